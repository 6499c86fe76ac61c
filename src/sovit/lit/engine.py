"""Runs one cell from its configuration to its records, from wherever an earlier process left it.

A run is a list of segments (`sovit.schedule.segments`), each one ``Trainer.fit`` from a checkpoint. The state on disk
is enough to go on (`sovit.lit.checkpoints`), whichever moment a process was killed at. Nothing is written without
asking whether the run is still this process's own (`sovit.claims`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sovit import claims, records, schedule
from sovit.config import ConfigError, RunConfig, compose, eval_steps, model_geometry, shape_of
from sovit.data.fractals import fingerprint
from sovit.flops import forward_gflops, num_params
from sovit.launch.pay.hardware import hardware
from sovit.lit import checkpoints
from sovit.lit.callbacks import Diverged, Ema, Evaluate, Log, Resume, Stopped, Watch
from sovit.lit.data import FractalData, world_of
from sovit.lit.evaluation import Evaluation
from sovit.lit.loggers import finish, make_loggers
from sovit.lit.module import LOSSES, LitClassifier
from sovit.models.vit import build_vit
from sovit.optim import build_optimizer

# Exit codes of a cell.
OK, ERROR, DIVERGED, STOPPED, LOCKED = 0, 1, 3, 75, 76

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notes on hardware and other products


def run_cell(overrides: Sequence[str]) -> int:
    """Run one cell given as Hydra overrides; the exit code says how it ended. Raises ConfigError."""
    return run(compose(overrides))


def run(cfg: RunConfig) -> int:
    """Run one cell to its end, or on from where it stood; the exit code says how it ended.

    Raises ConfigError if another cell's records are in its place, or its record cannot be read.
    """
    directory = records.run_dir(cfg)
    try:
        with claims.hold(directory, say=_say) as claim:
            return _run_held(cfg, directory, claim)
    except (claims.Held, claims.Lost) as error:
        _say(str(error))
        return LOCKED
    except OSError as error:
        code, reason = _obstacle(error) or _raise(error)
        _say(f"{directory.name}: {reason}")
        return code


def _run_held(cfg: RunConfig, directory: Path, claim: claims.Claim) -> int:
    found = _found(cfg, directory)
    if found.get("status") == records.DONE:
        broken = records.broken_seal(directory, found)
        if broken is None:
            checkpoints.delete(directory, keep_newest=cfg.trainer.keep_checkpoint)  # if a kill came after the done mark
            print(f"{directory.name} is done already.")
            return OK
        print(f"{directory.name} was done, but {broken}; it is trained again.")
    claim.check()
    plan = schedule.segments(list(eval_steps(cfg)), cfg.eval.weights, cfg.schedule.cooldown)  # type: ignore[arg-type]
    point, state = checkpoints.begin(directory, plan, records.config_hash(cfg))
    growing = records.GrowingFiles(directory, state.get("marks"), claim.check)
    if point is not None:
        print(f"Going on from step {point.step} of segment {point.segment + 1} of {len(plan)}.")
    torch.set_num_threads(cfg.trainer.num_threads)
    started = time.monotonic()
    record = _new_record(cfg, directory, found)
    claim.check()
    records.write_json(directory / records.RUN, record, durable=True)

    loggers = make_loggers(
        cfg, directory
    )  # metrics.jsonl is written by the Log callback, which knows where its rows end
    work = _Work(cfg, plan, growing, loggers, started - record["wall_s"])
    code, reason = ERROR, None
    try:
        with _stop_on_signals() as stop_requested:
            record |= _train(work, point, stop_requested)
        code = OK
    except Stopped as error:
        code, reason = STOPPED, str(error)
    except SIGTERMException:  # Lightning looks for the signal too, between our look and the next step
        code, reason = STOPPED, "stopped by a signal"
    except Diverged as error:
        code, reason = DIVERGED, str(error)
        record["diverged_step"] = error.step
    except checkpoints.Unusable as error:  # since this process began; the next one goes back further
        code, reason = STOPPED, f"a resume point is unusable: {error}"
    except claims.Lost:
        finish(loggers, LOCKED)
        raise
    except Exception as error:  # a failed cell is a state of the sweep, not the end of it
        found_obstacle = _obstacle(error)
        if found_obstacle is None:
            _say(traceback.format_exc().rstrip(), sys.stderr)
        code, reason = found_obstacle or (ERROR, f"{type(error).__name__}: {error}".splitlines()[0])
    status = {OK: records.DONE, DIVERGED: records.DIVERGED, STOPPED: records.RUNNING, ERROR: records.FAILED}[code]
    record |= {"status": status, "reason": reason, "wall_s": round(record["wall_s"] + time.monotonic() - started, 2)}
    try:
        claim.check()
        records.write_json(directory / records.RUN, record, durable=True)
    except OSError as error:  # the record stays as it was: the run is not over
        code, reason = _obstacle(error) or _raise(error)
        status = records.RUNNING
    finish(loggers, code)  # after the record: uploading must not keep a run from being done
    if code == OK:
        checkpoints.delete(directory, keep_newest=cfg.trainer.keep_checkpoint)
    _say(f"{directory.name}: {status}{f' ({reason})' if reason else ''}")
    return code


def _found(cfg: RunConfig, directory: Path) -> dict[str, Any]:
    """The record of what earlier processes have done, or {}. Raises ConfigError if it is another run's."""
    try:
        found = records.read_run(directory) or {}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    ours = records.config_hash(cfg)
    if found and found.get("config_hash") != ours:
        raise ConfigError(
            f"{directory} holds a run of another configuration ({found.get('config_hash')}, not {ours}); "
            f"choose another name or tag, or delete it."
        )
    return found


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def _obstacle(error: Exception) -> tuple[int, str] | None:
    """(exit code, what to do) if it is the disk that stands in the way, not the program; else None."""
    if not isinstance(error, OSError):
        return None
    name = error.filename or "its log"
    if error.errno in NO_SPACE:
        return STOPPED, f"{name} could not be written ({error.strerror}): free some space; the same command goes on."
    if error.errno in NO_ACCESS:
        return ERROR, f"{name} cannot be written ({error.strerror}): make it writable, or give another runs_dir."
    return None


