"""Least squares for laws that are non-negative sums of monomials, on log errors with run effects.

f_i = sum_j p_j exp(sum_k theta_k logs[j, k, i]),   p_j >= 0,   theta_k > 0.

The law of one dimension (Eq. 2) is one of these, the law that knows its FLOPs another, and so are their rivals. The
objective is a sum of squares over points, never a mean. The arithmetic is in `sovit.analysis.kernel`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BOX = (0.02, 6.0)  # bounds of an exponent
_SAME = 1e-3  # a start has converged if its objective is within this share of the best
_GRID = (0.12, 0.4, 1.2)  # exponents of the cold starts, for laws that bring no grid of their own


@dataclass(frozen=True)
class Noise:
    """Covariance of the log errors up to sigma^2: diag(scale^2) + ratio^2 for two points of one run.

    ``run``: whole numbers naming each point's run. ``ratio``: tau / sigma, the spread of a run's own offset over that
    of a single evaluation. ``scale``: relative standard deviation of each point, 1 where all are equal.
    """

    run: NDArray[np.intp]
    ratio: float
    scale: Array
    inverse_scale: Array = field(init=False, repr=False)
    shrink: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.ratio < 0 or not np.all(self.scale > 0):
            raise ValueError("noise needs a ratio of at least 0 and positive scales.")
        inverse = 1 / np.asarray(self.scale, float)
        size = np.maximum(np.bincount(self.run, weights=inverse**2), 1e-300)
        object.__setattr__(self, "inverse_scale", inverse)
        object.__setattr__(self, "shrink", (1 - 1 / np.sqrt(1 + self.ratio**2 * size)) / size)

    def whiten(self, columns: Array) -> Array:
        """W @ columns for (points, k) or (points,), where W W^T is the inverse covariance."""
        scaled = (columns.T * self.inverse_scale).T
        if self.ratio == 0:
            return scaled
        loading = np.zeros((len(self.run), len(self.shrink)))
        loading[np.arange(len(self.run)), self.run] = self.inverse_scale
        return scaled - loading @ (self.shrink * (loading.T @ scaled).T).T

    def log_det(self) -> float:
        """log determinant of the covariance (up to sigma^2)."""
        size = np.bincount(self.run, weights=self.inverse_scale**2)
        return float(-2 * np.log(self.inverse_scale).sum() + np.log1p(self.ratio**2 * size).sum())


def equal_noise(num_points: int) -> Noise:
    """Independent points of equal relative precision."""
    return Noise(np.zeros(num_points, dtype=np.intp), 0.0, np.ones(num_points))


@dataclass(frozen=True)
class Pull:
    """A Gaussian prior on log exponents: ``center`` (K,), and ``weight`` (K,) = sigma^2 / variance, 0 for none."""

    center: Array
    weight: Array


@dataclass(frozen=True)
class Solution:
    """``objective``: sum of squares of the whitened log residuals (and the pull). ``jacobian`` (n, J + K): derivative of
    log f by the coefficients, then by the exponents. ``start_objectives``: where each start ended, best first;
    ``converged``: share of them that ended at the best, to 0.1%; ``spread``: of those, largest minus smallest.
    """

    exponents: Array
    coefficients: Array
    objective: float
    log_fit: Array
    jacobian: Array
    start_objectives: tuple[float, ...]
    converged: float
    spread: float


def solve(
    logs: Array,
    log_error: Array,
    noise: Noise,
    *,
    starts: ArrayLike | None = None,
    grid: Sequence[Sequence[float]] | None = None,
    low: float | Array = BOX[0],
    high: float | Array = BOX[1],
    pull: Pull | None = None,
) -> Solution:
    """Fit a sum of monomials to log errors (n,).

    ``logs`` (J, K, n): log of term j is sum_k theta_k logs[j, k]; centre the logarithms first, or the problem is badly
    conditioned. ``starts`` (S, K): exponents to start from; without any, for each value of the first exponent in
    ``grid`` (K sequences of values) the best of the grid. Raises ValueError if the shapes disagree.
    """
    from sovit.analysis import kernel

    logs, log_error = np.ascontiguousarray(logs, float), np.ascontiguousarray(log_error, float)
    _, num_exponents, num_points = logs.shape
    if log_error.shape != (num_points,) or len(noise.run) != num_points:
        raise ValueError(
            f"logs of {num_points} points, {log_error.size} errors and {len(noise.run)} runs do not match."
        )
    bottom, top = _bounds(low, num_exponents), _bounds(high, num_exponents)
    table, group = np.empty((0, num_exponents)), np.empty(0, np.intp)
    first = np.empty((0, num_exponents))
    if starts is None:
        axes = list(grid) if grid is not None else [_GRID] * num_exponents
        table = np.clip(np.log(np.array(list(itertools.product(*axes)), float)), bottom, top)
        group = np.repeat(np.arange(len(axes[0])), len(table) // len(axes[0]))
    else:
        first = np.clip(np.log(np.atleast_2d(np.asarray(starts, float))), bottom, top)
    ends, thetas, coefficients = kernel.fit_many(
        table, group, first, logs, np.any(logs != 0, axis=2), log_error[None], noise.inverse_scale, noise.run,
        noise.shrink, _pull(pull, num_exponents), bottom, top,
    )  # fmt: skip
    objectives = np.sort(ends[0])
    theta, amounts, best = thetas[0], coefficients[0], float(objectives[0])
    reached = objectives[objectives <= best * (1 + _SAME) + 1e-24 * num_points]
    exponents = np.exp(theta)
    terms = np.exp(np.einsum("jkn,k->jn", logs, exponents))
    law = amounts @ terms
    by_exponent = np.einsum("j,jkn,jn->nk", amounts, logs, terms)
    return Solution(
        exponents=exponents,
        coefficients=amounts,
        objective=best,
        log_fit=np.log(law),
        jacobian=np.column_stack((terms.T, by_exponent)) / law[:, None],
        start_objectives=tuple(float(value) for value in objectives),
        converged=len(reached) / len(objectives),
        spread=float(reached[-1] - reached[0]),
    )


def refit(
    logs: Array, log_errors: Array, noise: Noise, exponents: ArrayLike, *, low: float = BOX[0], high: float = BOX[1]
) -> tuple[Array, Array, Array]:
    """Warm refits of many data sets (R, n) on one design: objectives (R,), exponents (R, K), coefficients (R, J)."""
    from sovit.analysis import kernel

    logs = np.ascontiguousarray(logs, float)
    num_exponents = logs.shape[1]
    bottom, top = _bounds(low, num_exponents), _bounds(high, num_exponents)
    first = np.clip(np.log(np.asarray(exponents, float)), bottom, top)
    objectives, thetas, coefficients = kernel.fit_many(
        np.empty((0, num_exponents)), np.empty(0, np.intp), first[None], logs, np.any(logs != 0, axis=2),
        np.ascontiguousarray(log_errors, float), noise.inverse_scale, noise.run, noise.shrink,
        _pull(None, num_exponents), bottom, top,
    )  # fmt: skip
    return objectives[:, 0], np.exp(thetas), coefficients


def restricted(objective: float, jacobian: Array, noise: Noise, free: float) -> float:
    """-2 x the restricted log likelihood of tau / sigma (Patterson and Thompson 1971), up to a constant.

    ``objective``: sum of squares of the whitened residuals, from which sigma is profiled out over ``free`` degrees of
    freedom; ``jacobian`` (n, parameters) of the linearised log law, not whitened.
    """
    from sovit.analysis import kernel

    rows = np.ascontiguousarray(jacobian.T)
    information = kernel.log_det_information(rows, noise.inverse_scale, noise.run, noise.shrink)
    return free * math.log(max(objective, 1e-300)) + noise.log_det() + information


def _bounds(value: float | Array, num_exponents: int) -> Array:
    return np.full(num_exponents, np.log(value))


def _pull(pull: Pull | None, num_exponents: int) -> Array:
    if pull is None:
        return np.zeros((2, num_exponents))
    return np.array([pull.center, pull.weight], float)
