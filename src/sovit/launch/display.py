"""What a person sees of a sweep: the plan, the running cells, the state of each cell afterwards.

On a terminal the running cells have bars below the lines of those that ended; anywhere else there are only lines, with a
summary once a minute, so that a log of the runner stays readable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
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
    progress,
    state_on_disk,
    summary,
)

STYLES = {DONE: "green", RUNNING: "cyan", BUSY: "yellow", STOPPED: "yellow"} | dict.fromkeys(
    (FAILED, DIVERGED, DIED), "red"
)
SUMMARY_EVERY_S = 60.0
UNDECIDED_SHARE = 0.05  # of a cell's steps; before that its pace says nothing yet


def duration_text(seconds: float) -> str:
    """Such as 47 s, 3 min 20 s, 2 h 05 min, 12 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def count_text(value: float) -> str:
    """Three digits and a suffix, such as 4.2K, 26.1M, 1.7e+11."""
    for limit, suffix in ((1e3, ""), (1e6, "K"), (1e9, "M"), (1e12, "B")):
        if value < limit * 0.9995:
            scaled = value / (limit / 1e3)
            return f"{value:g}" if not suffix and value == int(value) else f"{scaled:.3g}{suffix}"
    return f"{value:.3g}"


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
        self.say(
            f"{self.plan.name}: {len(self.states)} cells ({self.counts()}), {self.plan.workers} at once, "
            f"about {duration_text(self.left())}; error: {self.metric[0]}, {self.metric[1]} shots"
        )

    def started(self, state: CellState) -> None:
        self.say(self.event("start", "", state, "again" if state.attempts > 1 else ""))

    def ended(self, state: CellState, again: bool) -> None:
        took = duration_text(state.ended - state.started)
        if state.state == DONE:
            error = last_error(state.cell.run_dir, *self.metric)
            tail = f"{took:>11}  {state.images_per_s:>8,.0f} images/s" + (
                "" if error is None else f"  error {error:.3f}"
            )
        else:
            tail = f"{took:>11}  " + ("trying again: " if again else "") + state.reason
        self.say(self.event(state.state, STYLES[state.state], state, tail))

    def event(self, word: str, style: str, state: CellState, tail: str) -> Text:
        width = max(len(self.label(other)) for other in self.states)
        return Text.assemble((f"{word:<8}  ", style), f"{self.label(state):<{width}}", f"  {tail}".rstrip())

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


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=name != "reason", overflow="fold")  # type: ignore[arg-type]
    return table


def print_table(table: Table) -> None:
    """On a terminal as wide as it is, elsewhere as wide as the table needs, so that a pipe loses nothing."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(
            highlight=False, width=console.measure(table, options=console.options.update(width=1000)).maximum
        )
    console.print(table)


def plan_table(plan: Plan) -> Table:
    """A row a cell: shape, parameters, compute, the step of the first and the last duration, the time to expect."""
    table = _table(
        ("cell", "left"),
        ("params", "right"),
        ("GFLOPs/image", "right"),
        ("evaluated at step", "right"),
        ("steps", "right"),
        ("images", "right"),
        ("train GFLOPs", "right"),
        ("time", "right"),
    )
    for cell in plan.cells:
        steps = list(cell.evaluations)
        table.add_row(
            cell.run_id,
            count_text(cell.num_params),
            f"{cell.forward_gflops:.4g}",
            f"{steps[0]:,} .. {steps[-1]:,} ({len(steps)})" if len(steps) > 1 else f"{steps[0]:,}",
            f"{cell.steps:,}",
            count_text(cell.images),
            f"{cell.train_gflops:.3g}",
            duration_text(cell.seconds),
        )
    return table


def plan_summary(plan: Plan) -> str:
    """The totals of a plan, and the conventions behind them."""
    gpu = plan.cells[0].accelerator == "gpu"
    compute = plan.train_gflops / 3
    return (
        f"{plan.name}: {len(plan.cells)} cells, compute t = {compute:.3g} GFLOPs (forward FLOPs per image x images), "
        f"to train 3 t = {plan.train_gflops:.3g} GFLOPs.\n"
        f"About {plan.device_hours:,.3g} {'GPU' if gpu else 'core'} hours, {duration_text(plan.wall_seconds)} with "
        f"{plan.workers} at once; estimated for {plan.basis}."
    )


def status_table(directories: Sequence[Path], metric: tuple[str, int]) -> tuple[Table, list[str]]:
    """A row for each run directory, and the states. ``metric``: the dataset and the shots of the error shown."""
    dataset, shots = metric
    table = _table(
        ("cell", "left"),
        ("state", "left"),
        ("step", "right"),
        ("images/s", "right"),
        (f"{dataset} {shots}-shot error", "right"),
        ("reason", "left"),
    )
    states = []
    for directory in directories:
        state, reason = state_on_disk(directory)
        step, total_steps, images_per_s = progress(directory)
        error = last_error(directory, dataset, shots)
        table.add_row(
            directory.name,
            Text(state, style=STYLES.get(state, "")),
            f"{step:,} / {total_steps:,}" if total_steps else "",
            f"{images_per_s:,.0f}" if images_per_s else "",
            "" if error is None else f"{error:.3f}",
            reason,
        )
        states.append(state)
    return table, states
