"""How sure the exponent is, when every evaluation of a run shares that run's own luck.

Log errors get an offset per run of spread tau (initialisation, data order, tuning) on top of sigma per evaluation.
All information on s lies in differences between runs, so points must not be treated as independent: at tau = sigma the
textbook 95% interval covers about half the time. tau / sigma is chosen by REML (Patterson and Thompson 1971), the law
is refitted by generalised least squares, and the interval is Wald's on log s with t(G - 3), G = number of runs.
Where that is not valid (a parameter on its bound, or nearly no information) the profile likelihood decides, and may
leave a side open. The jackknife over runs is the check that does not rely on the offset model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from sovit.analysis.fit import BOX, MAX_EXPONENT, NUM_PARAMETERS, Array, LawFit, Noise, Prior, fit_law
from sovit.analysis.law import Law
from sovit.analysis.varpro import restricted

MIN_RUNS, MIN_SIZES = 5, 4
RATIOS = (0.0, *np.geomspace(0.1, 30.0, 20))  # tau / sigma
_FAR_WORSE = 12.0  # of -2 log likelihood: larger ratios only fall further behind
_ROBUST_PASSES, _SAME_WEIGHT = 5, 0.02
_FAR_POINT, _BISQUARE = 4.5, 7.0  # robust standard deviations; 98 clean points hold one beyond 4.5 in 0.07% of sweeps
_LEAST_FREE, _LEAST_WEIGHT = 10, 0.75
_WIDEST = math.log(10)  # a Wald half-width of log s beyond this factor is not quadratic any more
_FARTHEST = math.log(100)  # how far the profile follows s before it calls a side open
_ON_BOUND = ("alpha=0", "beta=0", "at its lower bound", "at its upper bound")


@dataclass(frozen=True)
class Interval:
    """An exponent with its interval; ``lo`` 0 or ``hi`` inf where the data leave that side open."""

    estimate: float
    lo: float
    hi: float
    method: str

    @property
    def is_open(self) -> bool:
        """Neither side is bounded: the data say nothing about the exponent."""
        return self.lo <= 0 and math.isinf(self.hi)


@dataclass(frozen=True)
class RunFit:
    """A law fitted with an offset per run.

    ``sigma``, ``tau``: relative spread of one evaluation and of a run's offset. ``log_se``: standard error of log s
    (inf if the data do not determine s). ``weights`` (n,): 1, or less for points far from their run's level.
    """

    fit: LawFit
    noise: Noise
    sigma: float
    tau: float
    log_se: float
    num_runs: int
    num_sizes: int
    weights: Array


def index_runs(run: ArrayLike) -> NDArray[np.intp]:
    """Whole numbers 0, 1, ... for run names of any type."""
    return np.unique(np.asarray(run), return_inverse=True)[1].reshape(-1)


def fit_with_runs(
    x: ArrayLike,
    t: ArrayLike,
    error: ArrayLike,
    run: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    robust: bool = True,
    priors: Mapping[str, Prior] | None = None,
) -> RunFit:
    """Fit the law to points (n,) of several runs, each with an offset of its own.

    ``t`` in GFLOPs; ``run`` (n,) names each point's run (two seeds of one size are two runs); ``scale`` (n,) the
    relative standard deviations of the points up to a factor, equal if not given. ``robust``: points that lie farther
    from their run's level than noise explains lose weight (see `_point_weights`). ``priors``: see `fit_law`.
    Raises what `fit_law` raises.
    """
    x, t, error = (np.asarray(values, float) for values in (x, t, error))
    index = index_runs(run)
    if len(index) != len(x):
        raise ValueError(f"run names {len(index)} points, but there are {len(x)}; give each point its run.")
    spread = np.ones(len(x)) if scale is None else np.asarray(scale, float)
    spread = spread / np.exp(np.log(spread).mean())
    weights = np.ones(len(x))
    found = _reml_fit(x, t, error, index, spread, weights, priors)
    for _ in range(_ROBUST_PASSES if robust else 0):
        found_weights = _point_weights(found.fit.residuals / spread, index)
        if np.abs(found_weights - weights).max() < _SAME_WEIGHT:
            break
        weights = found_weights
        found = _reml_fit(x, t, error, index, spread / np.sqrt(weights), weights, priors)
    return found


def _reml_fit(
    x: Array,
    t: Array,
    error: Array,
    index: NDArray[np.intp],
    scale: Array,
    weights: Array,
    priors: Mapping[str, Prior] | None,
) -> RunFit:
    """The fit at the tau / sigma of highest restricted likelihood; with priors, at the sigma it finds itself."""
    num_runs = int(index.max()) + 1
    free = float(weights.sum()) - NUM_PARAMETERS

    def fit_at(ratio: float, fit: LawFit | None = None, sigma: float = 0.0) -> tuple[LawFit, Noise]:
        noise = Noise(index, ratio, scale)
        starts = [fit.exponents] if fit else []
        return fit_law(x, t, error, noise=noise, starts=starts, priors=priors if sigma else None, sigma=sigma), noise

    def sigma_of(fit: LawFit, noise: Noise) -> float:
        return math.sqrt(float(np.sum(noise.whiten(fit.residuals) ** 2)) / free)

    cold, noise = fit_at(0.0)
    fit, best, ratio = cold, restricted(cold.objective, cold.jacobian, noise, free), 0.0
    for trial in RATIOS[1:] if num_runs > 1 else ():
        fit, noise = fit_at(float(trial), fit)
        criterion = restricted(fit.objective, fit.jacobian, noise, free)
        if criterion < best:
            best, ratio = criterion, float(trial)
        elif criterion > best + _FAR_WORSE:
            break
    fit, noise = fit_at(ratio) if ratio else (cold, Noise(index, 0.0, scale))
    sigma = sigma_of(fit, noise)
    for _ in range(2 if priors else 0):
        fit, noise = fit_at(ratio, None, sigma)
        sigma = sigma_of(fit, noise)
    log_se = log_standard_error(fit, noise, sigma, priors)
    return RunFit(fit, noise, sigma, ratio * sigma, log_se, num_runs, len(np.unique(x)), weights)


def _point_weights(residuals: Array, run: NDArray[np.intp]) -> Array:
    """Weights of Tukey's bisquare on residuals (in units of each point's scale) from the median of their run.

    All 1 unless some point is farther than `_FAR_POINT` robust standard deviations; never 0, so that a point keeps a say.
    All 1 too with few points, or if more than a quarter of the weight would go: then it is the law that does not fit.
    """
    free = len(residuals) - int(run.max()) - 4  # the runs' medians and the law's slopes in t take their share
    if free < _LEAST_FREE:
        return np.ones(len(residuals))
    centred = np.array(residuals, float)
    for one in range(int(run.max()) + 1):
        centred[run == one] -= np.median(centred[run == one])
    spread = 1.4826 * float(np.median(np.abs(centred))) * math.sqrt(len(centred) / free)
    if not spread > 0 or np.abs(centred).max() <= _FAR_POINT * spread:
        return np.ones(len(centred))
    inside = np.clip(1 - (centred / (_BISQUARE * spread)) ** 2, 0.0, 1.0)
    weights = np.maximum(inside**2, 1e-4)
    return weights if weights.mean() >= _LEAST_WEIGHT else np.ones(len(centred))


def exponent_interval(
    x: ArrayLike, t: ArrayLike, error: ArrayLike, whole: RunFit, *, level: float = 0.95
) -> Interval | str:
    """The interval of s for a fit of these points, or in words why there is none (too few runs or sizes).

    Raises ValueError if ``level`` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1; write 0.95 for 95%.")
    if whole.num_runs < MIN_RUNS:
        return f"{whole.num_runs} runs are too few for an interval; at least {MIN_RUNS} are needed"
    if whole.num_sizes < MIN_SIZES:
        return f"{whole.num_sizes} distinct sizes are too few for an interval; at least {MIN_SIZES} are needed"
    half = float(t_distribution.ppf((1 + level) / 2, whole.num_runs - 3)) * whole.log_se
    if half > _WIDEST or any(flag.endswith(_ON_BOUND) for flag in whole.fit.flags):
        x, t, error = (np.asarray(values, float) for values in (x, t, error))
        return profile_interval(x, t, error, whole, level)
    s = whole.fit.law.exponent
    return Interval(s, s * math.exp(-half), s * math.exp(half), "REML, Wald on log s, t(G-3)")


