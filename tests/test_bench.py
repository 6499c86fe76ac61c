"""What a shape costs in use: how calls are timed, what memory they hold, which model they are of, and what goes wrong."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

import killed_row
from sovit import cli, config, derived
from sovit.bench import energy, models, processes, row, turns
from sovit.bench.settings import Setting, Subject, settings
from sovit.flops import num_params
from sovit.inference import inference_memory, largest_batch
from sovit.memory import Model
from sovit.models.vit import build_vit
from sovit.shape import Shape
from test_memory import KEPT, Peak, random_model

TINY = Model(Shape(8, 2, 20, 2, 8), 16, channels=1, pool="avg", num_classes=5)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another are slow on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clock:
    """A clock that calls set forward."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, times):
        times = itertools.cycle(times)

        def call():
            self.now += next(times)

        return call


def setting(batch=1):
    return Setting(16, batch, "fp32", "eager", "cpu", threads=1)


def test_percentiles_are_numpys_and_the_ratio_is_taken_within_turns():
    """The machine is twice as slow in every third second, which must not show in the ratio."""
    clock, rng = Clock(), np.random.default_rng(0)
    times = rng.uniform(0.001, 0.002, 997)

    def slowed(call, factor):
        def slow():
            before = clock.now
            call()
            clock.now = before + (clock.now - before) * factor * (2 if int(before) % 3 == 0 else 1)

        return slow

    ours, theirs = slowed(clock.taking(times), 1.0), slowed(clock.taking(times), 1.5)
    found = turns.take_turns({"ours": ours, "theirs": theirs}, 20.0, clock=clock)
    calls = [1e3 * one for turn in found["ours"] for one in turn]
    took = turns.latency(found["ours"])
    assert took["p50"] == pytest.approx(np.percentile(calls, 50)) and took["p95"] == pytest.approx(
        np.percentile(calls, 95)
    )
    assert took["num_calls"] == len(calls) and took["mean"] == pytest.approx(np.mean(calls))
    ratios = [np.median(b) / np.median(a) for a, b in zip(found["ours"], found["theirs"], strict=True)]
    ratio = turns.ratio(found, "theirs", "ours")
    assert [ratio[key] for key in ("lo", "median", "hi")] == pytest.approx(np.percentile(ratios, (25, 50, 75)))
    assert ratio["num_turns"] == len(ratios)


def test_turns_alternate_and_a_slow_call_still_has_its_five():
    clock, order = Clock(), []
    calls = {name: clock.taking([100.0]) for name in "ab"}
    found = turns.take_turns(calls, 1.0, clock=clock, around=lambda name, turn: (order.append(name), turn()))
    assert order == list("abbaabbaab")
    assert [len(turn) for turn in found["a"]] == [1] * 5
    assert turns.latency(found["a"])["p95"] is None  # five calls have no 95th percentile


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_a_forward_pass_is_that_of_its_live_tensors_to_the_byte(precision):
    rng, dtype = random.Random(1), models.DTYPES[precision]
    drawn = [random_model(rng) for _ in range(12 if precision == "fp32" else 0)]
    for model in [
        *(Model(shape, size, num_classes=10, **options) for shape, size, options in KEPT),
        *(model for model in drawn if model.tokens > 1),  # of a single token the pooling head matters, and is rough
    ]:
        module = build_vit(**vars(model)).to(dtype).eval().requires_grad_(False)
        images = torch.randn(8, model.channels, model.image_size, model.image_size).to(dtype)
        peak = Peak({StorageWeakRef(p.untyped_storage()) for p in module.parameters()})
        with torch.inference_mode(), peak:
            module(images)
        found = inference_memory(model, 8, precision)
        assert found.activations == peak.most, model
        assert found.images == images.nbytes
        assert found.weights == sum(p.nbytes for p in module.parameters())


def test_the_largest_batch_fits_and_the_next_does_not():
    for room in (30e3, 1e6, 1e9):
        count = largest_batch(TINY, room)
        assert inference_memory(TINY, count).total <= room < inference_memory(TINY, count + 1).total
    assert largest_batch(TINY, 100.0) == 0


