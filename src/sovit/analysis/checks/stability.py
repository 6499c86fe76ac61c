"""Whether an exponent stays where it is without the cells near the star's center, in another star, or one run less.

The unit of noise is the run. An estimate from some of the points is correlated with that from all: their difference has
the variance that the linearised law and the fitted noise give it, and its p-value comes from sweeps drawn from the fit
and refitted both ways. Two stars share no run. No test here sees what changes all estimates alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution

from sovit.analysis import diagnostics as check
from sovit.analysis.fit import Noise, fit_law, law_logs
from sovit.analysis.intervals import (
    MIN_RUNS,
    MIN_SIZES,
    RATIOS,
    RunFit,
    index_runs,
    jackknife_runs,
)
from sovit.analysis.law import Law
from sovit.analysis.planning.information import exponent_gradient
from sovit.analysis.points import HasShape, Point
from sovit.analysis.specification import draw_residuals, run_test
from sovit.analysis.varpro import refit

Array = NDArray[np.float64]
DRAWS, RUN_DRAWS = 1000, 400
_WIDEST = math.log(10)  # a standard error of log s beyond this factor is no measurement


def response(jacobian: Array, noise: Noise, gradients: Array) -> Array | None:
    """(m, n): how far m functions of the fitted parameters move for a unit of each point's log error.

    ``jacobian`` (n, p) of the log law by its parameters, ``gradients`` (m, p) of the functions by them. None if the
    points do not determine the functions.
    """
    gradients = np.atleast_2d(gradients)
    norms = np.linalg.norm(jacobian, axis=0)
    used = norms > 0
    if used.sum() > len(jacobian) or np.any(gradients[:, ~used]):
        return None
    left, singular, right = np.linalg.svd(noise.whiten(jacobian[:, used] / norms[used]), full_matrices=False)
    if singular[-1] <= 1e-12 * singular[0]:
        return None
    whitened = (gradients[:, used] / norms[used]) @ right.T / singular @ left.T
    return whitened @ noise.whiten(np.eye(len(jacobian)))


def covariance(rows: Array, noise: Noise, sigma: float) -> Array:
    """(m, m) covariance of ``rows`` (m, n) @ log errors under an offset per run and noise per point."""
    by_run = np.zeros((len(rows), int(noise.run.max()) + 1))
    for one in range(by_run.shape[1]):
        by_run[:, one] = rows[:, noise.run == one].sum(1)
    scaled = rows * noise.scale
    return sigma**2 * (scaled @ scaled.T + noise.ratio**2 * (by_run @ by_run.T))


def spreads(jacobian: Array, noise: Noise, residuals: Array) -> tuple[Array, Array]:
    """tau / sigma (B,) and sigma (B,) by REML of residuals (n, B) about a law linearised at its fit.

    ``noise`` says the runs and scales; its own ratio is not used.
    """
    norms = np.linalg.norm(jacobian, axis=0)
    basis, singular, _ = np.linalg.svd(jacobian[:, norms > 0] / norms[norms > 0], full_matrices=False)
    basis = basis[:, singular > 1e-10 * singular[0]]
    free = len(basis) - basis.shape[1]
    best, ratios, sigmas = (np.full(residuals.shape[1], np.inf) for _ in range(3))
    for ratio in RATIOS:
        trial = Noise(noise.run, float(ratio), noise.scale)
        directions, triangle = np.linalg.qr(trial.whiten(basis))
        whitened = trial.whiten(residuals)
        rest = np.sum(whitened**2, axis=0) - np.sum((directions.T @ whitened) ** 2, axis=0)
        rest = np.maximum(rest, 1e-300)
        volume = trial.log_det() + 2 * float(np.log(np.abs(np.diag(triangle))).sum())
        criterion = free * np.log(rest) + volume
        better = criterion < best
        best[better], ratios[better], sigmas[better] = criterion[better], ratio, np.sqrt(rest[better] / free)
    return ratios, sigmas


@dataclass(frozen=True)
class Change:
    """An exponent and what it becomes: ``log_ratio`` = log (other / s) with its standard error, ``p`` of no change.

    ``detectable``: the factor between the two that a test at 5% sees about four times in five.
    """

    s: float
    other: float
    log_ratio: float
    log_se: float
    p: float
    detectable: float
    num_runs: int
    num_sizes: int
    left_out: tuple[int, ...] = ()


def subset_noise(noise: Noise, keep: NDArray[np.bool_]) -> Noise:
    """The same noise of some of the points."""
    return Noise(index_runs(noise.run[keep]), noise.ratio, noise.scale[keep])


def nearest_sizes(name: str, points: Sequence[Point], center: HasShape) -> tuple[int, ...]:
    """The sizes of an arm next to the center's, one on each side where there is one."""
    sizes, middle = sorted({getattr(point, name) for point in points}), getattr(center, name)
    below, above = [size for size in sizes if size < middle], [size for size in sizes if size > middle]
    return (*below[-1:], *above[:1])


