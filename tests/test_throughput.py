"""Measuring this machine: the fit against known models, what is timed, what is kept, and what happens if it fails."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sovit.config import compose
from sovit.launch.pay import hardware, throughput
from sovit.launch.pay.throughput import Timing, expect, fit, probes, time_cells, when
from sovit.launch.pay.timing import Timer, TimingError
from sovit.launch.plan import CPU, GPU, Plan, TimeModel, cell_gactivations, plan
from sovit.launch.sweep import Sweep

TRUTH = TimeModel(
    "cpu", start_s=1.9, step_s=4e-3, block_s=1.6e-3, gflops_per_s=80.0, eval_s=0.1, basis="", activation_s=16.0,
    eval_block_s=0.011, eval_gflops_per_s=250.0, eval_activation_s=8.0, startup_s=9.0,
)  # fmt: skip
SHAPES = ["32x4x128", "16x4x128", "256x4x128", "32x1x128", "32x16x128", "32x4x16", "32x4x512"]
FEW = SHAPES[:3]
METRIC = {"name": "eval/fractals_5shot/error", "goal": "minimize"}
TINY = [
    "logger=none", "data.num_classes=8", "data.num_heldout=4", "durations.values=[80 steps]", "durations.first=null",
    "durations.last=null", "durations.num=null", "eval.shots=[1,5]", "trainer.global_batch_size=16",
]  # fmt: skip


NOWHERE = "/nonexistent/runs"  # without finished runs


def planned(shapes: list[str], *overrides: str, workers: int = 2) -> Plan:
    return _planned(tuple(shapes), overrides, workers)


@functools.cache  # composing is slow, and a plan is a value
def _planned(shapes: tuple[str, ...], overrides: tuple[str, ...], workers: int) -> Plan:
    cells = [["experiment=star_tiny", f"shape={shape}", *overrides, f"runs_dir={NOWHERE}"] for shape in shapes]
    return plan(Sweep("star_tiny", Path("star.yaml"), METRIC, cells), workers=workers)


def test_of_a_cell_with_several_processes_the_share_of_one_is_timed() -> None:
    """A measurement of all of them would miss updates, which are made in processes of their own."""
    parallel = ("parallel=ddp", "parallel.devices=4", "trainer.global_batch_size=128")
    made, alone = planned(FEW, *parallel), planned(FEW, "trainer.global_batch_size=32")
    for cell, other in zip(made.cells, alone.cells, strict=True):
        composed = compose(throughput._overrides(cell, 20, Path("scratch")))
        assert composed.parallel == other.config.parallel and composed.trainer == other.config.trainer
        assert throughput._what(cell) == throughput._what(other)  # one measurement serves both
        assert throughput._guess(cell) == throughput._guess(other)


def test_decoders_are_in_a_plan_and_not_in_a_measurement() -> None:
    """Their updates were counted among the model's, and a cell ran into the time limit."""
    decoders = ("metric=multitask", "eval.decoder_draws=2", "eval.decoder_steps=500")
    made, alone = planned(FEW, *decoders), planned(FEW)
    for cell, other in zip(made.cells, alone.cells, strict=True):
        assert not compose(throughput._overrides(cell, 20, Path("scratch"))).eval.multitask
        assert throughput._what(cell) == throughput._what(other)
        assert cell.seconds - other.seconds > 2 * 500 * len(cell.evaluations) * CPU.block_s


def timing(made: Plan, number: int, model: TimeModel, noise: float = 1.0) -> Timing:
    """What a cell would take by a model; the noise is on the updates."""
    cell = made.cells[number]
    known = (cell.config.trainer.global_batch_size, cell.forward_gflops, cell_gactivations(cell))

    def seconds(steps: int, evaluations: int) -> float:
        return model.seconds(cell.shape.depth, steps, known[0], evaluations, *known[1:]) - model.start_s

    return Timing(cell.run_id, cell.shape.depth, *known, noise * seconds(1, 0), seconds(0, 1), model.start_s, 1.0)


@pytest.fixture
def broken_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the process that times cells find those of throughput_cells.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measurements are kept during a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sovit"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Machines that need no measuring, for they are TRUTH; the list grows by one each time one is asked."""
    asked: list[int] = []

    def time_cells(cells: Any, at_once: int, **_: Any) -> tuple[list[Timing], float, list[str]]:
        asked.append(at_once)
        fake = Plan("star", Path(), list(cells), at_once, "")
        return [timing(fake, number, TRUTH) for number in range(len(cells))], TRUTH.startup_s, []

    monkeypatch.setattr(throughput, "time_cells", time_cells)
    return asked