def _raise(error: Exception) -> Any:
    raise error


def _say(text: str, file: Any = None) -> None:
    """Print even where the log lies on a full disk: then nowhere, now and at the end of the process."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        os.close(nowhere)


def _new_record(cfg: RunConfig, directory: Path, found: dict[str, Any]) -> dict[str, Any]:
    shape = shape_of(cfg)
    noted = (found.get("wall_s"), (records.read_progress(directory) or {}).get("wall_s"))
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
        "machine": _machine(cfg),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "wall_s": max([0.0, *(seconds for seconds in noted if isinstance(seconds, int | float))]),
        "config": dataclasses.asdict(cfg),
    }


# What decides, beside the configuration, in which order or precision a machine adds: kept to explain two runs that differ.
ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "KMP_AFFINITY",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def _machine(cfg: RunConfig) -> dict[str, Any]:
    """The processor and the versions that a number can depend on in its last digits."""
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return {
        **hardware("gpu" if gpu else "cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "lightning": pl.__version__,
    }


class _Work(NamedTuple):
    """What the segments of a run share. The run would have begun at ``clock_zero`` had its processes left no gaps."""

    cfg: RunConfig
    plan: list[schedule.Segment]
    growing: records.GrowingFiles
    loggers: list[Logger]
    clock_zero: float


def _train(work: _Work, point: checkpoints.ResumePoint | None, stop_requested: Callable[[], bool]) -> dict[str, Any]:
    """Train and evaluate every segment from a resume point on; returns what the run's record has to say about it."""
    cfg, plan, directory = work.cfg, work.plan, work.growing.directory
    evaluation = Evaluation(cfg, work.growing, work.loggers)
    first = 0 if point is None else point.segment
    if point is not None and point.step == plan[first].stop:
        first, point = first + 1, None
    trained, seconds = 0, 0.0
    for index in range(first, len(plan)):
        begin = point if index == first and point else checkpoints.origin(plan, index)
        before = time.monotonic()
        trained += _fit(work, index, begin, evaluation, stop_requested)
        seconds += time.monotonic() - before
    work.growing.sync()
    foreign = work.growing.foreign()
    if foreign:
        raise checkpoints.Unusable(f"{foreign}; the same command repeats what is wrong")
    rate = trained * cfg.trainer.global_batch_size / seconds if seconds else None
    return {
        "baselines": evaluation.baselines(),
        "steps_trained": schedule.steps_trained(plan),
        "images_per_s": round(rate, 1) if rate else (records.read_progress(directory) or {}).get("images_per_s"),
        **records.seal(directory),
    }


def _fit(
    work: _Work,
    index: int,
    begin: checkpoints.ResumePoint | None,
    evaluation: Evaluation,
    stop_requested: Callable[[], bool],
) -> int:
    """Train one segment from a resume point (None: the random initialisation); returns the steps this took."""
    cfg, growing, segment = work.cfg, work.growing, work.plan[index]
    pl.seed_everything(cfg.seed, verbose=False)
    module = build_module(cfg, segment)
    ema = Ema(cfg.eval.ema_horizon) if cfg.eval.weights == "ema" else None
    watch = Watch(segment, above=cfg.optim.diverged_above, scaled=cfg.trainer.precision == "16-mixed")
    callbacks = [
        *([ema] if ema else []),
        watch,
        Log(
            growing,
            every=cfg.trainer.log_every_n_steps,
            batch_size=cfg.trainer.global_batch_size,
            done=schedule.steps_trained(work.plan[:index]) - segment.start,  # done + global_step counts all steps
            total=schedule.steps_trained(work.plan),
            clock_zero=work.clock_zero,
        ),
        Evaluate(segment, evaluation, ema, at_start=index == 0),
        Resume(
            growing,
            work.plan,
            index,
            watch=watch,
            config_hash=records.config_hash(cfg),
            every_s=cfg.trainer.checkpoint_every_s,
            stop_requested=stop_requested,
        ),
    ]
    with warnings.catch_warnings():
        # The first two are meant: batches are rendered in this process, and a resume inside an epoch is exact here (the
        # position in the data is a function of the step). The third is between Lightning 2.6 and torch.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*You're resuming from a checkpoint that ended before the epoch ended.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # a machine with Slurm, not used here
        trainer = pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=1,
            precision=cfg.trainer.precision,  # type: ignore[arg-type]
            max_steps=segment.stop,
            max_epochs=-1,
            callbacks=callbacks,
            logger=work.loggers or False,
            # One process a cell: a Slurm that Lightning detects would be asked for ranks, and requeued behind our back.
            plugins=[checkpoints.CheckpointFiles(growing.check), LightningEnvironment()],
            default_root_dir=growing.directory,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # not used: the Log callback decides
            use_distributed_sampler=False,
        )
        path = growing.directory / begin.name if begin else None
        trainer.fit(module, FractalData(cfg, segment.stop), ckpt_path=path, weights_only=True)
    return trainer.global_step - (begin.step if begin else 0)


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
