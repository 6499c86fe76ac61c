"""The ``sovit`` command: what it prints, its exit codes, and that it stays light."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fake_cells import go, plan
from sovit import records
from sovit.cli import main
from sovit.config import compose
from sovit.flops import forward_gflops, num_params
from sovit.launch.local import runner as local
from sovit.shape import Shape

SWEEPS = Path(__file__).parents[1] / "sweeps"
SMOKE = str(SWEEPS / "star_smoke.yaml")
HEAVY = ("torch", "timm", "lightning", "wandb", "sklearn", "numba", "scipy", "matplotlib")


def modules_after(*arguments: str) -> tuple[str, list[str]]:
    """Standard output of a command in a fresh process, and the heavy modules it loaded."""
    code = (
        f"import sys\nfrom sovit.cli import main\ntry:\n    main({list(arguments)})\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {(*HEAVY, 'hydra', 'rich')} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *out, loaded = done.stdout.splitlines()
    return "\n".join(out), json.loads(loaded.replace("'", '"'))


def test_help_and_shape_load_nothing_heavy() -> None:
    out, loaded = modules_after("--help")
    assert "status" in out and loaded == []
    out, loaded = modules_after("shape", "So400m/14", "--json")
    assert json.loads(out)["width"] == 1152 and loaded == []


def test_planning_and_status_load_no_torch(tmp_path: Path) -> None:
    _, loaded = modules_after("plan", SMOKE, "shape=32x4x128", f"runs_dir={tmp_path}", "--no-measure")
    assert not set(loaded) & set(HEAVY)


def test_shape_prints_the_sums_of_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shape", "So400m/14", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["num_params"] == sum(num_params(Shape(1152, 27, 4304, 16, 14), 224).values())
    assert content["num_params"] == sum(content["params_by_group"].values())
    # SoViT (arXiv 2305.13035), Table 1: 221 GFLOPs at 224 pixels, by a count that includes element-wise operations
    assert content["forward_gflops"] == pytest.approx(221, rel=0.005)
    assert content["forward_gflops"] == pytest.approx(sum(content["forward_flops_by_group"].values()) / 1e9)
    assert main(["shape", "So400m/14"]) == 0
    out = capsys.readouterr().out
    assert f"{content['num_params']:,}" in out and "2 FLOP per multiply-add" in out


def test_shape_options_reach_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--head-dim", "8", "--patch", "8", "--image-size", "16", "--channels", "1"]
    assert main(["shape", "32x4x128", *size, "--pool", "avg", "--classes", "256", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["num_heads"], content["patch_size"]) == (4, 8)
    geometry = {"channels": 1, "pool": "avg", "num_classes": 256}
    assert content["forward_gflops"] == pytest.approx(forward_gflops(Shape(32, 4, 128, 4, 8), 16, **geometry))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["shape", "So500m"], "'So500m' is not a shape"),
        (["shape", "32x4x128"], "give num_heads or head_dim"),
        (["shape", "33x4x128", "--heads", "4"], "width=33 is not divisible by num_heads=4"),
        (["plan", "nowhere.yaml"], "no such file or directory; give the path of a sweep file"),
        (["plan", SMOKE, "sead=0"], "'sead' is not a key of the configuration; did you mean 'seed'?"),
        (["run", SMOKE, "shape=33x1x8"], "width=33"),
        (["status", "nowhere"], "nowhere holds no runs"),
        (["fit", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"sovit {arguments[0]}: ") and sentence in err
    assert err.count("\n") == 1


def test_a_bad_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", SMOKE, "--workers", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_plan_prints_every_cell_and_the_totals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SMOKE, f"runs_dir={tmp_path}", "--workers", "3", "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert out.count("star_smoke-w") == 7 and "7 cells" in out and "3 at once" in out
    assert not list(tmp_path.iterdir())  # planning writes nothing


def test_run_plans_the_sweep_and_hands_it_to_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def run_sweep(made: object, **options: object) -> int:
        seen.update(plan=made, **options)
        return 1

    monkeypatch.setattr(local, "run_sweep", run_sweep)
    arguments = ["run", SMOKE, "shape=32x4x128", "seed=3", f"runs_dir={tmp_path}", "--workers", "1", "--retry-failed"]
    assert main(arguments) == 1
    made = seen["plan"]
    assert [cell.run_id for cell in made.cells] == ["star_smoke-w0032-d04-m0128-h04-p08-s3"] and made.workers == 1
    assert made.cells[0].config_hash == records.config_hash(compose(made.cells[0].overrides))
    assert seen["retry_failed"] is True and seen["metric"] == ("fractals", 10)


def test_status_shows_states_reasons_and_the_last_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(plan(tmp_path, {"good": "done", "bad": "diverge", "gone": "die"}))
    rows = [(5, 0, 0.9), (10, 0, 0.2), (10, 1, 0.4)]  # step, draw, error
    lines = [{"dataset": "fractals", "shots": 10, "step": step, "draw": d, "error": e} for step, d, e in rows]
    other = {"dataset": "digits", "shots": 10, "step": 10, "draw": 0, "error": 0.7}
    records.append_lines(tmp_path / "fake" / "fake-good" / records.EVALS, [*lines, other])
    capsys.readouterr()
    assert main(["status", str(tmp_path / "fake")]) == 0
    lines_out = capsys.readouterr().out.splitlines()
    row = {name: next(line for line in lines_out if line.split()[:1] == [name]) for name in ("good", "bad", "gone")}
    assert "done" in row["good"] and "0.300" in row["good"] and "10 / 10" in row["good"]
    assert "diverged" in row["bad"] and "training loss is nan at step 7" in row["bad"]
    assert "stopped" in row["gone"]
    assert "fake: 3 cells, 1 done, 1 diverged, 1 stopped." in lines_out


def test_status_of_a_sweep_file_counts_the_cells_that_have_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status", SMOKE]) == 0
    assert "star_smoke: 7 cells, 7 waiting." in capsys.readouterr().out


def write_run(directory: Path, shape: Shape, error: dict[int, float]) -> None:
    """A finished run as the engine leaves it: an error for each compute in GFLOPs, and one of the initialisation."""
    run_id = f"made_up-w{shape.width:04d}-d{shape.depth:02d}-m{shape.mlp_dim:04d}-h04-p08-s0"
    run_dir = directory / run_id
    run_dir.mkdir(parents=True)
    common = {**shape.as_dict(), "run_id": run_id, "sweep": "made_up", "seed": 0, "schema": records.SCHEMA}
    records.write_json(run_dir / records.RUN, {**common, "status": "done", "reason": None, "config": {}})
    rows = [
        {"step": step, "examples_seen": step, "t_gflops": float(t), "forward_gflops": 1.0, "duration": f"{t} gflops",
         "weights": "ema", "dataset": "fractals", "shots": 10, "draw": 0, "l2_reg": 1.0, "error": value, "stderr": 0.005}
        for step, (t, value) in enumerate({0: 0.98, **error}.items())
    ]  # fmt: skip
    records.append_lines(run_dir / records.EVALS, [{**common, **row} for row in rows])


def test_fit_writes_the_fit_of_a_star_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors from a law with s = 0.4 / (0.5 + 0.3) in every dimension, without noise: the exponent comes back."""
    center = (32, 8, 128)
    points = {center}
    for arm in range(3):
        points |= {(*center[:arm], center[arm] * 2**k // 8, *center[arm + 1 :]) for k in range(7)}
    for width, depth, mlp_dim in points:
        ratios = [value / middle for value, middle in zip((width, depth, mlp_dim), center, strict=True)]
        x = next((ratio for ratio in ratios if ratio != 1), 1.0)
        law = {t: 0.06 * x**-0.5 + (0.25 * x**0.3 + 0.05) * (t / 50) ** -0.4 + 0.02 for t in (50, 100, 200, 400, 800)}
        write_run(tmp_path / "made_up", Shape(width, depth, mlp_dim, 4, 8), law)
    assert main(["fit", str(tmp_path / "made_up"), "--out", str(tmp_path / "out")]) == 0
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert (
        fit["kind"] == "star"
        and fit["sweep"] == "made_up"
        and fit["center"] == dict(zip(("width", "depth", "mlp_dim"), center, strict=True))
    )
    assert [arm["s"]["estimate"] for arm in fit["arms"].values()] == pytest.approx([0.5] * 3, rel=0.02)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "fit.json", "fit.png", "report.html", "report.json", "report.md",
    }  # fmt: skip
    assert "10-shot error on fractals" in capsys.readouterr().out

    again = ["fit", str(tmp_path / "made_up"), "--out", str(tmp_path / "out")]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main(again) == 0
    assert "Nothing has changed since the last fit" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (tmp_path / "made_up" / "exclusions.csv").write_text(f"run_id,reason\n{fit['points'][0]['run_id']},made up\n")
    assert main(again) == 0
    assert "Nothing has changed" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "fit.json").read_text())["excluded"]) == 1


def test_fit_tells_a_grid_from_a_star(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width in (16, 32, 64):
        for depth in (1, 2, 4):
            off = abs(width - 32) / 32 + abs(depth - 2) / 2
            errors = {t: 0.3 + 0.1 * off + 5 / t for t in (50, 100, 200)}
            write_run(tmp_path / "made_up", Shape(width, depth, 128, 4, 8), errors)
    assert main(["fit", str(tmp_path / "made_up")]) == 0
    fit = json.loads((tmp_path / "made_up" / "fit.json").read_text())
    assert fit["kind"] == "grid" and fit["winners"][0]["best"] == {"width": 32, "depth": 2, "mlp_dim": 128}


def test_fit_of_a_sweep_without_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(plan(tmp_path, {"a": "diverge"}))
    assert main(["fit", str(tmp_path / "fake")]) == 2
    said = capsys.readouterr().err
    assert "holds no finished run" in said and "see sovit status" in said
