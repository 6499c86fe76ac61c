"""A plan in words and as JSON: a row for each cell, and the totals."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sovit.launch.pay.cost import bill, cell_hours, money
from sovit.launch.plan import Plan
from sovit.launch.tables import count_text, duration_text, table

COLUMNS = (
    "cell",
    "params",
    "GFLOPs/image",
    "evaluated at step",
    "steps",
    "images",
    "train GFLOPs",
    "time",
    "cost",
)
EXPENDABLE = ("evaluated at step", "images", "GFLOPs/image", "params")  # the first to go first
IDLE = 1.02  # held over used device hours, from which on both are said


def terminal_width() -> int | None:
    """Columns of the terminal that standard output goes to, or None if it goes elsewhere."""
    console = Console()
    return console.width if console.is_terminal else None


def plan_table(plan: Plan, price: float | None = None, *, width: int | None = None) -> Table:
    """A row a cell: shape, parameters, compute, the step of the first and the last duration, the time to expect.

    ``price``: dollars a device hour. ``width``: of the terminal; where it is too small for everything, the name of the
    sweep and columns that follow from the others are left out.
    """
    left_out: list[str] = [] if price is not None else ["cost"]
    rows = _table(plan, price, left_out, short=False)
    for name in ("", *EXPENDABLE):
        if width is None or _natural_width(rows) <= width:
            break
        left_out.append(name)
        rows = _table(plan, price, left_out, short=True)
    return rows


def _natural_width(rows: Table) -> int:
    console = Console(width=1000)
    return console.measure(rows).maximum


def _table(plan: Plan, price: float | None, left_out: list[str], *, short: bool) -> Table:
    names = [name for name in COLUMNS if name not in left_out]
    rows = table(*((name, "left" if name == "cell" else "right") for name in names))
    for cell in plan.cells:
        steps = list(cell.evaluations)
        texts = {
            "cell": cell.run_id.removeprefix(f"{plan.name}-") if short else cell.run_id,
            "params": count_text(cell.num_params),
            "GFLOPs/image": f"{cell.forward_gflops:.4g}",
            "evaluated at step": f"{steps[0]:,} .. {steps[-1]:,} ({len(steps)})" if len(steps) > 1 else f"{steps[0]:,}",
            "steps": f"{cell.steps:,}",
            "images": count_text(cell.images),
            "train GFLOPs": f"{cell.train_gflops:.3g}",
            "time": duration_text(cell.seconds),
            "cost": "" if price is None else money(cell_hours(plan, cell) * price),
        }
        rows.add_row(*(texts[name] for name in names))
    return rows


def plan_summary(plan: Plan, price: float | None = None) -> str:
    """The totals of a plan, where they are from, and the conventions behind them."""
    compute, whole = plan.train_gflops / 3, bill(plan)
    gpu = whole.device == "GPU"
    cells = "1 cell" if len(plan.cells) == 1 else f"{len(plan.cells)} cells"
    lines = [
        f"{plan.name}: {cells}, compute t = {compute:.3g} GFLOPs (forward FLOPs per image x images), "
        f"to train 3 t = {plan.train_gflops:.3g} GFLOPs.",
        f"About {duration_text(plan.wall_seconds)} with {plan.workers} at once, {plan.device_hours:,.3g} "
        f"{'GPU' if gpu else 'core'} hours; {plan.basis}.",
    ]
    if price is not None:
        each = f"{money(price)} an hour of {'one GPU' if gpu else 'this machine'}"
        cost = f"About {money(whole.used * price)} at {each}"
        if whole.held > IDLE * whole.used:
            cost += (
                f"; {money(whole.held * price)} if {'all GPUs are' if gpu else 'it is'} paid until the last cell ends"
            )
        lines.append(cost + ".")
    return "\n".join([*lines, *plan.notes])


def plan_document(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The plan for programs: seconds, GFLOPs (train: 3 x forward), device hours and, with a price, dollars."""
    whole = bill(plan)
    cells = []
    for cell in plan.cells:
        hours = cell_hours(plan, cell)
        cells.append(
            {
                "run_id": cell.run_id,
                "run_dir": str(cell.run_dir),
                "overrides": cell.overrides,
                "config_hash": cell.config_hash,
                **cell.shape.as_dict(),
                "seed": cell.seed,
                "num_params": cell.num_params,
                "forward_gflops": cell.forward_gflops,
                "evaluations": {duration: step for step, duration in cell.evaluations.items()},
                "steps": cell.steps,
                "images": cell.images,
                "train_gflops": cell.train_gflops,
                "seconds": cell.seconds,
                "device_hours": hours,
                **({} if price is None else {"cost": hours * price}),
            }
        )
    return {
        "name": plan.name,
        "workers": plan.workers,
        "accelerator": plan.cells[0].accelerator,
        "train_gflops": plan.train_gflops,
        "wall_seconds": plan.wall_seconds,
        "device": whole.device,
        "device_hours_used": whole.used,
        "device_hours_held": whole.held,
        **({} if price is None else {"price": price, "cost": whole.used * price, "cost_held": whole.held * price}),
        "basis": plan.basis,
        "notes": list(plan.notes),
        "cells": cells,
    }
