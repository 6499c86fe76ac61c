"""What happens between the steps of a run: averaging weights, logging, few-shot evaluation, resume points.

Order matters and is fixed in `sovit.lit.engine`: average, log, evaluate, then save, so that a checkpoint taken after an
evaluation remembers the file lengths with its rows in them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from sovit import records
from sovit.lit.module import LitClassifier
from sovit.schedule import Segment


class Diverged(RuntimeError):
    """Training has left the realm of numbers; the message says when."""


class Stopped(RuntimeError):
    """A signal asked the run to stop; its state is saved."""


class Ema(pl.Callback):
    """Exponential moving average of the weights over a window of ``horizon`` x the steps so far.

    After step n the average moves by 1 / (1 + horizon n) towards the weights, so early weights are forgotten at every
    scale of n and one trunk can be read at any duration. Costs one fused update a step.
    """

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon
        self.model: torch.nn.Module | None = None
        self._pairs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._loaded: dict[str, torch.Tensor] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.model
        assert isinstance(model, torch.nn.Module)
        self.model = deepcopy(model).eval().requires_grad_(False)
        if self._loaded is not None:
            self.model.load_state_dict(self._loaded)
        self._pairs = (list(self.model.parameters()), [p.detach() for p in model.parameters()])

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        torch._foreach_lerp_(*self._pairs, 1 / (1 + self.horizon * trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.model is None else self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


class Log(pl.Callback):
    """Training metrics every n steps, progress about once a second, and an end to runs that diverge.

    ``done`` + the trainer's step counts the steps of all segments, ``total`` is where that ends; the run's wall time
    counts from ``clock_zero``.
    """

    def __init__(
        self, directory: Path, *, every: int, batch_size: int, done: int, total: int, clock_zero: float
    ) -> None:
        self.directory, self.every, self.batch_size = directory, every, batch_size
        self.done, self.total, self.clock_zero = done, total, clock_zero
        self._mark = (0.0, 0)  # time and step of the last progress note

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitClassifier)
        step, now = trainer.global_step, time.monotonic()
        if step % self.every == 0 or step == trainer.max_steps:
            loss = float(outputs["loss"])
            if not math.isfinite(loss):
                raise Diverged(f"training loss is {loss} at step {step}")
            metrics = {"train/loss": loss, "train/lr_scale": pl_module.lr_scale(step - 1)}
            if pl_module.grad_norm is not None:
                metrics["train/grad_norm"] = float(pl_module.grad_norm)
            if now > self._mark[0] and step > self._mark[1]:
                metrics["perf/images_per_s"] = self._rate(now, step)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)
        if now - self._mark[0] > 1.0:
            progress = {
                "step": self.done + step,
                "total_steps": self.total,
                "images_per_s": self._rate(now, step),
                "wall_s": round(now - self.clock_zero, 2),
            }
            records.write_json(self.directory / records.PROGRESS, progress)
            self._mark = (now, step)

    def _rate(self, now: float, step: int) -> float:
        return round((step - self._mark[1]) * self.batch_size / (now - self._mark[0]), 1)


class Evaluate(pl.Callback):
    """Calls ``evaluate(model, step, weights)`` at the segment's steps, and once at the random initialisation if asked."""

    def __init__(
        self,
        segment: Segment,
        evaluate: Callable[[torch.nn.Module, int, str], None],
        ema: Ema | None,
        *,
        at_start: bool,
    ) -> None:
        self.segment, self.evaluate, self.ema, self.at_start = segment, evaluate, ema, at_start
        self.weights = "cooled" if segment.kind == "branch" else "ema" if ema else "trunk"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_start and trainer.global_step == 0:
            self._run(pl_module, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.segment.evaluate_at:
            self._run(pl_module, trainer.global_step)

    def _run(self, pl_module: pl.LightningModule, step: int) -> None:
        model = self.ema.model if self.ema else pl_module.model
        assert isinstance(model, torch.nn.Module)
        model.eval()
        self.evaluate(model, step, self.weights)
        assert isinstance(pl_module.model, torch.nn.Module)
        pl_module.model.train()


class Resume(pl.Callback):
    """Resume points: after every evaluation, every so many seconds, at the end of the segment, and on a stop signal.

    A checkpoint is written beside its place and moved there in one step. It carries the segment, the configuration's
    hash, the lengths of the growing files and the state of torch's random generator.
    """

    def __init__(
        self,
        directory: Path,
        segment: Segment,
        index: int,
        *,
        config_hash: str,
        every_s: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.directory, self.segment, self.index, self.config_hash = directory, segment, index, config_hash
        self.every_s, self.stop_requested = every_s, stop_requested
        self._saved_at = time.monotonic()
        self._rng: torch.Tensor | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        if self._rng is not None:  # only now: starting a DataLoader draws from the generator too
            torch.set_rng_state(self._rng)
            self._rng = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        stop = self.stop_requested()
        if step == self.segment.stop:
            self._save(trainer, TRUNK if self.segment.kind == "trunk" else LAST)
        elif stop or step in self.segment.evaluate_at or time.monotonic() - self._saved_at > self.every_s:
            self._save(trainer, LAST)
        if stop:
            raise Stopped(f"stopped by a signal at step {step}")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        scratch = self.directory / f".{name}.tmp"
        trainer.save_checkpoint(scratch)
        os.replace(scratch, self.directory / name)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["sovit"] = {
            "config_hash": self.config_hash,
            "segment": self.index,
            "step": trainer.global_step,
            "lengths": records.lengths(self.directory),
            "rng": torch.get_rng_state(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._rng = checkpoint["sovit"]["rng"]


LAST, TRUNK = "last.ckpt", "trunk.ckpt"
