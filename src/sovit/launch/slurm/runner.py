"""Run the cells of a sweep on a Slurm cluster: one job array, one task a cell, watched from a login node or left alone.

The truth about a cell is its run directory; of Slurm only the queue is asked, and only to know which cells need no
submitting and which have left it. Losing this process loses nothing: the same command finds the array again. What is asked
of Slurm: `slurm_array`; what a task does on its node: `slurm_task`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sovit import claims, records
from sovit.launch.local.display import Display, open_display
from sovit.launch.local.kept import keep, refuse_other
from sovit.launch.local.outcome import conclude
from sovit.launch.local.retry import MAX_RETRIES, check_factor, retry_cell
from sovit.launch.local.runner import refuse_changed
from sovit.launch.plan import Cell, Plan
from sovit.launch.slurm import array
from sovit.launch.slurm.config import Launcher
from sovit.launch.slurm.task import COMMAND
from sovit.launch.state import BUSY, DIVERGED, DONE, FAILED, RUNNING, STOPPED, WAITING, CellState, state_on_disk
from sovit.launch.sweep import Sweep, SweepError

POLL_S = 2.0
ASK_EVERY_S = 15.0  # squeue; every question costs the controller of the whole cluster something
GONE_PATIENCE_S = 30.0  # after a task has left the queue, for a network file system to show what it wrote last


def run_on_slurm(
    plan: Plan,
    launcher: Launcher,
    *,
    sweep: Sweep | None = None,
    retry_failed: bool = False,
    retry_diverged: float | None = None,
    detach: bool = False,
    metric: tuple[str, int] = ("fractals", 10),
    command: Sequence[str] = COMMAND,
) -> int:
    """Submit what is neither done nor in the queue, ``plan.workers`` at once, and wait for it unless ``detach``.

    ``retry_diverged`` repeats cells that have diverged by now at that fraction of their learning rate, as other cells.
    Returns 0 if every cell is done (or submitted, with ``detach``), 1 if some are not, 130 after Ctrl-C, which cancels
    nothing. Raises SweepError.
    """
    check_factor(retry_diverged)
    array.check(plan, launcher)
    home = plan.runs_dir / plan.name
    if sweep is not None:
        refuse_other(sweep, home)
    refuse_changed(plan)
    states = _states(plan.cells, retry_diverged)
    if all(state.state == DONE for state in states):
        print(f"{plan.name}: all {len(states)} cells are done already. Next: sovit fit {home}")
        return 0
    folder = home / array.FOLDER
    with array.submitting(folder):
        if sweep is not None:
            keep(sweep, home)
        try:
            queue = array.queue(array.read_jobs(folder))
        except array.NoAnswer as error:
            raise SweepError(f"squeue does not say what is queued already ({error}); try again.") from None
        chosen = _chosen(states, queue, retry_failed)
        if chosen:
            new = array.submit(plan, launcher, chosen, folder, command)
            what = f"array {new[0]}" if len(new) == 1 else f"arrays {', '.join(new)}"
            print(
                f"{plan.name}: {what} of {_cells(len(chosen))}, {min(plan.workers, len(chosen))} at once, up to "
                f"{launcher.hours:g} h a start; output in {home}/CELL/log.txt"
            )
    jobs = array.read_jobs(folder)
    with_tasks = set(queue) | {cell.run_id for cell in chosen}
    ids = sorted({job["id"] for job in jobs.values() if job["id"] and with_tasks & set(job["cells"])}, key=int)
    if queue:
        print(f"{plan.name}: {_cells(len(queue))} in the queue already ({', '.join(ids)}).")
    listed = ",".join(ids)
    if ids:
        print(f"Watch: sovit status {home}; squeue --jobs={listed}. Cancel: scancel {' '.join(ids)}.")
    if detach or not (with_tasks or any(state.state == BUSY for state in states)):
        return 0 if detach else conclude(plan, states, [])
    try:
        with open_display(replace(plan, workers=min(plan.workers, len(states))), states, metric) as display:
            _watch(states, folder, display)
    except KeyboardInterrupt:
        print(
            f"{plan.name}: detached, the array goes on; the same command watches it again, scancel {' '.join(ids)} ends it."
        )
        return 130
    return conclude(plan, states, [])


def _cells(number: int) -> str:
    return f"{number} cell{'s' if number > 1 else ''}"


def _states(cells: Sequence[Cell], factor: float | None) -> list[CellState]:
    """Where the cells stand, and the retries of those that have diverged."""
    states = []
    for cell in cells:
        state = CellState(cell)
        for number in range(1, MAX_RETRIES + 2):
            state.state, state.reason = state_on_disk(state.cell.run_dir)
            states.append(state)
            if state.state != DIVERGED or factor is None or number > MAX_RETRIES:
                break
            state = CellState(retry_cell(cell, factor, number), repeats=state)
    return states


def _chosen(states: Sequence[CellState], queue: Mapping[str, array.Queued], retry_failed: bool) -> list[Cell]:
    """The cells to submit, longest first: neither done nor queued, nor run by a process outside the queue."""
    left = [state for state in states if state.state != DONE and state.cell.run_id not in queue]
    _judge_holders([state for state in left if state.state == RUNNING])
    repeated = {id(state.repeats) for state in states if state.repeats is not None}
    chosen = []
    for state in left:
        tried = state.state in (FAILED, DIVERGED)
        if state.state == BUSY or (tried and (not retry_failed or id(state) in repeated)):
            continue
        if tried:
            state.before = records.read_run(state.cell.run_dir)
        state.state, state.reason = WAITING, ""
        chosen.append(state)
    for state in states:
        if state.cell.run_id in queue:
            state.state, state.reason = WAITING, ""
    return [state.cell for state in sorted(chosen, key=lambda state: state.cell.seconds, reverse=True)]


def _judge_holders(states: Sequence[CellState]) -> None:
    """Tell cells that another process really runs (busy) from those whose owner died on some node (stopped)."""
    watches = [(state, claims.Watch(state.cell.run_dir)) for state in states]
    told = False
    while watches:
        unsure = []
        for state, watch in watches:
            seen = watch.look()
            if seen.holder is not None and not seen.certain:
                unsure.append((state, watch))
            else:
                state.state, state.reason = (BUSY, f"run by {seen.holder}") if seen.holder else (STOPPED, "")
        if unsure and not told:
            told = True
            print(f"Waiting up to {claims.LEASE_S:g} s for a sign of life of {_cells(len(unsure))} claimed elsewhere.")
        watches = unsure
        time.sleep(0.5 if unsure else 0.0)


def _watch(states: Sequence[CellState], folder: Path, display: Display) -> None:
    """Show what becomes of the cells until each has a verdict or has left the queue without one."""
    watches = {state.cell.run_id: claims.Watch(state.cell.run_dir) for state in states}
    seen_last = dict.fromkeys(watches, time.monotonic())  # in the queue, or held
    queue: dict[str, array.Queued] = {}
    asked, told = float("-inf"), ""
    left = [state for state in states if state.state in (WAITING, BUSY)]
    while left:
        if time.monotonic() - asked >= ASK_EVERY_S:
            asked = time.monotonic()
            try:  # before the files are looked at: who has left the queue has written its last
                queue = array.queue(array.read_jobs(folder))
            except array.NoAnswer as error:
                display.say(f"squeue does not answer ({error}); asking again")
            told = _tell_reasons(left, queue, told, display)
        for state in left:
            name = state.cell.run_id
            with suppress(OSError):  # a file server that pauses: the next look may tell
                held = watches[name].look().holder is not None
                if held or name in queue:
                    seen_last[name] = time.monotonic()
                gone = time.monotonic() - seen_last[name] > GONE_PATIENCE_S
                _follow(state, held, queue.get(name), gone, display)
        left = [state for state in left if state.state in (WAITING, BUSY, RUNNING)]
        display.refresh()
        time.sleep(POLL_S if left else 0.0)


def _follow(state: CellState, held: bool, task: array.Queued | None, gone: bool, display: Display) -> None:
    """Take over what has become of a cell. ``held``: a process runs it; ``gone``: nothing will any more."""
    was = state.state
    try:
        found, reason = state_on_disk(state.cell.run_dir, held)
    except ValueError as error:  # a record that cannot be read
        found, reason, gone = FAILED, str(error), True
    if found == RUNNING or held:
        if was == WAITING:
            state.start(time.monotonic())
            display.started(state)
        state.read_progress()
        return
    fresh = found in (FAILED, DIVERGED) and (task is None and records.read_run(state.cell.run_dir) != state.before)
    if found == DONE or fresh or gone:
        state.ended = time.monotonic()
        state.read_progress()
        verdict = found == DONE or found in (FAILED, DIVERGED)
        state.state, state.reason = (found, reason) if verdict else (STOPPED, "left Slurm's queue; see its log.txt")
        if was == RUNNING:
            display.ended(state, False)
        else:
            display.elsewhere(state)
    elif was == RUNNING:
        state.ended, state.state, state.reason = time.monotonic(), STOPPED, "if Slurm requeues it"
        display.ended(state, True)
        state.state, state.reason = WAITING, ""


def _tell_reasons(left: Sequence[CellState], queue: Mapping[str, array.Queued], told: str, display: Display) -> str:
    """Say why Slurm lets cells wait, when nothing runs; returns what was said."""
    tasks = [queue[state.cell.run_id] for state in left if state.cell.run_id in queue]
    reasons = sorted({task.reason for task in tasks if task.state == "PENDING"} - {"None"})
    text = ", ".join(reasons) if tasks and all(task.state == "PENDING" for task in tasks) else ""
    if text and text != told:
        display.say(f"Slurm has {_cells(len(tasks))} wait: {text}")
    return text or told
