"""How a run is going: its pace, what it waits for, how much of the machine it uses, and the bar that shows it.

Read off this process's clock and counters, so that no step waits for a GPU; of several processes the first one speaks for
all. Everything here hangs on the clock: it goes to ``progress.json``, ``perf.jsonl``, W&B and the terminal, never to
``metrics.jsonl``, which is a function of the configuration.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sovit.config import RunConfig
from sovit.derived import model_geometry, shape_of
from sovit.flops import train_gflops
from sovit.launch.tables import duration_text
from sovit.lit.peak import Peak

LINE_EVERY_S = 60.0


class Meter:
    """Rates since a mark: images/s, share of the peak, share of the time spent waiting for images, peak memory.

    ``batch_size`` images and ``gflops`` of all devices together make a step; ``peak`` is that of one of ``devices``.
    """

    def __init__(
        self, *, batch_size: int, gflops: float, devices: int = 1, peak: Peak | None = None, now: float, step: int
    ) -> None:
        self.batch_size, self.gflops, self.devices, self.peak = batch_size, gflops, devices, peak
        self._mark = (now, step, 0.0)

    @property
    def marked(self) -> tuple[float, int]:
        """Time and step of the mark."""
        return self._mark[:2]

    def read(self, now: float, step: int, waited: float) -> dict[str, float]:
        """The rates from the mark to ``now``, which becomes the mark; ``waited``: seconds spent waiting until now."""
        before, first, waited_before = self._mark
        self._mark = (now, step, waited)
        seconds = now - before
        if seconds <= 0 or step <= first:
            return {}
        steps_per_s = (step - first) / seconds
        found = {
            "images_per_s": round(steps_per_s * self.batch_size, 1),
            "data_wait": round(min(1.0, (waited - waited_before) / seconds), 4),
            "memory_bytes": memory_bytes(),
        }
        if self.peak is not None:
            found["utilisation"] = round(1e9 * self.gflops * steps_per_s / (self.devices * self.peak.flops), 4)
        return found


def memory_bytes() -> int:
    """The most that this process has held: tensors on its GPU if it has one, else all of its memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_gflops(cfg: RunConfig) -> float:
    """GFLOPs of an update over the global batch."""
    return train_gflops(shape_of(cfg), **model_geometry(cfg)) * cfg.trainer.global_batch_size


class Display(Protocol):
    """Where a person looks; ``note`` is the content of ``progress.json``."""

    def update(self, note: Mapping[str, Any]) -> None: ...


_displays: list[Display] = []


def tell(note: Mapping[str, Any]) -> None:
    """Show a note wherever this process shows its run."""
    for display in _displays:
        display.update(note)


@contextmanager
def shown(label: str, console: Console | None = None, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Runs in here are shown: by a bar on a terminal, elsewhere by a line a minute.

    Nothing is shown in a task of Slurm, under a W&B agent or where the environment says ``SOVIT_QUIET``: there the
    display of a sweep reads ``progress.json``.
    """
    quiet = any(environment.get(name) for name in ("SLURM_JOB_ID", "WANDB_SWEEP_ID", "SOVIT_QUIET"))
    if quiet or environment.get("RANK", "0") != "0":
        yield
        return
    console = console or Console(highlight=False)
    with ExitStack() as stack:
        display: Display = stack.enter_context(_bar(label, console)) if console.is_terminal else Lines(console)
        _displays.append(display)
        stack.callback(_displays.remove, display)
        yield


class Lines:
    """A line a minute, so that a log stays readable."""

    def __init__(self, console: Console, every_s: float = LINE_EVERY_S) -> None:
        self.console, self.every_s = console, every_s
        self._last = time.monotonic()

    def update(self, note: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last >= self.every_s:
            self._last = now
            share = note["step"] / note["total_steps"]
            left = f"{duration_text(note['left_s'])} left"
            said = f"step {note['step']:,} of {note['total_steps']:,} ({share:.0%}), {left}; {', '.join(told(note))}"
            self.console.print(f"{time.strftime('%H:%M:%S')}  {said}", soft_wrap=True)


def told(note: Mapping[str, Any]) -> list[str]:
    """What a note says, most important first."""
    said = [f"{note['images_per_s']:,.0f} images/s"]
    if note.get("utilisation") is not None:
        said.append(f"{note['utilisation']:.0%} of the {note['peak']} peak")
    if note.get("loss") is not None:
        said.append(f"loss {note['loss']:.3f}")
    said.append(f"{note['data_wait']:.0%} data wait")
    said.append(f"{note['memory_bytes'] / 1e9:.1f} GB")
    return said


class _Bar:
    """Two lines: how far the run is, and how it is doing."""

    def __init__(self, live: Live, label: str) -> None:
        self.live, self.label = live, label

    def update(self, note: Mapping[str, Any]) -> None:
        self.live.start()  # at the first note: a process that only starts others has none
        self.live.update(self.render(note), refresh=True)

    def render(self, note: Mapping[str, Any]) -> RenderableType:
        step, total = note["step"], note["total_steps"]
        line = Table.grid(padding=(0, 2))
        for _ in range(4):
            line.add_column(no_wrap=True)
        line.add_row(
            Text(self.label, style="cyan"),
            ProgressBar(total, step, width=16),
            f"{step:,} / {total:,}",
            f"{duration_text(note['left_s'])} left",
        )
        return Group(line, Text("  ".join(told(note)), style="dim", no_wrap=True, overflow="ellipsis"))


@contextmanager
def _bar(label: str, console: Console) -> Iterator[_Bar]:
    # Refreshed by the notes alone: a thread of rich's own would wake up in the middle of a step.
    live = Live(console=console, auto_refresh=False, transient=True)
    try:
        yield _Bar(live, label)
    finally:
        live.stop()
