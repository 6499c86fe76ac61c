"""Runs one cell from its configuration to its records, from wherever an earlier process left it.

A run is a list of segments (`sovit.schedule.segments`), each one ``Trainer.fit`` from a checkpoint. The state on disk
is enough to go on: ``trunk.ckpt`` is where the trunk stands, ``last.ckpt`` the newest point of the segment in progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sovit import records, schedule
from sovit.config import ConfigError, RunConfig, compose, eval_steps, model_geometry, shape_of
from sovit.data.fractals import fingerprint
from sovit.data.stream import FewShotSet
from sovit.fewshot import fewshot_errors, summarise
from sovit.flops import forward_gflops, num_params
from sovit.lit.callbacks import LAST, TRUNK, Diverged, Ema, Evaluate, Log, Resume, Stopped
from sovit.lit.data import FractalData, fewshot_sets, world_of
from sovit.lit.loggers import finish, make_loggers
from sovit.lit.module import LOSSES, LitClassifier
from sovit.models.vit import build_vit, features
from sovit.optim import build_optimizer

# Exit codes of a cell.
OK, ERROR, DIVERGED, STOPPED, LOCKED = 0, 1, 3, 75, 76
EVAL_BATCH = 1024

# The segments of the run, which of them comes next, and the checkpoint inside it if it was begun.
Position = tuple[list[schedule.Segment], int, Path | None]

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notes on hardware and other products


def run_cell(overrides: Sequence[str]) -> int:
    """Run one cell given as Hydra overrides; the exit code says how it ended. Raises ConfigError."""
    return run(compose(overrides))


def run(cfg: RunConfig) -> int:
    """Run one cell to its end, or on from where it stood. Raises ConfigError if another cell's records are in its place."""
    directory = records.run_dir(cfg)
    try:
        with records.lock(directory):
            return _run_locked(cfg, directory)
    except records.Locked as error:
        print(error)
        return LOCKED


def _run_locked(cfg: RunConfig, directory: Path) -> int:
    found = records.read_run(directory)
    if found and found["config_hash"] != records.config_hash(cfg):
        raise ConfigError(
            f"{directory} holds a run of another configuration ({found['config_hash']}, not {records.config_hash(cfg)}); "
            f"choose another name or tag, or delete it."
        )
    if found and found["status"] == records.DONE:
        print(f"{directory.name} is done already.")
        return OK
    position = _position(cfg, directory)
    torch.set_num_threads(cfg.trainer.num_threads)
    started = time.monotonic()
    record = _new_record(cfg, directory, found)
    records.write_json(directory / records.RUN, record)

    loggers = make_loggers(cfg, directory)
    code, reason = ERROR, None
    try:
        with _stop_on_signals() as stop_requested:
            record |= _train(cfg, directory, position, loggers, stop_requested, started - record["wall_s"])
        code = OK
    except Stopped as error:
        code, reason = STOPPED, str(error)
    except SIGTERMException:  # Lightning looks for the signal too, between our look and the next step
        code, reason = STOPPED, "stopped by a signal"
    except Diverged as error:
        code, reason = DIVERGED, str(error)
    except Exception as error:  # a failed cell is a state of the sweep, not the end of it
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    status = {OK: records.DONE, DIVERGED: records.DIVERGED, STOPPED: records.RUNNING, ERROR: records.FAILED}[code]
    record |= {"status": status, "reason": reason, "wall_s": round(record["wall_s"] + time.monotonic() - started, 2)}
    records.write_json(directory / records.RUN, record)
    finish(loggers, code)  # after the record: uploading must not keep a run from being done
    if code == OK and not cfg.trainer.keep_checkpoint:
        for name in (LAST, TRUNK):
            (directory / name).unlink(missing_ok=True)
    print(f"{directory.name}: {status}{f' ({reason})' if reason else ''}")
    return code


def _new_record(cfg: RunConfig, directory: Path, found: dict[str, Any] | None) -> dict[str, Any]:
    shape = shape_of(cfg)
    return {
        "schema": records.SCHEMA,
        "run_id": directory.name,
        "sweep": cfg.name,
        "status": records.RUNNING,
        "reason": None,
        **shape.as_dict(),
        "seed": cfg.seed,
        "num_params": sum(num_params(shape, **model_geometry(cfg), pos_embed=cfg.model.pos_embed).values()),
        "forward_gflops": forward_gflops(shape, **model_geometry(cfg)),
        "config_hash": records.config_hash(cfg),
        "code_version": records.code_version(),
        "lock_sha256": records.lock_hash(),
        "data_fingerprint": fingerprint(world_of(cfg)),
        "torch_version": torch.__version__,
        "wall_s": max(found["wall_s"] if found else 0.0, (records.read_progress(directory) or {}).get("wall_s", 0.0)),
        "config": dataclasses.asdict(cfg),
    }


