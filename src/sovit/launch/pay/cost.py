"""What a plan costs: device hours, money, and a cap on either.

The device is a GPU, or on a CPU the whole machine, which is how both are rented. Its hours are counted twice: ``used`` by
the cells themselves, which is what a cluster bills for jobs, and ``held`` from the first start to the last end, which is
what a rented machine costs, for some devices wait while others finish the last cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sovit.launch.plan import Cell, Plan
from sovit.launch.state import DIVERGED, DONE, FAILED, progress, state_on_disk
from sovit.launch.sweep import SweepError
from sovit.launch.tables import duration_text


@dataclass(frozen=True)
class Bill:
    """``hours`` on the clock; ``used`` and ``held`` device hours; ``device`` is "GPU" or "machine"."""

    hours: float
    used: float
    held: float
    device: str


def bill(plan: Plan) -> Bill:
    """What the cells of a plan take, all of them."""
    hours = plan.wall_seconds / 3600
    device = "GPU" if plan.cells and plan.cells[0].accelerator == "gpu" else "machine"
    return Bill(hours, sum(cell_hours(plan, cell) for cell in plan.cells), _devices(plan) * hours, device)


def cell_hours(plan: Plan, cell: Cell) -> float:
    """Device hours of one cell, of all its devices: cells that run at the same time on one device share it."""
    if cell.accelerator == "gpu":
        return cell.seconds * cell.world / plan.cells_per_gpu / 3600
    return cell.seconds / _at_once(plan) / 3600


def _at_once(plan: Plan) -> int:
    return max(1, min(plan.workers, len(plan.cells)))


def _devices(plan: Plan) -> int:
    """Devices in use: the GPUs of as many cells as run at once, the largest of them, or one machine for all."""
    if not plan.cells or plan.cells[0].accelerator != "gpu":
        return 1
    sizes = sorted((cell.world for cell in plan.cells), reverse=True)
    return max(sizes[0], -(-sum(sizes[: _at_once(plan)]) // plan.cells_per_gpu))


def left(plan: Plan, *, retry_failed: bool = False) -> Plan:
    """The plan of what is left to do: without the cells that have a verdict, and less what the others have trained.

    ``retry_failed``: cells that failed or diverged will be run again. Raises ValueError if a record cannot be read.
    """
    cells = []
    for cell in plan.cells:
        state, _ = state_on_disk(cell.run_dir)
        if state == DONE or (state in (FAILED, DIVERGED) and not retry_failed):
            continue
        step, total_steps, _ = progress(cell.run_dir)
        share = 1 - step / total_steps if total_steps and state not in (FAILED, DIVERGED) else 1.0
        cells.append(replace(cell, seconds=cell.seconds * max(0.0, share)))
    return replace(plan, cells=cells)


def refuse_above(
    plan: Plan,
    *,
    price: float | None,
    max_cost: float | None,
    max_hours: float | None,
    retry_failed: bool = False,
    held: bool = True,
) -> None:
    """Raise SweepError, with one sentence, if what is left to do would exceed a cap.

    ``price``: dollars a device hour; ``max_cost``: dollars; ``max_hours``: on the clock. ``held``: devices are paid until
    the last cell ends (a rented machine), else only while a cell uses them (jobs on a cluster).
    """
    if max_cost is not None and price is None:
        raise SweepError(
            f"--max-cost {max_cost:g} needs a price; add --price, in dollars an hour of one GPU or machine."
        )
    if max_cost is None and max_hours is None:
        return
    rest = left(plan, retry_failed=retry_failed)
    if not rest.cells:
        return
    whole = bill(rest)
    cells = "the cell that is left" if len(rest.cells) == 1 else f"the {len(rest.cells)} cells that are left"
    if max_hours is not None and whole.hours > max_hours:
        raise SweepError(
            f"{cells} would take {duration_text(whole.hours * 3600)} with {plan.workers} at once ({plan.basis}), above "
            f"--max-hours {max_hours:g}; raise the cap, use more --workers, or run a part, such as seed=0 or a shorter "
            "durations.last."
        )
    if max_cost is not None and price is not None:
        hours = whole.held if held else whole.used
        if hours * price > max_cost:
            raise SweepError(
                f"{cells} would cost {money(hours * price)} ({hours:.3g} {whole.device} hours at {money(price)}; "
                f"{plan.basis}), above --max-cost {max_cost:g}; raise the cap, or run a part, such as seed=0 or a shorter "
                "durations.last."
            )


def money(dollars: float) -> str:
    """Such as <$0.0001, $0.0035, $2.15, $12,400: cents from one cent on, whole dollars from a hundred on."""
    if 0 < dollars < 0.0001:
        return "<$0.0001"
    return f"${dollars:,.{4 if 0 < dollars < 0.00995 else 2 if dollars < 99.995 else 0}f}"
