"""Where the cells of a sweep stand, as their files say: progress, time left, compute and hours spent, best error.

Reads only; any number may look, while a sweep runs or after it, from any machine that sees the files. One cell that
cannot be read is one line. The table of it is in `table`, the exponents to expect in `promise`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sovit import claims, records
from sovit.config import from_mapping
from sovit.derived import fewshot_name, text_results
from sovit.families import TEXT
from sovit.launch.devices import cores
from sovit.launch.local.kept import KEPT
from sovit.launch.plan import Cell, makespan, plan, world_of
from sovit.launch.state import DONE, RUNNING, STOPPED, WAITING, last_error, progress, state_on_disk
from sovit.launch.sweep import load_sweep, metric_of
from sovit.metric import Metric

SCHEMA = 1  # of the document that as_document makes
UNREADABLE = "unreadable"
MEASURED_SHARE = 0.05  # of a cell's steps; before that its pace says nothing yet


@dataclass(frozen=True)
class CellStatus:
    """One cell. ``train_gflops`` is 3 t of the steps made so far, ``planned_gflops`` of all (None: not known yet).

    ``wall_s``: seconds that its processes ran. ``devices``: GPUs, or on a CPU the share of the machine's cores.
    ``left_s``: of a running cell, from its measured pace. ``expected_s``: of the whole cell, by the plan. ``error``: the
    last one evaluated.
    """

    run_id: str
    state: str
    reason: str = ""
    step: int = 0
    total_steps: int | None = None
    images_per_s: float | None = None
    wall_s: float = 0.0
    left_s: float | None = None
    expected_s: float | None = None
    train_gflops: float = 0.0
    planned_gflops: float | None = None
    devices: float = 1.0
    gpu: bool = False
    error: float | None = None
    host: str | None = None
    pid: int | None = None

    @property
    def share(self) -> float:
        """The share of its steps that a cell has made."""
        if self.state == DONE:
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def device_hours(self) -> float:
        return self.wall_s * self.devices / 3600


@dataclass(frozen=True)
class SweepStatus:
    """All cells of a sweep at one moment. ``known``: whether cells that have not started are among them."""

    name: str
    metric: tuple[str, int]
    cells: tuple[CellStatus, ...]
    known: bool
    note: str = ""

    @property
    def states(self) -> list[str]:
        return [cell.state for cell in self.cells]

    @property
    def train_gflops(self) -> float:
        return sum(cell.train_gflops for cell in self.cells)

    @property
    def planned_gflops(self) -> float | None:
        """Of all cells, or None while that of one is not known."""
        planned = [cell.planned_gflops for cell in self.cells]
        return sum(value for value in planned if value is not None) if self.known and None not in planned else None

    @property
    def device_hours(self) -> float:
        return sum(cell.device_hours for cell in self.cells)

    @property
    def device(self) -> str:
        """What an hour is one of, as `launch.cost` counts them."""
        kinds = {cell.gpu for cell in self.cells if cell.wall_s} or {cell.gpu for cell in self.cells}
        return "GPU hours" if kinds == {True} else "machine hours" if kinds == {False} else "device hours"

    @property
    def best(self) -> CellStatus | None:
        """The cell with the smallest error."""
        evaluated = [cell for cell in self.cells if cell.error is not None]
        return min(evaluated, key=lambda cell: cell.error or 0.0, default=None)

    @property
    def left_s(self) -> float | None:
        return time_left(self.cells)


@dataclass
class Target:
    """A sweep to look at: its directory, the cells of its plan if there is one, and the observers of its claims."""

    name: str
    directory: Path
    metric: tuple[str, int]
    planned: dict[str, Cell] = field(default_factory=dict)
    note: str = ""
    watches: dict[Path, claims.Watch] = field(default_factory=dict)


def time_left(cells: Sequence[CellStatus]) -> float | None:
    """Seconds until the last cell ends with as many at once as run now; None if none runs or a cell's time is not known.

    What has not run is expected to take what the plan says, times the pace of the cells that have: the seconds they took
    over the seconds expected for their share.
    """
    measured = [cell for cell in cells if cell.expected_s and cell.wall_s and cell.share > MEASURED_SHARE]
    expected = sum(cell.share * (cell.expected_s or 0.0) for cell in measured)
    pace = sum(cell.wall_s for cell in measured) / expected if expected else 1.0
    busy: list[float] = []
    queue: list[float] = []
    for cell in cells:
        if cell.state not in (RUNNING, WAITING, STOPPED):
            continue
        left = cell.left_s
        if left is None:
            if cell.expected_s is None:
                return None
            left = pace * cell.expected_s * (1 - cell.share)
        (busy if cell.state == RUNNING else queue).append(left)
    return makespan(queue, busy) if busy else None


def target_of(path: Path, overrides: Sequence[str], default_metric: tuple[str, int]) -> Target:
    """The sweep of a sweep file or of a directory with runs. Raises ValueError for a file that cannot be planned."""
    if path.is_file():
        sweep = load_sweep(path, overrides)
        made = plan(sweep)
        cells = {cell.run_id: cell for cell in made.cells}
        return Target(made.name, made.runs_dir / made.name, metric_of(sweep.metric["name"]), cells)
    if overrides:
        raise ValueError(f"{' '.join(overrides)} goes with a sweep file; {path} is none.")
    return _of_directory(path, default_metric)


def _of_directory(path: Path, default_metric: tuple[str, int]) -> Target:
    """The runs in a directory, and the cells to come if the runner has left a copy of the sweep file there."""
    target = Target(path.resolve().name, path, default_metric)
    kept = path / KEPT
    if not kept.is_file():
        target.metric = _metric_of_runs(path, default_metric)
        return target
    try:
        sweep = load_sweep(kept)
        target.metric = metric_of(sweep.metric["name"])
        found = {directory.name for directory in run_directories(path)}
        if len(found) < len(sweep.cells):  # composing a cell takes a tenth of a second
            cells = {cell.run_id: cell for cell in plan(sweep).cells}
            if found <= set(cells):
                target.planned = cells
            else:
                target.note = "cells to come are not known: some were set on the command line"
    except ValueError as error:
        target.note = f"cells to come are not known: {error}"
    return target


def _metric_of_runs(directory: Path, usual: Metric) -> Metric:
    """The usual metric if the first run that has begun evaluates it, otherwise one that it does evaluate."""
    for path in run_directories(directory):
        try:
            record = records.read_run(path)
            if not record:
                continue
            cfg = from_mapping(records.with_younger(record["config"]))
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # such as a run that was imported
        if cfg.model.family == TEXT:
            known = [(name, 0) for name in text_results(cfg)]
        else:
            known = [(fewshot_name(name), shots) for name in cfg.eval.datasets for shots in cfg.eval.shots]
        alike = [metric for metric in known if metric[1] == usual[1]]
        return usual if usual in known else (alike or known)[0]
    return usual


def run_directories(directory: Path) -> list[Path]:
    """Directories of the runs of a sweep: those with a record, or a name that is a run id."""
    try:
        folders = sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError:
        return []
    return [path for path in folders if (path / records.RUN).exists() or _is_run_id(path.name)]


def _is_run_id(text: str) -> bool:
    try:
        return bool(records.parse_run_id(text))
    except ValueError:
        return False


def look(target: Target) -> SweepStatus:
    """All cells of a sweep as they stand now."""
    directories: dict[Path, Cell | None] = {target.directory / run_id: cell for run_id, cell in target.planned.items()}
    directories |= {path: target.planned.get(path.name) for path in run_directories(target.directory)}
    cells = tuple(_look_at(path, cell, target) for path, cell in directories.items())
    return SweepStatus(
        target.name, target.metric, cells, bool(target.planned) or _all_started(target, cells), target.note
    )


def _all_started(target: Target, cells: Sequence[CellStatus]) -> bool:
    return (target.directory / KEPT).is_file() and not target.note and bool(cells)


def _look_at(directory: Path, cell: Cell | None, target: Target) -> CellStatus:
    try:
        return _read(directory, cell, target)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        return CellStatus(directory.name, UNREADABLE, f"its files cannot be read: {' '.join(text.split())}")


def _read(directory: Path, cell: Cell | None, target: Target) -> CellStatus:
    holder = target.watches.setdefault(directory, claims.Watch(directory)).look().holder
    state, reason = state_on_disk(directory, held=holder is not None)
    record = records.read_run(directory) or {}
    step, total, images_per_s = progress(directory)
    total_steps = total or (cell.steps if cell else None)
    step_gflops, devices, gpu = _cost(record, cell)
    noted = [record.get("wall_s"), (records.read_progress(directory) or {}).get("wall_s")]
    wall_s = max((float(seconds) for seconds in noted if seconds is not None), default=0.0)
    left_s = None
    if state == RUNNING and total_steps and step and wall_s:
        left_s = max(0.0, wall_s * (total_steps - step) / step)
    return CellStatus(
        run_id=directory.name,
        state=state,
        reason=reason,
        step=step,
        total_steps=total_steps,
        images_per_s=images_per_s or None,
        wall_s=wall_s,
        left_s=left_s,
        expected_s=cell.seconds if cell else None,
        train_gflops=step * step_gflops,
        planned_gflops=total_steps * step_gflops if total_steps else None,
        devices=devices,
        gpu=gpu,
        error=_error(directory, target.metric),
        host=None if holder is None or holder.local else holder.host,
        pid=None if holder is None else holder.pid or None,
    )


def _cost(record: Mapping[str, Any], cell: Cell | None) -> tuple[float, float, bool]:
    """(training GFLOPs of a step: three times the forward ones, devices, whether they are GPUs)."""
    trainer = (record.get("config") or {}).get("trainer") or {}
    machine = record.get("machine") or {}
    if not trainer and cell is not None:
        gpu, threads, gflops = cell.accelerator == "gpu", cell.num_threads, cell.train_gflops / cell.steps
    else:
        gpu = bool(machine["gpu"]) if "gpu" in machine else trainer.get("accelerator") == "gpu"
        threads = int(trainer.get("num_threads") or 1)
        gflops = 3 * (record.get("forward_gflops") or 0.0) * trainer.get("global_batch_size", 0)
    processes = world_of(record) if record.get("config") else cell.world if cell is not None else 1
    num = machine.get("cores") or len(
        cores()
    )  # an older record does not say how many it had: taken to be like this one
    return gflops, float(processes) if gpu else min(1.0, processes * threads / num), gpu


def _error(directory: Path, metric: tuple[str, int]) -> float | None:
    try:
        about = (directory / records.EVALS).stat()
    except FileNotFoundError:
        return None
    return _error_of(directory, *metric, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _error_of(directory: Path, dataset: str, shots: int, size: int, mtime_ns: int) -> float | None:
    """`last_error`, read again only when the file has changed."""
    return last_error(directory, dataset, shots)


def as_document(
    found: Iterable[SweepStatus], price: float | None = None, exponents: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything as one JSON document. ``price``: of a device hour; ``exponents``: sweep name -> what is promised."""
    return {
        "schema": SCHEMA,
        "sweeps": [
            {
                "name": sweep.name,
                "dataset": sweep.metric[0],
                "shots": sweep.metric[1],
                "all_cells_known": sweep.known,
                "note": sweep.note or None,
                "states": {state: sweep.states.count(state) for state in sorted(set(sweep.states))},
                "left_s": _rounded(sweep.left_s),
                "train_gflops": sweep.train_gflops,
                "planned_gflops": sweep.planned_gflops,
                "device": sweep.device,
                "device_hours": sweep.device_hours,
                "price": price,
                "cost": None if price is None else price * sweep.device_hours,
                "best": None if sweep.best is None else {"run_id": sweep.best.run_id, "error": sweep.best.error},
                "exponents": (exponents or {}).get(sweep.name),
                "cells": [
                    asdict(cell) | {"left_s": _rounded(cell.left_s), "device_hours": cell.device_hours}
                    for cell in sweep.cells
                ],
            }
            for sweep in found
        ],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
