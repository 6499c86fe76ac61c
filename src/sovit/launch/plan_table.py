"""A plan in words: a row for each cell, and the totals."""

from __future__ import annotations

from rich.table import Table

from sovit.launch.plan import Plan
from sovit.launch.tables import count_text, duration_text, table


def plan_table(plan: Plan) -> Table:
    """A row a cell: shape, parameters, compute, the step of the first and the last duration, the time to expect."""
    rows = table(
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
        rows.add_row(
            cell.run_id,
            count_text(cell.num_params),
            f"{cell.forward_gflops:.4g}",
            f"{steps[0]:,} .. {steps[-1]:,} ({len(steps)})" if len(steps) > 1 else f"{steps[0]:,}",
            f"{cell.steps:,}",
            count_text(cell.images),
            f"{cell.train_gflops:.3g}",
            duration_text(cell.seconds),
        )
    return rows


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
