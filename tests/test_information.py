"""What runs are promised to tell, against numeric derivatives, closed forms, brute force and simulated sweeps."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime, brentq
from scipy.stats import t as t_distribution

from sovit.analysis.intervals import exponent_interval, fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.planning.information import (
    ASSUMED,
    Arm,
    Spread,
    arm,
    assumed_law,
    compute_wasted,
    expect,
    exponent_gradient,
    fitted_laws,
    fitted_spreads,
    information,
    optimum_gradient,
    seed_spread,
    weaknesses,
)
from sovit.analysis.points import Point

PAPER_RANGE = {"width": 3.2, "depth": 5.0, "mlp_dim": 5.6}
NAMES = ("alpha", "a", "beta", "b", "xi", "c", "eps")


def design(size_range, num_sizes=7, num_durations=14, t_range=32.0, repeats=1):
    """x, t, run around x = t = 1."""
    sizes = np.tile(size_range ** np.linspace(-0.5, 0.5, num_sizes), repeats)
    run = np.repeat(np.arange(len(sizes)), num_durations)
    return sizes[run], np.tile(t_range ** np.linspace(-0.5, 0.5, num_durations), len(sizes)), run


def planned(name, spread, size_range=None, **options):
    return arm(name, assumed_law(name, 1, 1), spread, *design(size_range or PAPER_RANGE[name], **options))


def dense_covariance(spread, t, run):
    """The covariance of the log errors, written out."""
    same = run[:, None] == run[None, :]
    log_t = np.log(t)
    centred = log_t - np.array([log_t[run == one].mean() for one in run])
    return spread.sigma**2 * np.eye(len(t)) + same * (spread.tau**2 + spread.slope**2 * np.outer(centred, centred))


# Cramer-Rao standard errors of s for 7 sizes x 14 durations, computed independently of this code: (sigma, tau) ->
# width, depth, mlp_dim.
BOUNDS = {
    (0.005, 0.0): (0.011, 0.034, 0.062),
    (0.01, 0.0): (0.021, 0.069, 0.124),
    (0.02, 0.0): (0.043, 0.137, 0.247),
    (0.005, 0.0025): (0.019, 0.067, 0.124),
    (0.005, 0.005): (0.034, 0.121, 0.224),
    (0.005, 0.01): (0.066, 0.233, 0.435),
}


@pytest.mark.parametrize(("noise", "bounds"), BOUNDS.items())
def test_known_cramer_rao_bounds_come_back(noise, bounds):
    for name, bound in zip(ASSUMED, bounds, strict=True):
        found = expect(planned(name, Spread(*noise)))
        assert found.s * found.log_se == pytest.approx(bound, rel=0.05)


def test_a_wide_arm_tells_most():
    """sd of s for depth at 1% over x3, x5, x8, x16, x32: .139, .069, .044, .027, .020, from the same independent source."""
    for size_range, bound in zip((3, 5, 8, 16, 32), (0.139, 0.069, 0.044, 0.027, 0.020), strict=True):
        found = expect(planned("depth", Spread(0.01, 0), size_range))
        assert found.s * found.log_se == pytest.approx(bound, rel=0.05)


def test_information_is_the_curvature_of_the_log_likelihood():
    """Numeric second derivatives of the Gaussian log likelihood at its maximum, covariance written out in full."""
    law, spread = Law(0.4, 0.9, 0.1, 0.5, 0.05, 0.4, 0.1), Spread(0.01, 0.02)
    x, t, run = design(8, num_sizes=5, num_durations=4)
    precision = np.linalg.inv(dense_covariance(spread, t, run))
    truth = np.array([getattr(law, name) for name in NAMES])

    def minus_log_likelihood(values):
        residual = np.log(law.error(x, t)) - np.log(Law(**dict(zip(NAMES, values, strict=True))).error(x, t))
        return 0.5 * residual @ precision @ residual

    step = 1e-3 * truth
    curvature = np.empty((7, 7))
    for i, j in itertools.product(range(7), repeat=2):
        corners = []
        for one, two in itertools.product((1, -1), repeat=2):
            values = truth.copy()
            values[i] += one * step[i]
            values[j] += two * step[j]
            corners.append(one * two * minus_log_likelihood(values))
        curvature[i, j] = sum(corners) / (4 * step[i] * step[j])
    found = information(law, spread, x, t, run, (1.0, 1.0))
    scale = np.sqrt(np.diag(found))
    np.testing.assert_allclose(curvature / np.outer(scale, scale), found / np.outer(scale, scale), atol=2e-5)


def test_gradients_of_exponent_and_optimum_are_those_of_the_law():
    law = Law(0.4, 0.9, 0.1, 0.5, 0.05, 0.4, 0.1)
    truth = np.array([getattr(law, name) for name in NAMES])

    def rebuilt(values):
        return Law(**dict(zip(NAMES, values, strict=True)))

    numeric = approx_fprime(truth, lambda values: math.log(rebuilt(values).exponent), 1e-8)
    np.testing.assert_allclose(exponent_gradient(law), numeric, atol=1e-6)
    numeric = approx_fprime(truth, lambda values: math.log(float(rebuilt(values).optimum(50.0))), 1e-8)
    np.testing.assert_allclose(optimum_gradient(law, 50.0, (1.0, 1.0)), numeric, atol=1e-5)


def test_units_of_size_and_compute_change_no_promise():
    """A law in pixels and petaflops promises the log errors of the same law in other units."""
    spread = Spread(0.005, 0.005)
    small, large = (
        expect(arm("depth", assumed_law("depth", at, 1e9 * at), spread, x * at, t * 1e9 * at, run), 1e11 * at)
        for at in (1.0, 700.0)
        for x, t, run in [design(5)]
    )
    assert large.log_se == pytest.approx(small.log_se, rel=1e-6)
    assert large.log_se_best == pytest.approx(small.log_se_best, rel=1e-6)


def test_a_drifting_run_costs_what_the_sandwich_formula_says():
    """Weights that know only the offset, noise that also drifts: A^-1 J' W V W J A^-1 with every matrix written out."""
    spread = Spread(0.005, 0.005, slope=0.0025)
    points = planned("depth", spread)
    units = math.exp(np.log(points.x).mean()), math.exp(np.log(points.t).mean())
    known = np.linalg.inv(dense_covariance(Spread(0.005, 0.005), points.t, points.run))
    truth = np.array([getattr(points.law, name) for name in NAMES])

    def log_law(values):
        return np.log(Law(**dict(zip(NAMES, values, strict=True))).error(points.x / units[0], points.t / units[1]))

    jacobian = np.column_stack(
        [(log_law(truth + step) - log_law(truth - step)) / 2e-6 for step in np.eye(7) * 1e-6]
    )  # units are 1 here
    bread = np.linalg.inv(jacobian.T @ known @ jacobian)
    meat = jacobian.T @ known @ dense_covariance(spread, points.t, points.run) @ known @ jacobian
    gradient = exponent_gradient(points.law)
    variance = gradient @ bread @ meat @ bread @ gradient
    assert expect(points).log_se == pytest.approx(math.sqrt(variance), rel=1e-3)
    assert expect(points).log_se > 1.02 * expect(planned("depth", Spread(0.005, 0.005))).log_se


