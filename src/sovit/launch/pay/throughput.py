"""How fast this machine trains: a few cells of a plan timed for real, and a time model fitted to them.

Up to five shapes that span the plan are run for some seconds each, by the engine itself, in as many processes at once as
the sweep will use, in a process of their own (`launch.timing`). The result is kept for each hardware, software, number of
workers and set of shapes in ``$XDG_CACHE_HOME/sovit`` (``~/.cache/sovit``). Not measured: what a network adds (W&B online,
a shared file system), the resume points between evaluations, thousandths of the time, and the decoders of
metric=multitask, whose updates are expected to take what the encoder's do (`launch.plan`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sovit.families import TEXT, blocks
from sovit.launch.devices import cores, visible_gpus
from sovit.launch.pay.hardware import cache_file, hardware, read_cache, write_cache
from sovit.launch.pay.timing import TARGET, Timer, TimingError
from sovit.launch.plan import CPU, EVAL_IMAGES, Cell, Plan, TimeModel, cell_gactivations, timed
from sovit.launch.tables import duration_text
from sovit.schedule import Segment, segments, steps_trained
from sovit.schema import KEYS_OF_DECODER, EvalConfig

Measure = Literal["anew", "missing", "cached", "never"]

SCHEMA = 1
STEPS_S = 4.0  # of updates to time for each shape
GROUPS = (2, 25)  # least and most groups of four blocks of updates; a block is up to ten updates
ENOUGH_S = 90.0  # after which no further shape is begun, given that three are known
LIMIT_S = 180.0  # of one shape
BUSY = 0.8  # of a core; a cell that gets less shares it with other programs
MAX_SHAPES = 5
COOLDOWN = 0.5  # of a duration, for cells that have one


@dataclass(frozen=True)
class Timing:
    """What a cell took, in seconds: an update, an evaluation (with the resume point after it), and all the rest.

    ``share`` is that of a core it got while it updated (None where that says nothing, with several threads or a GPU).
    """

    run_id: str
    depth: int
    batch_size: int
    forward_gflops: float
    gactivations: float
    step_s: float
    eval_s: float
    start_s: float
    share: float | None


def expect(
    plan: Plan,
    measure: Measure,
    *,
    say: Callable[[str], None] = print,
    target: str = TARGET,
    preload: Sequence[str] | None = None,
) -> Plan:
    """The plan with times measured on this machine, or as it was, with a note that says why.

    ``measure``: "anew"; "missing", only if no measurement is cached; "cached", never measure; "never", not even read the
    cache. ``say`` gets a line before anything that takes long. ``target`` and ``preload`` are for tests.
    """
    if measure == "never":
        return plan
    chosen, at_once = probes(plan.cells), min(plan.workers, len(plan.cells))
    at_once *= max(cell.devices for cell in plan.cells)
    if plan.cells[0].accelerator == "gpu":
        gpus, shared = len(visible_gpus()), plan.cells_per_gpu
        if not gpus:
            return replace(plan, notes=(*plan.notes, "No GPU is visible here, so nothing was measured."))
        if gpus * shared < at_once:
            each, need = ("one cell", at_once) if shared == 1 else (f"{shared} cells", -(-at_once // shared))
            note = (
                f"Times are for {each} a GPU: {plan.workers} at once need {need} GPUs, and this machine has {gpus}; "
                f"--cells-per-gpu says how many share one."
            )
            plan = replace(plan, notes=(*plan.notes, note))
        at_once = min(gpus * shared, at_once)
    else:
        at_once = min(at_once, max(plan.workers, len(cores())))
    if any(cell.config.eval.multitask for cell in plan.cells):
        note = "The decoders of metric=multitask are estimated, not measured; finished runs say more."
        plan = replace(plan, notes=(*plan.notes, note))
    if any(cell.world > 1 for cell in chosen):
        note = "Of cells with several processes, what one of them has to do was measured, without their exchange."
        plan = replace(plan, notes=(*plan.notes, note))
    what = {"workers": at_once, "cells": [_what(cell) for cell in chosen]}
    key = hardware(plan.cells[0].accelerator) | json.loads(json.dumps(what))  # as it will be read back
    path = cache_file(key)
    content = None
    if measure != "anew":
        try:
            content = _read(path, key)
        except ValueError as error:
            say(f"{error}; measured anew." if measure == "missing" else f"{error}; it is not used.")
    if content is None and measure == "cached":
        return plan
    if content is None:
        say(
            f"Measuring how fast this machine trains: {_count(chosen, 'shape')} of the sweep for some seconds each, "
            f"{_count(range(at_once), 'process', 'es')} at once (about {duration_text(15 + 8 * len(chosen))}; "
            "sovit plan --no-measure skips it)."
        )
        began = time.monotonic()
        try:
            timings, startup_s, failed = time_cells(chosen, at_once, instead=plan.cells, target=target, preload=preload)
        except (TimingError, OSError) as error:
            why = f"{error.filename or 'a file'}: {error.strerror}" if isinstance(error, OSError) else str(error)
            return replace(plan, notes=(*plan.notes, f"This machine could not be measured ({why}): times are assumed."))
        content = {
            "schema": SCHEMA,
            "key": key,
            "measured_at": time.time(),
            "took_s": round(time.monotonic() - began, 1),
            "startup_s": startup_s,
            "timings": [dataclasses.asdict(timing) for timing in timings],
            "failed": failed,
        }
        try:
            write_cache(path, content)
        except OSError as error:
            say(f"The measurement cannot be kept ({path}: {(error.strerror or str(error)).lower()}); it is used now.")
    return _apply(plan, content)


def _apply(plan: Plan, content: dict[str, Any]) -> Plan:
    """The plan with the times of a measurement, and what is to be known of it."""
    timings = [Timing(**row) for row in content["timings"]]
    key, at_once = content["key"], content["key"]["workers"]
    model = fit(plan.cells[0].accelerator, timings, content["startup_s"])
    processor = " + ".join(key["gpus"]) if plan.cells[0].accelerator == "gpu" else key["cpu"]
    model = replace(
        model,
        basis=f"measured on this machine: {processor}, {_count(range(at_once), 'worker')}, {_count(timings, 'shape')}, "
        f"{when(content['measured_at'])}",
    )
    notes = tuple(content["failed"])
    shares = [timing.share for timing in timings if timing.share is not None]
    if shares and statistics.median(shares) < BUSY:
        model = replace(model, basis=f"{model.basis}, while the machine was busy")
        notes += (
            f"Other programs ran meanwhile: a cell got {statistics.median(shares):.0%} of a core, and may be up to "
            f"{1 / statistics.median(shares):.1f} times as fast at rest; sovit plan --measure measures anew.",
        )
    off = max((abs(_predicted_step_s(model, timing) / timing.step_s - 1) for timing in timings), default=0.0)
    if off > 0.2:
        notes += (f"The times fit the shapes measured only within {off:.0%}.",)
    return timed(replace(plan, notes=(*plan.notes, *notes)), model)


def probes(cells: Sequence[Cell]) -> list[Cell]:
    """At most five cells that span a plan, the cheapest update first, then the dearest, deepest, widest, largest MLP.

    Of equal ones the cheapest. A plan whose extremes coincide gets the cell in the middle too.
    """
    cheap = sorted(cells, key=lambda cell: (_step_gflops(cell), cell.shape.depth, cell.run_id))
    chosen = [cheap[0], cheap[-1]]
    for largest in (lambda cell: cell.shape.depth, lambda cell: cell.shape.width, lambda cell: cell.shape.mlp_dim):
        chosen.append(max(cheap, key=largest))  # the first, so the cheapest, of equals
    if len({_identity(cell) for cell in chosen}) < MAX_SHAPES:
        chosen.append(cheap[len(cheap) // 2])
    distinct: dict[str, Cell] = {}
    for cell in chosen:
        distinct.setdefault(_identity(cell), cell)
    return list(distinct.values())[:MAX_SHAPES]


def time_cells(
    cells: Sequence[Cell],
    at_once: int,
    *,
    instead: Sequence[Cell] = (),
    target: str = TARGET,
    preload: Sequence[str] | None = None,
) -> tuple[list[Timing], float, list[str]]:
    """(timings, seconds until a first cell can start, sentences on cells that failed) of cells run for a few seconds.

    Each runs in ``at_once`` processes at the same time. The first one's pace decides how many updates the others make.
    For one that does not fit into memory the next cheaper of ``instead`` is tried. Raises TimingError if none could be
    timed.
    """
    gpus = visible_gpus() if cells[0].accelerator == "gpu" else []
    slots = [gpus[number % len(gpus)] if gpus else None for number in range(at_once)]
    timings: list[Timing] = []
    failed: list[str] = []
    pace, began = 1.0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sovit-") as scratch, Timer(Path(scratch), target, preload) as timer:
        queue, tried = list(cells), {_identity(cell) for cell in cells}
        while queue:
            if len(timings) >= 3 and time.monotonic() - began > ENOUGH_S:
                failed.append(f"To keep it short, {_count(queue, 'shape')} went unmeasured.")
                break
            cell = queue.pop(0)
            folder = Path(scratch) / str(len(timings) + len(failed))
            timing, why = _time_cell(cell, pace, timer, folder, slots)
            if timing is not None:
                timings.append(timing)
                pace = timing.step_s / _guess(cell)
                continue
            failed.append(f"{cell.run_id} could not be timed: {why}.")
            if "memory" in why:
                cheaper = [other for other in instead if _step_gflops(other) < _step_gflops(cell)]
                cheaper = [other for other in cheaper if _identity(other) not in tried]
                queue = sorted(cheaper, key=_step_gflops)[-1:] + queue
                tried |= {_identity(other) for other in queue}
            elif not timings:
                break
    if not timings:
        raise TimingError(" ".join(failed).rstrip("."))
    return timings, timer.startup_s, failed


def _time_cell(
    cell: Cell, pace: float, timer: Timer, folder: Path, slots: Sequence[str | None]
) -> tuple[Timing | None, str]:
    """(timing, "") of a cell, or (None, why there is none); ``pace``: updates take so many times what is assumed."""
    guess = pace * _guess(cell)
    block = min(10, max(1, int(STEPS_S / guess / 12)))
    first = 2 * block * min(GROUPS[1], max(GROUPS[0], int(STEPS_S / guess / (4 * block))))
    copies = [_overrides(cell, first, folder / f"runs{copy}") for copy in range(len(slots))]
    answer = timer.time(copies, slots, folder, block, LIMIT_S)
    for copy in answer:
        code, last = copy["code"], copy["last"].rstrip(".")
        if code < 0:
            name = signal.Signals(-code).name
            return None, f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        if code:
            return None, last or f"it ended with exit code {code}"
        if len(copy["updates"]) != steps_trained(_segments(cell, first)):
            return None, f"{len(copy['updates'])} updates were noted, another number than was asked for"
    return _timing(cell, answer, first, block), ""


def _segments(cell: Cell, first: int) -> list[Segment]:
    return segments([first, 2 * first], cell.config.eval.weights, COOLDOWN)  # type: ignore[arg-type]


def _timing(cell: Cell, answer: list[dict[str, Any]], first: int, block: int) -> Timing:
    """The medians of what the copies of a cell noted, which was evaluated after ``first`` and 2 x ``first`` steps."""
    parts = _segments(cell, first)
    borders = {steps_trained(parts[:number]) for number in range(len(parts) + 1)}
    if len(parts) == 1:
        borders.add(first)
    rows = [_of_copy(copy, sorted(borders), block) for copy in answer]
    step_s, eval_s, start_s, share = (statistics.median(column) for column in zip(*rows, strict=True))
    alone = cell.accelerator == "cpu" and cell.num_threads == 1
    return Timing(
        run_id=cell.run_id,
        depth=blocks(cell.shape),
        batch_size=_batch_size(cell),
        forward_gflops=cell.forward_gflops,
        gactivations=cell_gactivations(cell),
        step_s=step_s,
        eval_s=eval_s,
        start_s=start_s,
        share=share if alone else None,
    )


def _of_copy(copy: dict[str, Any], borders: list[int], block: int) -> tuple[float, float, float, float]:
    """(update, evaluation, the rest, share of a core) of one copy. Between two borders nothing but updates happens.

    The first block of the run and the update after each border are left out: warm-up, evaluation, a new trainer. What
    passes at the inner borders beyond an update belongs to the one duration that was evaluated before the end.
    """
    clock, cpu = zip(*copy["updates"], strict=True)
    blocks, shares = [], []
    for begin, end in itertools.pairwise(borders):
        for stop in range(begin + 2 * block, end + 1, block):
            took = clock[stop - 1] - clock[stop - block - 1]
            blocks.append(took / block)
            shares.append((cpu[stop - 1] - cpu[stop - block - 1]) / took if took else 1.0)
    step_s = statistics.median(blocks)
    gaps = [clock[border + block - 1] - clock[border - 1] - block * step_s for border in borders[1:-1]]
    eval_s = max(0.0, sum(gaps[:2]))  # of a branch: its beginning and its end
    rest = copy["end"][0] - len(clock) * step_s - 3 * eval_s  # 3: evaluated at the initialisation too
    return step_s, eval_s, max(0.0, rest), statistics.median(shares)


def fit(accelerator: str, timings: Sequence[Timing], startup_s: float) -> TimeModel:
    """The time model nearest to some timings: least squares of the relative error, no coefficient below 0.

    Raises ValueError for timings that are none.
    """
    train = [[1, t.depth, 3 * t.forward_gflops * t.batch_size, t.gactivations * t.batch_size] for t in timings]
    evaluate = [[1, t.depth, t.forward_gflops * EVAL_IMAGES, t.gactivations * EVAL_IMAGES] for t in timings]
    step_s, block_s, gflop_s, activation_s = _least_squares(train, [t.step_s for t in timings])
    eval_s, eval_block_s, eval_gflop_s, eval_activation_s = _least_squares(evaluate, [t.eval_s for t in timings])
    return TimeModel(
        accelerator,
        start_s=statistics.median(t.start_s for t in timings),
        step_s=step_s,
        block_s=block_s,
        gflops_per_s=1 / max(gflop_s, 1e-12),  # never infinite: a plan may hold larger shapes
        eval_s=eval_s,
        basis="",
        activation_s=activation_s,
        eval_block_s=eval_block_s,
        eval_gflops_per_s=1 / max(eval_gflop_s, 1e-12),
        eval_activation_s=eval_activation_s,
        startup_s=startup_s,
    )


def _least_squares(columns: list[list[float]], values: list[float]) -> list[float]:
    import numpy as np
    from scipy.optimize import nnls

    target = np.maximum(np.asarray(values, float), 1e-9)
    if not np.isfinite(target).all():
        raise ValueError(f"{values} are no timings; measure again.")
    weighted = np.asarray(columns, float) / target[:, None]
    scale = weighted.max(axis=0)  # columns of 1 and of 1e-6 would not be told from zero alike
    scale[scale == 0] = 1.0
    found, _ = nnls(weighted / scale, np.ones(len(target)))
    return [float(value) for value in found / scale]


def _predicted_step_s(model: TimeModel, timing: Timing) -> float:
    known = (timing.batch_size, 0, timing.forward_gflops, timing.gactivations)
    return model.seconds(timing.depth, 1, *known) - model.start_s


def _read(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept for a key, or None. Raises ValueError with one sentence if it cannot be used."""
    content = read_cache(path)
    if content is None:
        return None
    try:
        assert content["schema"] == SCHEMA and content["key"] == key
        rows = [Timing(**row) for row in content["timings"]]
        numbers = [n for row in rows for n in (row.step_s, row.eval_s, row.start_s, row.gactivations)]
        assert rows and all(0 <= n < math.inf for n in [*numbers, content["startup_s"], content["measured_at"]])
        assert all(row.step_s > 0 and row.depth > 0 and row.forward_gflops > 0 for row in rows)
        assert all(isinstance(line, str) for line in content["failed"])
    except (AssertionError, KeyError, TypeError):
        raise ValueError(f"The measurement kept in {path} is not one of this version") from None
    return content


