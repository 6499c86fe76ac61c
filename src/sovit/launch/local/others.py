"""Cells that other runners have, on this machine or on another: watched until they end or their owner is gone.

Several ``sovit run`` may share one ``runs/``. Each starts what nobody holds; what somebody holds is looked at every few
seconds, through its files alone, and taken over when its claim is released or dies.
"""

from __future__ import annotations

import time
from contextlib import suppress

from sovit.claims import LEASE_S, Holder, Watch
from sovit.launch.state import BUSY, DIVERGED, DONE, FAILED, WAITING, CellState, read_record, state_on_disk

LOOK_EVERY_S = 2.0


def take_verdict(state: CellState, held: bool) -> bool:
    """Whether the run has a verdict that this runner need not ask for again; the cell then has it."""
    found, reason = state_on_disk(state.cell.run_dir, held)
    new = not held and found in (FAILED, DIVERGED) and read_record(state.cell.run_dir) != state.before
    if found == DONE or new:
        state.state, state.reason = found, reason
    return found == DONE or new


class Others:
    """The busy cells of a sweep and who has them."""

    def __init__(self, lease: float = LEASE_S) -> None:
        self.lease = lease
        self.watched: list[tuple[CellState, Watch]] = []
        self._holders: dict[str, Holder] = {}  # by run id
        self._told: set[str] = set()
        self._next_look = 0.0

    def add(self, state: CellState) -> None:
        watch = Watch(state.cell.run_dir, self.lease)
        state.state, state.reason = BUSY, "another process runs it"
        with suppress(OSError):
            if not self._see(state, watch)[0]:
                self._next_look = 0.0  # let go in the meantime
        self.watched.append((state, watch))

    def look(self) -> list[CellState]:
        """The cells that others have no more: with a verdict, or waiting to be run here."""
        if time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + min(LOOK_EVERY_S, self.lease / 10)
        gone = []
        for item in list(self.watched):
            with suppress(OSError):  # a file server that pauses: the next look may tell
                if self._is_gone(*item):
                    self.watched.remove(item)
                    gone.append(item[0])
        return gone

    def waiting_for(self) -> str:
        """Who has the cells that are left, to be said once: again only if somebody is new; else ""."""
        hosts = {self._host(self._holders.get(state.cell.run_id)) for state, _ in self.watched}
        if hosts <= self._told:
            return ""
        self._told |= hosts
        count = f"{len(self.watched)} cells" if len(self.watched) > 1 else "1 cell"
        return f"waiting for {count} that {' and '.join(sorted(hosts))} {'run' if len(hosts) > 1 else 'runs'}"

    @staticmethod
    def _host(holder: Holder | None) -> str:
        return "another process" if holder is None else "a runner on this machine" if holder.local else holder.host

    def _see(self, state: CellState, watch: Watch) -> tuple[bool, bool]:
        """(whether somebody holds the run, whether its owner is only known to be silent)."""
        seen = watch.look()
        if seen.holder is not None:
            state.reason = f"run by {seen.holder}"
            self._holders[state.cell.run_id] = seen.holder
        return seen.holder is not None, seen.silent

    def _is_gone(self, state: CellState, watch: Watch) -> bool:
        held, silent = self._see(state, watch)
        state.read_progress()
        try:
            if take_verdict(state, held):
                return True
        except ValueError as error:
            state.state, state.reason = FAILED, str(error)
            return True
        if held:
            return False
        if silent:
            watch.evict()  # else the cell's process would wait for a sign of life once more
        who = self._holders.get(state.cell.run_id)
        state.state, state.reason = WAITING, f"{who or 'its process'} {'is silent' if silent else 'has left it'}"
        return True