def test_a_run_more_is_never_less_and_its_information_adds_up():
    law, spread = assumed_law("depth", 1, 1), Spread(0.005, 0.005)
    x, t, run = design(5)
    whole = information(law, spread, x, t, run, (1.0, 1.0))
    parts = sum(
        information(law, spread, x[run == one], t[run == one], np.zeros(14, int), (1.0, 1.0)) for one in range(7)
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-9 * np.abs(whole).max())
    assert expect(planned("depth", spread, repeats=3)).log_se == pytest.approx(
        expect(planned("depth", spread)).log_se / math.sqrt(3)
    )


def test_the_expected_interval_is_the_one_a_fit_would_print():
    """Errors that follow the law but for a hair: the fit's own interval, blown up to the noise that was planned."""
    spread = Spread(0.005, 0.005)
    points = planned("depth", spread, 16)
    rng = np.random.default_rng(0)
    error = points.law.error(points.x, points.t) * np.exp(1e-6 * rng.normal(size=len(points.x)))
    whole = fit_with_runs(points.x, points.t, error, points.run)
    alone = expect(arm("depth", points.law, Spread(whole.sigma, whole.tau), points.x, points.t, points.run))
    assert alone.log_se == pytest.approx(whole.log_se, rel=0.01)
    found = expect(points)
    half = t_distribution.ppf(0.975, 4) * found.log_se
    assert (found.lo, found.hi) == pytest.approx((found.s * math.exp(-half), found.s * math.exp(half)))
    printed = exponent_interval(points.x, points.t, error, whole)
    assert math.log(printed.hi / printed.lo) == pytest.approx(2 * half * whole.log_se / found.log_se, rel=0.01)


