"""A diagonal sweep: which sweeps are one, where a shape lies on it, and the step against laws whose step is known."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sovit.analysis.fit import Noise, fit_law
from sovit.analysis.forecast.diagonal import fit_diagonal, is_diagonal, place, principal_direction, step_along
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Dimensions, Exclusion, Point
from sovit.launch.sweep import load_sweep
from sovit.shape import parse_shape

SWEEPS = Path(__file__).parents[1] / "sweeps"
STAR = {"width": 0.22, "depth": 0.45, "mlp_dim": 0.60}
ORIGIN = Dimensions(608, 10, 928)
COMPUTE = (4e9, 8e9, 16e9, 32e9)
# Far from rounding: sizes in thousands, so that a test's oracle is the law and not the nearest integer.
LARGE = Dimensions(60800, 10000, 92800)


def shapes_of(name: str) -> list[Dimensions]:
    """The shapes a shipped sweep trains."""
    shapes = []
    for overrides in load_sweep(SWEEPS / f"{name}.yaml").cells:
        values = dict(item.split("=", 1) for item in overrides)
        if "shape" in values:
            shape = parse_shape(values["shape"], num_heads=1, patch_size=8)
            shapes.append(Dimensions(shape.width, shape.depth, shape.mlp_dim))
        else:
            shapes.append(Dimensions(*(int(values[f"model.{dimension}"]) for dimension in DIMENSIONS)))
    return shapes


def scaled(g: float, direction=STAR, origin=LARGE) -> Dimensions:
    return Dimensions(*(round(x * g ** direction[name]) for name, x in zip(DIMENSIONS, origin, strict=True)))


def diagonal_points(
    error, sizes=(0.3, 0.55, 1.0, 1.8, 3.3, 6.0, 11.0), *, noise=0.0, seeds=1, rng=None, compute=COMPUTE
):
    """Points of a diagonal; ``error(shape, t)``. ``noise``: of an evaluation and, as large again, of a run."""
    points = []
    for g, seed in itertools.product(sizes, range(seeds)):
        shape = scaled(g)
        offset = noise * rng.normal() if noise else 0.0
        for t in compute:
            value = error(shape, t) * math.exp(offset + (noise * rng.normal() if noise else 0.0))
            points.append(Point(f"diagonal-{shape}-s{seed}", *shape, seed, t, f"{t:.0f} gflops", value, 0.002, 3))
    return points


def along(law: Law, direction=STAR):
    """A law of G along a direction."""
    return lambda shape, t: float(law.error(place(shape, direction, LARGE), t))


def centred_law(step=0.65, c=0.4, b=0.25):
    """Optimum 1.5 at the middle of the compute, growing as t^step."""
    a, middle = c / step - b, 11.3e9
    alpha = 0.06 * b / a * 1.5 ** (a + b)
    return Law(alpha, a, 0.06 * middle**c, b, 0.04 * middle**c, c, 0.12)


def eq3(shape, t):
    """The paper's separable law (Eq. 3), exponents as published: the joint optimum is t^s_k, so the step is exactly 1."""
    a, b, c = np.array([1.10, 0.45, 0.30]), np.array([0.49, 0.328, 0.2833333333]), 0.35
    u, decay = np.log(np.array(shape) / np.array(LARGE)), (t / 11.3e9) ** -c
    return float((0.025 * b / a * np.exp(-a * u)).sum() + decay * ((0.025 * np.exp(b * u)).sum() + 0.02) + 0.12)


@pytest.mark.parametrize("name", ["diagonal_tiny", "diagonal"])
def test_the_shipped_diagonals_are_recognised(name):
    assert is_diagonal(shapes_of(name))


@pytest.mark.parametrize("name", ["star_tiny", "star", "grid_tiny", "grid", "star_smoke"])
def test_stars_and_grids_are_no_diagonals(name):
    assert not is_diagonal(shapes_of(name))


def test_neither_is_an_arm_a_staircase_or_a_curve():
    arm = [Dimensions(32, depth, 128) for depth in (1, 2, 4, 8)]
    staircase = [(16, 1, 16), (128, 1, 16), (128, 8, 16), (128, 8, 128)]
    zigzag = [(16, 1, 64), (24, 2, 32), (32, 4, 128), (48, 8, 256)]
    assert not any(is_diagonal(Dimensions(*shape) for shape in shapes) for shapes in (arm, staircase, zigzag))
    assert not is_diagonal([ORIGIN, scaled(2.0, origin=ORIGIN)])


