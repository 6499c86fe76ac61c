"""Runs one cell from its configuration to its records, from wherever an earlier process left it.

A run is a list of segments (`sovit.schedule.segments`), each one ``Trainer.fit`` from a checkpoint. The state on disk
is enough to go on (`sovit.lit.checkpoints`), whichever moment a process was killed at. Nothing is written without
asking whether the run is still this process's own (`sovit.claims`). Of several processes (`sovit.lit.ranks`) the first
one holds the claim and writes; all train.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sovit import claims, records, schedule
from sovit.config import ConfigError, RunConfig, compose
from sovit.data.images import Unreadable
from sovit.derived import eval_steps
from sovit.launch import processes
from sovit.lit import checkpoints, layout, sharded
from sovit.lit.callbacks import Diverged, Stopped
from sovit.lit.data import data_fingerprint
from sovit.lit.evaluation import Evaluation
from sovit.lit.fit import Work, beside_of, fit
from sovit.lit.locked import Locked
from sovit.lit.loggers import finish, make_loggers
from sovit.lit.ranks import PortTaken, Ranks, joined
from sovit.lit.record import new_record
from sovit.lit.teacher import Teacher
from sovit.lit.text_evaluation import TextEvaluation

BASELINES = ".baselines.json"  # of a sweep

# Exit codes of a cell.
OK, ERROR, DIVERGED, STOPPED, LOCKED, OUT_OF_MEMORY, PORT_TAKEN = 0, 1, 3, 75, 76, 77, 78

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notes on hardware and other products


def run_cell(overrides: Sequence[str]) -> int:
    """Run one cell given as Hydra overrides; the exit code says how it ended. Raises ConfigError."""
    return run(compose(overrides), overrides)


def run(cfg: RunConfig, arguments: Sequence[str] = ()) -> int:
    """Run one cell to its end, or on from where it stood; the exit code says how it ended.

    ``arguments`` are those of sovit.train that describe it: what its processes are started with, if it has several.
    Raises ConfigError if another cell's records are in its place, or its record cannot be read.
    """
    if cfg.trainer.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ConfigError(
            "trainer.accelerator=gpu, but no GPU is visible here; write trainer=cpu, or start it where one is."
        )
    devices = processes.wanted(cfg)
    if devices:
        return processes.start(arguments, devices=devices)
    here = processes.place()
    cfg = replace(cfg, parallel=processes.settled(cfg, here))
    if here is not None and here.world > 1:
        processes.rendezvous(here)
    try:
        with joined(here) as ranks:
            while (code := _run_joined(cfg, ranks)) == OUT_OF_MEMORY and ranks.world == 1:
                gc.collect()
                torch.cuda.empty_cache()
            return code
    except PortTaken as error:
        _say(str(error))
        return PORT_TAKEN


def _run_joined(cfg: RunConfig, ranks: Ranks) -> int:
    directory = records.run_dir(cfg)
    say = _say if ranks.first else _silent
    try:
        with contextlib.ExitStack() as stack:
            return _run_held(cfg, directory, ranks, stack, say)
    except (claims.Held, claims.Lost) as error:
        say(str(error))
        return LOCKED
    except OSError as error:
        code, reason = _obstacle(error) or _raise(error)
        say(f"{directory.name}: {reason}")
        return code


class _Beginning(NamedTuple):
    """Where the run stands: ``over`` if nothing is left to do, else the resume point, if there is one, and the layout."""

    over: bool
    point: checkpoints.ResumePoint | None = None
    layout: layout.Layout | None = None


@dataclass
class _Own:
    """What the first process alone has."""

    claim: claims.Claim
    growing: records.GrowingFiles
    record: dict[str, Any]
    loggers: list[Logger]
    beside: Teacher | Locked | None


def _run_held(
    cfg: RunConfig, directory: Path, ranks: Ranks, stack: contextlib.ExitStack, say: Callable[..., None]
) -> int:
    plan = schedule.segments(list(eval_steps(cfg)), cfg.eval.weights, cfg.schedule.cooldown)  # type: ignore[arg-type]
    own: list[_Own] = []
    begun = ranks.tell(lambda: _begin(cfg, directory, ranks, plan, stack, own))
    if begun.over:
        return OK
    assert begun.layout is not None
    first = own[0] if own else None
    started = time.monotonic()
    torch.set_num_threads(cfg.trainer.num_threads)
    work = Work(
        cfg=cfg,
        plan=plan,
        directory=directory,
        growing=first.growing if first else None,
        loggers=first.loggers if first else [],
        clock_zero=started - (first.record["wall_s"] if first else 0.0),
        ranks=ranks,
        layout=begun.layout,
        check=first.claim.check if first else _nothing,
        beside=first.beside if first else beside_of(cfg),
    )
    found: dict[str, Any] = {}
    code, reason = ERROR, None
    try:
        with _stop_on_signals() as stop_requested:
            found = _train(work, begun.point, stop_requested)
        code = OK
    except Stopped as error:
        code, reason = STOPPED, str(error)
    except SIGTERMException:  # Lightning looks for the signal too, between our look and the next step
        code, reason = STOPPED, "stopped by a signal"
    except Diverged as error:
        code, reason = DIVERGED, str(error)
        found["diverged_step"] = error.step
    except (checkpoints.Unusable, sharded.Damaged) as error:  # since this process began; the next one goes back further
        code, reason = STOPPED, f"a resume point is unusable: {error}"
    except Unreadable as error:  # a disk that went away
        code, reason = STOPPED, str(error)
    except torch.OutOfMemoryError:
        code, reason = _smaller(work)
    except claims.Lost:
        finish(work.loggers, LOCKED)
        raise
    except Exception as error:  # a failed cell is a state of the sweep, not the end of it
        found_obstacle = _obstacle(error)
        if found_obstacle is None:
            _say(traceback.format_exc().rstrip(), sys.stderr)
        code, reason = found_obstacle or (ERROR, f"{type(error).__name__}: {error}".splitlines()[0])
    return _conclude(work, first, code, reason, found, time.monotonic() - started) if first else code


def _begin(
    cfg: RunConfig,
    directory: Path,
    ranks: Ranks,
    plan: Sequence[schedule.Segment],
    stack: contextlib.ExitStack,
    own: list[_Own],
) -> _Beginning:
    """Take hold of the run and find where it stands: what the first process does before all train."""
    claim = stack.enter_context(claims.hold(directory, say=_say))
    before = _found(cfg, directory)
    if before.get("status") == records.DONE:
        broken = records.broken_seal(directory, before)
        if broken is None:
            checkpoints.delete(directory, keep_newest=cfg.trainer.keep_checkpoint)  # if a kill came after the done mark
            print(f"{directory.name} is done already.")
            return _Beginning(over=True)
        print(f"{directory.name} was done, but {broken}; it is trained again.")
    known = before.get("data_fingerprint")
    if known and known != data_fingerprint(cfg):
        raise ConfigError(
            f"the images have changed since {directory.name} began; put them back, or choose another name or tag."
        )
    beside = beside_of(cfg)
    if beside is not None:
        beside.check(before, directory.name)
    claim.check()
    point, state = checkpoints.begin(directory, plan, records.config_hash(cfg))
    growing = records.GrowingFiles(directory, state.get("marks"), claim.check)
    if point is not None:
        print(f"Going on from step {point.step} of segment {point.segment + 1} of {len(plan)}.")
    chosen = layout.choose(cfg, directory, ranks)
    record = new_record(cfg, directory, before, beside) | {"layout": {"processes": ranks.world, **asdict(chosen)}}
    claim.check()
    records.write_json(directory / records.RUN, record, durable=True)
    # metrics.jsonl is written by the Log callback, which knows where its rows end
    own.append(_Own(claim, growing, record, make_loggers(cfg, directory), beside))
    return _Beginning(over=False, point=point, layout=chosen)


def _smaller(work: Work) -> tuple[int, str]:
    """(exit code, reason) after a device had too little memory: the next start takes a smaller micro-batch."""
    micro = work.layout.micro_batch
    try:
        smaller = layout.shrink(work.directory, work.layout, work.ranks.world)
    except ValueError:
        return ERROR, (
            "out of device memory with one image at a time: spread the model over more devices (parallel=fsdp), or write "
            "parallel.checkpointing=full"
        )
    return OUT_OF_MEMORY, f"out of device memory with a micro-batch of {micro}; going on with {smaller}"


def _conclude(work: Work, own: _Own, code: int, reason: str | None, found: dict[str, Any], seconds: float) -> int:
    """Write how the run ended, and close what is open; returns the exit code."""
    cfg, directory, record = work.cfg, work.directory, own.record
    status = {OK: records.DONE, DIVERGED: records.DIVERGED, ERROR: records.FAILED}.get(code, records.RUNNING)
    record |= {**found, "status": status, "reason": reason, "wall_s": round(record["wall_s"] + seconds, 2)}
    try:
        own.claim.check()
        records.write_json(directory / records.RUN, record, durable=True)
    except OSError as error:  # the record stays as it was: the run is not over
        code, reason = _obstacle(error) or _raise(error)
        status = records.RUNNING
    finish(own.loggers, code)  # after the record: uploading must not keep a run from being done
    if code == OK:
        checkpoints.delete(directory, keep_newest=cfg.trainer.keep_checkpoint)
    _say(f"{directory.name}: {status}{f' ({reason})' if reason else ''}")
    return code


def _silent(*_: Any) -> None:
    """What the first process says need not be said again."""


def _nothing() -> None:
    """The claim is the first process's."""