@pytest.mark.parametrize("pool", ["map", "avg", "token"])
def test_timms_model_of_the_printed_arguments_is_the_same_network(pool):
    """Our weights in timm's model give our logits; (448, 976) is a pair that timm alone would round down."""
    for shape in (Shape(8, 2, 20, 2, 8), Shape(448, 1, 976, 7, 8)):
        model = Model(shape, 16, pool=pool, num_classes=3, qk_norm=True)
        torch.manual_seed(0)
        ours, theirs = build_vit(**vars(model)).eval(), models.build_timm(models.timm_arguments(model)).eval()
        assert sum(p.numel() for p in theirs.parameters()) == sum(num_params(**vars(model)).values())
        theirs.load_state_dict(ours.state_dict())
        images = torch.randn(2, 3, 16, 16)
        with torch.inference_mode():
            assert torch.equal(ours(images), theirs(images))
    assert json.loads(json.dumps(models.timm_arguments(model))) == models.timm_arguments(model)
    assert models.timm_arguments(dataclasses.replace(model, block="parallel")) is None


@pytest.fixture
def exported(tmp_path):
    """A file as `sovit export` writes it, of random weights."""
    keys = ("shape=8x2x20", "model.num_heads=2", "model.patch_size=8", "model.image_size=16", "data.num_classes=5")
    cfg = config.compose(list(keys))
    model = Model(derived.shape_of(cfg), **derived.model_geometry(cfg), **derived.model_options(cfg))
    torch.manual_seed(1)
    state = build_vit(**vars(model)).state_dict()
    about = {"config": json.dumps(dataclasses.asdict(cfg)), "weights": "average", "step": "3", "run_id": "r"}
    save_file(state, tmp_path / "w.safetensors", about)
    return Subject("w", model, tmp_path / "w.safetensors"), state


def test_a_checkpoint_is_measured_with_its_weights_and_positions_are_interpolated_as_timm_does(exported):
    subject, state = exported
    same = models.build(subject, 16)
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    larger = models.build(subject, 32)
    same.set_input_size((32, 32))  # timm's own way
    images = torch.randn(2, subject.model.channels, 32, 32)
    with torch.inference_mode():
        assert torch.equal(larger.eval()(images), same.eval()(images))