@dataclass(frozen=True)
class Function:
    """A function of the law whose change is tested: its value and gradient (7,) in the units of the points, and its
    values for many fits from exponents (B, 3) and coefficients (B, 4), nan where it has none."""

    of_law: Callable[[Law], float]
    gradient: Callable[[Law], Array]
    of_fits: Callable[[Array, Array], Array]


def log_exponents(exponents: Array, coefficients: Array) -> Array:
    """log s (B,) of many fits, exponents (B, 3) and coefficients (B, 4); nan for a law without an optimum."""
    a, b, c = exponents.T
    return np.where(np.all(coefficients[:, :2] > 0, axis=1), np.log(c / (a + b)), np.nan)


EXPONENT = Function(lambda law: math.log(law.exponent), exponent_gradient, log_exponents)


@dataclass(frozen=True)
class Shift:
    """How a function of the law moves when only some points are fitted, with its standard error; ``p`` of no change.

    ``limit``, ``typical``: quantiles 0.95 and 0.6 of |change| over standard error in sweeps drawn from the whole fit.
    """

    whole: float
    some: float
    log_se: float
    p: float
    limit: float
    typical: float

    @property
    def detectable(self) -> float:
        """The change that a test at 5% sees about four times in five."""
        return (self.limit + self.typical) * self.log_se


def shift(
    x: Array, t: Array, error: Array, whole: RunFit, keep: NDArray[np.bool_], of: Function, draws: int, seed: int
) -> Shift | str:
    """Test whether the fit of some of the points (those of ``keep``) differs from the whole, or why it cannot be had.

    The refit keeps the whole fit's tau / sigma. The change over its standard error (both estimates linearised at the
    whole fit) is compared with that of sweeps drawn from the whole fit and refitted both ways; each draw has a standard
    error by its own REML.
    """
    noise = subset_noise(whole.noise, keep)
    warm = fit_law(x[keep], t[keep], error[keep], noise=noise, starts=[whole.fit.exponents])
    found = min(warm, fit_law(x[keep], t[keep], error[keep], noise=noise), key=lambda fit: fit.objective)
    for fit, which in ((whole.fit, "all points"), (found, "the points left")):
        if check.optimal_exponent(fit) is None:
            return f"the law of {which} has no optimum ({', '.join(fit.flags)})"
    gradient = of.gradient(whole.fit.law)
    every = response(whole.fit.jacobian, whole.noise, gradient)
    some = response(whole.fit.jacobian[keep], noise, gradient)
    if every is None or some is None:
        return "the data left do not determine it"
    difference = -every
    difference[:, keep] += some
    log_se = max(math.sqrt(covariance(difference, whole.noise, whole.sigma)[0, 0]), 1e-12)
    if log_se > _WIDEST:
        return "the data left leave it open"
    drawn = draw_residuals(whole, draws, seed)
    log_x, log_t = np.log(x) - np.log(x).mean(), np.log(t) - np.log(t).mean()
    data = (np.log(error) - whole.fit.residuals + drawn.T).copy()
    logs = law_logs(log_x, log_t)
    before = of.of_fits(*refit(logs, data, whole.noise, whole.fit.exponents)[1:])
    after = of.of_fits(*refit(logs[:, :, keep], data[:, keep], noise, whole.fit.exponents)[1:])
    ratios, sigmas = spreads(whole.fit.jacobian, whole.noise, drawn)
    alone, shared = (
        covariance(difference, Noise(whole.noise.run, ratio, whole.noise.scale), 1.0)[0, 0] for ratio in (0.0, 1.0)
    )
    by_chance = np.abs(after - before) / (sigmas * np.sqrt(alone + ratios**2 * (shared - alone)))
    by_chance = by_chance[np.isfinite(by_chance)]
    if len(by_chance) < draws / 2:
        return "in most sweeps like this one the data left leave it open"
    before_now, after_now = of.of_law(whole.fit.law), of.of_law(found.law)
    p = float((1 + np.sum(by_chance >= abs(after_now - before_now) / log_se)) / (1 + len(by_chance)))
    limit, typical = np.quantile(by_chance, (0.95, 0.6))
    return Shift(before_now, after_now, log_se, p, float(limit), float(typical))