def _found(cfg: RunConfig, directory: Path) -> dict[str, Any]:
    """The record of what earlier processes have done, or {}. Raises ConfigError if it is another run's."""
    try:
        found = records.read_run(directory) or {}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if type(found.get("schema")) is int and found["schema"] > records.SCHEMA:
        raise ConfigError(
            f"{directory / records.RUN} has schema {found['schema']}, and this version writes schema {records.SCHEMA}; "
            "use the version that wrote it, or choose another name or tag."
        )
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


def _train(work: Work, point: checkpoints.ResumePoint | None, stop_requested: Callable[[], bool]) -> dict[str, Any]:
    """Train and evaluate every segment from a resume point on; returns what the run's record has to say about it."""
    cfg, plan, growing = work.cfg, work.plan, work.growing
    own = (cfg, growing, work.loggers, work.ranks, work.directory.name)
    evaluation = TextEvaluation(*own, work.beside) if isinstance(work.beside, Locked) else Evaluation(*own)
    first = 0 if point is None else point.segment
    if point is not None and point.step == plan[first].stop:
        first, point = first + 1, None
    trained, seconds = 0, 0.0
    for index in range(first, len(plan)):
        begin = point if index == first and point else checkpoints.origin(plan, index)
        before = time.monotonic()
        trained += fit(work, index, begin, evaluation, stop_requested)
        seconds += time.monotonic() - before
    if growing is None:
        return {}
    growing.sync()
    foreign = growing.foreign()
    if foreign:
        raise checkpoints.Unusable(f"{foreign}; the same command repeats what is wrong")
    rate = trained * cfg.trainer.global_batch_size / seconds if seconds else None
    return {
        "baselines": evaluation.baselines(work.directory.parent / BASELINES),
        "steps_trained": schedule.steps_trained(plan),
        "images_per_s": round(rate, 1) if rate else (records.read_progress(work.directory) or {}).get("images_per_s"),
        **records.seal(work.directory),
    }


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
