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
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from sovit import claims, records
from sovit.claims import LEASE_S
from sovit.launch.devices import visible_gpus
from sovit.launch.local.display import Display, open_display
from sovit.launch.local.kept import keep, refuse_other
from sovit.launch.local.others import Others, take_verdict
from sovit.launch.local.outcome import conclude, judge
from sovit.launch.local.retry import MAX_RETRIES, check_factor, retry_cell
from sovit.launch.local.slots import Slots
from sovit.launch.plan import Plan
from sovit.launch.processes import OUT_OF_MEMORY, RESTARTS
from sovit.launch.signals import collected
from sovit.launch.state import (
    BUSY,
    CUT,
    DIED,
    DIVERGED,
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    CellState,
    changed_cells,
    read_record,
    state_on_disk,
)
from sovit.launch.sweep import Sweep, SweepError

PRELOAD = ["sovit.launch.preload"]
TARGET = "sovit.lit.engine:run_cell"
UNDECIDED = (STOPPED, DIED, BUSY)
ATTEMPTS = 2
POLL_S = 0.5
GRACE_S = (
    30.0  # for a cell to end its step and write its checkpoint after a signal, and what a large one takes beyond that
)
STATE_BYTES, DISK_BYTES_PER_S = 16, 2e8  # weights, their average and two moments in float32; a slow disk


def run_sweep(
    plan: Plan,
    *,
    sweep: Sweep | None = None,
    retry_failed: bool = False,
    retry_diverged: float | None = None,
    target: str = TARGET,
    preload: Sequence[str] = PRELOAD,
    metric: tuple[str, int] = ("fractals", 10),
    lease: float = LEASE_S,
) -> int:
    """Run what is left of a sweep, longest cells first, ``plan.workers`` at once, and wait for what other runners have.

    ``sweep``: the file the plan was made of, kept beside the runs. ``retry_diverged``: repeat each diverged cell, as
    another cell, at this fraction of its learning rate, and once more at its square. ``target`` is ``module:function``,
    called as ``function(overrides) -> exit code`` in a process of its own; ``metric`` is the dataset and the shots whose
    error is shown; ``lease`` is the silence in seconds after which an owner on another machine counts as dead.

    Returns 0 if every cell is done or replaced by a retry that is, 1 if some are not, 128 + the number of the signal that
    stopped it. Raises SweepError if the runs belong to another sweep or configuration, OSError if they cannot be written.
    """
    check_factor(retry_diverged)
    home = plan.runs_dir / plan.name
    if sweep is not None:
        refuse_other(sweep, home)
    refuse_changed(plan)
    states = [CellState(cell) for cell in plan.cells]
    for state in states:
        _admit(state, retry_failed)
    for state in states:  # which grows
        _add_retry(states, state, retry_diverged, retry_failed)
    received: list[int] = []
    if any(state.state in (WAITING, BUSY) for state in states):
        slots = Slots(plan, visible_gpus() if plan.cells[0].accelerator == "gpu" else [])
        if sweep is not None:
            keep(sweep, home)
        with open_display(plan, states, metric) as display, collected(received):
            runner = _Workers(plan, states, slots, target, preload, display, lease)
            runner.retry = lambda state: _add_retry(states, state, retry_diverged, retry_failed)
            runner.work(received)
    elif all(state.state == DONE for state in states):
        print(f"{plan.name}: all {len(states)} cells are done already. Next: sovit fit {home}")
        return 0
    return conclude(plan, states, received)


def _admit(state: CellState, retry_failed: bool) -> None:
    """Decide from its files what is to be done with a cell."""
    state.state, state.reason = state_on_disk(state.cell.run_dir)
    if state.state == RUNNING:
        state.state = BUSY
    elif state.state == STOPPED:
        state.state, state.reason = WAITING, state.reason if state.reason == CUT else ""
    elif retry_failed and state.state in (FAILED, DIVERGED):
        state.state, state.reason, state.before = WAITING, "", read_record(state.cell.run_dir)