def _what(cell: Cell) -> dict[str, Any]:
    """The shape of a cell, and its configuration as far as it takes time."""
    cfg = dataclasses.asdict(cell.config)
    kept = {name: cfg[name] for name in ("model", "data", "eval", "optim", "trainer", "logger")}
    for group, names in {
        "model": ("width", "depth", "mlp_dim", "token_dim", "init", "head_bias"),
        "data": ("seed", "rotation"),
        "optim": [name for name in kept["optim"] if name not in ("name", "loss", "clip_norm")],
        "trainer": [name for name in kept["trainer"] if name not in TIMED_TRAINER_KEYS],
        "logger": [name for name in kept["logger"] if name != "name"],
        "eval": ("ema_horizon", "multitask", *KEYS_OF_DECODER),
    }.items():
        for name in names:
            del kept[group][name]
    kept["trainer"]["global_batch_size"] = _batch_size(cell)
    if cell.config.model.family == TEXT:  # its steps take what the image tower takes, too
        kept["text"] = cfg["text"]
    return {"shape": cell.shape.as_dict(), **kept}


TIMED_TRAINER_KEYS = ("accelerator", "precision", "num_threads", "global_batch_size", "log_every_n_steps")


def _identity(cell: Cell) -> str:
    return json.dumps(_what(cell), sort_keys=True)


