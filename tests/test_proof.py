"""Does the predicted shape win: rivals, their standings against Dunnett's, and the whole of `sovit optimize` in small."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from sovit.analysis.proof import rivals
from sovit.analysis.proof.standing import critical_value, standings
from sovit.flops import forward_gflops, num_params
from sovit.launch import proof
from sovit.launch.sweep import SweepError, load_sweep
from sovit.shape import Shape

TINY = {"image_size": 16, "channels": 1, "pool": "avg", "num_classes": 256, "patch_size": 8}
LARGE = {"image_size": 224, "channels": 3, "pool": "map", "num_classes": 0, "patch_size": 14}
SO150M = Shape(880, 18, 2320, 16, 14)


@pytest.mark.parametrize(
    ("num_rivals", "degrees", "value"),
    [(1, 10, 2.228), (2, 6, 2.86), (4, 10, 2.89), (5, 20, 2.73), (3, 8, 2.88)],
)
def test_the_common_critical_value_is_that_of_dunnetts_table(num_rivals: int, degrees: int, value: float) -> None:
    """Two-sided 5% points of Dunnett (1964), Biometrics 20, Table II, for equal numbers of runs."""
    scale = (np.eye(num_rivals) + 1) / 3
    assert critical_value(scale, degrees) == pytest.approx(value, abs=0.012)


def test_the_common_critical_value_is_the_one_behind_scipys_dunnett() -> None:
    rng = np.random.default_rng(3)
    samples = [rng.normal(mean, 0.02, 4) for mean in (-1.5, -1.49, -1.4, -1.2)]
    ends = stats.dunnett(*samples[1:], control=samples[0], random_state=0).confidence_interval(0.95)
    spread = math.sqrt(sum(((sample - sample.mean()) ** 2).sum() for sample in samples) / 12)
    theirs = (ends.high - ends.low) / 2 / (spread * math.sqrt(2 / 4))
    assert theirs == pytest.approx(critical_value((np.eye(3) + 1) / 4, 12), abs=2e-3)


def test_a_seed_that_is_hard_for_every_shape_widens_no_interval() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (3, 4))
    plain = {f"s{i}": {k: math.exp(-1 + 0.1 * i + noise[i, k]) for k in range(4)} for i in range(3)}
    hard = {name: {k: error * (1.5 if k == 2 else 1.0) for k, error in runs.items()} for name, runs in plain.items()}
    here, there = standings(plain, "s0"), standings(hard, "s0")
    assert here.degrees == there.degrees == 6
    for name in ("s1", "s2"):
        assert there.against[name].ratio == pytest.approx(here.against[name].ratio)
        assert there.against[name].lo == pytest.approx(here.against[name].lo)
        assert here.against[name].better is True
    # By hand: residuals of the two-way table, (shapes - 1)(seeds - 1) degrees.
    table = np.array([[math.log(plain[f"s{i}"][k]) for k in range(4)] for i in range(3)])
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert here.spread == pytest.approx(math.sqrt((rest**2).sum() / 6))


def test_simultaneous_intervals_hold_all_true_ratios_in_95_percent_of_proofs() -> None:
    """200 proofs of four rivals on three seeds, one run missing; a binomial of 95% leaves 90 to 98.5% once in 200."""
    rng = np.random.default_rng(1)
    truth = np.array([0.0, 0.0, 0.05, 0.2, 1.0])
    held = 0
    for _ in range(200):
        y = -1.3 + truth[:, None] + rng.normal(0, 0.05, 3) + rng.normal(0, 0.02, (5, 3))
        errors = {i: {k: math.exp(y[i, k]) for k in range(3)} for i in range(5)}
        del errors[3][1]
        found = standings(errors, 0)
        held += all(found.against[i].lo < math.exp(truth[i]) < found.against[i].hi for i in range(1, 5))
    assert 0.90 < held / 200 < 0.985


def test_one_seed_tells_nothing_apart_and_says_so() -> None:
    found = standings({"a": {1: 0.2}, "b": {1: 0.4}}, "a")
    assert found.spread is None and found.against["b"].ratio == pytest.approx(2.0)
    assert found.against["b"].better is None
    with pytest.raises(ValueError, match="a has no finished run"):
        standings({"a": {}, "b": {1: 0.4}}, "a")


def test_a_shape_without_a_seed_in_common_is_not_compared() -> None:
    """Its own seeds may have been the easy ones: b looks twice as bad as a, and could be as good."""
    found = standings({"a": {1: 0.2, 2: 0.21}, "b": {3: 0.4, 4: 0.5}, "c": {2: 0.3, 1: 0.31}}, "a")
    assert set(found.against) == {"c"} and found.degrees == 1
    assert found.interval["b"] == (None, None) and found.mean["b"] == pytest.approx(math.sqrt(0.4 * 0.5))
    chain = standings({"a": {1: 0.2}, "b": {2: 0.4}, "c": {1: 0.3, 2: 0.3}}, "a")  # tied by c: 0.2/0.3 and 0.4/0.3
    assert chain.against["b"].ratio == pytest.approx(2.0)


def test_the_conventional_rival_is_the_nearest_in_cost_of_all_widths() -> None:
    for predicted, geometry in ((SO150M, LARGE), (Shape(32, 3, 112, 4, 8), TINY)):
        found = rivals.conventional(predicted, geometry).shape
        assert (found.depth, found.mlp_dim, found.width) == (12, 4 * found.width, 64 * found.num_heads)
        wanted = math.log(forward_gflops(predicted, **_cost(geometry)))
        others = [Shape(64 * h, 12, 256 * h, h, predicted.patch_size) for h in range(1, 60)]
        best = min(others, key=lambda shape: abs(math.log(forward_gflops(shape, **_cost(geometry))) - wanted))
        assert found == best


def test_the_rival_of_as_many_parameters_is_the_papers_b150m() -> None:
    """SoViT (arXiv 2305.13035, Fig. 6) holds So150m against B proportions of its size; 12 w^2 of each of 12 blocks."""
    found = rivals.same_parameters(SO150M, LARGE).shape
    ours, theirs = (sum(num_params(shape, **_cost(LARGE)).values()) for shape in (SO150M, found))
    assert found.depth == 12 and found.mlp_dim == 4 * found.width and found.num_heads == 16
    assert theirs / ours == pytest.approx(1, abs=0.03)


def test_neighbours_lie_a_step_away_in_one_dimension_or_in_all() -> None:
    around = rivals.neighbours(SO150M)
    assert len(around) == len(set(around)) == 8
    one = [shape for shape in around if sum(_sizes(shape)[k] != _sizes(SO150M)[k] for k in range(3)) == 1]
    assert len(one) == 6
    for shape in around:
        for here, there in zip(_sizes(shape), _sizes(SO150M), strict=True):
            assert here == there or 1.2 < max(here / there, there / here) < 1.5
        assert shape.width % 16 == 0 and shape.mlp_dim % 16 == 0
    smallest = Shape(4, 1, 8, 4, 8)  # nothing lies below it
    assert all(min(_sizes(shape)) >= 1 and shape != smallest for shape in rivals.neighbours(smallest))


def test_a_star_of_one_head_dimension_gets_neighbours_and_a_model_of_its_size_that_have_it() -> None:
    predicted = Shape(384, 8, 1024, 6, 14)
    for shape in (*rivals.neighbours(predicted, 64), rivals.same_parameters(predicted, LARGE, 64).shape):
        assert shape.head_dim == 64
    assert {shape.width for shape in rivals.neighbours(predicted, 64)} == {256, 384, 512}


def _sizes(shape: Shape) -> tuple[int, int, int]:
    return shape.width, shape.depth, shape.mlp_dim


def _cost(geometry: dict) -> dict:
    return {key: geometry[key] for key in ("image_size", "channels", "pool", "num_classes")}


def test_the_proofs_cells_differ_from_the_stars_in_shape_seed_and_durations_only(tmp_path: Path) -> None:
    from sovit.config import compose

    star = load_sweep(Path(__file__).parents[1] / "sweeps" / "star_quick.yaml", ["logger=none"])
    file = tmp_path / "proof.yaml"
    proof.write(file, star, name="mine", shapes=["32x3x96", "16x12x64"], seeds=[1, 2], compute=320, about="Made.")
    cells = load_sweep(file, ["logger=none"]).cells
    assert len(cells) == 4
    here, there = compose(cells[0]), compose(star.cells[0])
    assert (here.name, here.shape, here.seed) == ("mine", "32x3x96", 1)
    for part in ("model", "data", "optim", "schedule", "eval", "parallel"):
        assert getattr(here, part) == getattr(there, part)
    assert (here.durations.first, here.durations.last, here.durations.num) == ("40 gflops", "320 gflops", 4)
    before = file.stat().st_mtime_ns
    proof.write(file, star, name="mine", shapes=["32x3x96", "16x12x64"], seeds=[1, 2], compute=320, about="Made.")
    assert file.stat().st_mtime_ns == before
    proof.write(file, star, name="habit", shapes=["64x12x256"], seeds=[1], compute=320, about="Made.", num_heads=1)
    assert compose(load_sweep(file).cells[0]).model.num_heads == 1


def test_a_star_that_lists_its_durations_or_varies_more_is_refused(tmp_path: Path) -> None:
    sweeps = Path(__file__).parents[1] / "sweeps"
    with pytest.raises(SweepError, match=r"durations\.first"):
        proof.write(tmp_path / "p.yaml", load_sweep(sweeps / "star_tiny.yaml"), name="p", shapes=["32x3x96"], seeds=[1],
                    compute=320, about="")  # fmt: skip
    content = yaml.safe_load((sweeps / "star_quick.yaml").read_text())
    content["parameters"]["optim.lr"] = {"values": [1e-3, 2e-3]}
    other = tmp_path / "two_rates.yaml"
    other.write_text(yaml.safe_dump(content))
    with pytest.raises(SweepError, match=r"varies optim\.lr"):
        proof.write(
            tmp_path / "p.yaml", load_sweep(other), name="p", shapes=["32x3x96"], seeds=[1], compute=3, about=""
        )


@pytest.mark.parametrize(
    ("star", "grid", "overrides", "name", "said"),
    [
        ("star_quick", "grid_quick", ["durations.last=8 gflops"], "p", r"a proof sets durations\.last"),
        ("star_quick", "grid_quick", ["seed=3"], "p", "a proof sets seed"),
        ("grid_quick", "star_quick", [], "p", "is a grid; --star needs a star"),
        ("star_tiny", "grid_quick", [], "p", r"list durations\.values"),
        ("star_mixer_tiny", "grid_quick", [], "p", "family mixer"),
        ("star_quick", "grid_quick", [], "star_quick", "a sweep is called star_quick already"),
        ("star_quick", "grid_quick", [], "../p", "letters, digits"),
    ],
)
def test_what_cannot_end_in_a_proof_is_refused_before_a_cell_is_trained(
    star: str, grid: str, overrides: list[str], name: str, said: str
) -> None:
    sweeps = Path(__file__).parents[1] / "sweeps"
    with pytest.raises(SweepError, match=said):
        proof.refuse(
            *(load_sweep(sweeps / f"{one}.yaml", overrides) for one in (star, grid)), overrides=overrides, name=name
        )


def test_a_proof_is_not_called_so_that_its_parts_are_the_star(tmp_path: Path) -> None:
    sweeps = Path(__file__).parents[1] / "sweeps"
    star, grid = (load_sweep(sweeps / f"{one}_quick.yaml", [f"runs_dir={tmp_path}"]) for one in ("star", "grid"))
    called = load_sweep(sweeps / "star_quick.yaml", [f"runs_dir={tmp_path}", "name=mine_proof"])
    with pytest.raises(SweepError, match="called mine_proof already"):
        proof.refuse(called, grid, [], "mine")
    proof.refuse(star, grid, [], "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.yaml").touch()
    with pytest.raises(SweepError, match="holds the runs of a sweep"):
        proof.refuse(star, grid, [], "mine")


def test_rivals_alike_but_for_their_heads_keep_their_own_runs_and_strays_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64x12x256 with 4 heads and with 1, in two folders; one run of the latter ended at half the budget."""
    from sovit.analysis.points import Point
    from sovit.analysis.proof import evidence

    def load(folder: Path, *_: object) -> tuple[list[Point], list]:
        sizes, error = {"proof": ((64, 12, 256), 0.3), "habit": ((64, 12, 256), 0.4), "local": ((40, 3, 96), 0.2)}[
            folder.name
        ]
        runs = [(seed, 160.0 if (folder.name, seed) == ("habit", 3) else 320.0) for seed in (1, 2, 3)]
        points = [Point(f"{folder.name}-{seed}", *sizes, seed, t, "320 gflops", round(error + seed / 100, 2), 0.01, 3)
                  for seed, t in runs]  # fmt: skip
        if folder.name == "proof":
            points += [Point(f"p-{seed}", 32, 3, 96, seed, 320.0, "320 gflops", 0.2, 0.01, 3) for seed in (1, 2, 3)]
        return points, []

    monkeypatch.setattr(evidence, "load_points", load)
    monkeypatch.setattr(evidence, "_exponents", lambda star: [])
    for name in ("proof", "habit", "local"):
        (tmp_path / name).mkdir()
    predicted, four, one = Shape(32, 3, 96, 4, 8), Shape(64, 12, 256, 4, 8), Shape(64, 12, 256, 1, 8)
    found = evidence.gather(
        [rivals.Rival(rivals.PREDICTED, predicted, ""), rivals.Rival(rivals.SAME_PARAMETERS, four, ""),
         rivals.Rival(rivals.CONVENTIONAL, one, ""), rivals.Rival(rivals.PUBLISHED, predicted, "")],
        tmp_path, folders={tmp_path / "proof": [predicted, four], tmp_path / "habit": [one]}, local=tmp_path / "local",
        metric=("fractals", 10), compute=320.0, joint=None, star=tmp_path, num_seeds=2,
        prediction=_found(1.0, 1.0)["prediction"] | {"geometry": TINY},
    )  # fmt: skip
    assert [row["errors"] for row in found["rows"][1:3]] == [
        {"1": 0.31, "2": 0.32, "3": 0.33},
        {"1": 0.41, "2": 0.42},
    ]
    assert [one["run_id"] for one in found["lost"]] == ["habit-3"]
    assert not found["complete"]  # for want of a neighbour

    from sovit.analysis.report import proof as report

    said = " ".join(report.text(found).split())
    assert "No neighbour has finished" in said and "also that of the published exponents" in said
    assert "the same shape" in said and "habit-3: ended at 160 GFLOPs" in said
    assert report.write(found, tmp_path).exists()


