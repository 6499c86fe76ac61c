"""The plan: steps, compute and time of a cell against numbers worked out by hand, and what a plan refuses."""

import dataclasses
import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from sovit import records
from sovit.config import ConfigError, compose
from sovit.families import activations
from sovit.launch import plan as planning
from sovit.launch.devices import visible_gpus
from sovit.launch.local.display import time_left
from sovit.launch.plan import CPU, GPU, Plan, makespan, plan, timed
from sovit.launch.plan_table import plan_document, plan_table
from sovit.launch.state import CellState
from sovit.launch.sweep import SweepError, load_sweep
from sovit.launch.tables import count_text, duration_text
from sovit.shape import Shape

SWEEPS = Path(__file__).parents[1] / "sweeps"
CENTER = ["shape=32x4x128", "durations.first=2 gflops", "durations.last=8 gflops", "durations.num=3"]


def center(tmp_path: Path, *overrides: str) -> Plan:
    """The plan of one tiny cell that is evaluated at 2, 4 and 8 GFLOPs."""
    return plan(load_sweep(SWEEPS / "star_smoke.yaml", [*CENTER, f"runs_dir={tmp_path}", *overrides]))


def test_a_tiny_cell_by_hand(tmp_path: Path) -> None:
    """4 tokens: FLOPs 2x4x64x32 patches, 4 blocks of 8x4x32^2 + 4x4^2x32 + 4x4x32x128, classifier 2x32x256."""
    [cell] = center(tmp_path).cells
    assert cell.run_id == "star_smoke-w0032-d04-m0128-h04-p08-s0"
    assert cell.forward_gflops == pytest.approx(434_176e-9, rel=1e-12)
    assert cell.num_params == 2080 + 128 + 4 * 4 * (1024 + 32) + 4 * (2 * 32 * 128 + 128 + 32) + 9 * 64 + 33 * 256
    assert list(cell.evaluations.items()) == [(36, "2 gflops"), (72, "4 gflops"), (144, "8 gflops")]
    assert (cell.steps, cell.images) == (144, 144 * 128)
    assert cell.train_gflops == pytest.approx(3 * 434_176e-9 * 144 * 128)
    step_s = CPU.step_s + 4 * CPU.block_s + 3 * 434_176e-9 * 128 / CPU.gflops_per_s
    eval_s = CPU.eval_s + 434_176e-9 * (64 * 164 + 1797) / CPU.gflops_per_s
    assert cell.seconds == pytest.approx(CPU.start_s + 144 * step_s + 4 * eval_s)  # and at the initialisation


def test_cooldown_branches_are_trained_too(tmp_path: Path) -> None:
    """Published durations 500K, 1M and 2M with cooldowns of 50K: a trunk of 1.95M steps and three branches."""
    [cell] = plan(load_sweep(SWEEPS / "star.yaml", ["shape=1968x40x6144", f"runs_dir={tmp_path}"])).cells
    assert list(cell.evaluations) == [500_000, 1_000_000, 2_000_000]
    assert cell.steps == 1_950_000 + 3 * 50_000


def test_the_time_on_a_gpu_is_a_share_of_its_peak(tmp_path: Path) -> None:
    sweep = load_sweep(SWEEPS / "star.yaml", ["shape=1968x40x6144", f"runs_dir={tmp_path}"])
    one, two = plan(sweep, peak_tflops=100.0), plan(sweep, peak_tflops=200.0)
    [cell] = one.cells
    products = (cell.train_gflops + 4 * planning.EVAL_IMAGES * cell.forward_gflops) / 40e3
    overhead = GPU.start_s + cell.steps * (GPU.step_s + 40 * GPU.block_s) + 4 * GPU.eval_s
    assert cell.seconds == pytest.approx(products + overhead)
    assert two.cells[0].seconds == pytest.approx(products / 2 + overhead)
    assert "an assumption" in one.basis
    assert one.device_hours == pytest.approx(cell.seconds / 3600)


def finished(tmp_path: Path, name: str, wall_s: float, **changes: object) -> None:
    """The record of a finished run of the center."""
    cfg = compose([*CENTER, "experiment=star_smoke", f"runs_dir={tmp_path}"])
    directory = tmp_path / "earlier" / name
    directory.mkdir(parents=True)
    record = {
        "schema": records.SCHEMA, "status": "done", "config": dataclasses.asdict(cfg), "wall_s": wall_s,
        "width": 32, "depth": 4, "mlp_dim": 128, "patch_size": 8, "steps_trained": 144, "forward_gflops": 434_176e-9,
    }  # fmt: skip
    records.write_json(directory / records.RUN, record | changes)


def test_finished_runs_correct_the_expected_time(tmp_path: Path) -> None:
    """By the median of measured over expected; runs that failed and records of another version say nothing."""
    [before] = center(tmp_path).cells
    for name, factor in {"a": 3.0, "b": 3.0, "c": 50.0}.items():
        finished(tmp_path, name, factor * before.seconds)
    finished(tmp_path, "failed", 1e6, status="failed")
    finished(tmp_path, "of_another_version", 1e6, schema=records.SCHEMA + 1)
    after = center(tmp_path)
    assert after.cells[0].seconds == pytest.approx(3 * before.seconds)
    assert "corrected by 3 finished runs" in after.basis


