"""Arms fitted together: what sharing buys is a known number, and a false claim of sharing is noticed."""

import numpy as np
import pytest

from sovit.analysis.intervals import exponent_interval, fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.shared import fit_shared


def arm(a, b, rng, *, size_range, eps=0.15, c=0.35, sigma=0.005):
    law = Law(0.07 * b / a, a, 0.07, b, 0.03, c, eps)
    x = np.repeat(size_range ** np.linspace(-0.5, 0.5, 7), 14)
    t = np.tile(32 ** np.linspace(-0.5, 0.5, 14), 7)
    run = np.repeat(np.arange(7), 14)
    error = law.error(x, t) * np.exp(sigma * rng.normal(size=98) + sigma / 2 * rng.normal(size=7)[run])
    return x, t, error, fit_with_runs(x, t, error, run)


def star(rng, **depth):
    return {
        "width": arm(1.10, 0.49, rng, size_range=3.2),
        "depth": arm(0.45, 0.328, rng, size_range=5.0, **depth),
        "mlp_dim": arm(0.30, 0.283, rng, size_range=5.6),
    }


def width_of(interval):
    return np.log(interval.hi / interval.lo)


def test_sharing_c_alone_buys_little_and_sharing_all_three_a_lot():
    """Over 8 stars: c alone moves s by a small part of its interval; with xi and eps depth is at least a third tighter."""
    rng = np.random.default_rng(0)
    moved, all_three = [], []
    for _ in range(8):
        arms = star(rng)
        x, t, error, fit = arms["depth"]
        apart = exponent_interval(x, t, error, fit)
        by_c, by_all = fit_shared(arms, ["c"]).s["depth"], fit_shared(arms, ["c", "xi", "eps"]).s["depth"]
        moved.append(abs(np.log(by_c.estimate / apart.estimate)) / width_of(apart))
        all_three.append(width_of(by_all) / width_of(by_c))
    assert np.median(moved) < 0.1
    assert np.median(all_three) < 0.67


def test_a_claim_of_sharing_is_rejected_when_it_is_false_and_seldom_when_true():
    rng = np.random.default_rng(1)
    true = [fit_shared(star(rng), ["c"]).p for _ in range(10)]
    false = [fit_shared(star(rng, c=0.6), ["c"]).p for _ in range(3)]
    assert sum(p <= 0.05 for p in true) <= 2
    assert max(false) < 0.01


def test_sharing_nothing_or_what_cannot_be_shared_is_refused():
    arms = star(np.random.default_rng(2))
    with pytest.raises(ValueError, match="choose among c, xi, eps"):
        fit_shared(arms, ["alpha"])
    with pytest.raises(ValueError, match="at least two"):
        fit_shared({"width": arms["width"]}, ["c"])
