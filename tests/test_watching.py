"""Watching a run: what it costs, what it says, and that nothing of the clock enters the records that are compared."""

import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from small_cells import content, pretend_stop, small
from sovit import records
from sovit.lit import checkpoints, engine, fit, loop, peak, progress
from sovit.lit.callbacks import WATCH_EVERY
from sovit.lit.loop import StepLoop
from sovit.lit.module import LitClassifier
from sovit.lit.peak import Peak
from sovit.lit.progress import Meter, shown, tell

NOTE = {
    "step": 1234,
    "total_steps": 4606,
    "images_per_s": 9298.3,
    "utilisation": 0.154,
    "peak": "measured",
    "data_wait": 0.04,
    "memory_bytes": 640_000_000,
    "loss": 3.2174,
    "left_s": 43.0,
    "wall_s": 20.0,
}


class Reads(TorchDispatchMode):
    """Counts, for each step, the tensors whose value Python asks for; on a GPU each is a wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.of_step: dict[int, int] = defaultdict(int)
        self.step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.of_step[self.step] += 1
        return func(*args, **(kwargs or {}))


def reads_of(monkeypatch: pytest.MonkeyPatch, *cfg: Any) -> dict[int, int]:
    """Step -> values read from its beginning to the beginning of the next."""
    reads = Reads()
    original, tolist = LitClassifier.training_step, torch.Tensor.tolist

    def training_step(self: Any, batch: Any, index: int) -> Any:
        reads.step = self.trainer.global_step + 1
        return original(self, batch, index)

    def counted(self: torch.Tensor) -> Any:  # which reads memory without a dispatch
        reads.of_step[reads.step] += 1
        return tolist(self)

    with monkeypatch.context() as patch, reads:
        patch.setattr(LitClassifier, "training_step", training_step)
        patch.setattr(torch.Tensor, "tolist", counted)
        assert [engine.run(one) for one in cfg] == [engine.OK] * len(cfg)
    return dict(reads.of_step)


@pytest.mark.parametrize(
    "options", [(), ("optim.clip_norm=null", "model.drop_path_rate=0.2", "parallel.micro_batch=4")]
)
def test_no_value_is_read_at_a_step_that_is_neither_logged_nor_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    cfg = small(tmp_path, "durations.values=[56 steps]", "trainer.log_every_n_steps=20", *options)
    read = {step for step, number in reads_of(monkeypatch, cfg).items() if number and step}
    assert read == {20, 40, WATCH_EVERY, 2 * WATCH_EVERY, 56}


def test_a_read_at_every_step_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LitClassifier.update

    def update(self: Any, *arguments: Any) -> Any:
        loss = original(self, *arguments)
        assert float(loss) >= 0
        return loss

    monkeypatch.setattr(LitClassifier, "update", update)
    read = reads_of(monkeypatch, small(tmp_path, "durations.values=[8 steps]"))
    assert set(range(1, 9)) <= set(read)


def test_what_hangs_on_the_clock_has_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = small(tmp_path / "a"), small(tmp_path / "b")
    assert engine.run(whole) == engine.OK
    with monkeypatch.context() as patch:
        pretend_stop(patch, 11)
        assert engine.run(stopped) == engine.STOPPED
    assert engine.run(stopped) == engine.OK
    assert content(whole) == content(stopped)
    rows = records.read_lines(records.run_dir(stopped) / records.PERF)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["wall_s"] for row in rows] == sorted(row["wall_s"] for row in rows)
    for row in rows:
        assert set(row) == {"step", "wall_s", "images_per_s", "data_wait", "memory_bytes", "utilisation"}
        assert row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1 and row["memory_bytes"] > 1e7
        assert row["utilisation"] > 0
    metrics = records.read_lines(records.run_dir(whole) / records.METRICS)
    assert all(set(row) == {"step", "train/loss", "train/lr_scale", "train/grad_norm"} for row in metrics)


def test_the_gradient_norm_is_logged_though_nothing_is_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms, original = [], LitClassifier.update

    def update(self: Any, *arguments: Any) -> Any:
        loss = original(self, *arguments)
        norms.append(sum(float(p.grad.double().square().sum()) for p in self.model.parameters()) ** 0.5)
        return loss

    monkeypatch.setattr(LitClassifier, "update", update)
    cfg = small(tmp_path, "optim.clip_norm=null")
    assert engine.run(cfg) == engine.OK
    rows = records.read_lines(records.run_dir(cfg) / records.METRICS)
    assert [row["train/grad_norm"] for row in rows] == pytest.approx([norms[row["step"] - 1] for row in rows], rel=1e-5)


def test_rates_are_those_between_two_readings() -> None:
    """100 steps of 8 images and 50 GFLOPs in 4 s on two devices of 1 TFLOP/s: 200 images/s and 62.5 % of the peak."""
    meter = Meter(batch_size=8, gflops=50.0, devices=2, peak=Peak(1e12, "measured"), now=10.0, step=5)
    found = meter.read(14.0, 105, waited=1.0)
    assert found.pop("memory_bytes") > 1e7
    assert found == {"images_per_s": 200.0, "data_wait": 0.25, "utilisation": 0.625}
    assert meter.read(14.0, 105, waited=1.0) == {}  # no time has passed, no rate
    again = meter.read(16.0, 115, waited=1.5)
    assert (again["images_per_s"], again["data_wait"], again["utilisation"]) == (40.0, 0.25, 0.125)


def test_waiting_for_batches_is_counted_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances a second whenever it is looked at."""
    loops: list[StepLoop] = []

    class Kept(StepLoop):
        def __init__(self, trainer: Any) -> None:
            super().__init__(trainer)
            loops.append(self)

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1.0
            return self.now

    monkeypatch.setattr(fit, "StepLoop", Kept)
    monkeypatch.setattr(loop, "time", Clock())
    assert engine.run(small(tmp_path)) == engine.OK
    assert [one.waited for one in loops] == [24.0]