def log_standard_error(fit: LawFit, noise: Noise, sigma: float, priors: Mapping[str, Prior] | None = None) -> float:
    """Delta-method standard error of log s = log c - log (a + b); inf where the data do not determine it.

    xi and eps count as free even when they sit at 0: conservative, for knowing both would halve the error.
    """
    law = fit.law
    gradient = np.zeros(NUM_PARAMETERS)
    gradient[[1, 3]] = -1 / (law.a + law.b)
    gradient[5] = 1 / law.c
    jacobian = noise.whiten(fit.jacobian)
    for name, prior in (priors or {}).items():
        row = np.zeros((1, NUM_PARAMETERS))
        row[0, {"a": 1, "b": 3, "c": 5}[name]] = sigma / (prior.log_sd * getattr(law, name))
        jacobian = np.vstack((jacobian, row))
    norms = np.linalg.norm(jacobian, axis=0)
    if np.any(norms[[1, 3, 5]] == 0):
        return math.inf
    norms[norms == 0] = 1.0
    _, singular, rows = np.linalg.svd(jacobian / norms, full_matrices=False)
    along = rows @ (gradient / norms)
    if singular[-1] <= 1e-12 * singular[0]:
        return math.inf
    return sigma * float(np.linalg.norm(along / singular))


def profile_interval(x: Array, t: Array, error: Array, whole: RunFit, level: float) -> Interval:
    """All s whose best law is not worse than the best of all by F(1, G - 3) of the residual variance.

    A side is open if no s up to 100 times as far is that bad, or if only the box of the exponents stops s there.
    """
    sigma2 = max(whole.sigma**2, 1e-300)
    allowed = float(f_distribution.ppf(level, 1, whole.num_runs - 3))
    centre = math.log(whole.fit.law.exponent)

    def side(sign: int) -> float:
        """log s at the end of the interval, or +-inf."""
        nearest = whole.fit

        def excess(shift: float) -> float:
            nonlocal nearest
            s = math.exp(centre + sign * shift)
            warm = fit_law(x, t, error, noise=whole.noise, exponent=s, starts=[nearest.exponents])
            cold = fit_law(x, t, error, noise=whole.noise, exponent=s)
            nearest = min(warm, cold, key=lambda trial: trial.objective)
            return (nearest.objective - whole.fit.objective) / sigma2 - allowed

        inner, outer = 0.0, 0.1
        farthest = min(_FARTHEST, math.log(MAX_EXPONENT) - centre) if sign > 0 else _FARTHEST
        while excess(min(outer, farthest)) <= 0:
            if outer >= farthest:
                return sign * math.inf
            inner, outer = outer, 1.6 * outer
        excess(end := float(brentq(excess, inner, min(outer, farthest), xtol=1e-4)))
        on_box = any(not 1.01 * BOX[0] < value < 0.99 * BOX[1] for value in nearest.exponents)
        return sign * math.inf if on_box else centre + sign * end

    low, high = side(-1), side(1)
    return Interval(whole.fit.law.exponent, math.exp(low), math.exp(high), "REML, profile likelihood, F(1, G-3)")