def _add_retry(states: list[CellState], state: CellState, factor: float | None, retry_failed: bool) -> CellState | None:
    """The retry of a cell if it diverged and has one left, added to the states unless it is among them."""
    chain = [state]
    while (repeated := chain[-1].repeats) is not None:
        chain.append(repeated)
    if state.state != DIVERGED or factor is None or len(chain) > MAX_RETRIES:
        return None
    cell = retry_cell(chain[-1].cell, factor, len(chain))
    if any(other.cell.run_id == cell.run_id for other in states):
        return None
    retry = CellState(cell, repeats=state)
    _admit(retry, retry_failed)
    states.append(retry)
    return retry


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
    """The processes of a sweep, each with the GPUs that it may use."""

    def __init__(
        self,
        plan: Plan,
        states: list[CellState],
        slots: Slots,
        target: str,
        preload: Sequence[str],
        display: Display,
        lease: float = LEASE_S,
    ) -> None:
        self.slots, self.target, self.preload, self.display = slots, target, list(preload), display
        self.queue: list[CellState] = []
        self.others = Others(lease)
        self.retry: Callable[[CellState], CellState | None] = lambda state: None
        self.running: dict[int, tuple[BaseProcess, CellState, tuple[str, ...]]] = {}  # by the process's sentinel
        self.grace_s = GRACE_S + max(cell.num_params for cell in plan.cells) * STATE_BYTES / DISK_BYTES_PER_S
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(self.preload)
        for state in sorted(states, key=lambda state: state.cell.seconds, reverse=True):
            if state.state in (WAITING, BUSY):
                self.display.repeats(state)
            self._take(state)

    def work(self, received: list[int]) -> None:
        """Run the queue to its end and see what others run to theirs, or until a signal arrives."""
        try:
            while (self.queue or self.running or self.others.watched) and not received:
                self._turn(received)
        except BaseException as error:
            time.sleep(POLL_S)  # for the signal, if the fork server died of one to the whole process group
            dead = isinstance(error, EOFError | ConnectionError)
            if not (received and dead):
                for process, _, _ in self.running.values():
                    process.kill()  # else this process would wait for them before it says what went wrong
                if not dead:
                    raise
                raise SweepError(
                    "the process that imports the libraries died (out of memory?); the same command goes on."
                ) from None
        if received:
            num = len(self.running)
            who = f"{num} cells write their checkpoints" if num > 1 else "the cell writes its checkpoint"
            self.display.say(f"stopping: {who} (again to kill)" if num else "stopping")
            self._stop(received)

    def _turn(self, received: list[int]) -> None:
        while self.queue and self.slots.fit(self.queue[0].cell.devices) and not received:
            self._begin(self.queue.pop(0))
        self._reap(stopping=False)
        for state in self.others.look():
            self.display.elsewhere(state)
            if state.state == WAITING:
                state.reason = ""  # said
            self._take(state)
            self._follow(state)
        if not self.queue and not self.running and self.others.watched and (text := self.others.waiting_for()):
            self.display.say(text)

    def _take(self, state: CellState) -> None:
        """Put a cell where it belongs: into the queue, or among those that others run."""
        if state.state == WAITING:
            self.queue.append(state)
        elif state.state == BUSY:
            self.others.add(state)
            self.display.elsewhere(state)

    def _follow(self, state: CellState) -> None:
        """See to the retry of a cell that diverged."""
        while (retry := self.retry(state)) is not None:
            self.display.repeats(retry)
            self._take(retry)
            state = retry

    def _begin(self, state: CellState) -> None:
        """Start a cell, unless another runner has it or has ended it since this one last looked."""
        directory = state.cell.run_dir
        try:
            holder = claims.holder(directory)
            if not take_verdict(state, held=holder is not None):
                state.state = WAITING if holder is None else BUSY
                directory.mkdir(parents=True, exist_ok=True)
                (directory / records.LOG).open("a").close()  # the process could not say why it has no log
        except OSError as error:
            state.state, state.reason = FAILED, f"{error.filename or directory}: {error.strerror or error}"
        except ValueError as error:
            state.state, state.reason = FAILED, str(error)
        if state.state == WAITING and self.preload:
            self._import()
            self._begin(state)  # which others may have run meanwhile
        elif state.state == WAITING:
            self._start(state)
        elif state.state == BUSY:
            self._take(state)
        else:
            self.display.elsewhere(state)
            self._follow(state)

    def _import(self) -> None:
        """Start the fork server and wait until it has everything imported, which takes a minute on a busy machine."""
        self.display.say("importing the libraries once for all cells")
        self.preload = []
        process = self.context.Process(target=int)
        process.start()
        process.join()
        process.close()

    def _start(self, state: CellState) -> None:
        log, gpus = state.cell.run_dir / records.LOG, self.slots.take(state.cell.devices)
        process = self.context.Process(
            target=_child, args=(self.target, state.cell.overrides, str(log), gpus), name=state.cell.run_id
        )
        process.start()
        state.start(time.monotonic())
        self.running[process.sentinel] = (process, state, gpus)
        self.display.started(state)

    def _reap(self, stopping: bool) -> None:
        """Wait a moment for processes that end, take their verdicts and show what the others do."""
        for sentinel in wait(list(self.running), timeout=POLL_S):
            assert isinstance(sentinel, int)
            process, state, gpus = self.running.pop(sentinel)
            process.join()
            assert process.exitcode is not None
            state.ended = time.monotonic()
            self.slots.give(gpus)
            state.state, state.reason = judge(state, process.exitcode, stopping)
            state.read_progress()
            no_memory = process.exitcode == OUT_OF_MEMORY and state.state == DIED and state.restarts < RESTARTS
            process.close()
            if no_memory and not stopping:  # it has noted a smaller micro-batch: no attempt either
                state.attempts, state.restarts = state.attempts - 1, state.restarts + 1
                self.display.say(f"{state.cell.run_id} ran out of device memory; again with a smaller micro-batch")
                self._wait_for_turn(state, first=True)
                continue
            if state.state == BUSY and not stopping:  # another runner was quicker: not an attempt
                state.attempts -= 1
                self._take(state)
                continue
            again = state.state in UNDECIDED and state.attempts < ATTEMPTS and not stopping
            self.display.ended(state, again)
            if again:
                self._wait_for_turn(state)
            elif not stopping:
                self._follow(state)
        for _, state, _ in self.running.values():
            state.read_progress()
        self.display.refresh()

    def _wait_for_turn(self, state: CellState, *, first: bool = False) -> None:
        """Put a cell back whose process ended; what that wrote is no verdict, such as the failure of a rank left alone."""
        state.state, state.reason, state.before = WAITING, "", read_record(state.cell.run_dir)
        self.queue.insert(0 if first else len(self.queue), state)

    def _stop(self, received: list[int]) -> None:
        for process, _, _ in self.running.values():
            process.terminate()
        deadline = time.monotonic() + self.grace_s
        while self.running and time.monotonic() < deadline and len(received) < 2:
            self._reap(stopping=True)
        for process, _, _ in self.running.values():
            process.kill()
        while self.running:
            self._reap(stopping=True)


def _child(target: str, overrides: list[str], log: str, gpus: tuple[str, ...]) -> None:
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
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
            gpus
        )  # read when CUDA starts, which nothing imported so far has done
    module, _, function = target.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)(overrides))


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # nobody is left to read it
