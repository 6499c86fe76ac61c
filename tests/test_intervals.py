"""Intervals against simulated sweeps whose truth is known."""

import math

import numpy as np
import pytest
from scipy.stats import binom
from scipy.stats import t as t_distribution

from sovit.analysis.fit import NUM_PARAMETERS, Noise, fit_law
from sovit.analysis.intervals import (
    Interval,
    exponent_interval,
    fit_with_runs,
    jackknife_runs,
    log_standard_error,
    profile_interval,
)
from sovit.analysis.law import Law

# Units of x = t = 1 at the middle of the design, where the optimum is.
DEPTH = Law(0.07 * 0.328 / 0.45, 0.45, 0.07, 0.328, 0.03, 0.35, 0.15)
WIDTH = Law(0.07 * 0.49 / 1.1, 1.1, 0.07, 0.49, 0.03, 0.35, 0.15)


def sweep(law, rng, *, sigma, tau, size_range=5.0, repeats=1, num_durations=14):
    """Seven sizes at equal durations, ``repeats`` runs of each: x, t, error, run names."""
    x = np.tile(np.repeat(size_range ** np.linspace(-0.5, 0.5, 7), num_durations), repeats)
    t = np.tile(32 ** np.linspace(-0.5, 0.5, num_durations), 7 * repeats)
    index = np.repeat(np.arange(7 * repeats), num_durations)
    noise = sigma * rng.normal(size=len(x)) + tau * rng.normal(size=7 * repeats)[index]
    return x, t, law.error(x, t) * np.exp(noise), np.array([f"run-{i:02d}" for i in index])


@pytest.mark.slow
def test_interval_covers_95_percent_of_sweeps_and_independent_points_do_not():
    """150 sweeps of 7 runs x 14 durations with tau = sigma = 0.5%: within binomial 99% bounds of 0.95."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(150):
        x, t, error, run = sweep(WIDTH, rng, sigma=0.005, tau=0.005, size_range=3.2)
        whole = fit_with_runs(x, t, error, run)
        found = exponent_interval(x, t, error, whole)
        covered += found.lo <= WIDTH.exponent <= found.hi
        alone = fit_law(x, t, error)
        sigma = math.sqrt(alone.objective / (len(x) - NUM_PARAMETERS))
        half = 2 * log_standard_error(alone, Noise(np.zeros(len(x), int), 0.0, np.ones(len(x))), sigma)
        naive += abs(math.log(alone.law.exponent / WIDTH.exponent)) <= half
    low, high = binom.ppf([0.005, 0.995], 150, 0.95)
    assert low <= covered <= high
    assert naive < 0.75 * 150


def test_spreads_within_and_between_runs_are_recovered():
    """REML: mean of sigma within 3%, of tau^2 within 35% over 12 sweeps of 21 runs (18 degrees of freedom each)."""
    rng = np.random.default_rng(1)
    fits = []
    for _ in range(12):
        fits.append(fit_with_runs(*sweep(DEPTH, rng, sigma=0.005, tau=0.01, repeats=3)))
    assert np.mean([fit.sigma for fit in fits]) == pytest.approx(0.005, rel=0.03)
    assert np.mean([fit.tau**2 for fit in fits]) == pytest.approx(0.01**2, rel=0.35)


def test_without_offsets_tau_is_small():
    fit = fit_with_runs(*sweep(DEPTH, np.random.default_rng(2), sigma=0.005, tau=0.0))
    assert fit.tau < 0.002


def test_two_seeds_of_one_size_are_two_runs():
    fit = fit_with_runs(*sweep(DEPTH, np.random.default_rng(3), sigma=0.005, tau=0.005, repeats=2))
    assert (fit.num_runs, fit.num_sizes) == (14, 7)


def test_names_and_order_of_runs_do_not_matter():
    x, t, error, run = sweep(DEPTH, np.random.default_rng(4), sigma=0.005, tau=0.005)
    order = np.random.default_rng(0).permutation(len(x))
    first, second = fit_with_runs(x, t, error, run), fit_with_runs(x[order], t[order], error[order], run[order])
    assert second.fit.law.exponent == pytest.approx(first.fit.law.exponent, rel=1e-4)
    assert second.tau == pytest.approx(first.tau, rel=1e-4)


def test_wald_and_profile_agree_where_the_data_are_good():
    """Both descend from one likelihood; at 0.05% noise it is a parabola in log s."""
    x, t, error, run = sweep(DEPTH, np.random.default_rng(5), sigma=0.0005, tau=0.0005)
    whole = fit_with_runs(x, t, error, run)
    wald = exponent_interval(x, t, error, whole)
    profile = profile_interval(x, t, error, whole, 0.95)
    assert "Wald" in wald.method
    assert math.log(profile.lo / wald.lo) == pytest.approx(0, abs=0.15 * math.log(wald.hi / wald.lo))
    assert math.log(profile.hi / wald.hi) == pytest.approx(0, abs=0.15 * math.log(wald.hi / wald.lo))


def test_higher_level_widens_the_interval_as_t_quantiles_do():
    x, t, error, run = sweep(DEPTH, np.random.default_rng(6), sigma=0.002, tau=0.002)
    whole = fit_with_runs(x, t, error, run)
    narrow, wide = (exponent_interval(x, t, error, whole, level=level) for level in (0.5, 0.95))
    ratio = math.log(wide.hi / wide.estimate) / math.log(narrow.hi / narrow.estimate)
    assert ratio == pytest.approx(t_distribution.ppf(0.975, 4) / t_distribution.ppf(0.75, 4))


def test_an_arm_that_never_turns_has_no_confident_interval():
    """Size helps wherever it was measured: cost in size, and with it s, is anybody's guess."""
    falling = Law(0.1, 0.6, 0.0, 0.5, 0.05, 0.35, 0.15)
    x, t, error, run = sweep(falling, np.random.default_rng(7), sigma=0.005, tau=0.005)
    whole = fit_with_runs(x, t, error, run)
    found = exponent_interval(x, t, error, whole)
    assert isinstance(found, Interval)
    assert "profile" in found.method
    assert found.is_open