def test_the_fit_recovers_a_known_model() -> None:
    """From five shapes that span a star to shapes it has not seen; exactly without noise."""
    made = planned(SHAPES)
    chosen = Plan("star", Path(), probes(made.cells), 2, "")
    found = fit("cpu", [timing(chosen, number, TRUTH) for number in range(len(chosen.cells))], TRUTH.startup_s)
    other = planned(["64x6x256", "24x2x64", "128x8x512"])
    for number in range(3):
        seen, true = timing(other, number, found), timing(other, number, TRUTH)
        assert (seen.step_s, seen.eval_s, seen.start_s) == pytest.approx((true.step_s, true.eval_s, true.start_s))
    assert found.startup_s == TRUTH.startup_s


def test_noise_does_not_grow_in_the_fit() -> None:
    """A twentieth in every timing: the total within a tenth, each shape within a fifth, no coefficient below 0."""
    made, rng = planned(SHAPES), random.Random(0)
    chosen = Plan("star", Path(), probes(made.cells), 2, "")
    truth = [timing(made, number, TRUTH).step_s for number in range(len(SHAPES))]
    for _ in range(20):
        noisy = [timing(chosen, number, TRUTH, rng.gauss(1, 0.05)) for number in range(len(chosen.cells))]
        found = fit("cpu", noisy, 0.0)
        assert all(value >= 0 for name, value in dataclasses.asdict(found).items() if name.endswith("_s"))
        steps = [timing(made, number, found).step_s for number in range(len(SHAPES))]
        assert steps == pytest.approx(truth, rel=0.2)
        assert sum(steps) == pytest.approx(sum(truth), rel=0.1)


@pytest.mark.parametrize("shapes", [["32x4x128"], ["32x4x128", "64x8x256"]])
def test_few_shapes_are_met_exactly(shapes: list[str]) -> None:
    made = planned(shapes)
    found = fit("cpu", [timing(made, number, TRUTH) for number in range(len(shapes))], 0.0)
    for number in range(len(shapes)):
        assert timing(made, number, found).step_s == pytest.approx(timing(made, number, TRUTH).step_s)
    assert math.isfinite(found.gflops_per_s)


def test_the_shapes_measured_span_the_plan() -> None:
    """Of a star: its cheapest update first, its dearest, which is the widest, the deepest, the largest MLP, the middle."""
    made = planned(SHAPES)
    assert [str(cell.shape) for cell in probes(made.cells)] == [
        "32x1x128", "256x4x128", "32x16x128", "32x4x512", "32x4x128",
    ]  # fmt: skip
    grid = planned([f"{w}x{d}x{m}" for w in (16, 64) for d in (1, 8) for m in (32, 256)])
    assert [str(cell.shape) for cell in probes(grid.cells)] == ["16x1x32", "64x8x256", "16x8x32", "64x1x32", "16x1x256"]
    seeds = planned(["32x4x128"])
    twice = [*seeds.cells, dataclasses.replace(seeds.cells[0], run_id="of_another_seed")]
    assert len(probes(twice)) == 1


def copy_of(step_s: float, eval_s: float, start_s: float, steps: int, borders: tuple[int, ...]) -> dict[str, Any]:
    """What a copy of a cell notes: a slow first update, evaluations before the first update and after those at borders."""
    clock, updates = start_s + eval_s + 5 * step_s, []
    for step in range(1, steps + 1):
        clock += step_s * (3.0 if step % 17 == 0 else 1.0)  # now and then something else comes in between
        updates.append((clock, 0.8 * clock))
        clock += eval_s if step in borders else 0.0
    return {"code": 0, "last": "", "updates": updates, "end": (clock, clock)}


def test_updates_evaluations_and_the_rest_are_told_apart() -> None:
    """The median of blocks does not see the first update, the evaluation between, nor a hiccup in one block in five."""
    [cell] = planned(["32x4x128"]).cells
    copies = [copy_of(0.01 * k, 0.5, 2.0, 400, (200, 400)) for k in (1, 2, 3)]
    found = throughput._timing(cell, copies, first=200, block=2)
    assert found.step_s == pytest.approx(0.02)
    assert found.eval_s == pytest.approx(0.5, abs=0.05)
    assert found.share == pytest.approx(0.8)
    assert found.start_s == pytest.approx(
        2.0 + 5 * 0.02 + 2 * 23 * 0.02, abs=0.2
    )  # and the hiccups, so no time is lost