def _batch_size(cell: Cell) -> int:
    """Images an update of one process of the cell."""
    return cell.config.trainer.global_batch_size // cell.world


def _step_gflops(cell: Cell) -> float:
    return 3 * cell.forward_gflops * _batch_size(cell)


def _guess(cell: Cell) -> float:
    """Seconds of an update as assumed before anything is measured."""
    if cell.accelerator == "gpu":
        return 0.02 + _step_gflops(cell) / 5e4
    return CPU.step_s + blocks(cell.shape) * CPU.block_s + _step_gflops(cell) / CPU.gflops_per_s


def _overrides(cell: Cell, first: int, runs_dir: Path) -> list[str]:
    """The cell, evaluated after ``first`` and 2 x ``first`` steps, in a place of its own and without a network.

    Of a cell with several processes the share of one.
    """
    share = ["parallel=single", f"trainer.global_batch_size={_batch_size(cell)}"] if cell.world > 1 else []
    own = [text for text in cell.overrides if not (share and text.startswith(("parallel=", "parallel.")))]
    durations = f"durations.values=[{first} steps,{2 * first} steps]"
    unset = [f"durations.{name}=null" for name in ("first", "last", "num")]
    cooldown = [f"schedule.cooldown={COOLDOWN}"] if cell.config.eval.weights == "cooled" else []
    return [
        *own, durations, *unset, *cooldown, *share, *_without_decoders(cell),
        "trainer.max_steps=null", "logger.mode=offline", f"runs_dir={runs_dir}",
    ]  # fmt: skip


def _without_decoders(cell: Cell) -> list[str]:
    """Decoders take longer than all the rest, and their updates would be noted among the model's."""
    if not cell.config.eval.multitask:
        return []
    usual = EvalConfig()
    return ["eval.multitask=false", *(f"eval.{key}={getattr(usual, key)}" for key in KEYS_OF_DECODER)]


def when(measured_at: float) -> str:
    """Such as ``41 s ago``; a date from a day on."""
    age = time.time() - measured_at
    if 0 <= age < 86400:
        return f"{duration_text(age)} ago"
    return f"on {time.strftime('%Y-%m-%d', time.localtime(measured_at))}"


def _count(things: Any, noun: str, plural: str = "s") -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else plural}"
