"""The state of a sweep as text: a table that fits the terminal, the totals, and what the exponents promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sovit.launch.local.display import STYLES
from sovit.launch.pay.cost import money
from sovit.launch.state import CUT, DIVERGED, DONE, FAILED, RUNNING, STOPPED, WAITING, summary
from sovit.launch.tables import count_text, duration_text, table
from sovit.launch.watch.promise import Promise
from sovit.launch.watch.status import UNREADABLE, CellStatus, SweepStatus
from sovit.metric import place, shot_name, value_name

WIDE = 160  # columns from which the table has all there is; below, reasons follow in lines of their own
REASONS = 3  # lines of them in a live display, whose height is that of the terminal
FIRST = (RUNNING, UNREADABLE, FAILED, DIVERGED, STOPPED)  # whom to show where not all fit


def status_text(
    sweep: SweepStatus,
    *,
    width: int,
    rows: int | None = None,
    price: float | None = None,
    exponents: Mapping[str, Promise] | str | None = None,
) -> RenderableType:
    """Everything about a sweep. ``width`` in columns; at most ``rows`` lines of cells; ``price`` of a device hour."""
    cells = list(sweep.cells)
    hidden: list[CellStatus] = []
    if rows is not None and len(cells) > rows:
        order = [*FIRST, DONE, WAITING]
        ranked = sorted(cells, key=lambda cell: order.index(cell.state) if cell.state in order else len(FIRST))
        shown = ranked[: max(0, rows - 1)]
        hidden = [cell for cell in cells if cell not in shown]
        cells = [cell for cell in cells if cell in shown]
    parts: list[RenderableType] = [_table(sweep, cells, width)]
    if hidden:
        parts.append(Text(f"and {len(hidden)} more: {counts([cell.state for cell in hidden])}", style="dim"))
    if width < WIDE:
        told = [cell for cell in cells if cell.reason and (cell.state != STOPPED or cell.reason == CUT)]
        least = told if rows is None else told[:REASONS]
        parts += [
            Text(f"{label(sweep, cell)}: {cell.reason}", overflow="ellipsis", no_wrap=rows is not None)
            for cell in least
        ]
        if len(least) < len(told):
            parts.append(Text(f"and {len(told) - len(least)} more reasons, without --watch", style="dim"))
    parts += [Text(line) for line in totals(sweep, price)]
    parts += [Text(line) for line in promise_lines(exponents)]
    return Group(*parts)


def _table(sweep: SweepStatus, cells: list[CellStatus], width: int) -> Table:
    wide = width >= WIDE
    columns = [("cell", "left"), ("state", "left"), ("done", "right"), ("left", "right")]
    columns += [("step", "right"), ("images/s", "right")] if wide else []
    columns += [
        ("GFLOPs", "right"),
        (f"{sweep.metric[0]} {shot_name(*sweep.metric)}" if wide else value_name(*sweep.metric), "right"),
        ("process", "left"),
    ]
    rows = table(*columns, *([("reason", "left")] if wide else []))
    if not wide:
        rows.box, rows.padding = None, (0, 1, 0, 0)
        rows.columns[-1].no_wrap, rows.columns[-1].min_width = False, len("process")  # the one to give way
    for cell in cells:
        total = f" / {cell.total_steps:,}" if cell.total_steps else ""
        rows.add_row(
            Text(label(sweep, cell)),
            Text(cell.state, style=STYLES.get(cell.state, "red" if cell.state == UNREADABLE else "")),
            f"{cell.share:.0%}" if cell.step or cell.state == DONE else "",
            duration_text(cell.left_s) if cell.left_s is not None else "",
            *([f"{cell.step:,}{total}" if cell.step else "", _rate(cell)] if wide else []),
            count_text(cell.train_gflops) if cell.train_gflops else "",
            "" if cell.error is None else f"{cell.error:.3f}",
            Text(_where(cell), overflow="ellipsis", no_wrap=True),
            *([Text(cell.reason)] if wide else []),
        )
    return rows


def label(sweep: SweepStatus, cell: CellStatus) -> str:
    """The run id without the sweep's name."""
    return cell.run_id.removeprefix(f"{sweep.name}-")


def _rate(cell: CellStatus) -> str:
    return f"{cell.images_per_s:,.0f}" if cell.images_per_s else ""


def _where(cell: CellStatus) -> str:
    """The machine and process that run a cell, the machine only where it is not this one."""
    if cell.pid is None:
        return cell.host or ""
    return f"{cell.host.partition('.')[0]}:{cell.pid}" if cell.host else str(cell.pid)


def counts(states: list[str]) -> str:
    """Such as ``12 done, 1 failed, 7 waiting``, unreadable ones included."""
    unreadable = states.count(UNREADABLE)
    said = [summary(states)] if len(states) > unreadable else []
    return ", ".join(said + [f"{unreadable} {UNREADABLE}"] * bool(unreadable))


def totals(sweep: SweepStatus, price: float | None) -> list[str]:
    """Sentences about the whole sweep: states, time left, compute, hours, money, the best error."""
    left = sweep.left_s
    running = sweep.states.count(RUNNING)
    lines = [f"{sweep.name}: {len(sweep.cells)} cells, {counts(sweep.states)}."]
    if left is not None:
        among = "" if sweep.known else " for the cells that have started"
        lines.append(f"About {duration_text(left)} left with {running} at once{among}.")
    elif not running and {WAITING, STOPPED} & set(sweep.states):
        lines.append("Nothing runs; sovit run goes on with what is left.")
    planned = f" of {count_text(sweep.planned_gflops)}" if sweep.planned_gflops else ""
    cost = f", {money(price * sweep.device_hours)} at {money(price)} an hour" if price is not None else ""
    hours = f"{sweep.device_hours:,.3g} {sweep.device}{cost}"
    lines.append(f"Spent: {count_text(sweep.train_gflops)}{planned} GFLOPs trained (3 t), {hours}.")
    best = sweep.best
    if best is not None:
        lines.append(
            f"Best {value_name(*sweep.metric)} so far: {best.error:.3f} on {place(*sweep.metric)}, {label(sweep, best)}."
        )
    if sweep.note:
        lines.append(f"{sweep.note[0].upper()}{sweep.note[1:].rstrip('.')}.")
    return lines


def promise_lines(found: Mapping[str, Any] | str | None) -> list[str]:
    """A line for each exponent."""
    if found is None:
        return []
    if isinstance(found, str):
        return [f"Exponents: {found}."]
    lines = ["Exponents that the points so far promise (standard error; 95% interval to expect):"]
    for name, promise in found.items():
        if promise.why is not None:
            lines.append(f"  {name:<8} {promise.why}")
            continue
        high = "open" if promise.hi is None else f"{promise.hi:.2f}"
        interval = f"[{promise.lo:.2f}, {high}]" if promise.lo else "no interval yet"
        lines.append(f"  {name:<8} s = {promise.s:.2f} ± {promise.stderr:.2g}  {interval}  ({promise.runs} runs)")
    return lines
