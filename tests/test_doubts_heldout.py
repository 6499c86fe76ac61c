"""Budgets and sizes held out: exact on noiseless laws, calibrated on noisy ones, alarmed by laws that bend."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import binom

from sovit.analysis.checks import heldout, rivals
from sovit.analysis.checks.heldout import HeldOut, held_out, held_out_rows, split
from sovit.analysis.checks.rivals import EQ2, FORMS, compare
from sovit.analysis.diagnostics import vectors
from sovit.analysis.intervals import fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.points import Point

SIZES = [round(1000 * 8**place) for place in np.linspace(-0.5, 0.5, 6)]
TIMES = 1000 * 32 ** np.linspace(-0.5, 0.5, 8)
LAW = Law(0.051 * 1000**0.9, 0.9, 0.07 * 1000**-0.656 * 1000**0.7, 0.656, 0.03 * 1000**0.7, 0.7, 0.15)


def arm(rng, noise=0.005, *, seeds=1, error=LAW.error, bend=0.0, by_images=False):
    """``bend``: what is added to the log error at the last duration, growing from 0 at the middle."""
    points = []
    for seed in range(seeds):
        for x in SIZES:
            luck = noise * rng.normal()
            for number, nominal in enumerate(TIMES):
                t = nominal * x / 1000 if by_images else nominal
                extra = bend * max(0.0, math.log(t / 1000)) / math.log(TIMES[-1] / 1000)
                value = float(error(x, t)) * math.exp(luck + noise * rng.normal() + extra)
                points.append(Point(f"r-{x:05d}-s{seed}", 1000, x, 1000, seed, float(t), f"d{number}", value, 0.005, 4))
    return points


def test_the_largest_durations_are_held_out():
    points = arm(np.random.default_rng(0))
    early, held, count = split(points, 3)
    assert (held, count) == (3, 8)
    assert {point.duration for point, kept in zip(points, early, strict=True) if kept} == {f"d{n}" for n in range(5)}
    assert split(points)[1] == 2
    with pytest.raises(ValueError, match="6 of 8 durations cannot be held out"):
        split(points, 6)


def test_durations_in_images_are_split_by_compute():
    """No held-out point costs less than a fitted one, and a quarter of all are held out."""
    points = arm(np.random.default_rng(1), by_images=True)
    early, *_ = split(points, 2)
    t = np.array([point.t_gflops for point in points])
    assert t[early].max() < t[~early].min()
    assert (~early).mean() == pytest.approx(0.25, abs=0.03)


def test_a_noiseless_law_predicts_itself():
    found = held_out(arm(np.random.default_rng(2), 1e-6), "depth", 2, draws=49)
    assert found.signed == pytest.approx(0, abs=1e-4)
    assert found.factor == pytest.approx(TIMES[-1] / TIMES[-3])
    assert found.optimum == pytest.approx(float(LAW.optimum(TIMES[-1])), rel=1e-2)
    assert found.optimum_after == pytest.approx(float(LAW.optimum(TIMES[-1])), rel=1e-2)
    assert found.regret == pytest.approx(0, abs=1e-4)
    assert found.num_cells == 12


def test_alarms_are_rare_cells_are_covered_and_a_bend_is_seen():
    """40 arms each: false alarms of errors and of the best size within the 99.9% bound of 5%, 92 to 98% of cells inside
    their 95% intervals; errors that bend up to 5% away are seen, with their sign."""
    rng = np.random.default_rng(3)
    clean = [held_out(arm(rng), "depth", draws=99, seed=seed) for seed in range(40)]
    limit = binom.ppf(0.999, 40, 0.05)
    assert sum(found.p <= 0.05 for found in clean) <= limit
    assert sum(found.optimum_p <= 0.05 for found in clean) <= limit
    assert 0.92 <= np.mean([found.covered / found.num_cells for found in clean]) <= 0.98
    assert np.std([found.z for found in clean]) == pytest.approx(1, abs=0.35)
    bent = [held_out(arm(rng, bend=0.05), "depth", draws=99, seed=seed) for seed in range(20)]
    assert np.mean([found.p <= 0.05 for found in bent]) >= 0.8
    assert all(found.signed > 0 for found in bent)


def test_standard_errors_know_that_runs_are_on_both_sides():
    """The spread of the mean prediction error over 300 sweeps drawn from one law, against the one computed."""
    rng = np.random.default_rng(4)
    points = arm(rng, 0.003, seeds=2)
    x, t, _, names = vectors("depth", points)
    run = np.unique(names, return_inverse=True)[1]
    early, *_ = split(points, 2)
    before = fit_with_runs(
        x[early], t[early], LAW.error(x, t)[early] * np.exp(1e-4 * rng.normal(size=early.sum())), run[early]
    )
    before = dataclasses.replace(before, sigma=0.003, noise=dataclasses.replace(before.noise, ratio=2.0))
    errors = heldout._Errors.of(x, t, run, early, before)
    expected = math.sqrt(errors.covariance(2.0, 0.003).mean())
    noise = 0.003 * (rng.normal(size=(300, len(x))) + 2 * rng.normal(size=(300, 12))[:, run])
    assert (noise @ errors.rows.mean(0)).std() == pytest.approx(expected, rel=0.12)
    by_chance, _ = errors.by_chance(300, 5)
    assert by_chance.std() == pytest.approx(1, abs=0.2)


def test_a_stalled_optimum_is_seen():
    """From the middle of the durations on the best size stays: the prediction from the earlier ones is too large."""

    def error(x, t):
        return LAW.error(x * (max(t, 1000) / 1000) ** LAW.exponent, t)

    found = held_out(arm(np.random.default_rng(6), 0.002, error=error, seeds=2), "depth", 3, draws=99)
    assert found.optimum_p <= 0.05
    assert found.optimum > found.optimum_after
    assert found.regret > 0


def test_every_share_that_can_be_held_out_has_a_row():
    rows = held_out_rows(arm(np.random.default_rng(7)), "depth", draws=19)
    assert [row.num_held for row in rows] == [1, 2, 3, 4]
    assert [row.factor for row in rows] == sorted(row.factor for row in rows)


def test_too_little_to_hold_out_is_said_in_words():
    points = [point for point in arm(np.random.default_rng(8)) if point.duration in ("d5", "d6", "d7")]
    assert held_out(points, "depth") == "1 of 3 durations cannot be held out"
    few = [point for point in arm(np.random.default_rng(9)) if point.depth in SIZES[:2]]
    assert held_out(few, "depth") == "the 6 smaller budgets hold too few points or sizes to fit the law"
    runs = [point for point in arm(np.random.default_rng(9)) if point.depth in SIZES[:4]]
    assert held_out(runs, "depth") == "4 runs are too few; at least 5 are needed"


@pytest.mark.parametrize("form", [form for form in FORMS if form.terms], ids=lambda form: form.name)
def test_each_form_fits_errors_of_its_own_kind(form):
    """Noiseless errors made from the formula written out, one size and one duration held out: predicted to 0.1%."""
    x, t = (part.ravel() for part in np.meshgrid(SIZES, TIMES))
    u, v = x / 1000, t / 1000
    made = {
        EQ2: 0.05 * u**-0.9 + (0.07 * u**0.6 + 0.03) * v**-0.7 + 0.15,
        "without xi": 0.05 * u**-0.9 + 0.07 * u**0.6 * v**-0.7 + 0.15,
        "without eps": 0.15 * u**-0.5 + (0.1 * u**0.6 + 0.03) * v**-0.4,
        "a = b": 0.05 * u**-0.8 + (0.07 * u**0.8 + 0.03) * v**-0.7 + 0.15,
        "images": 0.05 * u**-0.9 + 0.07 * (v / u) ** -0.6 + 0.15,
    }[form.name]
    run = np.unique(x, return_inverse=True)[1]
    data = rivals._Data(np.log(x), np.log(t), np.log(made), run, rivals.Noise(run, 1.0, np.ones(len(x))))
    off = rivals._off(form, data, [(x != SIZES[2]) & (t < TIMES[-1])])
    assert np.isnan(off).sum() == 5 * 7
    assert np.nanmax(off) < 1e-3


def parabola(x, t):
    u, v = math.log(x / 1000), math.log(t / 1000)
    return math.exp(-1.3 + 0.15 * u - 0.25 * v + 0.15 * u**2 - 0.1 * u * v - 0.08 * v**2)


def scores(points):
    found = compare("depth", points, fit_with_runs(*vectors("depth", points)))
    return {rival.name: rival for rival in found}


def test_no_law_beats_the_true_one_and_the_wrong_ones_are_found_out():
    """8 arms from Eq. 2: nothing better at either task; the law with no xi of its own and no b is worse at large budgets.
    From a parabola: the parabola is better, in all of 4."""
    rng = np.random.default_rng(10)
    ours = [scores(arm(rng)) for _ in range(8)]
    for found in ours:
        for rival in found.values():
            assert "better" not in (rival.budgets.verdict, rival.sizes.verdict)
    assert sum(found["images"].budgets.verdict == "worse" for found in ours) >= 5
    for _ in range(4):
        assert scores(arm(rng, error=parabola))["parabola"].budgets.verdict == "better"


def test_scores_are_mean_misses_and_intervals_a_jackknife_over_runs():
    """Both by hand, for the parabola on the largest budgets."""
    points = arm(np.random.default_rng(11), 0.01)
    found = scores(points)
    x, t, error, names = vectors("depth", points)
    run = np.unique(names, return_inverse=True)[1]
    whole = fit_with_runs(x, t, error, run)
    early, *_ = split(points)
    form = FORMS[-1]

    def miss(form, keep):
        data = rivals._Data(np.log(x), np.log(t), np.log(error), run, whole.noise)
        fitted = data.some(early & keep)
        late = ~early & keep
        return np.abs(np.log(error[late]) - rivals._predict(form, fitted, np.log(x[late]), np.log(t[late]))).mean()

    everyone = np.ones(len(x), bool)
    assert found["parabola"].budgets.off == pytest.approx(miss(form, everyone))
    without = np.array([miss(form, run != one) - miss(FORMS[0], run != one) for one in range(6)])
    half = 2.5706 * math.sqrt(5 / 6 * np.sum((without - without.mean()) ** 2))
    score = found["parabola"].budgets
    assert score.difference == pytest.approx(miss(form, everyone) - miss(FORMS[0], everyone))
    assert (score.hi - score.lo) / 2 == pytest.approx(half, rel=1e-3)
    assert found[EQ2].budgets.difference is None


def test_laws_that_cannot_be_compared_say_why():
    few = [point for point in arm(np.random.default_rng(12)) if point.depth in SIZES[:4]]
    assert compare("depth", few, fit_with_runs(*vectors("depth", few))) == "4 runs are too few; at least 5 are needed"
    short = [point for point in arm(np.random.default_rng(13)) if point.duration in ("d5", "d6", "d7")]
    found = compare("depth", short, fit_with_runs(*vectors("depth", short)))
    assert found == "1 of 3 durations cannot be held out"


def test_a_held_out_result_is_complete():
    found = held_out(arm(np.random.default_rng(14)), "depth", draws=19)
    assert isinstance(found, HeldOut)
    assert None not in dataclasses.asdict(found).values()