@dataclass(frozen=True)
class Jackknife:
    """Delete-one-run jackknife of log s with t(G - 1).

    ``half``: half-width of the interval of log s; ``without``: s without each run, in order of run index, and ``laws``
    the laws behind.
    """

    lo: float
    hi: float
    half: float
    without: tuple[float, ...]
    laws: tuple[Law, ...]


def jackknife_runs(
    x: ArrayLike, t: ArrayLike, error: ArrayLike, run: ArrayLike, whole: RunFit, *, level: float = 0.95
) -> Jackknife | None:
    """Refit without each run in turn, at the whole fit's tau / sigma; None if a refit leaves too few points or sizes.

    Raises what `fit_law` raises for the points themselves.
    """
    x, t, error = (np.asarray(values, float) for values in (x, t, error))
    index = index_runs(run)
    num_runs = int(index.max()) + 1
    laws = []
    for left_out in range(num_runs):
        keep = index != left_out
        if keep.sum() <= NUM_PARAMETERS or len(np.unique(x[keep])) < MIN_SIZES - 1 or len(np.unique(t[keep])) < 2:
            return None
        noise = Noise(index_runs(index[keep]), whole.noise.ratio, whole.noise.scale[keep])
        warm = fit_law(x[keep], t[keep], error[keep], noise=noise, starts=[whole.fit.exponents])
        cold = fit_law(x[keep], t[keep], error[keep], noise=noise)
        laws.append(min(warm, cold, key=lambda fit: fit.objective).law)
    without = tuple(law.exponent for law in laws)
    logs = np.log(without)
    spread = math.sqrt((num_runs - 1) / num_runs * float(np.sum((logs - logs.mean()) ** 2)))
    half = float(t_distribution.ppf((1 + level) / 2, num_runs - 1)) * spread
    s = whole.fit.law.exponent
    return Jackknife(s * math.exp(-half), s * math.exp(half) if half < 700 else math.inf, half, without, tuple(laws))
