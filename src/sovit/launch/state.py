"""Where a cell stands, as its files say: the part that the runner, the display and ``sovit status`` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import claims, records
from sovit.launch.plan import Cell

# The states of a cell. The last three have no verdict: the next invocation of the sweep goes on with them. A busy cell is
# run by another runner, here or on another machine.
WAITING, RUNNING, DONE, FAILED, DIVERGED = "waiting", records.RUNNING, records.DONE, records.FAILED, records.DIVERGED
STOPPED, DIED, BUSY = "stopped", "died", "busy"
CUT = "its records were cut after it ended"


@dataclass
class CellState:
    """A cell of a sweep that runs. ``started`` and ``ended`` are monotonic times; ``first_step`` is where it resumed.

    ``before`` is the verdict it is tried again in spite of; ``repeats`` is the diverged cell it repeats at a lower rate.
    """

    cell: Cell
    state: str = WAITING
    reason: str = ""
    attempts: int = 0
    restarts: int = 0  # for want of device memory
    step: int = 0
    total_steps: int = 0
    images_per_s: float = 0.0
    first_step: int | None = None
    started: float = 0.0
    ended: float = 0.0
    before: dict[str, Any] | None = None
    repeats: CellState | None = None

    def start(self, now: float) -> None:
        self.state, self.started, self.ended, self.first_step = RUNNING, now, 0.0, None
        self.attempts += 1

    def read_progress(self) -> None:
        """Take over what the cell last wrote about itself."""
        step, self.total_steps, self.images_per_s = progress(self.cell.run_dir)
        if self.first_step is None:
            self.first_step = step if self.state == RUNNING else 0
        self.step = step


def progress(directory: Path) -> tuple[int, int, float]:
    """(step, total steps, images/s) of a run, all 0 before its first second of training or if nothing can be read."""
    with suppress(ValueError, OSError, KeyError):
        run = records.read_run(directory)
        if run is not None and run["status"] == DONE:
            return run["steps_trained"], run["steps_trained"], run["images_per_s"] or 0.0
        note = records.read_progress(directory)
        return (note["step"], note["total_steps"], note["images_per_s"]) if note else (0, 0, 0.0)
    return 0, 0, 0.0


def read_record(directory: Path) -> dict[str, Any] | None:
    """The run's record, or None if there is none yet. Raises ValueError if it cannot be read or says no status."""
    run = records.read_run(directory)
    if run is not None and not (isinstance(run.get("status"), str) and "config_hash" in run):
        raise ValueError(f"{directory / records.RUN} is not the record of a run; delete it and run the cell again.")
    return run


def state_on_disk(directory: Path, held: bool | None = None) -> tuple[str, str]:
    """(state, reason) of the run in a directory. Raises ValueError if its record cannot be read.

    A record that says ``running`` is believed only while a process holds the run; ``held`` says so if it is known better
    than at first sight. A finished run whose records were cut afterwards is not done.
    """
    if held is None:
        held = claims.holder(directory) is not None  # before the record, which is written before the run is let go
    run = read_record(directory)
    if run is None:
        return (RUNNING, "") if held else (WAITING, "")
    if run["status"] == DONE and _is_cut(directory, run):
        return (RUNNING, "") if held else (STOPPED, CUT)
    if run["status"] != RUNNING or held:
        return run["status"], run.get("reason") or ""
    return STOPPED, "no process runs it; the same command goes on"


def _is_cut(directory: Path, run: dict[str, Any]) -> bool:
    """Whether the evaluations are shorter or longer than the record says; an older record does not say."""
    try:
        size = (directory / records.EVALS).stat().st_size
    except FileNotFoundError:
        size = 0
    return size != run.get("evals_bytes", size)


def changed_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Cells whose run directory holds a run of another configuration."""
    changed = []
    for cell in cells:
        run = read_record(cell.run_dir)
        if run is not None and run["config_hash"] != cell.config_hash:
            changed.append(cell)
    return changed


def last_error(directory: Path, dataset: str, shots: int) -> float | None:
    """Mean error over the draws of the last evaluation of a run, or None before the first."""
    rows = records.read_lines(directory / records.EVALS)
    rows = [row for row in rows if row["dataset"] == dataset and row["shots"] == shots]
    last_step = max((row["step"] for row in rows), default=None)
    errors = [row["error"] for row in rows if row["step"] == last_step]
    return sum(errors) / len(errors) if errors else None


def summary(states: Sequence[str]) -> str:
    """Such as ``12 done, 1 failed, 7 waiting``."""
    order = [DONE, RUNNING, FAILED, DIVERGED, DIED, BUSY, STOPPED, WAITING]
    return ", ".join(f"{states.count(state)} {state}" for state in order if state in states)
