"""The shape for a budget: the rule, its region, whole shapes near it, what the rounding wastes, and what is refused."""

import itertools
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import t as t_distribution

from sovit import cli, config, derived, records
from sovit.analysis.forecast import candidates as whole
from sovit.analysis.forecast.exponents import Start, given, grid_origin, read_fit, star_exponents
from sovit.analysis.forecast.predict import fitted_rule, paper_rule
from sovit.analysis.forecast.region import region
from sovit.cli import predict
from sovit.flops import forward_gflops, num_params
from sovit.shape import Shape

DIMENSIONS = ("width", "depth", "mlp_dim")
PUBLISHED = ["--exponents", "width=0.22,depth=0.45,mlp=0.6", "--origin", "608x10x928"]
TINY = {"image_size": 16, "channels": 1, "pool": "avg", "num_classes": 256, "patch_size": 8}
LAW = {"alpha": 0.5, "a": 0.5, "beta": 0.05, "b": 0.3, "xi": 0.2, "c": 0.4, "eps": 0.02}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `sovit predict` in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, predict))))

    def call(*arguments):
        try:
            code = cli.main(["predict", *map(str, arguments)])
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def star_fit(**arms):
    """A star's fit.json with the keys a prediction reads; ``arms``: s, interval and others by dimension."""
    plain = {"s": 0.3, "lo": 0.2, "hi": 0.45, "num_runs": 7, "law": LAW}
    rows = {}
    for name in DIMENSIONS:
        arm = plain | arms.get(name, {})
        s = {"estimate": arm["s"], "lo": arm["lo"], "hi": arm["hi"], "method": "REML"}
        why = arm.get("why")
        rows[name] = {
            "identified": why is None, "why": why, "s": None if why else s, "num_runs": arm["num_runs"], "law": arm["law"],
        }  # fmt: skip
    points = [{"t_gflops": t, "used": used} for t, used in ((64.0, True), (256.0, True), (512.0, False))]
    metric = {"dataset": "fractals", "shots": 10}
    return {
        "schema": 1,
        "kind": "star",
        "sweep": "star",
        "metric": metric,
        "level": 0.95,
        "arms": rows,
        "points": points,
    }


def grid_fit(origin=(24, 2, 64), t0=16.0, origins=(), **more):
    sizes = dict(zip(DIMENSIONS, origin, strict=True)) if origin else None
    return {
        "schema": 1, "kind": "grid", "sweep": "grid", "metric": {"dataset": "fractals", "shots": 10},
        "origin": sizes and sizes | {"t0_gflops": t0, "share": 0.7},
        "origins": [dict(zip(DIMENSIONS, x, strict=True)) | {"t0_gflops": t, "share": p} for x, t, p in origins],
        "why": None if origin else "no shape strictly inside the grid is the best at two neighbouring computes",
        "extend": [] if origin else ["extend the grid above width 48: the best shape has the largest width"],
        "points": [],
    } | more  # fmt: skip


def diagonal_fit(**more):
    return {
        "schema": 1, "kind": "diagonal", "sweep": "diag", "metric": {"dataset": "fractals", "shots": 10}, "level": 0.95,
        "direction": {"width": 0.2, "depth": 0.4, "mlp_dim": 0.5}, "origin": {"width": 16, "depth": 2, "mlp_dim": 32},
        "step": {"estimate": 0.7, "lo": 0.6, "hi": 0.8, "method": "REML"}, "why": None, "num_runs": 9,
        "anchor": {"t_gflops": 100.0, "g": 3.0, "log_se": 0.05, "correlation": 0.3},
        "points": [{"t_gflops": 256.0, "used": True}],
    } | more  # fmt: skip


def write(directory, fit):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "fit.json").write_text(json.dumps(fit))
    return directory


def write_runs(directory, overrides=("experiment=star_tiny",), shapes=("32x4x128", "64x4x128")):
    """Finished runs as the engine records them."""
    import dataclasses

    for text in shapes:
        cfg = config.compose([*overrides, f"shape={text}"])
        shape = derived.shape_of(cfg)
        run_dir = directory / records.run_id(cfg)
        run_dir.mkdir(parents=True)
        content = {"status": "done", **shape.as_dict(), "config": dataclasses.asdict(cfg)}
        records.write_json(run_dir / records.RUN, content)