def test_the_paper_size_diagonal_follows_the_published_exponents_from_the_published_origin():
    for shape, g in zip(shapes_of("diagonal"), (0.3, 0.55, 1.0, 1.8, 3.3, 6.0, 11.0), strict=True):
        for (name, s), x, x0 in zip(STAR.items(), shape, ORIGIN, strict=True):
            unit = 1 if name == "depth" else 16
            assert x % unit == 0 and abs(x - x0 * g**s) <= unit
        assert place(shape, STAR, ORIGIN) == pytest.approx(g, rel=0.06)


def test_place_is_least_squares_and_undoes_scaling():
    shape = Dimensions(700, 16, 1500)
    log_ratio = np.log(np.array(shape) / np.array(ORIGIN))
    slope = np.linalg.lstsq(np.array(list(STAR.values()))[:, None], log_ratio, rcond=None)[0][0]
    assert math.log(place(shape, STAR, ORIGIN)) == pytest.approx(slope)
    assert place(scaled(7.0), STAR, LARGE) == pytest.approx(7.0, rel=1e-3)


def test_the_direction_is_deduced_from_the_shapes_up_to_its_length():
    found = principal_direction(scaled(g) for g in (0.3, 1.0, 3.0, 10.0))
    for name, s in STAR.items():
        assert found[name] == pytest.approx(s / sum(STAR.values()), rel=1e-3)


def test_step_comes_back_exactly_from_noiseless_errors():
    fit = fit_diagonal(diagonal_points(along(centred_law(0.65))), direction=STAR, origin=LARGE)
    assert fit.step.estimate == pytest.approx(0.65, rel=1e-3)
    assert fit.anchor["g"] == pytest.approx(float(centred_law(0.65).optimum(fit.anchor["t_gflops"])), rel=1e-3)
    assert fit.why is None and fit.direction_from == "given" and fit.origin == LARGE._asdict()
    last = fit.held_out[-1]
    assert last.t_gflops == pytest.approx(max(COMPUTE))
    assert last.rms < 1e-4 and last.predicted_g == pytest.approx(
        float(centred_law(0.65).optimum(max(COMPUTE))), rel=0.01
    )
    assert last.fitted_up_to == 16e9 and last.num_points == 7


def test_under_the_papers_own_joint_law_the_step_is_one_not_a_third():
    """Oracle: Eq. 3 minimised dimension by dimension. In units of the sum-one direction the step is the sum of s_k."""
    points = diagonal_points(eq3)
    given = fit_diagonal(points, direction=STAR, origin=LARGE)
    assert given.step.estimate == pytest.approx(1.0, rel=2e-3)
    deduced = fit_diagonal(points)
    assert deduced.direction_from == "shapes"
    assert deduced.step.estimate == pytest.approx(sum(STAR.values()), rel=4e-3)
    assert step_along(deduced.step.estimate, deduced.direction, STAR) == pytest.approx(given.step.estimate, rel=2e-3)
    for name in DIMENSIONS:
        growth = given.step.estimate * given.direction[name]
        assert deduced.step.estimate * deduced.direction[name] == pytest.approx(growth, rel=4e-3)