@pytest.mark.parametrize("weights", ["ema", "cooled"])
def test_the_short_loop_leaves_what_lightnings_own_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    class Whole(StepLoop):
        advance = _TrainingEpochLoop.advance
        on_advance_end = _TrainingEpochLoop.on_advance_end

    options = (f"eval.weights={weights}", "trainer.keep_checkpoint=true", "model.drop_path_rate=0.2")
    short, whole = small(tmp_path / "short", *options), small(tmp_path / "whole", *options)
    assert engine.run(short) == engine.OK
    monkeypatch.setattr(fit, "StepLoop", Whole)
    assert engine.run(whole) == engine.OK
    assert content(short) == content(whole)
    states = [checkpoints.read(next(records.run_dir(cfg).glob("*.ckpt"))) for cfg in (short, whole)]
    assert states[0]["loops"] == states[1]["loops"] and states[0]["global_step"] == states[1]["global_step"] > 0


def test_a_run_on_a_cpu_has_torch_look_for_no_gpu_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through NVIDIA's library, which Lightning asks for: an eighth of a millisecond."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: asked.append(1) or -1)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    assert engine.run(small(tmp_path)) == engine.OK
    assert len(asked) < 10


def test_the_highest_peak_that_any_run_has_seen_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine shows less than its peak: kept, that figure would make every later run look too good."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = iter([2e9, 3e9, 1e9, 5e9, 4e9, 1e9])
    monkeypatch.setattr(peak, "matmul_flops", lambda *_: next(found))
    cpu, measure = torch.device("cpu"), peak.peak.__wrapped__
    assert [measure(cpu, "32-true").flops for _ in range(3)] == [2e9, 3e9, 3e9]
    assert measure(cpu, "bf16-mixed") == Peak(5e9, "measured")  # another precision, another figure
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")
    assert measure(cpu, "32-true") == Peak(4e9, "measured")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    (tmp_path / "nowhere").write_text("a file")
    assert measure(cpu, "32-true") == Peak(1e9, "measured")


@pytest.mark.parametrize(
    ("name", "dtype", "flops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA H200", torch.float32, None),
        ("Some Other Card", torch.bfloat16, None),
    ],
)
def test_known_gpus_have_the_figure_of_their_datasheet(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, flops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak.datasheet(torch.device("cuda"), dtype) == flops
    assert peak.datasheet(torch.device("cpu"), dtype) is None


def test_measuring_the_peak_draws_nothing_from_the_runs_generator() -> None:
    before = torch.get_rng_state()
    assert peak.matmul_flops(torch.device("cpu"), torch.float32, 64) > 1e6
    assert torch.equal(before, torch.get_rng_state())


def screen(terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width, highlight=False, color_system=None), file


def test_a_terminal_has_a_bar_with_rate_utilisation_and_time_left() -> None:
    console, file = screen(terminal=True)
    with shown("star-w0032", console, {}):
        tell(NOTE)
        said = file.getvalue()
    for text in (
        "star-w0032",
        "1,234 / 4,606",
        "9,298 images/s",
        "15% of the measured peak",
        "43 s left",
        "4% data wait",
    ):
        assert text in said
    tell(NOTE | {"step": 2345})
    assert "2,345" not in file.getvalue()  # the bar is gone


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console, file = screen(terminal=False)
    with shown("star", console, {}):
        for second in range(150):
            now[0] = 100.0 + second
            tell(NOTE | {"step": second})
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[1].split(" of ")[0] for line in lines] == ["step 60", "step 120"]
    assert "43 s left; 9,298 images/s, 15% of the measured peak, loss 3.217" in lines[0]


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "WANDB_SWEEP_ID", "SOVIT_QUIET"])
def test_a_run_under_a_display_of_its_own_is_quiet(name: str) -> None:
    console, file = screen(terminal=True)
    with shown("star", console, {name: "1"}):
        tell(NOTE)
    with shown("star", console, {"RANK": "1"}):
        tell(NOTE)
    assert file.getvalue() == ""


def test_the_notes_of_a_real_run_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sovit.lit import callbacks

    monkeypatch.setattr(callbacks, "NOTE_EVERY_S", 0.0)
    console, file = screen(terminal=True)
    cfg = small(tmp_path)
    with shown("small", console, {}):
        assert engine.run(cfg) == engine.OK
    assert "24 / 24" in file.getvalue()
    note = json.loads((records.run_dir(cfg) / records.PROGRESS).read_text())
    assert (note["step"], note["total_steps"], note["left_s"]) == (24, 24, 0.0)
    assert set(note) == set(NOTE)