@pytest.mark.parametrize(("name", "tau"), [("depth", 0.005), ("mlp_dim", 0.0025)])
def test_the_promised_standard_error_is_the_one_obtained(name, tau):
    """150 sweeps of 7 sizes x 3 seeds over x16, fitted without knowing the noise: within 15% (sampling error 6%)."""
    spread = Spread(0.005, tau)
    points = planned(name, spread, 16, repeats=3)
    rng = np.random.default_rng(1)
    shifts = []
    for _ in range(150):
        noise = spread.sigma * rng.normal(size=len(points.x)) + tau * rng.normal(size=21)[points.run]
        error = points.law.error(points.x, points.t) * np.exp(noise)
        whole = fit_with_runs(points.x, points.t, error, points.run)
        shifts.append(math.log(whole.fit.law.exponent / points.law.exponent))
    obtained = math.sqrt(np.mean(np.square(shifts)))
    assert obtained == pytest.approx(expect(points).log_se, rel=0.15)


def test_independent_points_would_promise_far_too_much():
    """tau of 0.5% costs a factor of 3.5: a promise that forgets it is one that breaks."""
    honest, naive = (expect(planned("depth", Spread(0.005, tau))).log_se for tau in (0.005, 0.0))
    assert honest / naive == pytest.approx(3.5, rel=0.05)


def test_compute_wasted_is_the_mean_over_misplaced_sizes():
    """Against drawing sizes and solving, for each, for the compute at which the optimum reaches the same error."""
    law, target, log_se = assumed_law("depth", 1, 1), 20.0, 0.4
    rng = np.random.default_rng(0)
    shares = []
    for shift in log_se * rng.normal(size=2000):
        error = float(law.error(law.optimum(target) * math.exp(shift), target))
        shares.append(1 - brentq(lambda t, error=error: float(law.frontier(t)) - error, 1e-6, target * 1.001) / target)
    found = compute_wasted(law, target, log_se)
    assert found == pytest.approx(np.mean(shares), abs=3 * np.std(shares) / math.sqrt(2000))
    # second order: half the curvature of f in log x times the variance, over the slope of f in log t
    size = float(law.beta * law.optimum(target) ** law.b)
    second = law.b * 0.01**2 * size / (size + law.xi) / (2 * law.exponent)
    assert compute_wasted(law, target, 0.01) == pytest.approx(second, rel=0.02)
    assert compute_wasted(law, target, math.inf) == 1.0


def seeds(rng, *, num_shapes, num_seeds, num_durations, sigma, tau):
    points = []
    for shape, seed in itertools.product(range(num_shapes), range(num_seeds)):
        offset = tau * rng.normal()
        for duration in range(num_durations):
            error = 0.5 * 0.8**duration * math.exp(offset + sigma * rng.normal())
            run_id = f"star-w{shape:04d}-d01-m0008-h01-p08-s{seed}"
            points.append(Point(run_id, 8 + shape, 1, 8, seed, 2.0**duration, f"{duration}", error, 0.01, 1))
    return points


def test_noise_of_repeated_seeds_is_split_into_runs_and_evaluations():
    rng = np.random.default_rng(0)
    found = seed_spread(seeds(rng, num_shapes=150, num_seeds=3, num_durations=6, sigma=0.01, tau=0.02))
    assert found.sigma == pytest.approx(0.01, rel=0.06)
    assert found.tau == pytest.approx(0.02, rel=0.12)
    assert "450 runs of 150 shapes, 300 degrees of freedom" in found.basis