def test_a_losing_prediction_is_said_to_lose_and_where_the_law_failed(tmp_path: Path) -> None:
    from sovit.analysis.report import proof as report

    found = _found(neighbour=0.85, forecast=1.05)
    told = " ".join(sentence for _, sentence in report.sentences(found))
    assert "LOSES to its best neighbour (40x3x96, 0.85 [0.82, 0.88] times its error)" in told
    assert "It is worse than the best of its local grid" in told
    assert "The law failed at 40x3x96 (best neighbour): it expected 1.05 times" in told
    page = report.write(found, tmp_path).read_text()
    assert "LOSES" in page and "<script" not in page and (tmp_path / "fit.png").stat().st_size > 10_000
    won = _found(neighbour=1.01, forecast=1.02)
    told = " ".join(sentence for _, sentence in report.sentences(won))
    assert "LOSES" not in told and "law failed" not in told
    assert "within the noise of the best of its local grid, 40x3x96: its error is at most 2.0% higher" in told
    assert "not told apart" in report.text(won)


def _found(neighbour: float, forecast: float) -> dict:
    def row(role: str, sizes: tuple[int, int, int], ratio: float | None, expected: float | None) -> dict:
        ends = {"estimate": ratio, "lo": ratio - 0.03, "hi": ratio + 0.03} if ratio else None
        better = None if ends is None else True if ends["lo"] > 1 else False if ends["hi"] < 1 else None
        error = 0.25 * (ratio or 1)
        return {
            "role": role, "shape": dict(zip(("width", "depth", "mlp_dim"), sizes, strict=True)), "why": "<b>made</b>",
            "num_params": 1000, "forward_gflops": 1e-4, "images": 3e6, "num_seeds": 3,
            "errors": {"1": error, "2": error * 1.01}, "ratio": ends, "predicted_is_better": better,
            "error": {"estimate": error, "lo": error * 0.98, "hi": error * 1.02},
            "forecast": 0.25 * (expected or 1), "forecast_ratio": expected,
            "curve": [{"t_gflops": t, "error": error * (320 / t) ** 0.3} for t in (160.0, 320.0)],
        }  # fmt: skip

    rows = [
        row("predicted", (32, 3, 96), None, None),
        row("conventional", (64, 12, 256), 2.0, 2.0),
        row("best neighbour", (40, 3, 96), neighbour, forecast),
    ]
    prediction = {"rule": "flops", "optimum": {"width": 31.0, "depth": 3.1, "mlp_dim": 98.0}, "region": None,
                  "extrapolation": {"factor": 10.0}, "notes": []}  # fmt: skip
    return {
        "schema": 1, "kind": "proof", "sweep": "optimize", "metric": {"dataset": "fractals", "shots": 10},
        "t_gflops": 320.0, "complete": True, "level": 0.95, "spread": 0.02, "degrees": 4, "critical": 3.0,
        "num_test_stderr": 0.007, "rows": rows,
        "local": [], "lost": [], "prediction": prediction, "exponents": [], "command": [],
    }  # fmt: skip


@pytest.mark.full
def test_optimize_ends_in_a_report_and_is_idempotent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing on a twentieth of the compute; the second time no cell is trained and the numbers are the same."""
    from sovit.cli import main

    command = ["optimize", "--compute", "24", "--seeds", "2", "logger=none", f"runs_dir={tmp_path}"]
    assert main(command) == 0
    first = json.loads((tmp_path / "optimize" / "proof.json").read_text())
    assert {row["role"] for row in first["rows"]} >= {"predicted", "conventional", "same size", "best neighbour"}
    assert all(row["num_seeds"] == 2 for row in first["rows"])
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads((tmp_path / "optimize" / "proof.json").read_text()) == first
    assert "start     w" not in capsys.readouterr().out
