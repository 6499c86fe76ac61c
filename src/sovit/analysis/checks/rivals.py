"""Other laws for the same arm, judged by what they predict of points they have not seen.

Each law is fitted to the same points with the same weights and noise, twice over: with the largest budgets held out,
and with each size held out in turn. Its score is the mean |log measured - log predicted| of the held-out points.
Differences to Eq. 2 (SoViT, arXiv 2305.13035) come with a jackknife over runs, every fit repeated without each run;
inside that interval neither law is called better.

A held-out size at an end of the arm asks for extrapolation in x, one inside for interpolation; the score has both.
Scores say which law predicts, not which is true: a wrong law with few parameters can beat a true one on few runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution

from sovit.analysis import diagnostics as check
from sovit.analysis.checks.heldout import split
from sovit.analysis.fit import MIN_POINTS, law_logs
from sovit.analysis.intervals import MIN_RUNS, RunFit, index_runs
from sovit.analysis.points import Point
from sovit.analysis.varpro import Noise, solve

Array = NDArray[np.float64]
_WORST = math.log(10)  # a prediction further off counts as this far: a law that explodes is bad, not infinitely so
_SIZE, _COST, _DECAY = (0.12, 0.4, 1.2, 3.5), (0.12, 0.5, 1.6), (0.12, 0.35, 0.9)  # starts of a, b, c


@dataclass(frozen=True)
class _Form:
    """``terms``: (log x, log t) -> logs (J, K, n) for `varpro.solve`; None for the parabola, which is linear."""

    name: str
    formula: str
    num_parameters: int
    terms: Callable[[Array, Array], Array] | None
    grid: tuple[tuple[float, ...], ...] = ()


def _without(*left_out: int) -> Callable[[Array, Array], Array]:
    return lambda log_x, log_t: np.delete(law_logs(log_x, log_t), left_out, axis=0)


def _one_exponent(log_x: Array, log_t: Array) -> Array:
    zero = np.zeros_like(log_x)
    return np.array([[-log_x, zero], [log_x, -log_t], [zero, -log_t], [zero, zero]])


def _images(log_x: Array, log_t: Array) -> Array:
    zero = np.zeros_like(log_x)
    return np.array([[-log_x, zero], [zero, log_x - log_t], [zero, zero]])


EQ2 = "Eq. 2"
FORMS = (
    _Form(EQ2, "alpha x^-a + (beta x^b + xi) t^-c + eps", 7, law_logs, (_SIZE, _COST, _DECAY)),
    _Form("without xi", "alpha x^-a + beta x^b t^-c + eps", 6, _without(2), (_SIZE, _COST, _DECAY)),
    _Form("without eps", "alpha x^-a + (beta x^b + xi) t^-c", 6, _without(3), (_SIZE, _COST, _DECAY)),
    _Form("a = b", "alpha x^-a + (beta x^a + xi) t^-c + eps", 6, _one_exponent, (_SIZE, _DECAY)),
    _Form("images", "alpha x^-a + beta (t / x)^-c + eps", 5, _images, (_SIZE, _DECAY)),
    _Form("parabola", "log error quadratic in (log x, log t)", 6, None),
)


@dataclass(frozen=True)
class Score:
    """``off``: mean |log error| of the predictions; ``difference`` to that of Eq. 2 with its 95% interval, None for Eq. 2
    itself; ``verdict``: "better", "worse" or "inside the noise"."""

    off: float
    difference: float | None
    lo: float | None
    hi: float | None
    verdict: str


@dataclass(frozen=True)
class Rival:
    """One law: its score on the largest budgets and on sizes left out, None where it could not be fitted."""

    name: str
    formula: str
    num_parameters: int
    budgets: Score | None
    sizes: Score | None


def compare(name: str, points: Sequence[Point], whole: RunFit) -> list[Rival] | str:
    """All laws of ``FORMS`` on the points of an arm, those of the fit ``whole``, or why they cannot be compared."""
    if whole.num_runs < MIN_RUNS:
        return f"{whole.num_runs} runs are too few; at least {MIN_RUNS} are needed"
    try:
        early, *_ = split(points)
    except ValueError as refusal:
        return str(refusal).split(";")[0]
    x, t, error, run = check.vectors(name, points)
    data = _Data(np.log(x), np.log(t), np.log(error), index_runs(run), whole.noise)
    by_size = [data.log_x != size for size in np.unique(data.log_x)]
    off = np.array([[_off(form, data, [early]), _off(form, data, by_size)] for form in FORMS])  # (forms, 2, n)
    if np.isnan(off[0]).all(1).any():
        return "too few points are left to fit the law to"
    means = np.nanmean(off, axis=2)
    without = np.empty((whole.num_runs, *means.shape))
    for one in range(whole.num_runs):
        keep = data.run != one
        some = data.some(keep)
        sizes = [part[keep] for part in by_size if not part[keep].all()]
        again = np.array([[_off(form, some, [early[keep]]), _off(form, some, sizes)] for form in FORMS])
        if np.isnan(again).all(2).any():
            return "too few points are left to fit the law to"
        without[one] = np.nanmean(again, axis=2)
    differences, theirs = means - means[0], without - without[:, :1]
    count = whole.num_runs
    spread = np.sqrt((count - 1) / count * np.sum((theirs - theirs.mean(0)) ** 2, axis=0))
    half = float(t_distribution.ppf(0.975, count - 1)) * spread
    return [
        Rival(
            form.name,
            form.formula,
            form.num_parameters,
            *(_score(means[k, which], differences[k, which], half[k, which], form) for which in range(2)),
        )
        for k, form in enumerate(FORMS)
    ]


def _score(off: float, difference: float, half: float, form: _Form) -> Score:
    if form.name == EQ2:
        return Score(float(off), None, None, None, "")
    lo, hi = float(difference - half), float(difference + half)
    return Score(
        float(off), float(difference), lo, hi, "better" if hi < 0 else "worse" if lo > 0 else "inside the noise"
    )


@dataclass(frozen=True)
class _Data:
    log_x: Array
    log_t: Array
    log_error: Array
    run: NDArray[np.intp]
    noise: Noise

    def some(self, keep: NDArray[np.bool_]) -> _Data:
        run = index_runs(self.run[keep])
        noise = Noise(run, self.noise.ratio, self.noise.scale[keep])
        return _Data(self.log_x[keep], self.log_t[keep], self.log_error[keep], run, noise)


def _off(form: _Form, data: _Data, fitted: Sequence[NDArray[np.bool_]]) -> Array:
    """(n,) |log measured - log predicted| of the points left out by some of the parts fitted; nan for the others and
    where a part has too few points or sizes."""
    off = np.full(len(data.log_x), np.nan)
    for part in fitted:
        if part.sum() < MIN_POINTS or len(np.unique(data.log_x[part])) < 3 or len(np.unique(data.log_t[part])) < 2:
            continue
        miss = data.log_error[~part] - _predict(form, data.some(part), data.log_x[~part], data.log_t[~part])
        off[~part] = np.minimum(np.abs(miss), _WORST)
    return off


def _predict(form: _Form, data: _Data, log_x: Array, log_t: Array) -> Array:
    """log error at new points by the form fitted to the data."""
    mean_x, mean_t = data.log_x.mean(), data.log_t.mean()
    u, v, new_u, new_v = data.log_x - mean_x, data.log_t - mean_t, log_x - mean_x, log_t - mean_t
    if form.terms is None:
        columns, new = (
            np.column_stack((np.ones_like(p), p, q, p**2, p * q, q**2)) for p, q in ((u, v), (new_u, new_v))
        )
        found, *_ = np.linalg.lstsq(data.noise.whiten(columns), data.noise.whiten(data.log_error), rcond=None)
        return new @ found
    solution = solve(form.terms(u, v), data.log_error, data.noise, grid=form.grid)
    terms = np.exp(np.minimum(np.einsum("jkn,k->jn", form.terms(new_u, new_v), solution.exponents), 700))
    return np.log(np.maximum(solution.coefficients @ terms, 1e-300))