def test_a_cooldown_branch_counts_as_part_of_its_evaluation() -> None:
    """Two durations with branches: trunk, branch, trunk, branch; a new trainer at each border, an evaluation after one."""
    cooled = ["eval.weights=cooled", "schedule.cooldown=0.2"]
    [cell] = planned(["32x4x128"], *cooled).cells
    copy = copy_of(0.01, 0.0, 2.0, 250, ())
    shift, updates = 0.0, []
    for step, (clock, cpu) in enumerate(copy["updates"], start=1):
        updates.append((clock + shift, cpu))
        shift += {50: 0.1, 100: 0.6, 150: 0.1}.get(step, 0.0)
    copy |= {"updates": updates, "end": (updates[-1][0], 0.0)}
    found = throughput._timing(cell, [copy], first=100, block=5)
    assert found.eval_s == pytest.approx(0.1 + 0.6, abs=0.05)


def test_a_measurement_is_made_once_and_said_so(
    cache: Path, measured: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Then found again for other durations and seeds, not for another number of workers, shape or batch size."""
    made = planned(FEW)
    said: list[str] = []
    first = expect(made, "missing", say=said.append)
    assert measured == [2]
    [line] = said
    assert "3 shapes of the sweep for some seconds each, 2 processes at once" in line and "--no-measure" in line
    assert first.basis.startswith("measured on this machine: ") and "2 workers, 3 shapes, 0 s ago" in first.basis
    assert [cell.seconds for cell in first.cells] != [cell.seconds for cell in made.cells]
    assert first.startup_s == TRUTH.startup_s and first.notes == ()
    [file] = cache.iterdir()
    assert json.loads(file.read_text())["key"]["cores"] == hardware.hardware("cpu")["cores"]

    again = expect(planned(FEW, "durations.values=[1 gflops]", "seed=3"), "missing", say=said.append)
    assert measured == [2] and len(said) == 1
    assert again.startup_s == TRUTH.startup_s
    assert expect(made, "cached", say=said.append).basis.startswith("measured")
    expect(made, "anew", say=said.append)
    expect(planned(FEW, workers=1), "missing", say=said.append)
    expect(planned([*FEW, "512x4x128"]), "missing", say=said.append)
    expect(planned(FEW, "trainer.global_batch_size=64"), "missing", say=said.append)
    assert measured == [2, 2, 1, 2, 2] and len(list(cache.iterdir())) == 4
    assert capsys.readouterr().out == ""


def test_another_machine_is_another_measurement(
    cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home directories are shared: one cache serves the nodes of a cluster."""
    made = planned(SHAPES[:2])
    expect(made, "missing", say=lambda line: None)
    for name in ("cpu", "cores", "torch"):
        other = hardware.hardware("cpu") | {name: "another"}
        monkeypatch.setattr(throughput, "hardware", lambda accelerator, other=other: other)
        assert expect(made, "cached", say=lambda line: None) == made
        expect(made, "missing", say=lambda line: None)
    assert len(measured) == 4


def test_nothing_is_measured_unless_it_is_asked_for(cache: Path, measured: list[int]) -> None:
    made = planned(SHAPES[:2])
    assert expect(made, "cached") == made and expect(made, "never") == made
    expect(made, "missing", say=lambda line: None)
    assert expect(made, "never") == made
    assert measured == [2]


BROKEN = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "binary": lambda text: "\udcff\udcfe",
    "other schema": lambda text: text.replace('"schema": 1', '"schema": 2'),
    "other key": lambda text: text.replace('"workers": 2', '"workers": 3'),
    "nan": lambda text: text.replace('"startup_s": 9.0', '"startup_s": NaN'),
    "word": lambda text: text.replace('"startup_s": 9.0', '"startup_s": "soon"'),
    "no timings": lambda text: json.dumps(json.loads(text) | {"timings": []}),
    "odd timing": lambda text: json.dumps(json.loads(text) | {"timings": [{"step_s": 1}]}),
    "zero": lambda text: json.dumps(
        json.loads(text) | {"timings": [row | {"step_s": 0} for row in json.loads(text)["timings"]]}
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_cache_is_ignored_with_one_line(cache: Path, measured: list[int], how: str) -> None:
    made = planned(SHAPES[:2])
    expect(made, "missing", say=lambda line: None)
    [file] = cache.iterdir()
    whole = file.read_text()
    file.write_bytes(BROKEN[how](whole).encode(errors="surrogateescape"))
    assert file.read_text(errors="replace") != whole
    said: list[str] = []
    assert expect(made, "cached", say=said.append) == made
    [line] = said
    assert str(file) in line and line.endswith("it is not used.") and "\n" not in line
    assert expect(made, "missing", say=said.append).basis.startswith("measured")
    assert measured == [2, 2] and len(said) == 3
    assert expect(made, "cached", say=said.append).basis.startswith("measured") and len(said) == 3


def test_a_cache_that_cannot_be_written_costs_one_line(cache: Path, measured: list[int]) -> None:
    cache.parent.write_text("a file where the directory should be")
    said: list[str] = []
    made = expect(planned(SHAPES[:2]), "missing", say=said.append)
    assert made.basis.startswith("measured")
    assert "cannot be kept" in said[-1] and len(said) == 3  # that it cannot be read, that it is measured, that
    assert measured == [2]


def test_a_write_that_is_cut_short_leaves_the_old_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "kept.json"
    hardware.write_cache(file, {"a": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        hardware.write_cache(file, {"a": 2})
    assert [path.name for path in file.parent.iterdir()] == ["kept.json"]
    assert hardware.read_cache(file) == {"a": 1}


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the base-directory specification wants; else every working directory would grow a cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hardware.cache_file({}).parent == tmp_path / ".cache" / "sovit"


def test_a_gpu_that_is_not_here_is_assumed(cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = planned(SHAPES[:2], "trainer.accelerator=gpu")
    found = expect(made, "anew")
    assert found.cells == made.cells and "an assumption (--tflops)" in found.basis
    assert found.notes == ("No GPU is visible here, so nothing was measured.",)
    assert measured == [] and made.cells[0].seconds > GPU.start_s


def test_a_plan_for_more_gpus_than_are_here_is_measured_one_cell_a_gpu(
    cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning for a cluster on one of its nodes: seventeen cells on its one GPU would each look very slow."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    made = planned(FEW, "trainer.accelerator=gpu", workers=3)
    found = expect(made, "missing", say=lambda line: None)
    assert measured == [1] and "1 worker, 3 shapes" in found.basis
    assert found.notes == (
        "Times are for one cell a GPU: 3 at once need 3 GPUs, and this machine has 1; "
        "--cells-per-gpu says how many share one.",
    )
    assert found.workers == 3


def test_a_busy_machine_is_said_to_be_one(cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(SHAPES[:2])
    rows = [dataclasses.replace(timing(made, number, TRUTH), share=0.25) for number in range(2)]
    monkeypatch.setattr(throughput, "time_cells", lambda *_, **__: (rows, 1.0, []))
    found = expect(made, "missing", say=lambda line: None)
    assert found.basis.endswith("while the machine was busy")
    assert "got 25% of a core, and may be up to 4.0 times as fast at rest" in found.notes[0]


class FakeTimer:
    """A timing process that answers what it is told to, in the order of the cells."""

    startup_s = 3.0

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __call__(self, *_: Any) -> FakeTimer:
        return self

    def __enter__(self) -> FakeTimer:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def time(
        self, copies: list[list[str]], gpus: Any, folder: Path, block: int, limit_s: float
    ) -> list[dict[str, Any]]:
        [durations] = [text for text in copies[0] if "steps," in text]
        first = int(durations.partition("[")[2].split()[0])
        self.asked.append(next(text for text in reversed(copies[0]) if text.startswith("shape=")))
        answer = self.answers.pop(0)
        return [answer or copy_of(0.01, 0.5, 2.0, 2 * first, (first, 2 * first)) for _ in copies]


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "a sentence": ({"code": 1, "last": "It was not to be."}, "It was not to be"),
    "diverged": ({"code": 3, "last": "training loss is nan at step 7"}, "training loss is nan at step 7"),
    "silence": ({"code": 1, "last": ""}, "it ended with exit code 1"),
    "killed": ({"code": -9, "last": "so far so good"}, r"killed by SIGKILL \(out of memory\?\)"),
    "nothing": ({"code": 0, "last": "", "updates": [], "end": [1, 1]}, "0 updates were noted"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_measurement_that_fails_leaves_the_assumption(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One sentence, however the cell ends; and nothing is kept."""
    answer, why = FAILURES[name]
    monkeypatch.setattr(throughput, "Timer", FakeTimer([answer] * 9))
    made = planned(SHAPES[:1])
    found = expect(made, "missing", say=lambda line: None)
    assert found.cells == made.cells and found.basis == made.basis == CPU.basis
    [note] = found.notes
    why = rf"\({made.cells[0].run_id} could not be timed: {why}.*\)"
    assert re.fullmatch(rf"This machine could not be measured {why}: times are assumed\.", note), note
    assert not cache.exists()


def test_a_shape_too_large_for_memory_is_replaced_by_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And said: a cell that cannot be timed for want of memory cannot be trained either."""
    made = planned([*SHAPES, "64x4x128"])
    oom = {"code": 1, "last": "OutOfMemoryError: CUDA out of memory."}
    timer = FakeTimer([{}, oom, oom, {}, {}, {}, {}])
    monkeypatch.setattr(throughput, "Timer", timer)
    found = expect(made, "missing", say=lambda line: None)
    assert [text.removeprefix("shape=") for text in timer.asked] == [
        "32x1x128", "256x4x128", "32x4x128", "32x4x16", "32x16x128", "32x4x512", "64x4x128",
    ]  # fmt: skip
    assert found.basis.startswith("measured") and found.startup_s == 3.0
    assert "w0256-d04-m0128-h04-p08-s0 could not be timed: OutOfMemoryError: CUDA out of memory." in found.notes[0]
    assert all(0 < cell.seconds < math.inf for cell in found.cells)  # predicted all the same


@pytest.mark.usefixtures("broken_cells")
def test_a_process_that_ends_badly_leaves_the_assumption(cache: Path) -> None:
    made = planned(SHAPES[:1], workers=1)
    found = expect(made, "missing", say=lambda line: None, target="throughput_cells:fail", preload=[])
    assert found.cells == made.cells
    assert "could not be timed: it was not to be): times are assumed." in found.notes[0]


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(TimingError, match="No module named 'no_such_preload'"),
        Timer(tmp_path, "a:b", ["no_such_preload"]),
    ):
        pass


@pytest.mark.usefixtures("broken_cells")
def test_a_cell_that_hangs_is_ended(tmp_path: Path) -> None:
    """By a signal after its time; and with the process that timed it, whatever is left of that."""
    with Timer(tmp_path, "throughput_cells:hang", ["torch"]) as timer:
        [copy] = timer.time([[str(tmp_path / "first")]], [None], tmp_path / "0", 1, limit_s=0.5)
        assert copy["code"] == -15
        timer.begin([[str(tmp_path / "second")]], [None], tmp_path / "1", 1, limit_s=600.0)
        wait_until((tmp_path / "second").exists)
        wait_until(lambda: (tmp_path / "second").read_text() != "")
    pid = int((tmp_path / "second").read_text())
    wait_until(lambda: not alive(pid))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_two_real_shapes_are_measured_in_the_right_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, two processes at once: a shape of 80 times the FLOPs takes longer, by more than twice."""
    made = planned(["16x1x16", "128x4x512"], *TINY)
    monkeypatch.setattr(throughput, "STEPS_S", 0.2)
    timings, startup_s, failed = time_cells(probes(made.cells), 2)
    assert failed == [] and [row.run_id for row in timings] == [cell.run_id for cell in made.cells]
    small, large = timings
    assert 0 < 2 * small.step_s < large.step_s < 60
    for row in timings:
        assert 0 < row.start_s < 600 and 0 < row.eval_s < 600 and row.share is not None and 0 < row.share < 1.1
    assert startup_s > 0
    model = fit("cpu", timings, startup_s)
    assert throughput._predicted_step_s(model, large) == pytest.approx(large.step_s)
    assert not Path(NOWHERE).exists(), "measuring leaves no run behind"


def test_a_collection_in_a_cell_does_not_walk_through_what_the_server_imported() -> None:
    """It took .4 s at a moment that any change of the code moved: into the middle evaluation of the test above."""
    count = "import gc, sovit.launch.preload; print(gc.get_freeze_count(), len(gc.get_objects()))"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True, timeout=300)
    hidden, seen = map(int, done.stdout.split())
    assert hidden > 100_000 and seen < hidden / 100


def test_ages_read_like_ages() -> None:
    assert when(time.time() - 41) == "41 s ago"
    assert when(time.time() - 3 * 3600) == "3 h 00 min ago"
    assert when(time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1)) - 400 * 86400) == "on 2025-10-17"
    assert when(time.time() + 1e6).startswith("on ")  # a clock that was wrong when it was measured
