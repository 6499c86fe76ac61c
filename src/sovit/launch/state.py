"""Where a cell stands, as its files say: the part that the runner, the display and ``sovit status`` share."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sovit import records
from sovit.launch.plan import Cell

# The states of a cell. The last three have no verdict: the next invocation of the sweep goes on with them.
WAITING, RUNNING, DONE, FAILED, DIVERGED = "waiting", records.RUNNING, records.DONE, records.FAILED, records.DIVERGED
STOPPED, DIED, BUSY = "stopped", "died", "busy"


@dataclass
class CellState:
    """A cell of a sweep that runs. ``started`` and ``ended`` are monotonic times; ``first_step`` is where it resumed."""

    cell: Cell
    state: str = WAITING
    reason: str = ""
    attempts: int = 0
    step: int = 0
    total_steps: int = 0
    images_per_s: float = 0.0
    first_step: int | None = None
    started: float = 0.0
    ended: float = 0.0

    def start(self, now: float) -> None:
        self.state, self.reason, self.started, self.ended, self.first_step = RUNNING, "", now, 0.0, None
        self.attempts += 1

    def read_progress(self) -> None:
        """Take over what the cell last wrote about itself."""
        step, self.total_steps, self.images_per_s = progress(self.cell.run_dir)
        if self.first_step is None:
            self.first_step = step if self.state == RUNNING else 0
        self.step = step


def progress(directory: Path) -> tuple[int, int, float]:
    """(step, total steps, images/s) of a run, all 0 before its first second of training."""
    run = records.read_run(directory)
    if run is not None and run["status"] == DONE:
        return run["steps_trained"], run["steps_trained"], run["images_per_s"] or 0.0
    note = records.read_progress(directory)
    return (note["step"], note["total_steps"], note["images_per_s"]) if note else (0, 0, 0.0)


def state_on_disk(directory: Path) -> tuple[str, str]:
    """(state, reason) of the run in a directory. Raises ValueError if its record cannot be read.

    A record that says ``running`` is believed only while a process holds the run's lock.
    """
    run = records.read_run(directory)
    if run is None:
        return (RUNNING, "") if is_locked(directory) else (WAITING, "")
    if run["status"] != records.RUNNING or is_locked(directory):
        return run["status"], run.get("reason") or ""
    return STOPPED, "no process runs it; the same command goes on"


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of this run."""
    try:
        with (directory / records.LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once, by closing
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def changed_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Cells whose run directory holds a run of another configuration."""
    changed = []
    for cell in cells:
        run = records.read_run(cell.run_dir)
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