def test_a_row_has_every_figure_and_utilisation_is_flops_over_time_and_peak(monkeypatch):
    monkeypatch.setattr(row, "peak", lambda device, precision: row_peak)
    row_peak = type("Peak", (), {"flops": 5e9, "basis": "datasheet"})
    found = row.measure(Subject("t", TINY), setting(4), seconds=0.02)
    p50 = found["latency_ms"]["p50"] / 1e3
    n, w, m = 4, 8, 20  # by hand: patches, two blocks, classifier
    flops = 2 * n * 64 * w + 2 * (8 * n * w * w + 4 * n * n * w + 4 * n * w * m) + 2 * w * 5
    assert found["utilisation"] == pytest.approx(4 * flops / p50 / 5e9)
    assert found["images_per_s"] == pytest.approx(4e3 / found["latency_ms"]["mean"])
    assert found["timm"]["ratio"]["num_turns"] >= turns.LEAST_TURNS
    assert found["compile_s"] is None and found["memory_basis"] == "resident set of the process"
    json.dumps(found)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_said_and_other_errors_are_not_taken_for_it(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(row, "build", fails)
    with pytest.raises(row.NotMeasured, match=r"^out of memory$"):
        row.measure(Subject("t", TINY), setting(), seconds=0.01)
    error = RuntimeError("sizes do not match")
    with pytest.raises(RuntimeError, match="sizes do not match"):
        row.measure(Subject("t", TINY), setting(), seconds=0.01)


def test_a_row_that_is_killed_or_too_large_says_so_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PRELOAD", "json")
    monkeypatch.setattr(processes, "free_memory", lambda: 10**9)
    subject, out = Subject("t", TINY), tmp_path / "new" / "rows.jsonl"
    monkeypatch.setattr(processes, "_child", killed_row.killed)
    (killed,) = processes.measure_all([(subject, setting(1))], seconds=1.0, out=out)
    assert (killed["status"], killed["why"]) == ("not measured", "killed by SIGKILL (out of memory?)")
    monkeypatch.setattr(processes, "_child", killed_row.told)
    work = [(subject, setting(batch)) for batch in (1, 10**8, 2)]
    found = list(processes.measure_all(work, seconds=1.0, out=out))
    assert [one["status"] for one in found] == ["measured", "not measured", "measured"]
    assert re.fullmatch(r"out of memory: about 2\d\d\.\d\d GB are needed, 1\.00 GB are free", found[1]["why"])
    assert len({os.getpid(), found[0]["pid"], found[2]["pid"]}) == 3  # a process each
    assert [json.loads(line) for line in out.read_text().splitlines()] == [killed, *found]
    assert processes.same(found[0], *work[0], found[0]["machine"])
    assert not any(processes.same(one, *work[2], one["machine"]) for one in (*found[:2], killed))


def test_a_line_cut_off_by_a_kill_is_dropped_before_the_next_is_appended(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in ("", '{"a": 1}\n{"b"', '{"cut'):
        path.write_text(content)
        processes.append(path, {"c": 3})
        assert path.read_text().splitlines() == [*content.splitlines()[: content.count("\n")], '{"c": 3}']


def package(root, name, micro, wrap=1000):
    (root / name).mkdir(parents=True)
    (root / name / "energy_uj").write_text(f"{micro}\n")
    (root / name / "max_energy_range_uj").write_text(f"{wrap}\n")


def test_energy_counts_every_package_once_and_survives_a_counter_that_starts_again(tmp_path):
    package(tmp_path, "intel-rapl:0", 900)
    package(tmp_path, "intel-rapl:1", 100)
    package(tmp_path, "intel-rapl:0:0", 500)  # the cores of package 0
    found = energy.meter("cpu", rapl=tmp_path)
    before = found.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")  # 100 to the end, 50 from 0
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("130\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("900\n")
    assert found.between(before, found.read()) == pytest.approx(180e-6)
    assert energy.meter("cpu", rapl=tmp_path / "none") is None


def test_rows_are_every_combination_and_a_size_that_the_patch_does_not_divide_is_refused_first():
    use = {"precisions": ("fp32", "bf16"), "modes": ("eager", "compiled"), "device": "cpu", "threads": 2}
    chosen = settings(Subject("t", TINY), image_sizes=(16, 24), batch_sizes=(1, 2), **use)
    assert len(set(chosen)) == 16 and {one.image_size for one in chosen} == {16, 24}
    with pytest.raises(ValueError, match="image_size=20 is not divisible by patch_size=8"):
        settings(Subject("t", TINY), image_sizes=(16, 20), batch_sizes=(1,), **use)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with contextlib.suppress(SystemExit):
            return (cli.main(["bench", *map(str, arguments)]), *capsys.readouterr())
        return (2, *capsys.readouterr())

    return call


def test_ctrl_c_keeps_the_rows_that_are_measured(run, monkeypatch, tmp_path):
    figures = {
        "status": "measured",
        "why": None,
        "latency_ms": {"p50": 2.0, "p95": 3.0, "mean": 2.1, "num_calls": 30},
        "images_per_s": 500.0,
        "utilisation": 0.5,
        "peak_gflops_per_s": 90.0,
        "peak_basis": "measured",
        "memory_bytes": 10**6,
        "memory_basis": "here",
        "energy_j_per_image": None,
        "energy_basis": None,
        "timm": None,
        "cpu_share": 1.0,
        "compile_s": None,
    }
    answers = iter([figures, KeyboardInterrupt()])

    def answer(*_):
        one = next(answers)
        if isinstance(one, BaseException):
            raise one
        return one

    monkeypatch.setattr(processes, "_row", answer)
    out = tmp_path / "rows.jsonl"
    asked = ("mu/16", "--mode", "eager", "--precision", "fp32", "--batch", "1,2,4", "--device", "cpu", "--out", out)
    code, printed, err = run(*asked)
    assert code == 130 and "Stopped; 1 of 3 rows are measured" in err and "2.00" in printed and "not told" in printed
    assert [json.loads(line)["batch_size"] for line in out.read_text().splitlines()] == [1]
    answers = iter([figures, figures])
    code, printed, err = run(*asked, "--missing", "--json")
    assert code == 0 and "1 of 3 rows are in" in err
    assert [one["batch_size"] for one in json.loads(printed)] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to measure"),
        (["S/17"], "image_size=224 is not divisible by patch_size=17"),
        (["So400"], "did you mean 'So400m'"),
        (["no.safetensors"], "no.safetensors is not there"),
        (["S/16", "--precision", "fp8"], "precision='fp8' is unknown"),
        (["S/16", "--mode", "eagre"], "mode='eagre' is unknown"),
        (["S/16", "--clock", "processor", "--threads", "2"], "one thread of a CPU"),
        (["S/16", "--device", "cuda"], "no GPU is visible"),
        (["S/16", "--missing"], "--missing needs --out"),
        (["S/16", "-o", "x.json"], "-o is for the model that --fit makes"),
        (["S/16", "--fit", "x.jsonl"], "--fit measures nothing; leave out S/16"),
        (["--fit", "x.jsonl", "--batch", "1"], "--batch has no meaning with --fit"),
        (["--fit", "x.jsonl"], "x.jsonl is not there"),
    ],
)
def test_a_mistake_is_one_sentence(run, monkeypatch, arguments, sentence):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = run(*arguments)
    assert code == 2 and sentence in err


def test_an_option_of_a_shape_is_refused_for_a_checkpoint(run, exported):
    code, _, err = run(exported[0].source, "--heads", 2)
    assert code == 2 and "--heads is for a shape" in err


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            "InductorError: InvalidCxxCompiler: No working C++ compiler found in config: (None, 'g++')",
            "no C++ compiler",
        ),
        ("TritonMissing: Cannot find a working triton installation. Please install it", "no working Triton"),
        ("graph break\nmore", "torch.compile failed: graph break"),
        ("can't allocate memory: you tried to allocate 8 bytes", None),
    ],
)
def test_a_model_that_cannot_be_compiled_says_why_in_one_clause(monkeypatch, error, why):
    def fails(_):
        raise RuntimeError(error)

    monkeypatch.setattr(torch, "compile", lambda model, **options: fails)
    use = dataclasses.replace(setting(), mode="compiled")
    with pytest.raises(RuntimeError) as raised:
        row._callable(torch.nn.Identity(), torch.zeros(1), use, gpu=False)
    assert isinstance(raised.value, row.NotMeasured) == (why is not None)  # memory is handled elsewhere
    assert str(raised.value).startswith(why or error)


@pytest.mark.full
def test_the_command_measures_and_without_a_compiler_the_row_says_so(tmp_path):
    """For real, in processes of its own: eager is measured, compiled has no C++ compiler."""
    out = tmp_path / "rows.jsonl"
    shape = ["8x1x16", "--heads", "2", "--patch", "8", "--channels", "1", "--pool", "avg", "--image-size", "16"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sovit.cli", "bench", *shape, "--batch", "1", "--precision", "fp32"),
            *("--threads", "1", "--seconds", "0.05", "--device", "cpu", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    eager, compiled = (json.loads(line) for line in out.read_text().splitlines())
    assert (
        eager["status"] == "measured" and eager["timm"]["ratio"]["num_turns"] >= 5 and eager["memory_bytes"] is not None
    )
    assert compiled["status"] == "not measured" and "no C++ compiler" in compiled["why"]
    assert "no C++ compiler" in done.stdout and "Traceback" not in done.stderr
