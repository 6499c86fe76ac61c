"""What a person sees of a sweep: the plan, the running cells, the state of each cell afterwards.

On a terminal the running cells have bars below the lines of those that ended; anywhere else there are only lines, with a
summary once a minute, so that a log of the runner stays readable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sovit.launch.plan import Plan, makespan
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
    last_error,
    summary,
)
from sovit.launch.tables import duration_text
from sovit.metric import place, value_name

STYLES = {DONE: "green", RUNNING: "cyan", BUSY: "yellow", STOPPED: "yellow"} | dict.fromkeys(
    (FAILED, DIVERGED, DIED), "red"
)
SUMMARY_EVERY_S = 60.0
UNDECIDED_SHARE = 0.05  # of a cell's steps; before that its pace says nothing yet


def time_left(states: Sequence[CellState], workers: int, now: float) -> float:
    """Seconds until the last cell ends: the plan's expectation, corrected by the pace of the cells run so far."""
    took = expected = 0.0
    for state in states:
        share = _share_run(state)
        if state.started and share > UNDECIDED_SHARE:
            took += (state.ended or now) - state.started
            expected += share * state.cell.seconds
    pace = took / expected if expected else 1.0
    busy = []
    for state in states:
        if state.state == RUNNING:
            done = state.step / state.total_steps if state.total_steps else 0.0
            busy.append(max(0.0, pace * state.cell.seconds * (1 - done) - (0.0 if done else now - state.started)))
    free = [0.0] * (workers - len(busy))
    return makespan((pace * state.cell.seconds for state in states if state.state == WAITING), [*busy, *free] or [0.0])


def _share_run(state: CellState) -> float:
    """The share of its steps that a cell has made since it was started, which leaves out those before a resume."""
    if not state.total_steps or state.state not in (RUNNING, DONE):
        return 0.0
    return (state.step - (state.first_step or 0)) / state.total_steps


@dataclass
class Display:
    """Lines for what happens; `_Bars` adds the live part."""

    plan: Plan
    states: list[CellState]
    metric: tuple[str, int]
    console: Console
    begun: float = field(default_factory=time.monotonic)
    last_summary: float = field(default_factory=time.monotonic)

    def say(self, text: str | Text) -> None:
        line = Text(time.strftime("%H:%M:%S  "), style="dim")
        line.append(text if isinstance(text, Text) else Text(text, style="default"))
        if self.console.is_terminal:
            self.console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            self.console.print(line, soft_wrap=True)

    def begin(self) -> None:
        said = place(*self.metric).replace(" at ", ", ")
        self.say(
            f"{self.plan.name}: {len(self.states)} cells ({self.counts()}), {self.plan.workers} at once, "
            f"about {duration_text(self.left())}; {value_name(*self.metric)}: {said}"
        )

    def started(self, state: CellState) -> None:
        self.say(self.event("start", "", state, state.reason or ("again" if state.attempts > 1 else "")))

    def ended(self, state: CellState, again: bool) -> None:
        took = duration_text(state.ended - state.started)
        if state.state == DONE:
            error = last_error(state.cell.run_dir, *self.metric)
            tail = f"{took:>11}  {state.images_per_s:>8,.0f} images/s" + (
                "" if error is None else f"  {value_name(*self.metric)} {error:.3f}"
            )
        else:
            tail = f"{took:>11}  " + ("trying again: " if again else "") + state.reason
        self.say(self.event(state.state, STYLES[state.state], state, tail))

    def elsewhere(self, state: CellState) -> None:
        """What became of a cell that this runner did not run, or not to its end."""
        tail = state.reason
        if state.state == DONE:
            error = last_error(state.cell.run_dir, *self.metric)
            tail = "by another runner" + ("" if error is None else f"  {value_name(*self.metric)} {error:.3f}")
        word = "free" if state.state == WAITING else state.state
        self.say(self.event(word, STYLES.get(state.state, ""), state, tail))

    def repeats(self, state: CellState) -> None:
        """That a cell is a retry, and of what."""
        if state.repeats is not None:
            self.say(
                f"retry     {self.label(state)}  repeats {self.label(state.repeats)}, which diverged at optim.lr "
                f"{state.repeats.cell.config.optim.lr:g}, at {state.cell.config.optim.lr:g}"
            )

    def event(self, word: str, style: str, state: CellState, tail: str) -> Text:
        width = max(len(self.label(other)) for other in self.states)
        text = Text.assemble((f"{word:<8}  ", style), f"{self.label(state):<{width}}  {tail}")
        text.rstrip()
        return text

    def refresh(self) -> None:
        if time.monotonic() - self.last_summary >= SUMMARY_EVERY_S:
            self.last_summary = time.monotonic()
            self.say(f"{self.plan.name}: {self.counts()}; about {duration_text(self.left())} left")

    def label(self, state: CellState) -> str:
        return state.cell.run_id.removeprefix(f"{self.plan.name}-")

    def counts(self) -> str:
        return summary([state.state for state in self.states])

    def left(self) -> float:
        return time_left(self.states, self.plan.workers, time.monotonic())


@dataclass
class _Bars(Display):
    live: Live = field(init=False)

    def __post_init__(self) -> None:
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def started(self, state: CellState) -> None:
        self.refresh()

    def refresh(self) -> None:
        self.live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """A bar for each running cell and one for the sweep, which is measured in expected seconds."""
        now = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for column in range(5):
            table.add_column(justify="left" if column < 2 else "right", no_wrap=True)
        running = sorted((state for state in self.states if state.state == RUNNING), key=lambda state: state.started)
        for state in running:
            known = state.total_steps > 0
            table.add_row(
                Text(self.label(state), style=STYLES[RUNNING]),
                ProgressBar(state.total_steps or 1, state.step, width=24, pulse=not known),
                f"{state.step:,} / {state.total_steps:,} steps" if known else "starting",
                f"{state.images_per_s:,.0f} images/s" if known else "",
                duration_text(now - state.started),
            )
        whole = sum(state.cell.seconds for state in self.states)
        made = sum(state.cell.seconds * self._share(state) for state in self.states)
        table.add_row(
            Text(self.plan.name, style="bold"),
            ProgressBar(whole or 1, made, width=24),
            f"{sum(state.state == DONE for state in self.states)} / {len(self.states)} cells",
            "",
            duration_text(now - self.begun),
        )
        return Group("", table, Text(f"{self.counts()}; about {duration_text(self.left())} left", style="dim"))

    @staticmethod
    def _share(state: CellState) -> float:
        if state.state in (DONE, FAILED, DIVERGED):
            return 1.0
        return state.step / state.total_steps if state.total_steps else 0.0


@contextmanager
def open_display(plan: Plan, states: list[CellState], metric: tuple[str, int]) -> Iterator[Display]:
    """The display that suits standard output: bars on a terminal, lines elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        display = Display(plan, states, metric, console)
        display.begin()
        yield display
        return
    bars = _Bars(plan, states, metric, console)
    bars.begin()
    with bars.live:
        yield bars
