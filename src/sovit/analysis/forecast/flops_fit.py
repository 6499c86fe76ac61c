"""The law that knows its FLOPs, fitted to points: an offset per run by REML, the best shape with its standard error.

Least squares of whitened log residuals as for Eq. 2 (`sovit.analysis.varpro`, `sovit.analysis.intervals`); what the law
says of a budget comes with the delta method's error and t(G - p), G runs, p parameters. It knows nothing of sweeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as t_distribution

from sovit.analysis.forecast.flops_law import AXES, EXPONENTS, PLAIN, FlopsLaw, Form, Geometry
from sovit.analysis.intervals import RATIOS, Interval, index_runs
from sovit.analysis.varpro import BOX, Noise, Solution, restricted, solve

_FAR_WORSE = 12.0  # of -2 log likelihood: larger ratios only fall further behind
_WIDEST = math.log(10)  # a Wald half-width of log x beyond this factor says nothing
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A law and how sure it is: ``covariance`` (J + 4, J + 4) of coefficients and exponents, and the degrees of freedom
    of its t distribution, runs less parameters."""

    law: FlopsLaw
    covariance: Array
    degrees: int

    def log_shape(self, t: float) -> tuple[Array, Array]:
        """log x* at t GFLOPs and its standard error (delta method), (3,) each."""
        return np.log(self.law.optimum(t)), self._spread(self.law.sensitivity(t))

    def log_growth(self, t: float) -> tuple[Array, Array]:
        """log of the local growth exponents at t and its standard error (delta method), (3,) each."""
        step, growth = 1e-3, self.law.growth(t)
        above, below = (self.law.sensitivity(t * math.exp(sign * step)) for sign in (1, -1))
        return np.log(growth), self._spread((above - below) / (2 * step) / growth[:, None])

    def error_interval(self, x: ArrayLike, t: float, level: float) -> tuple[Array, Array]:
        """Ends (n,) of the interval of the law's error at (n, 3) sizes and t GFLOPs: delta method on its logarithm."""
        error = self.law.error(x, t)
        quantile = float(t_distribution.ppf((1 + level) / 2, self.degrees)) if self.degrees > 0 else math.inf
        factor = np.exp(quantile * self._spread(self.law.error_by_parameter(x, t) / error[:, None]))
        return error / factor, error * factor

    def _spread(self, gradient: Array) -> Array:
        return np.asarray(np.sqrt(np.einsum("ki,ij,kj->k", gradient, self.covariance, gradient)))


@dataclass(frozen=True)
class FlopsFit:
    """The law with an offset per run. sigma, tau: relative spread of an evaluation and of a run's offset.

    ``residuals``: log measured - log fitted; ``flags``: what is degenerate.
    """

    estimate: Estimate
    solution: Solution
    residuals: Array
    noise: Noise
    sigma: float
    tau: float
    num_runs: int
    flags: tuple[str, ...]

    @property
    def law(self) -> FlopsLaw:
        return self.estimate.law


def wald(log_value: float, log_se: float, degrees: int, level: float) -> Interval:
    """The interval of a positive value; open on both sides where it is wider than a factor of ten each way."""
    half = float(t_distribution.ppf((1 + level) / 2, degrees)) * log_se if degrees > 0 else math.inf
    value, open_ended = math.exp(log_value), not half <= _WIDEST
    low, high = (0.0, math.inf) if open_ended else (value * math.exp(-half), value * math.exp(half))
    return Interval(value, low, high, "REML, Wald on the logarithm, t(G-p)")


