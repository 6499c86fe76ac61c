"""Run the cells of a sweep on this machine: one process a cell, forked from a server that has everything imported.

A cell is done when its run directory says so, hence running a sweep again only does what is left. A failed or diverged
cell is a result: it is kept, the others go on, and it is tried again only when asked for. A process that ends without a
verdict (killed, out of memory) is tried once more, then left for the next invocation; either continues from its
checkpoint. Cells die with the runner, however it dies.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from sovit import records
from sovit.launch.display import Display, open_display
from sovit.launch.plan import Plan, visible_gpus
from sovit.launch.state import (
    BUSY,
    DIED,
    DIVERGED,
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    CellState,
    changed_cells,
    state_on_disk,
)
from sovit.launch.sweep import SweepError

PRELOAD = ["sovit.launch.preload"]
TARGET = "sovit.lit.engine:run_cell"
# Exit codes of a cell; anything else, signals included, is no verdict.
VERDICTS = {0: DONE, 1: FAILED, 3: DIVERGED, 75: STOPPED, 76: BUSY}
UNDECIDED = (STOPPED, DIED, BUSY)
ATTEMPTS = 2
POLL_S = 0.5
GRACE_S = 30.0  # for a cell to write its checkpoint after a signal


def run_sweep(
    plan: Plan,
    *,
    retry_failed: bool = False,
    target: str = TARGET,
    preload: Sequence[str] = PRELOAD,
    metric: tuple[str, int] = ("fractals", 10),
) -> int:
    """Run what is left of a sweep, longest cells first, ``plan.workers`` at once.

    ``target`` is ``module:function``, called as ``function(overrides) -> exit code`` in a process of its own;
    ``metric`` is the dataset and the shots whose error is shown. Returns 0 if every cell is done, 1 if some are not,
    128 + the number of the signal that stopped it. Raises SweepError if a run directory holds another configuration.
    """
    refuse_changed(plan)
    states = [CellState(cell) for cell in plan.cells]
    for state in states:
        state.state, state.reason = state_on_disk(state.cell.run_dir)
        if state.state in (STOPPED, RUNNING) or (retry_failed and state.state in (FAILED, DIVERGED)):
            state.state, state.reason = WAITING, ""  # a cell that runs elsewhere will say so itself
    if all(state.state == DONE for state in states):
        print(f"{plan.name}: all {len(states)} cells are done already. Next: sovit fit {plan.runs_dir / plan.name}")
        return 0
    received: list[int] = []
    if any(state.state == WAITING for state in states):
        with open_display(plan, states, metric) as display, _signals(received):
            _Workers(plan, states, target, preload, display).work(received)
    return _verdict(plan, states, received)


def refuse_changed(plan: Plan) -> None:
    """Raise SweepError if a cell would mix two configurations in one run directory."""
    changed = changed_cells(plan.cells)
    if changed:
        raise SweepError(
            f"{changed[0].run_dir} holds a run of another configuration"
            + (f", and so do {len(changed) - 1} other cells" if len(changed) > 1 else "")
            + "; give the sweep another name (name=NEW), or delete what is outdated."
        )


class _Workers:
    """The processes of a sweep: a slot for each worker, holding the GPU it may use (None on a CPU)."""

    def __init__(
        self, plan: Plan, states: list[CellState], target: str, preload: Sequence[str], display: Display
    ) -> None:
        self.states, self.target, self.display = states, target, display
        self.queue = sorted(
            (state for state in states if state.state == WAITING), key=lambda state: state.cell.seconds, reverse=True
        )
        gpus = visible_gpus() if plan.cells[0].accelerator == "gpu" else []
        self.slots = [gpus[i % len(gpus)] if gpus else None for i in range(plan.workers)]
        self.running: dict[int, tuple[BaseProcess, CellState, str | None]] = {}  # by the process's sentinel
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(preload))
        if preload:
            display.say("importing the libraries once for all cells")

    def work(self, received: list[int]) -> None:
        """Run the queue to its end, or until a signal arrives."""
        while (self.queue or self.running) and not received:
            while self.queue and self.slots:
                self._start(self.queue.pop(0), self.slots.pop())
            self._reap(stopping=False)
        if received:
            self.display.say(f"stopping: {len(self.running)} cells write their checkpoints (again to kill them)")
            self._stop(received)

    def _start(self, state: CellState, gpu: str | None) -> None:
        log = state.cell.run_dir / records.LOG
        process = self.context.Process(
            target=_child, args=(self.target, state.cell.overrides, str(log), gpu), name=state.cell.run_id
        )
        process.start()  # the first waits for the fork server to have everything imported
        state.start(time.monotonic())
        self.running[process.sentinel] = (process, state, gpu)
        self.display.started(state)

    def _reap(self, stopping: bool) -> None:
        """Wait a moment for processes that end, take their verdicts and show what the others do."""
        for sentinel in wait(list(self.running), timeout=POLL_S):
            assert isinstance(sentinel, int)
            process, state, gpu = self.running.pop(sentinel)
            process.join()
            assert process.exitcode is not None
            state.ended = time.monotonic()
            self.slots.append(gpu)
            state.state, state.reason = _judge(state, process.exitcode, stopping)
            state.read_progress()
            process.close()
            again = state.state in UNDECIDED and state.attempts < ATTEMPTS and not stopping
            self.display.ended(state, again)
            if again:
                state.state = WAITING
                self.queue.append(state)
        for _, state, _ in self.running.values():
            state.read_progress()
        self.display.refresh()

    def _stop(self, received: list[int]) -> None:
        for process, _, _ in self.running.values():
            process.terminate()
        deadline, signals = time.monotonic() + GRACE_S, len(received)
        while self.running and time.monotonic() < deadline and len(received) == signals:
            self._reap(stopping=True)
        for process, _, _ in self.running.values():
            process.kill()
        while self.running:
            self._reap(stopping=True)


def _child(target: str, overrides: list[str], log: str, gpu: str | None) -> None:
    """A cell's process: tie its life to the runner's, send its output to the log, run it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The sentinel is a pipe whose other end only the runner holds (not the fork server, which outlives it).
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    os.setpgid(0, 0)  # Ctrl-C on a terminal goes to the runner alone, which passes on SIGTERM
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed cell keeps what it said
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, which nothing imported so far has done
    module, _, function = target.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)(overrides))


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # nobody is left to read it


