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
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from sovit.analysis.fit import BOX, MAX_EXPONENT, NUM_PARAMETERS, Array, LawFit, Noise, fit_law

MIN_RUNS, MIN_SIZES = 5, 4
_RATIOS = (0.0, *np.geomspace(0.1, 30.0, 20))  # tau / sigma
_FAR_WORSE = 12.0  # of -2 log likelihood: larger ratios only fall further behind
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
    (inf if the data do not determine s).
    """

    fit: LawFit
    noise: Noise
    sigma: float
    tau: float
    log_se: float
    num_runs: int
    num_sizes: int


def index_runs(run: ArrayLike) -> NDArray[np.intp]:
    """Whole numbers 0, 1, ... for run names of any type."""
    return np.unique(np.asarray(run), return_inverse=True)[1].reshape(-1)


def fit_with_runs(
    x: ArrayLike, t: ArrayLike, error: ArrayLike, run: ArrayLike, *, scale: ArrayLike | None = None
) -> RunFit:
    """Fit the law to points (n,) of several runs, each with an offset of its own.

    ``t`` in GFLOPs; ``run`` (n,) names each point's run (two seeds of one size are two runs); ``scale`` (n,) the
    relative standard deviations of the points up to a factor, equal if not given. Raises what `fit_law` raises.
    """
    x, t, error = (np.asarray(values, float) for values in (x, t, error))
    index = index_runs(run)
    if len(index) != len(x):
        raise ValueError(f"run names {len(index)} points, but there are {len(x)}; give each point its run.")
    weights = np.ones(len(x)) if scale is None else np.asarray(scale, float)
    weights = weights / np.exp(np.log(weights).mean())
    num_runs = int(index.max()) + 1

    cold = fit = fit_law(x, t, error, noise=Noise(index, 0.0, weights))
    best, ratio = _reml(fit, Noise(index, 0.0, weights)), 0.0
    for trial in _RATIOS[1:] if num_runs > 1 else ():
        noise = Noise(index, float(trial), weights)
        fit = fit_law(x, t, error, noise=noise, starts=[fit.exponents])
        criterion = _reml(fit, noise)
        if criterion < best:
            best, ratio = criterion, float(trial)
        elif criterion > best + _FAR_WORSE:
            break
    noise = Noise(index, ratio, weights)
    fit = fit_law(x, t, error, noise=noise) if ratio else cold
    sigma = math.sqrt(fit.objective / (len(x) - NUM_PARAMETERS))
    log_se = log_standard_error(fit, noise, sigma)
    return RunFit(fit, noise, sigma, ratio * sigma, log_se, num_runs, len(np.unique(x)))


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


def _reml(fit: LawFit, noise: Noise) -> float:
    """-2 x the restricted log likelihood of tau / sigma, sigma profiled out, up to a constant (law linearised)."""
    free = len(fit.residuals) - NUM_PARAMETERS
    singular = np.linalg.svd(noise.whiten(fit.jacobian), compute_uv=False)
    singular = singular[singular > 1e-10 * singular[0]]
    return free * math.log(max(fit.objective, 1e-300)) + noise.log_det() + 2 * float(np.log(singular).sum())


def log_standard_error(fit: LawFit, noise: Noise, sigma: float) -> float:
    """Delta-method standard error of log s = log c - log (a + b); inf where the data do not determine it.

    xi and eps count as free even when they sit at 0: conservative, for knowing both would halve the error.
    """
    law = fit.law
    gradient = np.zeros(NUM_PARAMETERS)
    gradient[[1, 3]] = -1 / (law.a + law.b)
    gradient[5] = 1 / law.c
    jacobian = noise.whiten(fit.jacobian)
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

    ``half``: half-width of the interval of log s; ``without``: s without each run, in order of run index.
    """

    lo: float
    hi: float
    half: float
    without: tuple[float, ...]


def jackknife_runs(
    x: ArrayLike, t: ArrayLike, error: ArrayLike, run: ArrayLike, whole: RunFit, *, level: float = 0.95
) -> Jackknife | None:
    """Refit without each run in turn, at the whole fit's tau / sigma; None if a refit leaves too few points or sizes.

    Raises what `fit_law` raises for the points themselves.
    """
    x, t, error = (np.asarray(values, float) for values in (x, t, error))
    index = index_runs(run)
    num_runs = int(index.max()) + 1
    without = []
    for left_out in range(num_runs):
        keep = index != left_out
        if keep.sum() <= NUM_PARAMETERS or len(np.unique(x[keep])) < MIN_SIZES - 1 or len(np.unique(t[keep])) < 2:
            return None
        noise = Noise(index_runs(index[keep]), whole.noise.ratio, whole.noise.scale[keep])
        warm = fit_law(x[keep], t[keep], error[keep], noise=noise, starts=[whole.fit.exponents])
        cold = fit_law(x[keep], t[keep], error[keep], noise=noise)
        without.append(min(warm, cold, key=lambda fit: fit.objective).law.exponent)
    logs = np.log(without)
    spread = math.sqrt((num_runs - 1) / num_runs * float(np.sum((logs - logs.mean()) ** 2)))
    half = float(t_distribution.ppf((1 + level) / 2, num_runs - 1)) * spread
    s = whole.fit.law.exponent
    return Jackknife(s * math.exp(-half), s * math.exp(half) if half < 700 else math.inf, half, tuple(without))


def studentized_runs(whole: RunFit) -> Array:
    """For each run, its mean log residual from the fit of the others over its standard error: t(G - 4) if it belongs.

    The law is linearised at the whole fit, and tau / sigma is chosen again by REML without the run, as an outlier would
    hide in an inflated tau. nan where too few points remain.
    """
    jacobian, residuals, run, scale = whole.fit.jacobian, whole.fit.residuals, whole.noise.run, whole.noise.scale
    norms = np.linalg.norm(jacobian, axis=0)
    jacobian = jacobian[:, norms > 0] / norms[norms > 0]
    values = np.full(whole.num_runs, np.nan)
    for one in range(whole.num_runs):
        keep = run != one
        if keep.sum() <= NUM_PARAMETERS:
            continue
        best = math.inf
        for ratio in _RATIOS:
            noise = Noise(index_runs(run[keep]), float(ratio), scale[keep])
            left, singular, rows = np.linalg.svd(noise.whiten(jacobian[keep]), full_matrices=False)
            left, singular, rows = _leading(left, singular, rows)
            along = left.T @ noise.whiten(residuals[keep])
            sigma2 = float(np.sum(noise.whiten(residuals[keep]) ** 2) - along @ along) / (keep.sum() - NUM_PARAMETERS)
            sigma2 = max(sigma2, 1e-300)
            criterion = (keep.sum() - NUM_PARAMETERS) * math.log(sigma2) + noise.log_det() + 2 * np.log(singular).sum()
            if criterion < best:
                best = float(criterion)
                mean = rows @ jacobian[~keep].mean(0) / singular
                expected = np.sum(scale[~keep] ** 2) / (~keep).sum() ** 2 + ratio**2 + mean @ mean
                values[one] = (residuals[~keep].mean() - mean @ along) / math.sqrt(sigma2 * expected)
    return values


def _leading(left: Array, singular: Array, rows: Array) -> tuple[Array, Array, Array]:
    """A singular value decomposition without the directions the data do not determine."""
    keep = singular > 1e-10 * singular[0]
    return left[:, keep], singular[keep], rows[keep]