def without_center(
    name: str, points: Sequence[Point], center: HasShape, whole: RunFit, *, draws: int = DRAWS, seed: int = 0
) -> Change | str:
    """The exponent of an arm without the sizes next to the center's, or in words why it cannot be had.

    ``points``: those of the fit ``whole``, in its order. How it is tested: `shift`.
    """
    left_out = nearest_sizes(name, points, center)
    keep = np.array([getattr(point, name) not in left_out for point in points])
    rest = [point for point, kept in zip(points, keep, strict=True) if kept]
    sizes = len({getattr(point, name) for point in rest})
    if whole.num_runs < MIN_RUNS:
        return f"{whole.num_runs} runs are too few; at least {MIN_RUNS} are needed"
    if sizes < MIN_SIZES - 1 or check.too_few(name, rest):
        return f"{sizes} sizes would be left, too few to fit the law"
    x, t, error, _ = check.vectors(name, points)
    found = shift(x, t, error, whole, keep, EXPONENT, draws, seed)
    if isinstance(found, str):
        return found
    num_runs, change = len({point.run_id for point in rest}), found.some - found.whole
    s, other, least = math.exp(found.whole), math.exp(found.some), math.exp(found.detectable)
    return Change(s, other, change, found.log_se, found.p, least, num_runs, sizes, left_out)


def two_stars(first: RunFit, second: RunFit) -> Change | str:
    """One dimension's exponent in two stars that share no run: Welch's test on log s, or why there is none."""
    for which, fit in (("first", first), ("second", second)):
        if fit.num_runs < MIN_RUNS or fit.num_sizes < MIN_SIZES:
            return f"{fit.num_runs} runs at {fit.num_sizes} sizes in the {which} star are too few"
        if check.optimal_exponent(fit.fit) is None or fit.log_se > _WIDEST:
            return f"the {which} star leaves the exponent open"
    squares = np.array([first.log_se, second.log_se]) ** 2
    df = float(squares.sum() ** 2 / np.sum(squares**2 / np.array([first.num_runs - 3, second.num_runs - 3])))
    log_se, (s, other) = math.sqrt(squares.sum()), (first.fit.law.exponent, second.fit.law.exponent)
    p = float(2 * t_distribution.sf(abs(math.log(other / s)) / log_se, df))
    detectable = math.exp(float(t_distribution.ppf(0.975, df) + t_distribution.ppf(0.8, df)) * log_se)
    sizes = min(first.num_sizes, second.num_sizes)
    return Change(s, other, math.log(other / s), log_se, p, detectable, first.num_runs + second.num_runs, sizes)


@dataclass(frozen=True)
class Influence:
    """Leave one run out. ``dfbeta``: log (s without / s) over the standard error of log s, the largest named.

    ``t``: the named run's mean residual from what the others predict, in standard errors; ``p`` of one as far off among
    all runs, so that a run that merely sits at an end of the arm does not alarm.
    """

    run_id: str
    s: float
    s_without: float
    dfbeta: float
    t: float
    p: float
    runs: tuple[dict[str, Any], ...]


def influence(
    name: str, points: Sequence[Point], whole: RunFit, *, draws: int = RUN_DRAWS, seed: int = 0
) -> Influence | str:
    """How much each run of an arm moves its exponent, or in words why that cannot be said. p: `specification.run_test`."""
    if whole.num_runs < MIN_RUNS:
        return f"{whole.num_runs} runs are too few; at least {MIN_RUNS} are needed"
    if check.optimal_exponent(whole.fit) is None or not math.isfinite(whole.log_se):
        return "the data leave the exponent open"
    found = jackknife_runs(*check.vectors(name, points), whole)
    if found is None:
        return "a fit without one of the runs has too few points or sizes"
    s = whole.fit.law.exponent
    dfbeta = np.log(np.array(found.without) / s) / whole.log_se
    x, t, *_ = check.vectors(name, points)
    tested = run_test(x, t, whole, num_draws=draws, seed=seed)
    names = sorted({point.run_id for point in points})
    size = {point.run_id: getattr(point, name) for point in points}
    rows = tuple(
        {"run_id": run, "size": size[run], "s_without": without, "dfbeta": float(moved), "t": float(t)}
        for run, without, moved, t in zip(names, found.without, dfbeta, tested.t, strict=True)
    )
    worst = int(np.argmax(np.abs(dfbeta)))
    without, moved = found.without[worst], float(dfbeta[worst])
    return Influence(names[worst], s, without, moved, float(tested.t[worst]), float(tested.p[worst]), rows)