def test_two_seeds_by_hand():
    """Log errors (0, 0) and (3d, 5d): offset 4d apart, differences +-d: sigma^2 = d^2 and tau^2 = 8 d^2 - sigma^2 / 2."""
    d = 0.01
    values = {("s0", "a"): 0.0, ("s0", "b"): 0.0, ("s1", "a"): 3 * d, ("s1", "b"): 5 * d}
    points = [
        Point(run, 8, 1, 8, int(run[1]), 1.0, duration, 0.3 * math.exp(value), 0.01, 1)
        for (run, duration), value in values.items()
    ]
    found = seed_spread(points)
    assert found.sigma**2 == pytest.approx(d**2)
    assert found.tau**2 == pytest.approx(8 * d**2 - d**2 / 2)


def test_one_seed_tells_no_noise():
    rng = np.random.default_rng(0)
    assert seed_spread(seeds(rng, num_shapes=5, num_seeds=1, num_durations=4, sigma=0.01, tau=0.02)) is None


def star_fit(**arms):
    law = assumed_law("depth", 4, 100).as_dict()
    rows = {name: {"law": law, "sigma": 0.01, "tau": 0.02, "num_runs": 6} | row for name, row in arms.items()}
    return {"kind": "star", "schema": 1, "arms": rows}


def test_an_arm_whose_tau_came_out_as_zero_gets_that_of_the_others():
    found = fitted_spreads(star_fit(width={}, depth={"tau": 0.0, "sigma": 0.005}, mlp_dim={"tau": 0.01}))
    assert found["depth"].sigma == 0.005
    assert found["depth"].tau == pytest.approx(math.sqrt((0.02**2 + 0.01**2) / 2))
    assert found["width"].tau == 0.02


def test_a_fit_without_an_optimum_is_no_law_to_plan_by():
    with pytest.raises(ValueError, match="no law for the width arm"):
        fitted_laws(star_fit(width={"law": None}), ["width"])
    flat = assumed_law("depth", 4, 100).as_dict() | {"beta": 0.0}
    with pytest.raises(ValueError, match="depth: the fitted law has beta = 0"):
        fitted_laws(star_fit(depth={"law": flat}), ["depth"])


def sentences(points: Arm) -> str:
    return " / ".join(weaknesses(points, expect(points), points.sizes))


def test_a_plan_that_can_tell_is_not_scolded():
    assert sentences(planned("width", Spread(0.005, 0.0025), 16)) == ""


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (planned("width", Spread(0.005, 0.005), 16, num_sizes=4), "4 runs are too few for an interval"),
        (planned("width", Spread(0.005, 0.005), 16, num_sizes=3, repeats=2), "3 distinct sizes are too few"),
        (planned("mlp_dim", Spread(0.005, 0.005)), "a factor of 2.86 either way"),
        (planned("width", Spread(0.001, 0.0), 3), "the sizes span only x3; over x16"),
        (planned("width", Spread(0.001, 0.0), 16, t_range=8), "the durations span only x8 of compute"),
        (
            arm("depth", assumed_law("depth", 6, 1), Spread(0.001, 0.0), *design(16)),
            "lies outside the sizes 0.25 to 4 at most durations; add larger ones",
        ),
        (
            arm("depth", assumed_law("depth", 1 / 6, 1), Spread(0.001, 0.0), *design(16)),
            "at most durations; add smaller ones",
        ),
    ],
)
def test_what_a_plan_cannot_determine_is_said(points, sentence):
    assert sentence in sentences(points)


def test_points_above_the_cut_off_are_not_counted():
    """A fit drops errors above 0.6; a plan that counts them promises what nobody will see."""
    law = assumed_law("depth", 1, 1)
    x, t, run = design(5, t_range=1e6)
    assert law.error(x, t).max() > 0.6
    points = arm("depth", law, Spread(0.005, 0.005), x, t, run)
    assert len(points.x) == np.count_nonzero(law.error(x, t) <= 0.6)
    with pytest.raises(ValueError, match="above the cut-off"):
        arm("depth", law, Spread(0.005, 0.005), x, t * 1e-8, run)


@pytest.mark.parametrize("noise", [(0.0, 0.01), (-0.01, 0.0), (0.01, -0.01), (0.5, 2.0), (math.nan, 0.0)])
def test_impossible_noise_is_refused(noise):
    with pytest.raises(ValueError, match="sigma above 0"):
        Spread(*noise)
