"""How a cell's process ended, how the sweep did, and what to do about it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from sovit import records
from sovit.launch.local.others import take_verdict
from sovit.launch.plan import Plan
from sovit.launch.state import (
    BUSY,
    CUT,
    DIED,
    DIVERGED,
    DONE,
    FAILED,
    STOPPED,
    CellState,
    read_record,
    state_on_disk,
)

# Exit codes of a cell; anything else, signals included, is no verdict. 2: it was refused, and would be again.
VERDICTS = {0: DONE, 1: FAILED, 2: FAILED, 3: DIVERGED, 75: STOPPED, 76: BUSY}


def judge(state: CellState, exitcode: int, stopping: bool) -> tuple[str, str]:
    """(state, reason) of a cell whose process ended; ``stopping``: this runner has asked it to."""
    verdict = VERDICTS.get(exitcode, DIED)
    try:
        on_disk, reason = state_on_disk(state.cell.run_dir)
    except ValueError as error:
        return FAILED, str(error)
    if stopping and (verdict == DIED or (verdict == DONE and on_disk != DONE)):
        return STOPPED, ""  # the signal came before the cell could handle it
    if verdict == DONE and on_disk != DONE:
        return DIED, reason if reason == CUT else "ended without a verdict; see log.txt"
    if verdict == DIED and on_disk == DONE:
        return DONE, ""  # killed after its last word
    if verdict == DIED:
        number = -exitcode if exitcode < 0 else exitcode - 128  # as `processes.start` says it of one of several
        killed = number in set(signal.Signals)
        how = f"killed by {signal.Signals(number).name}" if killed else f"ended with exit code {exitcode}"
        return DIED, how + (" (out of memory?)" if number == signal.SIGKILL else "")
    if verdict in (FAILED, DIVERGED):
        return verdict, reason if on_disk == verdict and reason else _last_line(state.cell.run_dir / records.LOG)
    if verdict == STOPPED and not stopping:
        said = (read_record(state.cell.run_dir) or {}).get("reason") or _last_line(state.cell.run_dir / records.LOG)
        return STOPPED, said.removeprefix(f"{state.cell.run_id}: ")
    return verdict, ""


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output; is the disk full?")


def conclude(plan: Plan, states: Sequence[CellState], received: Sequence[int]) -> int:
    """Say what is left of a sweep and how to go on; the exit code of the runner.

    A cell that diverged counts as done if its retry is done, which is said; the analysis sees both.
    """
    for state in states:
        if state.state == DIED:  # another runner may have had more luck
            take_verdict(state, held=True)
    cells = [state for state in states if state.repeats is None]
    ends = [(cell, _last_of_chain(cell, states)) for cell in cells]
    left = {name: sum(end.state == name for _, end in ends) for name in (DONE, FAILED, DIVERGED, DIED, BUSY, STOPPED)}
    if received:
        print(
            f"{plan.name}: stopped, {left[DONE]} of {len(cells)} cells are done; the same command goes on from there."
        )
        return 128 + received[0]
    for cell, end in ends:
        if end is not cell and end.state == DONE:
            print(
                f"{plan.name}: {cell.cell.run_id} diverged; {end.cell.run_id}, at optim.lr {end.cell.config.optim.lr:g}, "
                "is done and takes its place."
            )
    if left[FAILED] or left[DIVERGED]:
        in_vain = sum(end is not cell and end.state in (FAILED, DIVERGED) for cell, end in ends)
        mend = "the same command with --retry-failed tries them again"
        if left[DIVERGED] > in_vain:
            mend += "; --retry-diverged 0.5 repeats what diverged at half its learning rate"
        print(
            f"{plan.name}: {left[FAILED] + left[DIVERGED]} of {len(cells)} cells failed or diverged"
            f"{f' ({in_vain} at lower rates too)' if in_vain else ''}; their log.txt says why, and {mend}."
        )
    if left[DIED]:
        print(
            f"{plan.name}: {left[DIED]} of {len(cells)} cells died twice without a verdict; the same command goes on "
            "with them, with fewer --workers if memory is short."
        )
    if left[STOPPED]:
        print(f"{plan.name}: {left[STOPPED]} of {len(cells)} cells were stopped; the same command goes on with them.")
    if left[DONE] < len(cells):
        return 1
    print(f"{plan.name}: all {len(cells)} cells are done. Next: sovit fit {plan.runs_dir / plan.name}")
    return 0


def _last_of_chain(cell: CellState, states: Sequence[CellState]) -> CellState:
    """The last retry of a cell that diverged, or the cell itself."""
    while cell.state == DIVERGED:
        retry = next((state for state in states if state.repeats is cell), None)
        if retry is None:
            break
        cell = retry
    return cell