def test_finished_runs_do_not_correct_a_measurement(tmp_path: Path) -> None:
    """Or what they say of this machine would count twice; that they took much longer is said."""
    model = dataclasses.replace(CPU, block_s=2 * CPU.block_s, startup_s=7.0, basis="measured")
    alone = timed(center(tmp_path), model)
    for name in "abc":
        finished(tmp_path, name, 1.2 * alone.cells[0].seconds)
    assert timed(center(tmp_path), model).notes == ()
    for name in "def":
        finished(tmp_path, name, 1.6 * alone.cells[0].seconds)
    finished(tmp_path, "g", 1.6 * alone.cells[0].seconds)
    after = timed(center(tmp_path), model)
    assert after.cells == alone.cells
    assert (after.basis, after.wall_seconds) == ("measured", pytest.approx(7.0 + alone.cells[0].seconds))
    [note] = after.notes
    assert "Half of the 7 finished runs" in note and "took 1.6 times or more as long" in note


def test_activations_cost_time_too() -> None:
    """A block of width 32 and MLP 128 with 4 tokens has 4 x (128 + 4 x 32) of them."""
    assert activations(Shape(32, 3, 128, 4, 8), 16) == 3 * 4 * 256
    slow = dataclasses.replace(CPU, activation_s=2.0, eval_activation_s=3.0)
    more = slow.seconds(4, 10, 128, 2, 1e-3, 5e-6) - CPU.seconds(4, 10, 128, 2, 1e-3, 5e-6)
    assert more == pytest.approx(10 * 128 * 5e-6 * 2.0 + 2 * planning.EVAL_IMAGES * 5e-6 * 3.0)


def test_a_narrow_terminal_gets_a_table_that_fits(tmp_path: Path) -> None:
    """No cell of it is folded or cut, whether the cost is asked for or not."""
    made = plan(load_sweep(SWEEPS / "star_tiny.yaml", ["shape=256x16x512", f"runs_dir={tmp_path}"]))
    for width in (80, 120, None):
        for price in (None, 2.0):
            rows = plan_table(made, price, width=width)
            console = Console(width=width or 200, record=True, file=io.StringIO())
            console.print(rows)
            [row] = [line for line in console.export_text().splitlines() if "w0256-d16-m0512" in line]
            assert duration_text(made.cells[0].seconds) in row and ("$" in row) == (price is not None)
            assert "\u2026" not in row and f"{made.cells[0].steps:,}" in row


def test_the_document_of_a_plan_adds_up(tmp_path: Path) -> None:
    made = center(tmp_path)
    document = json.loads(json.dumps(plan_document(made, price=3.0)))
    [cell] = document["cells"]
    assert cell["overrides"] == made.cells[0].overrides and cell["evaluations"]["8 gflops"] == 144
    assert cell["seconds"] == made.cells[0].seconds == pytest.approx(document["wall_seconds"])
    assert document["cost"] == pytest.approx(cell["cost"]) == pytest.approx(3.0 * cell["seconds"] / 3600)
    assert "cost" not in plan_document(made) and "cost" not in plan_document(made)["cells"][0]


def test_device_hours_count_the_threads_of_a_worker(tmp_path: Path) -> None:
    made = center(tmp_path, "trainer.num_threads=2")
    assert made.device_hours == pytest.approx(2 * made.cells[0].seconds / 3600)


def test_several_devices_share_the_batch_at_the_stated_efficiency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overhead of an update stays, its images divide by 4 x 2 devices, and a tenth is lost; the cell stays the same."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    gpu = center(tmp_path, "trainer=gpu")
    made = center(tmp_path, "trainer=gpu", "parallel=fsdp", "parallel.devices=4", "parallel.nodes=2")
    [alone], [cell] = gpu.cells, made.cells
    assert (cell.devices, cell.nodes, cell.world) == (4, 2, 8)
    assert (cell.run_id, cell.config_hash, cell.steps) == (alone.run_id, alone.config_hash, alone.steps)
    gflops_per_s = 312e3 * 0.4
    step_s = (GPU.step_s + 4 * GPU.block_s + 3 * 434_176e-9 * 16 / gflops_per_s) / 0.9
    eval_s = GPU.eval_s + 434_176e-9 * (64 * 164 + 1797) / 8 / gflops_per_s
    assert cell.seconds == pytest.approx(GPU.start_s + 144 * step_s + 4 * eval_s)
    assert made.device_hours == pytest.approx(8 * cell.seconds / 3600)
    assert made.notes == ("A cell takes 8 GPUs, assumed to train 90% as fast as so many that exchange nothing.",)
    assert gpu.notes == ()