def test_noise_as_large_as_the_curve_leaves_the_exponent_open():
    x, t, error, run = sweep(DEPTH, np.random.default_rng(8), sigma=0.2, tau=0.2)
    assert exponent_interval(x, t, error, fit_with_runs(x, t, error, run)).is_open


@pytest.mark.parametrize(("sizes", "runs_each", "words"), [(4, 1, "4 runs are too few"), (3, 3, "3 distinct sizes")])
def test_few_runs_or_sizes_give_words_instead_of_an_interval(sizes, runs_each, words):
    x, t, error, run = sweep(DEPTH, np.random.default_rng(9), sigma=0.005, tau=0.005, repeats=runs_each)
    keep = x <= np.unique(x)[sizes - 1]
    whole = fit_with_runs(x[keep], t[keep], error[keep], run[keep])
    assert words in exponent_interval(x[keep], t[keep], error[keep], whole)


def test_jackknife_is_the_brute_force_one():
    x, t, error, run = sweep(DEPTH, np.random.default_rng(10), sigma=0.004, tau=0.004)
    whole = fit_with_runs(x, t, error, run)
    found = jackknife_runs(x, t, error, run, whole)
    names = np.unique(run)
    logs = []
    for name in names:
        keep = run != name
        index = np.searchsorted(names[names != name], run[keep])
        noise = Noise(index, whole.noise.ratio, np.ones(keep.sum()))
        logs.append(math.log(fit_law(x[keep], t[keep], error[keep], noise=noise).law.exponent))
    assert np.log(found.without) == pytest.approx(logs, abs=1e-3)
    half = t_distribution.ppf(0.975, 6) * math.sqrt(6 / 7 * np.sum((np.array(logs) - np.mean(logs)) ** 2))
    assert math.log(found.hi / whole.fit.law.exponent) == pytest.approx(half, rel=1e-2)
    assert math.log(whole.fit.law.exponent / found.lo) == pytest.approx(half, rel=1e-2)


def test_precise_points_count_more():
    """Points known to be twenty times noisier hardly move the fit if their scale says so."""
    rng = np.random.default_rng(12)
    x, t, error, run = sweep(DEPTH, rng, sigma=0.001, tau=0.0)
    noisy = rng.random(len(x)) < 0.3
    scale = np.where(noisy, 20.0, 1.0)
    error = error * np.exp(np.where(noisy, 0.02, 0.0) * rng.normal(size=len(x)))
    weighted, equal = fit_with_runs(x, t, error, run, scale=scale), fit_with_runs(x, t, error, run)
    assert weighted.log_se < 0.4 * equal.log_se
    assert weighted.fit.law.exponent == pytest.approx(DEPTH.exponent, rel=0.1)


def test_a_level_that_is_no_probability_and_runs_of_another_length_are_refused():
    x, t, error, run = sweep(DEPTH, np.random.default_rng(13), sigma=0.005, tau=0.005)
    whole = fit_with_runs(x, t, error, run)
    with pytest.raises(ValueError, match=r"write 0\.95 for 95%"):
        exponent_interval(x, t, error, whole, level=95)
    with pytest.raises(ValueError, match="give each point its run"):
        fit_with_runs(x, t, error, run[:-1])
