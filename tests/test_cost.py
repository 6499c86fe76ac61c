"""What a plan costs, worked out by hand, and the caps that refuse it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import fake_cells
from sovit import records
from sovit.launch.pay.cost import bill, cell_hours, left, money, refuse_above
from sovit.launch.plan import Plan
from sovit.launch.sweep import SweepError

HOUR = 3600.0


def made(
    tmp_path: Path,
    hours: tuple[float, ...] = (3.0, 2.0, 2.0),
    workers: int = 2,
    accelerator: str = "cpu",
    startup: float = 0,
) -> Plan:
    plan = fake_cells.plan(tmp_path, dict.fromkeys("abcdef"[: len(hours)], "done"), workers, accelerator=accelerator)
    cells = [dataclasses.replace(cell, seconds=h * HOUR) for cell, h in zip(plan.cells, hours, strict=True)]
    return dataclasses.replace(plan, cells=cells, startup_s=startup * HOUR, basis="measured on this machine: a clock")


def record(plan: Plan, number: int, status: str, step: int | None = None, of: int = 100) -> None:
    """The files of a cell that ended with a status, or was left at a step."""
    cell = plan.cells[number]
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    run = {"schema": records.SCHEMA, "run_id": cell.run_id, "status": status, "config_hash": cell.config_hash,
           "steps_trained": of, "images_per_s": 1.0, "reason": None}  # fmt: skip
    records.write_json(cell.run_dir / records.RUN, run)
    if step is not None:
        progress = {"step": step, "total_steps": of, "images_per_s": 1.0, "wall_s": 1.0}
        records.write_json(cell.run_dir / records.PROGRESS, progress)


def test_two_cells_at_once_share_the_machine(tmp_path: Path) -> None:
    """3 + 2 + 2 hours on two workers: 4 hours on the clock, of which half the machine waits for one."""
    plan = made(tmp_path)
    whole = bill(plan)
    assert (whole.hours, whole.used, whole.held, whole.device) == (4.0, 3.5, 4.0, "machine")
    assert [cell_hours(plan, cell) for cell in plan.cells] == [1.5, 1.0, 1.0]


def test_gpu_hours_are_counted_a_gpu(tmp_path: Path) -> None:
    """On two GPUs the same cells use 7 GPU hours; both GPUs are held for 4, and from before the first cell starts."""
    whole = bill(made(tmp_path, accelerator="gpu", startup=0.5))
    assert (whole.hours, whole.used, whole.held, whole.device) == (4.5, 7.0, 9.0, "GPU")
    assert bill(made(tmp_path, workers=64, accelerator="gpu")).held == 9.0  # 3 cells never hold 64 GPUs


def test_all_gpus_of_a_cell_are_counted_and_shared_ones_by_the_share(tmp_path: Path) -> None:
    """Cells of 8 GPUs (on 4 nodes: 32), 3 + 2 + 2 hours, two at once; then the same with one GPU, two cells on each."""
    plan = made(tmp_path, accelerator="gpu")
    cells = [dataclasses.replace(cell, devices=8) for cell in plan.cells]
    whole = bill(dataclasses.replace(plan, cells=cells))
    assert (whole.hours, whole.used, whole.held) == (4.0, 56.0, 64.0)
    wide = [dataclasses.replace(cells[0], nodes=4), *cells[1:]]
    whole = bill(dataclasses.replace(plan, cells=wide))
    assert (whole.used, whole.held) == (3 * 32 + 4 * 8.0, 4.0 * (32 + 8))
    assert dataclasses.replace(plan, cells=wide).device_hours == 3 * 32 + 4 * 8.0
    pair = dataclasses.replace(plan, cells_per_gpu=2)
    whole = bill(pair)
    assert (whole.hours, whole.used, whole.held, pair.device_hours) == (4.0, 3.5, 4.0, 3.5)


def test_what_is_done_costs_nothing(tmp_path: Path) -> None:
    """Cell a is done; b has failed, which is no work unless it is asked for; c was left at three quarters."""
    plan = made(tmp_path)
    record(plan, 0, "done")
    record(plan, 1, "failed", step=40)
    record(plan, 2, "running", step=75)
    assert [(cell.run_id, cell.seconds / HOUR) for cell in left(plan).cells] == [("fake-c", 0.5)]
    again = left(plan, retry_failed=True)
    assert [cell.seconds / HOUR for cell in again.cells] == [2.0, 0.5]
    refuse_above(plan, price=None, max_cost=None, max_hours=0.51)
    with pytest.raises(SweepError, match=r"the cell that is left would take 30 min 00 s .* above --max-hours 0\.49;"):
        refuse_above(plan, price=None, max_cost=None, max_hours=0.49)
    for number in range(3):
        record(plan, number, "done")
    refuse_above(plan, price=100.0, max_cost=0.01, max_hours=0.01)


def test_a_cap_names_what_it_would_take_the_cap_and_the_mend(tmp_path: Path) -> None:
    plan = made(tmp_path)
    refuse_above(plan, price=2.0, max_cost=8.0, max_hours=4.0)  # at the cap, not above
    with pytest.raises(SweepError) as hours:
        refuse_above(plan, price=2.0, max_cost=8.0, max_hours=3.9)
    assert "3 cells that are left would take 4 h 00 min with 2 at once" in str(hours.value)
    assert "above --max-hours 3.9; raise the cap, use more --workers" in str(hours.value)
    with pytest.raises(SweepError) as cost:
        refuse_above(plan, price=2.0, max_cost=7.9, max_hours=None)
    assert "would cost $8.00 (4 machine hours at $2.00; measured on this machine: a clock)" in str(cost.value)
    assert "above --max-cost 7.9; raise the cap" in str(cost.value)
    for error in (hours.value, cost.value):
        assert "\n" not in str(error) and str(error).endswith(".")


def test_a_cluster_bills_what_its_jobs_use(tmp_path: Path) -> None:
    plan = made(tmp_path, accelerator="gpu")
    refuse_above(plan, price=1.0, max_cost=7.0, max_hours=None, held=False)
    with pytest.raises(SweepError, match=r"\$8\.00 \(8 GPU hours at \$1\.00"):
        refuse_above(plan, price=1.0, max_cost=7.0, max_hours=None)


def test_a_cap_on_money_without_a_price_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"--max-cost 5 needs a price; add --price"):
        refuse_above(made(tmp_path), price=None, max_cost=5.0, max_hours=None)


def test_without_a_cap_nothing_is_refused_or_read(tmp_path: Path) -> None:
    plan = made(tmp_path)
    plan.cells[0].run_dir.mkdir(parents=True)
    (plan.cells[0].run_dir / records.RUN).write_text("{")
    refuse_above(plan, price=5.0, max_cost=None, max_hours=None)


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0, "$0.00"), (3e-5, "<$0.0001"), (0.00351, "$0.0035"), (0.02, "$0.02"), (2.154, "$2.15"), (99.994, "$99.99"),
     (99.996, "$100"), (12_400.4, "$12,400")],
)  # fmt: skip
def test_money_reads_like_money(dollars: float, text: str) -> None:
    assert money(dollars) == text