def test_workers_follow_the_gpus_that_a_cell_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert center(tmp_path, "trainer=gpu", "parallel=ddp", "parallel.devices=2").workers == 4
    assert center(tmp_path, "trainer=gpu", "parallel=ddp").cells[0].devices == 8  # null: all of them
    sweep = load_sweep(SWEEPS / "star_smoke.yaml", [*CENTER, f"runs_dir={tmp_path}", "trainer=gpu"])
    assert plan(sweep, cells_per_gpu=3).workers == 24
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    cpu = center(tmp_path, "parallel=ddp", "parallel.devices=2", "trainer.num_threads=2")
    assert cpu.workers == 2 and "takes 2 processes" in cpu.notes[0]
    with pytest.raises(SweepError, match="--cells-per-gpu 3, but the cells train on a CPU; give --workers"):
        plan(load_sweep(SWEEPS / "star_smoke.yaml", CENTER), cells_per_gpu=3)


def test_the_longest_task_first_packs_as_graham_says() -> None:
    """The example on which longest-first is known to end at 7 where 6 is possible, and workers that are busy at first."""
    assert makespan([2, 3, 2, 3, 2], [0, 0]) == 7
    assert makespan([4], [1, 3]) == 5
    assert makespan([], [1, 3]) == 3


def test_workers_follow_cores_threads_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert center(tmp_path).workers == 8
    assert center(tmp_path, "trainer.num_threads=3").workers == 2
    assert center(tmp_path, "trainer.num_threads=99").workers == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,GPU-0a")
    assert visible_gpus() == ["3", "5", "GPU-0a"]
    assert center(tmp_path, "trainer.accelerator=gpu").workers == 3
    assert center(tmp_path, "trainer.accelerator=auto").cells[0].accelerator == "gpu"
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert visible_gpus() == []
    assert center(tmp_path, "trainer.accelerator=auto").cells[0].accelerator == "cpu"


def sweep_file(tmp_path: Path, body: str) -> Path:
    head = (SWEEPS / "star_smoke.yaml").read_text().split("parameters:")[0]
    file = tmp_path / "sweep.yaml"
    file.write_text(f"{head}parameters:\n  experiment: {{value: star_smoke}}\n{body}")
    return file


def test_two_cells_with_one_run_id_are_refused(tmp_path: Path) -> None:
    """They would write into one directory, each taking the other's records for its own."""
    sweep = load_sweep(sweep_file(tmp_path, "  optim.lr: {values: [0.01, 0.02]}\n"))
    with pytest.raises(SweepError, match=r"run id star_smoke-\S+; they differ in optim\.lr=0\.02, .* give each a tag"):
        plan(sweep)


def test_cells_in_two_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="name and runs_dir must be the same"):
        plan(load_sweep(sweep_file(tmp_path, "  name: {values: [a, b]}\n")))


def test_a_cell_that_does_not_compose_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.yaml, cell experiment=star_smoke shape=33x1x8: width=33"):
        plan(load_sweep(sweep_file(tmp_path, "  shape: {values: [32x1x8, 33x1x8]}\n")))


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_first_and_the_last_cell_of_a_shipped_sweep_plan(file: Path) -> None:
    sweep = load_sweep(file)
    made = plan(dataclasses.replace(sweep, cells=[sweep.cells[0], sweep.cells[-1]]))
    assert made.name == file.stem  # so that sovit fit runs/NAME is what the file's comment says
    assert f"sovit fit runs/{made.name}" in file.read_text() or f"sovit status runs/{made.name}" in file.read_text()
    assert plan_table(made).row_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_cell_of_a_shipped_sweep_plans(file: Path) -> None:
    sweep = load_sweep(file)
    assert len({cell.run_id for cell in plan(sweep).cells}) == len(sweep.cells)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (1.05e6, "12 d 3 h")],
)
def test_a_duration_reads_like_one(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12, "12"), (999, "999"), (4210, "4.21K"), (999_999, "1M"), (26.1e6, "26.1M"), (1.6e12, "1.6e+12")],
)
def test_a_count_has_three_digits(value: float, text: str) -> None:
    assert count_text(value) == text


def states(tmp_path: Path, seconds: list[float]) -> list[CellState]:
    [cell] = center(tmp_path).cells
    return [CellState(dataclasses.replace(cell, seconds=value)) for value in seconds]


def test_the_time_left_is_the_plans_before_anything_ran(tmp_path: Path) -> None:
    assert time_left(states(tmp_path, [30.0, 20.0, 10.0]), 2, now=0.0) == 30.0


def test_the_time_left_follows_the_pace_of_this_machine(tmp_path: Path) -> None:
    """One cell took twice its 10 s; of another, resumed at step 50, 25 of 100 steps took 20 s where 10 s were expected."""
    first, second, third = states(tmp_path, [10.0, 40.0, 30.0])
    first.state, first.step, first.total_steps, first.first_step = "done", 100, 100, 0
    first.started, first.ended = 100.0, 120.0
    second.state, second.step, second.total_steps, second.first_step = "running", 75, 100, 50
    second.started = 100.0
    assert time_left([first, second, third], 2, now=120.0) == pytest.approx(60.0)  # the third: 30 s at half speed
    assert time_left([first, second, third], 1, now=120.0) == pytest.approx(20.0 + 60.0)