def _train(
    cfg: RunConfig,
    directory: Path,
    position: Position,
    loggers: list[Logger],
    stop_requested: Any,
    clock_zero: float,
) -> dict[str, Any]:
    """Train and evaluate every segment; returns what the run's record has to say about it.

    ``clock_zero``: the time at which the run would have started had no time passed between its processes.
    """
    plan, first, checkpoint = position
    evaluation = Evaluation(cfg, directory, loggers)
    total = schedule.steps_trained(plan)
    trained, seconds = 0, 0.0
    for index in range(first, len(plan)):
        segment = plan[index]
        trunk = directory / TRUNK
        begin = checkpoint if index == first and checkpoint else trunk if trunk.exists() else None
        done = schedule.steps_trained(plan[:index]) - segment.start  # so that done + global_step counts all steps
        before = time.monotonic()
        progress = {"done": done, "total": total, "clock_zero": clock_zero}
        trained += _fit(cfg, directory, segment, index, begin, progress, loggers, evaluation, stop_requested)
        seconds += time.monotonic() - before
    rate = trained * cfg.trainer.global_batch_size / seconds if seconds else None
    return {
        "baselines": evaluation.baselines(),
        "steps_trained": total,
        "images_per_s": round(rate, 1) if rate else None,
    }


def _position(cfg: RunConfig, directory: Path) -> Position:
    """Where to go on, from what lies in the directory; cuts the growing files back to it.

    Raises ConfigError if a checkpoint belongs to another configuration.
    """
    plan = schedule.segments(list(eval_steps(cfg)), cfg.eval.weights, cfg.schedule.cooldown)  # type: ignore[arg-type]
    found = []
    for name in (LAST, TRUNK):
        path = directory / name
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)["sovit"]
            if state["config_hash"] != records.config_hash(cfg):
                raise ConfigError(f"{path} belongs to another configuration; choose another name or tag, or delete it.")
            found.append((state["segment"], state["step"], path, state["lengths"]))
    if not found:
        records.cut_back(directory, {name: 0 for name in records.lengths(directory)})
        return plan, 0, None
    index, step, path, lengths = max(found)
    records.cut_back(directory, lengths)
    print(f"Going on from step {step} of segment {index + 1} of {len(plan)}.")
    return (plan, index + 1, None) if step == plan[index].stop else (plan, index, path)


def _fit(
    cfg: RunConfig,
    directory: Path,
    segment: schedule.Segment,
    index: int,
    checkpoint: Path | None,
    progress: dict[str, Any],
    loggers: list[Logger],
    evaluation: Evaluation,
    stop_requested: Any,
) -> int:
    """Train one segment from a checkpoint (None: from the random initialisation); returns the steps this took."""
    pl.seed_everything(cfg.seed, verbose=False)
    module = build_module(cfg, segment)
    ema = Ema(cfg.eval.ema_horizon) if cfg.eval.weights == "ema" else None
    callbacks = [
        *([ema] if ema else []),
        Log(
            directory,
            every=cfg.trainer.log_every_n_steps,
            batch_size=cfg.trainer.global_batch_size,
            **progress,
        ),
        Evaluate(segment, evaluation, ema, at_start=index == 0),
        Resume(
            directory,
            segment,
            index,
            config_hash=records.config_hash(cfg),
            every_s=cfg.trainer.checkpoint_every_s,
            stop_requested=stop_requested,
        ),
    ]
    before = torch.load(checkpoint, map_location="cpu", weights_only=True)["sovit"]["step"] if checkpoint else 0
    with warnings.catch_warnings():
        # The first two are meant: batches are rendered in this process, and a resume inside an epoch is exact here (the
        # position in the data is a function of the step). The third is between Lightning 2.6 and torch.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*You're resuming from a checkpoint that ended before the epoch ended.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        trainer = pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=1,
            precision=cfg.trainer.precision,  # type: ignore[arg-type]
            max_steps=segment.stop,
            max_epochs=-1,
            callbacks=callbacks,
            logger=loggers,
            default_root_dir=directory,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # not used: the Log callback decides
            use_distributed_sampler=False,
        )
        trainer.fit(module, FractalData(cfg, segment.stop), ckpt_path=checkpoint, weights_only=True)
    return trainer.global_step - before


def build_model(cfg: RunConfig) -> torch.nn.Module:
    """The model a configuration asks for, freshly initialised from torch's global generator."""
    return build_vit(
        shape_of(cfg),
        image_size=cfg.model.image_size,
        channels=cfg.model.channels,
        num_classes=cfg.data.num_classes,
        pool=cfg.model.pool,
        pos_embed=cfg.model.pos_embed,
        init=cfg.model.init,
        head_bias=cfg.model.head_bias,
        drop_path_rate=cfg.model.drop_path_rate,
    )