def _judge(state: CellState, exitcode: int, stopping: bool) -> tuple[str, str]:
    """(state, reason) of a cell whose process ended."""
    verdict = VERDICTS.get(exitcode, DIED)
    on_disk, reason = state_on_disk(state.cell.run_dir)
    if stopping and (verdict == DIED or (verdict == DONE and on_disk != DONE)):
        return STOPPED, ""  # the signal came before the cell could handle it
    if verdict == DONE and on_disk != DONE:
        return DIED, "ended without a verdict; see log.txt"
    if verdict == BUSY:
        return BUSY, "another process runs it"
    if verdict == DIED:
        how = f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
        return DIED, how + (" (out of memory?)" if exitcode == -signal.SIGKILL else "")
    if verdict in (FAILED, DIVERGED):
        return verdict, (reason if on_disk == verdict and reason else _last_line(state.cell.run_dir / records.LOG))
    return verdict, ""


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _verdict(plan: Plan, states: list[CellState], received: list[int]) -> int:
    """Say what is left and how to go on; the exit code of the runner."""
    left = {name: sum(state.state == name for state in states) for name in (FAILED, DIVERGED, DIED, BUSY, STOPPED)}
    if received:
        done = sum(state.state == DONE for state in states)
        print(f"{plan.name}: stopped, {done} of {len(states)} cells are done; the same command goes on from there.")
        return 128 + received[0]
    if left[FAILED] or left[DIVERGED]:
        print(
            f"{plan.name}: {left[FAILED] + left[DIVERGED]} of {len(states)} cells failed or diverged; their log.txt says "
            "why, and the same command with --retry-failed tries them again."
        )
    if left[DIED]:
        print(
            f"{plan.name}: {left[DIED]} of {len(states)} cells died twice without a verdict; the same command goes on "
            "with them, with fewer --workers if memory is short."
        )
    if left[STOPPED]:
        print(f"{plan.name}: {left[STOPPED]} of {len(states)} cells were stopped; the same command goes on with them.")
    if left[BUSY]:
        print(f"{plan.name}: {left[BUSY]} of {len(states)} cells are run by another process.")
    if any(state.state != DONE for state in states):
        return 1
    print(f"{plan.name}: all {len(states)} cells are done. Next: sovit fit {plan.runs_dir / plan.name}")
    return 0


@contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