def test_interval_of_the_step_covers_under_run_effects():
    """15 diagonals of 7 runs at sigma = tau = 0.3%: with 95% coverage fewer than 11 hits come once in 2,000."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(15):
        points = diagonal_points(along(centred_law(0.65)), noise=0.003, rng=rng)
        step = fit_diagonal(points, direction=STAR, origin=LARGE, cutoffs=(0.6,)).step
        hits += step is not None and step.lo <= 0.65 <= step.hi
    assert hits >= 11


def test_anchor_standard_error_and_correlation_are_those_of_repeated_sweeps():
    """300 draws of the noise, fitted by least squares; sampling error of a standard deviation 4%, of rho about 0.05."""
    law, rng = centred_law(0.65), np.random.default_rng(1)
    first = diagonal_points(along(law), noise=0.003, rng=rng)
    fit = fit_diagonal(first, direction=STAR, origin=LARGE)
    g = np.array([row["g"] for row in fit.points])
    t = np.array([row["t_gflops"] for row in fit.points])
    # The same noise model as the fit's: its sigma and tau, its design; the truth is its law.
    run = np.unique([row["run_id"] for row in fit.points], return_inverse=True)[1]
    covariance = Noise(run, fit.arm.tau / fit.arm.sigma, np.ones(len(t)))
    draws = []
    for _ in range(300):
        noise = fit.arm.tau * rng.normal(size=run.max() + 1)[run] + fit.arm.sigma * rng.normal(size=len(t))
        found = fit_law(g, t, fit.law.error(g, t) * np.exp(noise), noise=covariance)
        draws.append((math.log(found.law.optimum(fit.anchor["t_gflops"])), math.log(found.law.exponent)))
    spread = np.std(draws, axis=0)
    assert fit.anchor["log_se"] == pytest.approx(spread[0], rel=0.2)
    assert fit.log_se == pytest.approx(spread[1], rel=0.2)
    assert fit.anchor["correlation"] == pytest.approx(np.corrcoef(np.array(draws).T)[0, 1], abs=0.2)


def test_no_step_where_the_best_shape_is_the_smallest_or_largest_at_most_durations():
    points = diagonal_points(along(centred_law(0.65)), sizes=(3.3, 6.0, 11.0, 20.0, 36.0))
    fit = fit_diagonal(points, direction=STAR, origin=LARGE)
    assert fit.step is None and fit.anchor is None
    assert fit.why == "not identified: the minimum is at the smallest g for 4 of 4 durations"


def test_points_that_cannot_be_used_are_listed_with_a_reason():
    points = diagonal_points(along(centred_law(0.65)))
    points[0] = dataclasses.replace(points[0], error=0.95)
    points[4] = dataclasses.replace(points[4], error=0.7)
    fit = fit_diagonal(points, direction=STAR, origin=LARGE, exclusions=[Exclusion("diagonal-x", "failed")])
    reasons = [row["why_not"] for row in fit.points if not row["used"]]
    assert reasons == ["error 0.95 is above 0.9: diverged, or not learning yet", "error 0.7 is above the cut-off 0.6"]
    assert "1 runs of the sweep are left out" in fit.warnings


def test_a_direction_that_is_not_the_shapes_is_told():
    points = diagonal_points(along(centred_law(0.65)))
    fit = fit_diagonal(points, direction={"width": 1.0, "depth": 0.1, "mlp_dim": 0.1}, origin=LARGE)
    assert any("degrees off the direction" in text for text in fit.warnings)
    assert not any("degrees off" in text for text in fit_diagonal(points, direction=STAR, origin=LARGE).warnings)


def test_the_dict_is_json_and_holds_the_rule():
    fit = fit_diagonal(
        diagonal_points(eq3), sweep="diagonal", dataset="fractals", shots=10, direction=STAR, origin=LARGE
    )
    read = json.loads(json.dumps(fit.as_dict(), allow_nan=False))
    assert (read["schema"], read["kind"], read["metric"]) == (1, "diagonal", {"dataset": "fractals", "shots": 10})
    t = 100 * read["anchor"]["t_gflops"]
    g = read["anchor"]["g"] * (t / read["anchor"]["t_gflops"]) ** read["step"]["estimate"]
    assert g == pytest.approx(float(Law(**read["law"]).optimum(t)), rel=1e-9)
    assert {"direction", "origin", "why", "log_se", "num_runs", "minima", "points", "excluded", "warnings"} <= set(read)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": {"width": 0.2, "depth": 0.4}}, "give one exponent each"),
        ({"direction": STAR | {"depth": 0.0}}, "depth=0.0 is not above 0"),
        ({"direction": STAR | {"depth": math.nan}}, "depth=nan is not above 0"),
    ],
)
def test_arguments_without_meaning_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        fit_diagonal(diagonal_points(eq3), **options)


def test_a_star_is_refused_in_words():
    arm = [Point(f"r{d}", 32, d, 128, 0, t, f"{t}", 0.3, 0.01, 1) for d in (1, 2, 4) for t in (10.0, 20.0)]
    with pytest.raises(ValueError, match="are no diagonal sweep: all three dimensions must grow together"):
        fit_diagonal(arm)