def build_module(cfg: RunConfig, segment: schedule.Segment) -> LitClassifier:
    """The LightningModule of a segment, with a fresh model."""
    optim = cfg.optim
    model = build_model(cfg)
    optimizer = build_optimizer(
        model,
        optim.name,  # type: ignore[arg-type]
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        head_weight_decay=optim.head_weight_decay,
        lr_rule=optim.lr_rule,  # type: ignore[arg-type]
        base_width=optim.base_width,
        base_depth=optim.base_depth,
        base_mlp_dim=optim.base_mlp_dim,
        beta1=optim.beta1,
        beta2=optim.beta2,
    )

    def lr_scale(step: int) -> float:
        return schedule.learning_rate_scale(
            step,
            kind=cfg.schedule.kind,  # type: ignore[arg-type]
            total_steps=segment.total_steps,
            warmup_steps=cfg.schedule.warmup_steps,
            timescale=cfg.schedule.timescale,
            cooldown_steps=segment.cooldown_steps,
        )

    return LitClassifier(
        model, loss=LOSSES[optim.loss], optimizer=optimizer, lr_scale=lr_scale, clip_norm=optim.clip_norm
    )


class Evaluation:
    """Few-shot evaluation of a model on every target; appends its rows to ``evals.jsonl`` and tells the loggers."""

    def __init__(self, cfg: RunConfig, directory: Path, loggers: list[Logger]) -> None:
        self.cfg, self.directory, self.loggers = cfg, directory, loggers
        self.durations = {0: "init", **eval_steps(cfg)}
        self.targets = fewshot_sets(cfg)
        shape = shape_of(cfg)
        self.gflops = forward_gflops(shape, **model_geometry(cfg))
        self.fields = {
            "schema": records.SCHEMA,
            "run_id": directory.name,
            "sweep": cfg.name,
            **shape.as_dict(),
            "image_size": cfg.model.image_size,
            "seed": cfg.seed,
        }

    def __call__(self, model: torch.nn.Module, step: int, weights: str) -> None:
        """Raises Diverged if the features are not finite."""
        examples = step * self.cfg.trainer.global_batch_size
        compute = examples * self.gflops
        rows: list[dict[str, Any]] = []
        metrics: dict[str, float] = {"t_gflops": compute, "examples_seen": examples}
        for target in self.targets:
            train, test = (extract(model, images) for images in (target.train_images, target.test_images))
            if not (train.isfinite().all() and test.isfinite().all()):
                raise Diverged(f"features are not finite at step {step}")
            found = self._errors(target, train, test)
            for row in found:
                rows.append(
                    {
                        **self.fields,
                        "step": step,
                        "examples_seen": examples,
                        "forward_gflops": self.gflops,
                        "t_gflops": compute,
                        "duration": self.durations[step],
                        "weights": weights,
                        "dataset": target.name,
                        **dataclasses.asdict(row),
                    }
                )
            for summary in summarise(found):
                metrics[f"eval/{target.name}_{summary.shots}shot/error"] = summary.error
        records.append_lines(self.directory / records.EVALS, rows)
        for logger in self.loggers[1:]:  # not the local file: the rows above are the local record
            logger.log_metrics(metrics, step)

    def baselines(self) -> dict[str, Any]:
        """What an error must beat: chance, and the same ridge regression on raw pixels, per data set and shots."""
        found = {}
        for target in self.targets:
            train, test = (images.flatten(1) for images in (target.train_images, target.test_images))
            pixels = {str(row.shots): row.error for row in summarise(self._errors(target, train, test))}
            found[target.name] = {"chance": 1 - 1 / target.num_classes, "pixels": pixels}
        return found

    def _errors(self, target: FewShotSet, train: torch.Tensor, test: torch.Tensor) -> list[Any]:
        return fewshot_errors(
            train,
            target.train_labels,
            test,
            target.test_labels,
            target.num_classes,
            shots=self.cfg.eval.shots,
            num_draws=self.cfg.eval.num_draws,
            l2=self.cfg.eval.l2_reg,  # type: ignore[arg-type]
        )


@torch.no_grad()
def extract(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pre-logits (N, width) of images (N, channels, size, size), in batches, as float32 on the CPU."""
    device = next(model.parameters()).device
    parts = [features(model, batch.to(device)).float().cpu() for batch in images.split(EVAL_BATCH)]  # type: ignore[arg-type]
    return torch.cat(parts)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Any]:
    """Yields a function that says whether SIGTERM or SIGINT has come; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
