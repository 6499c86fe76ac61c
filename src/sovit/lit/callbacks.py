"""What happens between the steps of a run: averaging weights, watching for divergence, logging, evaluation, resume points.

Order matters and is fixed in `sovit.lit.fit`: average, watch, log, evaluate, then save, so that a checkpoint taken
after an evaluation remembers the growing files with its rows in them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from sovit import records
from sovit.lit import checkpoints
from sovit.lit.loop import StepLoop
from sovit.lit.module import LitClassifier
from sovit.lit.peak import Peak
from sovit.lit.progress import Meter, tell
from sovit.lit.ranks import Ranks
from sovit.lit.sharded import alike, local, part_of
from sovit.schedule import Segment

WATCH_EVERY = 25  # steps
NOTE_EVERY_S = 1.0


class Diverged(RuntimeError):
    """Training has left the realm of numbers; the message says when."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Stopped(RuntimeError):
    """A signal asked the run to stop; its state is saved."""


class Ema(pl.Callback):
    """Exponential moving average of the weights over a window of ``horizon`` x the steps so far.

    After step n the average moves by 1 / (1 + horizon n) towards the weights, so early weights are forgotten at every
    scale of n and one trunk can be read at any duration. Costs one fused update a step. Every process averages the part
    of the weights that it holds.
    """

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon
        self._names: list[str] = []
        self._averages: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._whole: list[torch.Tensor] = []  # the parameters, of which the weights are this process's part
        self._loaded: dict[str, torch.Tensor] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.model
        assert isinstance(model, torch.nn.Module)
        self._names = [name for name, _ in model.named_parameters()]
        self._whole = list(model.parameters())
        self._weights = [local(p).detach() for p in self._whole]
        self._averages = [weight.clone() for weight in self._weights]
        if self._loaded is not None:
            self._fill(self._loaded)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 / (1 + self.horizon * trainer.global_step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights in here, and its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The averages by the parameters' names, sharded as these are."""
        return {
            name: alike(average, parameter)
            for name, average, parameter in zip(self._names, self._averages, self._whole, strict=True)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Averages that are whole, or sharded as the parameters are."""
        if self._averages:
            self._fill(state_dict)
        else:
            self._loaded = state_dict

    @torch.no_grad()
    def _fill(self, found: dict[str, torch.Tensor]) -> None:
        for name, average, parameter in zip(self._names, self._averages, self._whole, strict=True):
            average.copy_(part_of(found[name], parameter))
        self._loaded = None


class Watch(pl.Callback):
    """Ends a run that has diverged: every 25 steps, before every evaluation and at the end of a segment.

    These steps follow from the configuration alone, never from the clock or from what is logged, so a run that was
    stopped and resumed diverges at the same step as one that was not. Diverged is a loss, gradient or parameter that is
    not finite, or a loss of more than ``above`` times that of the run's first step. Half precision with a loss scale
    (``scaled``) meets infinite gradients as a matter of course and skips the step.
    """

    def __init__(self, segment: Segment, *, above: float | None, scaled: bool, ranks: Ranks) -> None:
        self.segment, self.above, self.scaled, self.ranks = segment, above, scaled, ranks
        self._first: torch.Tensor | float | None = None  # loss of the run's first step; a float costs a GPU a wait
        self._loss: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._loss = outputs["loss"]
        if self._first is None:
            self._first = self._loss
        if step % WATCH_EVERY == 0 or step in self.segment.evaluate_at or step == self.segment.stop:
            why = self.complaint(pl_module)
            if why:
                raise Diverged(f"{why} at step {step}", step)

    @torch.no_grad()
    def complaint(self, module: pl.LightningModule) -> str | None:
        """What speaks against the state after the last step, or None; the same in every process."""
        assert isinstance(module, LitClassifier) and self._loss is not None and self._first is not None
        weights = torch.stack(
            torch._foreach_norm([local(p) for p in module.trained if local(p).numel()], math.inf)
        ).amax()
        share = 1 / self.ranks.world
        first = torch.as_tensor(self._first, dtype=torch.float32, device=weights.device)
        found = [self._loss.float() * share, weights.float(), module.gradient_norm().float() * share, first * share]
        loss, largest, gradient, first_loss = self.ranks.total(torch.stack(found)).tolist()  # one wait for the GPU
        self._first = first_loss
        if not math.isfinite(loss):
            return f"training loss is {loss}"
        if not math.isfinite(gradient) and not self.scaled:
            return f"gradient norm is {gradient}"
        if not math.isfinite(largest):
            return "a parameter is not finite"
        if self.above is not None and loss > self.above * first_loss:
            return f"training loss is {loss:.4g}, above {self.above:g} times the {first_loss:.4g} of the first step,"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._first is None else {"first_loss": float(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first = state_dict.get("first_loss")


class Log(pl.Callback):
    """Training metrics every n steps, and how the run is going about once a second.

    ``done`` + the trainer's step counts the steps of all segments, ``total`` is where that ends; the run's wall time
    counts from ``clock_zero``, a monotonic time. ``peak``: of a device, for the utilisation. Waits for a GPU at the steps
    that are logged, once, and at no other.
    """

    def __init__(
        self,
        growing: records.GrowingFiles | None,
        *,
        every: int,
        batch_size: int,
        gflops: float,
        peak: Peak | None,
        done: int,
        total: int,
        clock_zero: float,
        ranks: Ranks,
    ) -> None:
        self.growing, self.every, self.ranks = growing, every, ranks
        self.done, self.total, self.clock_zero, self.peak = done, total, clock_zero, peak
        self._meter = functools.partial(
            Meter, batch_size=batch_size, gflops=gflops, devices=ranks.world, peak=self.peak
        )
        self._loss: float | None = None  # of the last row

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = (time.monotonic(), trainer.global_step)
        self._rows, self._notes = (self._meter(now=self._begun[0], step=self._begun[1]) for _ in range(2))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            assert isinstance(pl_module, LitClassifier)
            loss = self.ranks.total(outputs["loss"] / self.ranks.world)
            norm = pl_module.gradient_norm()  # which all processes may have to compute together
            if self.growing is not None:
                self._append(self.growing, trainer, pl_module, loss, norm)
        if self.growing is not None and time.monotonic() - self._notes.marked[0] > NOTE_EVERY_S:
            self._note(self.growing, trainer)

    def _append(
        self, growing: records.GrowingFiles, trainer: pl.Trainer, module: LitClassifier, *values: torch.Tensor
    ) -> None:
        step = trainer.global_step
        loss, norm = torch.stack([value.double() for value in values]).tolist()  # the one wait for the GPU
        metrics = {"train/loss": loss, "train/lr_scale": module.lr_scale(step - 1), "train/grad_norm": norm}
        # JSON has no word for a number that is none. What hangs on the clock has a file of its own, so that two runs of
        # one cell leave the same metrics.
        row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        growing.append(records.METRICS, [{"step": step, **row}])
        self._loss = row["train/loss"]
        now = time.monotonic()
        speeds = self._rows.read(now, step, _waited(trainer))
        if speeds:
            growing.check()
            about = {"step": self.done + step, "wall_s": round(now - self.clock_zero, 2)}
            records.append_lines(growing.directory / records.PERF, [about | speeds])
            metrics |= {f"perf/{key}": value for key, value in speeds.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _note(self, growing: records.GrowingFiles, trainer: pl.Trainer) -> None:
        now, step = time.monotonic(), trainer.global_step
        began, first = self._begun
        left_s = (now - began) / (step - first) * (self.total - self.done - step)
        note = {
            "step": self.done + step,
            "total_steps": self.total,
            **self._notes.read(now, step, _waited(trainer)),
            "peak": self.peak and self.peak.basis,
            "loss": self._loss,
            "left_s": round(left_s, 1),
            "wall_s": round(now - self.clock_zero, 2),
        }
        growing.check()
        records.write_json(growing.directory / records.PROGRESS, note)
        tell(note)


def _waited(trainer: pl.Trainer) -> float:
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, StepLoop)
    return loop.waited


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
            self._run(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.segment.evaluate_at:
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.model
        assert isinstance(model, torch.nn.Module)
        model.eval()
        with self.ema.in_place() if self.ema else nullcontext(), trainer.precision_plugin.forward_context():
            self.evaluate(model, trainer.global_step, self.weights)
        model.train()


class Resume(pl.Callback):
    """Resume points: after every evaluation, every so many seconds, at the end of the segment, and on a stop signal.

    A point carries the configuration's hash and the marks of the growing files. No generator: what is drawn at random is a
    function of the seed and the step (data, augmentation, stochastic depth).
    A state that `Watch` complains about is not saved, so the newest point is a good one whenever the run diverges. Of
    several processes one that is told to stop, or whose clock says that a point is due, is heeded by all a step later.
    """

    def __init__(
        self,
        growing: records.GrowingFiles | None,
        directory: Path,
        plan: Sequence[Segment],
        index: int,
        *,
        watch: Watch,
        config_hash: str,
        every_s: float,
        stop_requested: Callable[[], bool],
        ranks: Ranks,
    ) -> None:
        self.growing, self.directory, self.plan, self.index, self.watch = growing, directory, plan, index, watch
        self.config_hash, self.every_s, self.stop_requested, self.ranks = config_hash, every_s, stop_requested, ranks
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step, segment = trainer.global_step, self.plan[self.index]
        due = self.ranks.first and time.monotonic() - self._saved_at > self.every_s
        stop, due = self.ranks.agree(self.stop_requested(), due)
        if stop or due or step == segment.stop or step in segment.evaluate_at:
            if step == segment.stop:
                self.ranks.settle()
            if self.watch.complaint(pl_module) is None:
                self._save(trainer, checkpoints.ResumePoint(self.index, step))
        if stop:
            raise Stopped(f"stopped by a signal at step {step}")

    def _save(self, trainer: pl.Trainer, point: checkpoints.ResumePoint) -> None:
        if self.growing is not None:
            self.growing.sync()  # first: the point remembers them
        trainer.save_checkpoint(self.directory / point.name)
        if self.ranks.first:
            checkpoints.thin_out(self.directory, self.plan)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[checkpoints.KEY] = {
            "config_hash": self.config_hash,
            "marks": dict(self.growing.marks) if self.growing is not None else {},  # the first process writes it
        }