def fit_flops(
    x: ArrayLike,
    t: ArrayLike,
    error: ArrayLike,
    run: ArrayLike,
    geometry: Geometry,
    *,
    form: Form = PLAIN,
    scale: ArrayLike | None = None,
    ratio: float | None = None,
    start: ArrayLike | None = None,
) -> FlopsFit:
    """Fit the law to points: sizes (n, 3), t in GFLOPs (n,), errors (n,), and the run (n,) each belongs to.

    ``scale`` (n,): relative standard deviations up to a factor, equal if not given. ``ratio``: tau / sigma, by REML if
    not given. ``start``: exponents to start from, cold starts if not given. Raises ValueError for fewer points than
    parameters, a dimension or a number of images that does not vary, or values without a logarithm.
    """
    x, t, error = (np.asarray(values, float) for values in (x, t, error))
    num_parameters = form.num_parameters
    if x.shape != (len(t), 3) or error.shape != t.shape or len(np.asarray(run)) != len(t):
        raise ValueError(
            f"sizes {x.shape}, compute {t.shape} and errors {error.shape} do not match; give (n, 3), n, n."
        )
    for what, values in (("size", x), ("compute", t), ("error", error)):
        if not np.all(np.isfinite(values) & (values > 0)):
            bad = values[~(np.isfinite(values) & (values > 0))].flat[0]
            raise ValueError(f"{what} {bad} has no logarithm; leave that point out.")
    if len(t) <= num_parameters:
        raise ValueError(f"{len(t)} points cannot fit a law of {num_parameters} parameters; give more.")
    u = np.column_stack((np.log(x), np.log(t / geometry.forward_gflops(x))))
    for name, values in zip(AXES, u.T, strict=True):
        if np.ptp(values) < 1e-9:
            raise ValueError(f"{name} is the same at every point; add runs in which it differs.")
    center = u.mean(0)
    logs = -form.members[:, :, None] * (u - center).T
    log_error = np.log(error)
    weights = np.ones(len(t)) if scale is None else np.asarray(scale, float)
    weights = weights / np.exp(np.log(weights).mean())
    index = index_runs(run)

    def fitted(ratio: float, start: ArrayLike | None) -> tuple[Noise, Solution]:
        noise = Noise(index, ratio, weights)
        return noise, solve(logs, log_error, noise, starts=None if start is None else np.atleast_2d(start))

    noise, solution = fitted(ratio or 0.0, start)
    if ratio is None and index.max() > 0:
        free = len(log_error) - solution.jacobian.shape[1]
        cold, best, chosen = solution, restricted(solution.objective, solution.jacobian, noise, free), 0.0
        for trial in RATIOS[1:]:
            noise, solution = fitted(float(trial), solution.exponents)
            criterion = restricted(solution.objective, solution.jacobian, noise, free)
            if criterion < best:
                best, chosen = criterion, float(trial)
            elif criterion > best + _FAR_WORSE:
                break
        noise, solution = fitted(chosen, None) if chosen else (Noise(index, 0.0, weights), cold)
    # A term below 1e-9 of every error is rounding: it is 0, and flagged as such.
    share = solution.coefficients * solution.jacobian[:, : len(solution.coefficients)].max(0)
    coefficients = np.where(share > 1e-9, solution.coefficients, 0.0)
    law = FlopsLaw(form, coefficients, solution.exponents, center, geometry)
    sigma = math.sqrt(solution.objective / (len(t) - num_parameters))
    num_runs = int(index.max()) + 1
    covariance = sigma**2 * _inverse(noise.whiten(solution.jacobian))
    return FlopsFit(
        estimate=Estimate(law, covariance, num_runs - num_parameters),
        solution=solution,
        residuals=log_error - solution.log_fit,
        noise=noise,
        sigma=sigma,
        tau=noise.ratio * sigma,
        num_runs=num_runs,
        flags=_flags(law, error),
    )


def _inverse(jacobian: Array) -> Array:
    """(J^T J)^-1, 0 in the rows of parameters that move no error, huge where the data leave a direction open."""
    norms = np.linalg.norm(jacobian, axis=0)
    live = np.flatnonzero(norms > 0)
    _, singular, rows = np.linalg.svd(jacobian[:, live] / norms[live], full_matrices=False)
    half = rows.T / np.maximum(singular, 1e-10 * singular[0])
    inverse = np.zeros((len(norms), len(norms)))
    inverse[np.ix_(live, live)] = (half @ half.T) / np.outer(norms[live], norms[live])
    return inverse


def _flags(law: FlopsLaw, error: Array) -> tuple[str, ...]:
    flags = [f"{name}=0" for name, value in zip(law.form.coefficients, law.coefficients, strict=True) if value == 0]
    if law.coefficients[-1] >= 0.95 * error.min():
        flags.append("eps at the smallest error")
    for name, value in zip(EXPONENTS, law.exponents, strict=True):
        if value <= BOX[0] * 1.001:
            flags.append(f"{name} at its lower bound")
        elif value >= BOX[1] * 0.999:
            flags.append(f"{name} at its upper bound")
    return tuple(flags)
