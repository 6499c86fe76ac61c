"""Tests of the model against sweeps that hold it and sweeps that break it in a known way."""

import numpy as np
import pytest
from scipy.stats import binom

from sovit.analysis.intervals import fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.specification import break_test, draw_residuals, run_test, structure_test

# Units of x = t = 1 at the middle of the design, where the optimum is.
DEPTH = Law(0.07 * 0.328 / 0.45, 0.45, 0.07, 0.328, 0.03, 0.35, 0.15)
SIGMA = 0.005


def design(repeats):
    x = np.tile(np.repeat(5.0 ** np.linspace(-0.5, 0.5, 7), 14), repeats)
    t = np.tile(32 ** np.linspace(-0.5, 0.5, 14), 7 * repeats)
    return x, t, np.repeat(np.arange(7 * repeats), 14)


def draw(rng, truth, run, tau):
    noise = SIGMA * rng.normal(size=len(run)) + tau * rng.normal(size=run.max() + 1)[run]
    return truth * np.exp(noise)


@pytest.mark.slow
def test_false_alarms_of_all_three_tests_stay_near_their_nominal_share():
    """60 clean sweeps, 7 runs, tau = sigma: not above the 99.5% point of a binomial at twice the nominal 5%."""
    x, t, run = design(1)
    rng = np.random.default_rng(0)
    alarms = np.zeros(3)
    for _ in range(60):
        whole = fit_with_runs(x, t, draw(rng, DEPTH.error(x, t), run, SIGMA), run)
        p = (
            np.nanmin(run_test(x, t, whole, num_draws=99).p),
            break_test(x, t, whole, num_draws=99).p,
            structure_test(x, t, whole, num_draws=99),
        )
        alarms += np.array(p) <= 0.05
    assert np.all(alarms <= binom.ppf(0.995, 60, 0.1))


def test_a_run_two_percent_off_is_named_among_21():
    x, t, run = design(3)
    rng = np.random.default_rng(1)
    named = 0
    for bad in range(0, 20, 2):
        error = draw(rng, DEPTH.error(x, t), run, SIGMA / 2) * np.where(run == bad, 1.02, 1.0)
        found = run_test(x, t, fit_with_runs(x, t, error, run), num_draws=99)
        named += int(np.nanargmin(found.p)) == bad and found.p[bad] <= 0.05 and found.t[bad] > 0
    assert named >= 9


def test_c_halving_midway_is_found_where_it_happens():
    x, t, run = design(1)
    rng = np.random.default_rng(2)
    slower = DEPTH.alpha * x**-DEPTH.a + (DEPTH.beta * x**DEPTH.b + DEPTH.xi) * t ** (-DEPTH.c / 2) + DEPTH.eps
    truth = np.where(t <= 1, DEPTH.error(x, t), slower)
    for tau in (0.0, SIGMA):
        for _ in range(5):
            whole = fit_with_runs(x, t, draw(rng, truth, run, tau), run)
            found = break_test(x, t, whole, num_draws=199)
            assert found.p <= 0.05
            assert 0.4 < found.t_gflops < 2.5
            assert found.factor < 0.9


def test_a_hump_in_compute_is_left_in_the_residuals():
    """Smooth structure within runs: 2% high at the middle compute of the largest sizes, low at its ends."""
    x, t, run = design(1)
    truth = DEPTH.error(x, t) * np.exp(0.02 * np.log(x) * (1 - np.log(t) ** 2))
    whole = fit_with_runs(x, t, draw(np.random.default_rng(3), truth, run, SIGMA), run)
    assert structure_test(x, t, whole) <= 0.01


def test_simulated_residuals_have_the_spreads_of_the_fit():
    """Many runs pin tau / sigma down: within 10% for sigma and 25% for tau, and runs share their offset."""
    x, t, run = design(3)
    whole = fit_with_runs(x, t, draw(np.random.default_rng(4), DEPTH.error(x, t), run, 2 * SIGMA), run)
    drawn = draw_residuals(whole, 2000)
    by_run = drawn.reshape(21, 14, -1)
    within = by_run.std(axis=1, ddof=1).mean()
    between = np.sqrt(by_run.mean(axis=1).var() - within**2 / 14)
    assert within == pytest.approx(whole.sigma, rel=0.1)
    assert between == pytest.approx(whole.tau, rel=0.25)


def test_too_few_durations_or_sizes_give_no_verdict():
    x, t, run = design(1)
    few = t >= np.unique(t)[-5]
    error = draw(np.random.default_rng(5), DEPTH.error(x, t), run, SIGMA)
    whole = fit_with_runs(x[few], t[few], error[few], run[few])
    assert break_test(x[few], t[few], whole) is None
    narrow = run < 4
    whole = fit_with_runs(x[narrow], t[narrow], error[narrow], run[narrow])
    assert structure_test(x[narrow], t[narrow], whole) is None


def test_points_ten_percent_high_lose_their_say_and_no_clean_point_does():
    """5% of points +10%: least squares misses s by more than ten times as much as the robust fit does."""
    x, t, run = design(1)
    rng = np.random.default_rng(6)
    plain, robust = [], []
    for _ in range(10):
        clean = draw(rng, DEPTH.error(x, t), run, SIGMA / 2)
        bad = rng.choice(len(x), 5, replace=False)
        error = clean.copy()
        error[bad] *= 1.1
        reference = np.log(fit_with_runs(x, t, clean, run, robust=False).fit.law.exponent)
        found = fit_with_runs(x, t, error, run)
        assert set(np.flatnonzero(found.weights < 0.1)) == set(bad)
        robust.append(np.log(found.fit.law.exponent) - reference)
        plain.append(np.log(fit_with_runs(x, t, error, run, robust=False).fit.law.exponent) - reference)
    assert np.sqrt(np.mean(np.square(robust))) < 0.1 * np.sqrt(np.mean(np.square(plain)))


def test_clean_points_all_count_in_full():
    x, t, run = design(1)
    rng = np.random.default_rng(7)
    untouched = sum(
        np.all(fit_with_runs(x, t, draw(rng, DEPTH.error(x, t), run, SIGMA), run).weights == 1) for _ in range(40)
    )
    assert untouched >= 38
