"""The smallest real cells, for the tests of what happens to one: a second of training, evaluated at three durations."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sovit import records
from sovit.config import RunConfig, compose

SMALL = {
    "shape": "16x1x16",
    "logger": "none",
    "data.num_classes": "8",
    "data.num_heldout": "4",
    "durations.values": "[8 steps,16 steps,24 steps]",
    "durations.first": "null",
    "durations.last": "null",
    "durations.num": "null",
    "schedule.warmup_steps": "4",
    "schedule.cooldown": "0.25",
    "eval.shots": "[1,5]",
    "trainer.global_batch_size": "16",
    "trainer.log_every_n_steps": "4",
}


def overrides(runs_dir: Path, *given: str) -> list[str]:
    """The overrides of a small run; those given replace what is small."""
    merged = SMALL | {"runs_dir": str(runs_dir)} | dict(text.split("=", 1) for text in given)
    return [f"{key}={value}" for key, value in merged.items()]


def small(runs_dir: Path, *given: str) -> RunConfig:
    return compose(overrides(runs_dir, *given))


def content(cfg: RunConfig) -> list[bytes]:
    """The growing files of a run."""
    return [(records.run_dir(cfg) / name).read_bytes() for name in records.GROWING]


def pretend_stop(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a stop signal arrive during the n-th step of this process, until the patch is undone."""
    from sovit.lit import engine

    calls = iter(range(1, 10**6))

    @contextlib.contextmanager
    def signals() -> Iterator[Any]:
        yield lambda: next(calls) >= step

    patch.setattr(engine, "_stop_on_signals", signals)


@contextlib.contextmanager
def stop_at(step: int) -> Iterator[None]:
    """As `pretend_stop`, for the length of a block."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_stop(patch, step)
        yield


def in_child(prepare: Callable[[], None], given: list[str], log: str) -> None:
    """Run a cell as the process of a sweep does, its output in a file. To be the target of a process."""
    from sovit.lit import engine

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    prepare()
    sys.exit(engine.run_cell(given))