@pytest.mark.parametrize(
    ("factor", "unrounded", "rounded"),
    [
        (10, (719.8, 14.1, 1470.8), (720, 14, 1472)),
        (100, (852.3, 20.0, 2331.0), (848, 20, 2336)),
        (1000, (1009.0, 28.2, 3694.4), (1008, 28, 3696)),
        (10000, (1194.6, 39.8, 5855.3), (1200, 40, 5856)),
    ],
)
def test_published_exponents_give_the_shapes_worked_out_by_hand(run, factor, unrounded, rounded):
    """x0 tau^(s/3) with s = (0.22, 0.45, 0.60), x0 = 608x10x928, to the nearest 16, 1 and 16."""
    code, out, _ = run(*PUBLISHED, "--factor", factor, "--json")
    found = json.loads(out)
    assert code == 0
    assert tuple(round(found["optimum"][name], 1) for name in DIMENSIONS) == unrounded
    first = found["candidates"][0]
    assert tuple(first[name] for name in DIMENSIONS) == rounded
    assert first["heads"][0] == [16, rounded[0] // 16] and first["images"] is None and first["regret"] is None
    assert first["num_params"] == sum(num_params(Shape(*rounded, 16, 14), 224).values())
    code, out, _ = run(*PUBLISHED, "--factor", factor)
    assert code == 0 and "x".join(map(str, rounded)) in out and f"{unrounded[2]:,.1f}" in out


@pytest.mark.parametrize(("match", "expected"), [("B/14:4B", (815, 18.1, 2062)), ("ViT-g/14:16e9", (1078, 32.2, 4427))])
def test_one_origin_cannot_give_both_published_shapes(run, match, expected):
    """From 608x10x928 at 3.5e9 GFLOPs the rule comes within a fifth of 880x18x2320 and 1152x27x4304, not nearer.

    Budgets: ViT-B/14 on 4 and ViT-g/14 on 16 billion images (arXiv 2305.13035): 1.87e11 and 8.5e12 GFLOPs.
    """
    code, out, _ = run(*PUBLISHED, "--t0", "3.5e9", "--match", match, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["t_gflops"] == pytest.approx({"B/14:4B": 1.87e11, "ViT-g/14:16e9": 8.54e12}[match], rel=0.002)
    assert tuple(found["optimum"][name] for name in DIMENSIONS) == pytest.approx(expected, rel=0.005)
    published = (880, 18, 2320) if match.startswith("B") else (1152, 27, 4304)
    assert tuple(found["optimum"][name] for name in DIMENSIONS) == pytest.approx(published, rel=0.21)
    first = found["candidates"][0]
    shape = Shape(*(first[name] for name in DIMENSIONS), 16, 14)
    assert first["images"] == pytest.approx(found["t_gflops"] / forward_gflops(shape, 224))


def test_the_same_budget_in_four_forms(run):
    """GPU hours: 1000 h x 312 TFLOP/s x 0.4, a third of it forward."""
    t = 1000 * 3600 * 312e3 * 0.4 / 3
    forms = (
        ["--compute", f"{t}"], ["--compute", f"{t / 1e9}B gflops"], ["--compute", f"{t * 1e9}flops"],
        ["--gpu-hours", "1000"], ["--gpu-hours", "500", "--tflops", "312", "--mfu", "0.8"], ["--factor", f"{t / 3.5e9}"],
    )  # fmt: skip
    for form in forms:
        code, out, err = run(*PUBLISHED, "--t0", "3.5e9", *form, "--json")
        assert code == 0, err
        assert json.loads(out)["t_gflops"] == pytest.approx(t)


def test_weights_and_the_origin_of_a_grid_enter_the_rule(run, tmp_path):
    star, grid = write(tmp_path / "star", star_fit()), write(tmp_path / "grid", grid_fit())
    weights = "width=0.5,depth=0.2,mlp=0.3"
    code, out, _ = run("--fit", star, "--grid", grid / "fit.json", "--compute", 1600, "--weights", weights, "--json")
    found = json.loads(out)
    assert code == 0
    expected = [x0 * 100 ** (0.3 * w) for x0, w in zip((24, 2, 64), (0.5, 0.2, 0.3), strict=True)]
    assert [found["optimum"][name] for name in DIMENSIONS] == pytest.approx(expected)
    assert found["extrapolation"] == {"factor": 1600 / 256, "largest_t_gflops": 256.0, "fit": "star"}
    override = ["--exponents", "depth=0.9", "--origin", "32x4x96", "--t0", "100"]
    code, out, _ = run("--fit", star, "--compute", 1600, *override, "--json")
    found = json.loads(out)
    assert [found["optimum"][name] for name in DIMENSIONS] == pytest.approx([32 * 16**0.1, 4 * 16**0.3, 96 * 16**0.1])
    assert found["exponents"]["depth"] == {
        "estimate": 0.9, "lo": 0.9, "hi": 0.9, "source": "given", "split": 1 / 3, "growth": pytest.approx(0.3),
    }  # fmt: skip
    depth = found["region"]["box"]["depth"]
    assert depth["lo"] == depth["hi"] == pytest.approx(found["optimum"]["depth"])
    assert found["region"]["box"]["width"]["lo"] < found["optimum"]["width"] < found["region"]["box"]["width"]["hi"]


OPTIMUM = (1009.0, 28.2, 3694.4)
GEOMETRY = {"image_size": 224, "channels": 3, "pool": "map", "num_classes": 0, "patch_size": 14, "pos_embed": "learned"}


@pytest.mark.parametrize("optimum", [OPTIMUM, (852.3, 20.0, 2331.0), (45.2, 3.4, 101.0), (9.0, 1.2, 30.0)])
@pytest.mark.parametrize("judged", [False, True])
def test_every_candidate_is_the_best_of_its_kind_by_brute_force(optimum, judged):
    """All multiples within 6 steps, against the two neighbours that the table looks at."""
    how = whole.rounding(optimum)
    regret = whole.star_regret(star_fit(), optimum, 1e6) if judged else None
    score = regret or (lambda shape: sum(math.log(a / b) ** 2 for a, b in zip(shape, optimum, strict=True)))
    found = {tuple(row.dimensions) for row in whole.candidates(optimum, how, GEOMETRY | TINY, regret=regret)}
    grains = [(step, step) for step in how.steps[1:]]
    grains += [(math.lcm(how.steps[0], head), how.steps[-1]) for head in how.head_dims]
    for width_grain, mlp_grain in grains:
        nearby = itertools.product(
            *(
                [n * grain for n in range(max(1, round(size / grain) - 6), round(size / grain) + 7)]
                for size, grain in zip(optimum, (width_grain, 1, mlp_grain), strict=True)
            )
        )
        assert min(nearby, key=score) in found
    rule = tuple(
        max(step, step * round(size / step)) for size, step in zip(optimum, (how.width, 1, how.mlp_dim), strict=True)
    )
    assert rule in found


def test_heads_divide_every_width_and_settled_heads_are_kept():
    for row in whole.candidates(OPTIMUM, whole.rounding(OPTIMUM), GEOMETRY):
        assert all(num * size == row.width for num, size in row.heads)
        assert any(size in (64, 72, 80, 96, 128) for _, size in row.heads)
        built = row.shape(14)
        assert row.forward_gflops == forward_gflops(built, 224)
        assert row.off == pytest.approx([here / there - 1 for here, there in zip(row.dimensions, OPTIMUM, strict=True)])
    for row in whole.candidates(OPTIMUM, whole.rounding(OPTIMUM, num_heads=12), GEOMETRY):
        assert row.heads == ((12, row.width // 12),) and row.width % 12 == 0
    for row in whole.candidates(OPTIMUM, whole.rounding(OPTIMUM, head_dim=96), GEOMETRY):
        assert row.heads == ((row.width // 96, 96),) and row.width % 96 == 0
    first = whole.candidates(OPTIMUM, whole.rounding(OPTIMUM, width=100, depth=5, mlp_dim=1000), GEOMETRY)[0]
    assert tuple(first.dimensions) == (1000, 30, 4000)


def separable(x, t, alpha, a, beta, b, xi, c, eps):
    """The joint law of arXiv 2305.13035, Eq. 3."""
    x = np.asarray(x, float)
    return float(alpha @ x**-a + (beta @ x**b + xi) * t**-c + eps)


def test_regret_by_the_star_is_that_of_the_separable_law_solved_exactly():
    """At a center that is optimal at t, three exact arms: their sum against root finding on Eq. 3."""
    a, b, c, t = np.array([1.1, 0.6, 0.5]), np.array([0.6, 0.5, 0.3]), 0.4, 256.0
    center = np.array([40.0, 5.0, 150.0])
    alpha = np.array([0.02, 0.03, 0.04]) * center**a
    beta = alpha * a * center**-a / (b * center**b) * t**c
    truth = {"alpha": alpha, "a": a, "beta": beta, "b": b, "xi": 0.1, "c": c, "eps": 0.05}
    arms = {}
    for k, name in enumerate(DIMENSIONS):
        rest = [j for j in range(3) if j != k]
        xi = 0.1 + float(sum(beta[j] * center[j] ** b[j] for j in rest))
        eps = 0.05 + float(sum(alpha[j] * center[j] ** -a[j] for j in rest))
        law = {"alpha": alpha[k], "a": a[k], "beta": beta[k], "b": b[k], "xi": xi, "c": c, "eps": eps}
        arms[name] = {"law": {key: float(value) for key, value in law.items()}}
    regret = whole.star_regret(star_fit(**arms), tuple(center), t)

    def least(log_t):
        sizes = (alpha * a * math.exp(c * log_t) / (beta * b)) ** (1 / (a + b))
        return separable(sizes, math.exp(log_t), **truth)

    assert least(math.log(t)) == pytest.approx(separable(center, t, **truth))
    for shape in ((48, 5, 160), (40, 6, 128), (32, 4, 128), (44, 5, 176)):
        reached = separable(shape, t, **truth)
        wasted = 1 - math.exp(brentq(lambda log_t, r=reached: least(log_t) - r, 0, math.log(t))) / t
        assert regret(shape) == pytest.approx(wasted, rel=0.05)
    assert regret(center) == pytest.approx(0, abs=1e-9)


def test_regret_by_a_joint_law_is_solved_exactly():
    class Toy:
        """f = |log x - log x*(t)|^2 + t^-0.5: a shape off by d wastes 1 - (1 + d^2 t^0.5)^-2."""

        def error(self, x, t):
            return float(np.sum((np.log(x) - np.log([16, 2, 64])) ** 2) + t**-0.5)

        def frontier(self, t):
            return t**-0.5

    regret = whole.joint_regret(Toy(), 100.0)
    assert regret((16, 2, 64)) == 0
    assert regret((16, 3, 64)) == pytest.approx(1 - (1 + 10 * math.log(1.5) ** 2) ** -2)


def test_an_arm_without_an_identified_law_leaves_the_regret_unknown(run, tmp_path):
    star = write(tmp_path / "star", star_fit(depth={"why": "not identified: x"}))
    arguments = ["--fit", star, "--origin", "24x2x64", "--t0", 16, "--compute", 512]
    code, out, _ = run(*arguments, "--exponents", "depth=0.4", "--json")
    assert code == 0 and all(row["regret"] is None for row in json.loads(out)["candidates"])
    code, out, _ = run(*arguments, "--exponents", "depth=0.4")
    assert "regret: share of T wasted, not known without the laws of a star" in out


def test_the_region_holds_the_shape_as_often_as_it_says():
    """400 stars with exponents drawn about the truth, each with its own estimate of the noise from 4 degrees of freedom."""
    rng = np.random.default_rng(0)
    truth, log_se, degrees = np.array([0.22, 0.45, 0.6]), np.array([0.1, 0.15, 0.25]), 4
    start = Start((24.0, 2.0, 64.0), 16.0)
    true_shape = np.array(start.x) * 64 ** (truth / 3)
    quantile = t_distribution.ppf(0.975, degrees)
    inside = inside_ellipsoid = 0
    for seed in range(400):
        s = truth * np.exp(log_se * rng.standard_normal(3))
        half = quantile * log_se * np.sqrt(rng.chisquare(degrees, 3) / degrees)
        arms = {
            name: {"s": s[k], "lo": s[k] * math.exp(-half[k]), "hi": s[k] * math.exp(half[k])}
            for k, name in enumerate(DIMENSIONS)
        }
        forecast = paper_rule(star_exponents(star_fit(**arms)), start, 64.0, num_draws=2000, seed=seed)
        found = region(forecast)
        inside += all(lo <= x <= hi for lo, x, hi in zip(found.lo, true_shape, found.hi, strict=True))
        off = np.log(true_shape) - np.array(found.ellipsoid["center"])
        square = off @ np.linalg.solve(np.array(found.ellipsoid["matrix"]), off)
        inside_ellipsoid += square <= found.ellipsoid["radius2"]
    assert 0.92 <= inside / 400 <= 0.98  # 95%, standard error 1.1%
    assert 0.91 <= inside_ellipsoid / 400 <= 0.985


def test_the_box_of_one_uncertain_dimension_is_its_interval():
    """With two exponents given there is nothing to be simultaneous about: x0 64^(lo / 3) to x0 64^(hi / 3)."""
    exponents = star_exponents(star_fit(), {"depth": 0.4, "mlp_dim": 0.5})
    found = region(paper_rule(exponents, Start((24.0, 2.0, 64.0), 16.0), 64.0, num_draws=200_000))
    assert (found.lo[0], found.hi[0]) == pytest.approx((24 * 64 ** (0.2 / 3), 24 * 64 ** (0.45 / 3)), rel=0.005)
    assert found.lo[1] == found.hi[1] == pytest.approx(2 * 64 ** (0.4 / 3))
    assert found.ellipsoid is None and found.correlation is None


def test_an_open_end_stays_open_and_is_said(run, tmp_path):
    star = write(tmp_path / "star", star_fit(width={"hi": None}, depth={"lo": 0.0}))
    arguments = ["--fit", star, "--origin", "24x2x64", "--t0", 16, "--compute", 512]
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    box = found["region"]["box"]
    assert box["width"]["hi"] is None and box["width"]["lo"] > 24
    assert box["depth"]["lo"] == pytest.approx(2) and box["depth"]["hi"] > found["optimum"]["depth"]
    assert found["region"]["open"] == ["width above"] and found["region"]["ellipsoid"] is None
    assert any("depth: the data leave the exponent open towards 0" in note for note in found["notes"])
    _, out, _ = run(*arguments)
    assert "0.30 above 0.20" in out and ", open" in out and "0.30 below 0.45" in out


def test_the_origins_that_a_grid_elects_widen_and_correlate_the_region():
    """Two origins a factor apart in all sizes: the box reaches from one to the other, and the sizes move together."""
    exponents = {name: given(0.3) for name in DIMENSIONS}
    draws = (((24.0, 2.0, 64.0), 16.0, 0.6), ((32.0, 3.0, 96.0), 16.0, 0.3))
    forecast = paper_rule(exponents, Start((24.0, 2.0, 64.0), 16.0, draws, "grid"), 64.0)
    found = region(forecast)
    growth = 64**0.1
    assert found.lo == pytest.approx([growth * size for size in (24, 2, 64)])
    assert found.hi == pytest.approx([growth * size for size in (32, 3, 96)])
    assert np.array(found.correlation) == pytest.approx(np.ones((3, 3)))
    assert found.ellipsoid is None  # it would be flat
    assert any("in 10% of its draws the grid has no origin" in note for note in forecast.notes)


def test_a_later_t0_of_an_elected_origin_means_less_growth():
    exponents = {name: given(0.3) for name in DIMENSIONS}
    draws = (((24.0, 2.0, 64.0), 16.0, 0.5), ((24.0, 2.0, 64.0), 64.0, 0.5))
    found = region(paper_rule(exponents, Start((24.0, 2.0, 64.0), 16.0, draws, "grid"), 64.0))
    assert (found.lo[0], found.hi[0]) == pytest.approx((24 * 16**0.1, 24 * 64**0.1))


def test_the_fitted_step_replaces_the_split_and_its_doubt_moves_along_the_direction():
    """x = x0 G^d at G = 3 (T / 100)^0.7; the region follows the interval of the step, [0.6, 0.8], along d."""
    quiet = diagonal_fit(anchor={"t_gflops": 100.0, "g": 3.0, "log_se": 0.0, "correlation": 0.0})
    forecast = fitted_rule(quiet, 10_000.0)
    g = 3 * 100**0.7
    assert forecast.x == pytest.approx((16 * g**0.2, 2 * g**0.4, 32 * g**0.5))
    found = region(forecast)
    # one doubt for all three: nothing to be simultaneous about
    assert found.lo == pytest.approx(
        [x * 100 ** (-0.1 * d) for x, d in zip(forecast.x, (0.2, 0.4, 0.5), strict=True)], rel=0.02
    )
    assert found.hi == pytest.approx(
        [x * 100 ** (0.1 * d) for x, d in zip(forecast.x, (0.2, 0.4, 0.5), strict=True)], rel=0.02
    )
    wider = region(fitted_rule(diagonal_fit(), 10_000.0))
    assert all(hi > there for hi, there in zip(wider.hi, found.hi, strict=True))
    at_anchor = region(fitted_rule(diagonal_fit(), 100.0))
    half = t_distribution.ppf(0.975, 6) * 0.05
    assert at_anchor.hi[0] == pytest.approx(16 * 3**0.2 * math.exp(0.2 * half), rel=0.01)


def test_doubt_about_the_direction_turns_it_but_does_not_lengthen_it():
    """With the star's uncertainty, each draw has the same projection on d as d itself: G stays what was fitted."""
    quiet = diagonal_fit(
        step={"estimate": 0.7, "lo": 0.7, "hi": 0.7, "method": "REML"},
        anchor={"t_gflops": 100.0, "g": 1.0, "log_se": 0.0, "correlation": 0.0},
    )
    forecast = fitted_rule(quiet, 10_000.0, exponents=star_exponents(star_fit()))
    along = np.array([0.2, 0.4, 0.5])
    moved = (forecast.log_draws - np.log([16, 2, 32])) @ along / (along @ along)
    assert moved == pytest.approx(0.7 * math.log(100))
    assert np.ptp(forecast.log_draws[:, 0]) > 0.05


def joint_points(sizes, t, geometry):
    """The law that knows its FLOPs, with nine chosen parameters."""
    sizes = np.asarray(sizes, float)
    model = 1.2 * sizes[..., 0] ** -1.0 + 0.12 * sizes[..., 1] ** -0.8 + 0.7 * sizes[..., 2] ** -0.8
    return model + 25.0 * (t / geometry.forward_gflops(sizes)) ** -0.42 + 0.03


@pytest.fixture(scope="module")
def joint_dir(tmp_path_factory):
    from sovit.analysis.forecast.joint import Geometry, fit_joint
    from sovit.analysis.points import Point

    geometry = Geometry(**TINY, num_heads=4)
    rng = np.random.default_rng(0)
    points = []
    for shape in itertools.product((16, 32, 64), (2, 4, 8), (32, 128, 512)):
        run = 0.002 * rng.standard_normal()
        for t in (64.0, 128.0, 256.0):
            error = float(joint_points(shape, t, geometry)) * math.exp(run + 0.001 * rng.standard_normal())
            points.append(Point(f"g-{shape}", *shape, 0, t, f"{t:g} gflops", error, 0.004, 3))
    fit = fit_joint({"sweep": points}, geometry, dataset="fractals", shots=10)
    return write(tmp_path_factory.mktemp("runs") / "joint", json.loads(json.dumps(fit.as_dict())))


def test_the_law_that_knows_its_flops_brings_its_own_optimum_and_exact_regret(run, joint_dir):
    """Against Nelder-Mead and root finding on the law the points came from."""
    from sovit.analysis.forecast.joint import Geometry

    geometry = Geometry(**TINY, num_heads=4)

    def best(t):
        found = minimize(
            lambda u: math.log(float(joint_points(np.exp(u), t, geometry))), np.log([40, 6, 200]), method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000},
        )  # fmt: skip
        return np.exp(found.x), found.fun

    sizes, _ = best(1024.0)
    code, out, err = run("--law", "flops", "--joint", joint_dir, "--compute", 1024, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [found["optimum"][name] for name in DIMENSIONS] == pytest.approx(sizes, rel=0.08)
    for ends, size in zip(found["region"]["box"].values(), sizes, strict=True):
        assert ends["lo"] < size < ends["hi"]
    assert found["extrapolation"]["factor"] == 4 and found["geometry"]["image_size"] == 16
    far = [row for row in run_and_read(run, joint_dir) if row["regret"] > 0.02]
    assert far
    for row in far:
        reached = math.log(float(joint_points([row[name] for name in DIMENSIONS], 1024.0, geometry)))
        wasted = 1 - math.exp(brentq(lambda u, r=reached: best(1024 * math.exp(u))[1] - r, -4, 0, xtol=1e-4))
        assert row["regret"] == pytest.approx(wasted, rel=0.2)


def run_and_read(run, joint_dir):
    """Candidates of the paper's rule from an origin that is too small, judged by the joint law."""
    given_rule = ["--exponents", "width=0.2,depth=0.2,mlp=0.2", "--origin", "16x2x64", "--t0", "100"]
    code, out, err = run(*given_rule, "--joint", joint_dir, "--compute", 1024, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "against its optimum" in found["regret_by"]
    return found["candidates"]


def test_beyond_the_data_it_refuses_unless_forced(run, tmp_path):
    """1000 times the largest compute that the star used, 256; its point at 512 was not used."""
    star = write(tmp_path / "star", star_fit())
    arguments = ["--fit", star, "--origin", "24x2x64", "--t0", 16]
    assert run(*arguments, "--compute", 256_000)[0] == 0
    code, out, err = run(*arguments, "--compute", 256_100)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "times the largest compute of the fit (256 GFLOPs), beyond the limit of 1000" in err
    for more in (["--force"], ["--max-extrapolation", "2000"]):
        code, out, _ = run(*arguments, "--compute", 300_000, *more)
        assert code == 0 and "extrapolation: 1,172 times the largest compute in star (256 GFLOPs)" in out
    assert run(*arguments, "--compute", 300, "--max-extrapolation", "1.1")[0] == 2


def bad(**changes):
    return {key: value for key, value in (star_fit() | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compute", "512"], "no exponent of width, depth and mlp_dim: give --fit"),
        (["--exponents", "width=0.2", "--origin", "24x2x64", "--factor", "2"], "no exponent of depth and mlp_dim"),
        (["--fit", "STAR", "--compute", "512"], "no origin: give --grid runs/GRID, or --origin"),
        (["--fit", "STAR", "--origin", "24x2x64", "--compute", "512"], "--origin without --t0"),
        (["--fit", "STAR", "--origin", "24x2x64", "--factor", "2"], "does not say how far the forecast lies"),
        (["--fit", "GRID", "--grid", "GRID", "--compute", "512"], "is the fit of a grid; give it as --grid"),
        (["--fit", "NOWHERE", "--grid", "GRID", "--compute", "512"], "nowhere/fit.json does not exist; give a fit.json"),
        (["--fit", "EMPTY", "--grid", "GRID", "--compute", "512"], "does not exist; run sovit fit"),
        (["--fit", "BROKEN", "--grid", "GRID", "--compute", "512"], "is not valid JSON"),
        (["--fit", "LIST", "--grid", "GRID", "--compute", "512"], "is no fit of a sweep"),
        (["--fit", "NEW", "--grid", "GRID", "--compute", "512"], "has schema 2, not 1"),
        (["--fit", "BARE", "--grid", "GRID", "--compute", "512"], "lacks arms, points; make it again"),
        (["--fit", "UNUSED", "--grid", "GRID", "--compute", "512"], "used no point"),
        (["--fit", "SHOTS", "--grid", "GRID", "--compute", "512"], "different metrics (the star on fractals at 25 shots"),
        (["--fit", "OPEN", "--grid", "GRID", "--compute", "512"], "depth is not identified in star (the minimum is at"),
        (["--fit", "OPEN", "--grid", "GRID", "--compute", "512"], "--exponents depth=VALUE"),
        (["--fit", "ARMS", "--grid", "GRID", "--compute", "512"], "star has no arm of mlp_dim; run its cells"),
        (["--fit", "STAR", "--grid", "EDGE", "--compute", "512"], "extend the grid above width 48"),
        (["--fit", "STAR", "--grid", "EDGE", "--compute", "512"], "choose one with --origin WIDTHxDEPTHxMLP --t0 GFLOPS"),
        (["--fit", "STAR", "--grid", "GRID", "--diagonal", "DIAG", "--compute", "512"], "add --step fitted"),
        (["--fit", "STAR", "--grid", "GRID", "--origin", "24x2x64", "--t0", "9", "--compute", "512"], "--grid has no"),
        (["--step", "fitted", "--diagonal", "DIAG", "--exponents", "width=1", "--compute", "9"], "--exponents have no"),
        ([*PUBLISHED, "--factor", "10", "--max-extrapolation", "5"], "--max-extrapolation has no meaning"),
        (["--step", "fitted", "--compute", "512"], "--step fitted needs --diagonal PATH"),
        (["--law", "flops", "--compute", "512"], "--law flops needs --joint PATH"),
        (["--step", "fitted", "--law", "flops", "--compute", "512"], "leave out --step fitted"),
        (["--step", "fitted", "--diagonal", "DIAG", "--grid", "GRID", "--compute", "512"], "--grid has no meaning with"),
        (["--step", "fitted", "--diagonal", "FLAT", "--compute", "512"], "diag does not determine the step"),
        (["--fit", "STAR", "--grid", "GRID", "--compute", "512", "--weights", "width=1"], "--weights needs all three"),
        (["--fit", "STAR", "--grid", "GRID", "--compute", "512", "--heads", "4", "--head-dim", "8"], "give one of the two"),
        (["--fit", "STAR", "--grid", "GRID", "--gpu-hours", "5", "--mfu", "40"], "--mfu 40 is above 1"),
        (["--fit", "STAR", "--grid", "GRID", "--compute", "512", "--mfu", "0.4"], "no meaning without --gpu-hours"),
        (["--fit", "STAR", "--grid", "GRID", "--compute", "512", "--classes", "-1"], "--classes -1 is below 0"),
        (["--fit", "STAR", "--grid", "GRID", "--compute", "512", "--choose", "2"], "--choose has no meaning without"),
        (["--fit", "STAR", "--grid", "GRID", "--compute", "512", "--image-size", "8"], "image_size=8 is smaller than"),
        ([*PUBLISHED, "--factor", "10", "--write", "conf/experiment/x.yaml"], "--write needs the budget in FLOPs"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(run, tmp_path, arguments, sentence):
    stars = {
        "STAR": star_fit(), "NEW": bad(schema=2), "BARE": bad(arms=None, points=None), "LIST": [1],
        "UNUSED": bad(points=[{"t_gflops": 1.0, "used": False}]), "SHOTS": bad(metric={"dataset": "fractals", "shots": 25}),
        "OPEN": star_fit(depth={"why": "not identified: the minimum is at the smallest depth for 6 of 6 durations"}),
        "ARMS": bad(arms={name: star_fit()["arms"][name] for name in ("width", "depth")}),
        "GRID": grid_fit(), "EDGE": grid_fit(None, origins=[((24, 2, 64), 16.0, 0.2)]),
        "DIAG": diagonal_fit(), "FLAT": diagonal_fit(step=None, why="not identified", anchor=None),
    }  # fmt: skip
    paths = {name: write(tmp_path / name.lower(), fit) for name, fit in stars.items()}
    paths |= {"NOWHERE": tmp_path / "nowhere" / "fit.json", "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    paths["EMPTY"].mkdir()
    paths["BROKEN"].mkdir()
    (paths["BROKEN"] / "fit.json").write_text('{"kind": "st')
    code, out, err = run(*(paths.get(word, word) for word in arguments))
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("sovit predict: ") and sentence in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compute", "-1"], "'-1' is no compute"),
        (["--compute", "5 images"], "'5 images' is no compute"),
        (["--factor", "0"], "'0' is not a number above 0"),
        (["--gpu-hours", "nan"], "'nan' is not a number above 0"),
        (["--match", "g/14"], "write MODEL:IMAGES"),
        (["--match", "ViT-gg/14:16e9"], "'gg/14' is not a shape"),
        (["--match", "g/14:many"], "write MODEL:IMAGES"),
        (["--factor", "2", "--exponents", "with=0.2"], "write width=NUMBER"),
        (["--factor", "2", "--exponents", "width=0.2,width=0.3"], "names width twice"),
        (["--factor", "2", "--exponents", "width=x"], "'x' is not a number above 0"),
        (["--factor", "2", "--origin", "24x2"], "'24x2' is not a shape"),
        (["--factor", "2", "--compute", "3"], "not allowed with argument"),
        ([], "one of the arguments --compute --gpu-hours --match --factor is required"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(run, arguments, sentence):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and sentence in err.splitlines()[-1]


def test_geometry_comes_from_the_runs_and_options_win(run, tmp_path):
    star, grid = write(tmp_path / "star", star_fit()), write(tmp_path / "grid", grid_fit())
    arguments = ["--fit", star, "--grid", grid, "--compute", 1600, "--json"]
    found = json.loads(run(*arguments)[1])
    assert found["geometry"]["image_size"] == 224 and "no runs beside" in found["geometry"]["from"]
    write_runs(star)
    found = json.loads(run(*arguments)[1])
    expected = {"image_size": 16, "channels": 1, "pool": "avg", "num_classes": 256, "patch_size": 8}
    assert {key: found["geometry"][key] for key in expected} == expected
    first = found["candidates"][0]
    shape = Shape(*(first[name] for name in DIMENSIONS), first["heads"][0][0], 8)
    assert shape.num_heads == 4  # as in the runs
    geometry = {key: value for key, value in expected.items() if key != "patch_size"}
    assert first["forward_gflops"] == pytest.approx(forward_gflops(shape, **geometry))
    found = json.loads(run(*arguments, "--image-size", 32, "--pool", "map", "--classes", 0)[1])
    assert [found["geometry"][key] for key in ("image_size", "pool", "num_classes", "patch_size")] == [32, "map", 0, 8]
    write_runs(grid, ["experiment=star_tiny", "model.image_size=32"])
    code, _, err = run(*arguments)
    assert code == 2 and "differ in image_size; give fits of one kind of run" in err


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of conf/ to write into."""
    shutil.copytree(config.CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(config, "CONF_DIR", tmp_path / "conf")
    return tmp_path / "conf" / "experiment"


def test_the_written_experiment_composes_to_the_shape_the_recipe_and_the_budget(run, tmp_path, conf):
    star, grid = write(tmp_path / "star", star_fit()), write(tmp_path / "grid", grid_fit())
    write_runs(
        star,
        ["experiment=star_tiny", "optim.lr=0.004", "eval.ema_horizon=0.2", "model.pool=map", "trainer.max_steps=9"],
    )
    arguments = ["--fit", star, "--grid", grid, "--compute", 1600, "--write", conf / "next.yaml"]
    code, out, err = run(*arguments, "--choose", 2, "--json")
    assert code == 0, err
    chosen = json.loads(out)["candidates"][1]
    cfg = config.compose(["experiment=next"])
    shape = derived.shape_of(cfg)
    assert shape == Shape(*(chosen[name] for name in DIMENSIONS), chosen["heads"][0][0], 8)
    assert (cfg.name, cfg.optim.lr, cfg.eval.ema_horizon, cfg.model.pool) == ("next", 0.004, 0.2, "map")
    assert cfg.trainer.max_steps is None and cfg.data.num_classes == 256
    (step,) = derived.eval_steps(cfg)
    gflops = forward_gflops(shape, **derived.model_geometry(cfg))
    assert step * cfg.trainer.global_batch_size * gflops == pytest.approx(1600, rel=0.01)
    text = (conf / "next.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == "# @package _global_" and "python -m sovit.train experiment=next" in text
    assert any(line.startswith("# Cost: ") for line in head) and any(line.startswith("# Expect: ") for line in head)
    assert any(line.startswith("# Made by: sovit predict --fit ") and "--choose 2" in line for line in head)
    before = text
    code, _, err = run(*arguments)
    assert code == 2 and "exists; choose another name, or replace it with --force" in err
    assert (conf / "next.yaml").read_text() == before
    assert run(*arguments, "--force")[0] == 0
    assert (conf / "next.yaml").read_text() != before


def test_published_exponents_write_the_published_recipe(run, conf):
    arguments = [*PUBLISHED, "--t0", "3.5e9", "--match", "ViT-g/14:16e9", "--write", conf / "so.yaml"]
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "experiment=so" in out
    cfg = config.compose(["experiment=so"])
    assert (str(derived.shape_of(cfg)), cfg.model.num_heads, cfg.optim.name) == ("1072x32x4416", 16, "adafactor")
    assert (cfg.eval.weights, cfg.schedule.kind, cfg.model.image_size) == ("cooled", "rsqrt", 224)


def test_an_experiment_that_does_not_compose_is_taken_back(run, conf):
    """At 1e9 GFLOPs the cooldown of 50,000 steps is longer than the training."""
    arguments = [*PUBLISHED, "--t0", "3.5e7", "--compute", "1e8", "--write", conf / "short.yaml"]
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "was not written, for its experiment does not compose" in err
    assert err.count("\n") == 1 and not (conf / "short.yaml").exists()
    for name, sentence in (
        ("a-b.yaml", "no '-'"),
        ("x.yml", "is not an experiment"),
        ("../x.yaml", "is not an experiment"),
    ):
        code, _, err = run(*arguments[:-1], conf / name)
        assert code == 2 and sentence in err


def test_nothing_in_a_path_or_a_sweeps_name_leaves_the_comment_of_an_experiment(run, tmp_path, conf):
    star = write(tmp_path / "star\nshape: 8x1x8 #", star_fit() | {"sweep": "star\nshape: 8x1x8 #"})
    code, _, err = run(
        "--fit", star, "--origin", "608x10x928", "--t0", "1e9", "--compute", "3e11", "--force", "--write", conf / "odd.yaml"
    )  # fmt: skip
    assert code == 0, err
    assert derived.shape_of(config.compose(["experiment=odd"])).width > 8


def test_an_older_grid_without_shares_still_predicts():
    fit = grid_fit()
    del fit["origins"], fit["origin"]["share"]
    assert grid_origin(fit) == Start((24.0, 2.0, 64.0), 16.0, (), "grid")


def test_the_fit_of_a_directory_is_the_one_in_it(tmp_path):
    directory = write(tmp_path / "star", star_fit())
    assert (
        read_fit(directory, "star") == read_fit(directory / "fit.json", "star") == (directory / "fit.json", star_fit())
    )


def test_it_says_when_the_shape_outgrows_the_compute_and_when_the_budget_is_below_the_origins(run):
    steep = [*PUBLISHED, "--t0", "3.5e9", "--weights", "width=1,depth=1,mlp=1"]
    out = run(*steep, "--compute", "3.5e11")[1]
    assert "the weights sum to 3" in out and "outgrows the compute" in out
    out = run(*PUBLISHED, "--t0", "3.5e9", "--compute", "1e9")[1]
    assert "T is below the origin's t0" in out


def test_predicting_loads_no_torch_and_no_compiler():
    code = (
        "import sys\nfrom sovit import cli\nfrom sovit.cli import predict\n"
        "cli.COMMANDS = tuple(dict.fromkeys((*cli.COMMANDS, predict)))\n"
        f"assert cli.main(['predict', *{PUBLISHED}, '--factor', '10']) == 0\n"
        "print([m for m in ('torch', 'timm', 'lightning', 'wandb', 'sklearn', 'numba', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
