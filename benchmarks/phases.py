"""Where the time of a run goes: exclusive seconds by phase, read at the borders of the functions that do the work."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

from sovit import records
from sovit.lit import callbacks, engine, fit
from sovit.lit.evaluation import Evaluation
from sovit.lit.loop import StepLoop
from sovit.lit.module import LitClassifier
from sovit.schedule import segments, steps_trained


@dataclass
class Phases:
    """Exclusive seconds of every phase, while ``on``."""

    clock: Callable[[], float]
    wait: Callable[[], None]
    on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _stack: list[str] = field(default_factory=list)
    _mark: float = 0.0

    def turn(self, name: str | None) -> None:
        """Enter a phase, or leave the innermost one."""
        if not self.on:
            return
        self.wait()
        now = self.clock()
        self.seconds[self._stack[-1] if self._stack else "rest"] += now - self._mark
        self._mark = now
        if name is None:
            self._stack.pop()
        else:
            self._stack.append(name)

    def begin(self) -> None:
        self.on, self._stack, self._mark = True, [], self.clock()

    def end(self) -> None:
        while self._stack:
            self.turn(None)
        self.seconds["rest"] += self.clock() - self._mark
        self.on = False

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            depth = len(self._stack)
            self.turn(name)
            try:
                return function(*args, **kwargs)
            finally:
                while len(self._stack) > depth:  # fewer if a turn ended in here
                    self.turn(None)

        return timed


PARTS: list[tuple[Any, str, str]] = [
    (_BaseDataLoaderIter, "__next__", "data"),
    (fit.TrainData, "on_after_batch_transfer", "data"),
    (LitClassifier, "loss_of", "forward"),
    (Tensor, "backward", "backward"),
    (LitClassifier, "update", "glue"),
    (LightningOptimizer, "step", "rest"),
    (Precision, "_wrap_closure", "rest"),  # nested in AdamW.step
    (torch.optim.Optimizer, "zero_grad", "optimiser"),
    (torch.optim.AdamW, "step", "optimiser"),
    (LitClassifier, "on_before_optimizer_step", "optimiser"),
    (callbacks.Ema, "on_train_batch_end", "average"),
    (callbacks.Watch, "on_train_batch_end", "records"),
    (callbacks.Log, "on_train_batch_end", "records"),
    (callbacks.Evaluate, "on_train_batch_end", "records"),
    (callbacks.Resume, "on_train_batch_start", "records"),
    (callbacks.Resume, "on_train_batch_end", "records"),
]


@contextlib.contextmanager
def taken_apart(phases: Phases) -> Iterator[None]:
    """The phases of a run are noted in here."""
    with contextlib.ExitStack() as stack:
        for owner, name, phase in PARTS:
            stack.enter_context(patch.object(owner, name, phases.around(phase, getattr(owner, name))))
        yield


CELL_PARTS: list[tuple[Any, str, str]] = [
    (engine, "fit", "segments"),  # what is left of it: a trainer is made, a resume point read
    (StepLoop, "advance", "rest"),
    (Evaluation, "__init__", "evaluation"),
    (Evaluation, "__call__", "evaluation"),
    (Evaluation, "baselines", "baselines"),
    (callbacks.Ema, "_exchange", "evaluation"),
    (callbacks.Resume, "_save", "resume points"),
]


def measure_cell(overrides: list[str], clock: Callable[[], float]) -> dict[str, Any]:
    """Where the time of a whole cell goes, from its configuration to its sealed record."""
    from sovit.config import compose

    phases = Phases(clock, nothing)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        cfg = compose(["experiment=star_tiny", "logger=none", f"runs_dir={scratch}", *overrides])
        for owner, name, phase in [*PARTS, *CELL_PARTS]:
            stack.enter_context(patch.object(owner, name, phases.around(phase, getattr(owner, name))))
        phases.begin()
        code = phases.around("set-up", engine.run)(cfg)
        phases.end()
        if code:
            raise SystemExit(f"The cell ended with exit code {code}.")
        steps = (records.read_run(records.run_dir(cfg)) or {})["steps_trained"]
    whole = sum(phases.seconds.values())
    return {
        "overrides": overrides,
        "seconds": whole,
        "steps": steps,
        "shares": {
            name: seconds / whole for name, seconds in sorted(phases.seconds.items(), key=lambda item: -item[1])
        },
    }


OVERHEAD = ("evaluation", "baselines", "resume points", "segments", "average")
SHORT = (40, 80)  # updates after which a short cell is evaluated


def measure_star(shapes: Sequence[str], weights: str, clock: Callable[[], float]) -> dict[str, Any]:
    """Where the time of a whole star goes, from short cells: what an update, an evaluation and a segment take, times how
    many the star has.
    """
    from sovit.config import compose
    from sovit.derived import eval_steps

    measure_cell([f"durations.values=[{SHORT[0]} steps]"], clock)  # what only a first cell does
    star: dict[str, float] = defaultdict(float)
    cells = {}
    for shape in shapes:
        recipe = [f"shape={shape}", f"eval.weights={weights}", "schedule.cooldown=0.25"]
        short = measure_cell([*recipe, f"durations.values=[{SHORT[0]} steps,{SHORT[1]} steps]"], clock)
        cfg = compose(["experiment=star_tiny", "logger=none", *recipe])
        plans = [
            segments(list(steps), weights, 0.25)  # type: ignore[arg-type]
            for steps in (SHORT, eval_steps(cfg))
        ]
        times = {
            "evaluation": [1 + len(SHORT), 1 + len(cfg.durations.values or [])],
            "baselines": [1, 1],
            "set-up": [1, 1],
            "segments": [len(plan) for plan in plans],
            "resume points": [1 + len(SHORT), 1 + len(cfg.durations.values or [])]
            if weights == "ema"
            else [len(plan) for plan in plans],
        }
        steps = [steps_trained(plan) for plan in plans]
        whole: dict[str, float] = {}
        for name, share in short["shares"].items():
            few, many = times.get(name, steps)
            whole[name] = share * short["seconds"] * many / few
        seconds = sum(whole.values())
        cells[shape] = {"seconds": seconds, "share": sum(whole.get(name, 0.0) for name in OVERHEAD) / seconds}
        for name, value in whole.items():
            star[name] += value
    total = sum(star.values())
    return {
        "weights": weights,
        "seconds": total,
        "shares": {name: value / total for name, value in sorted(star.items(), key=lambda item: -item[1])},
        "evaluation_and_bookkeeping": sum(star[name] for name in OVERHEAD) / total,
        "cells": cells,
    }


def nothing() -> None:
    """A CPU is never behind."""
