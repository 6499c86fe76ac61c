"""The law of one dimension (Eq. 2) fitted to errors: least squares of log residuals by variable projection.

x and t are divided by their geometric means first, without which the problem is too ill-conditioned to solve. For given
exponents (a, b, c) the law is linear in (alpha, beta, xi, eps) >= 0, so only three numbers are searched for; see
`sovit.analysis.varpro`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sovit.analysis.law import Law
from sovit.analysis.varpro import BOX, Array, Noise, Pull, Solution, equal_noise, solve

MAX_EXPONENT = BOX[1] / (2 * BOX[0])
NUM_PARAMETERS = 7
MIN_POINTS = NUM_PARAMETERS + 1

# Cold starts: the best (b, c) for each a. Spread over a, because at alpha = 0 the objective is flat in a.
_GRID = ((0.12, 0.4, 1.2, 3.5), (0.12, 0.5, 1.6), (0.12, 0.35, 0.9))
_HELD_GRID = _GRID[:2]


@dataclass(frozen=True)
class Prior:
    """What is known of an exponent beforehand: log-normal around ``value``, ``log_sd`` its spread in e-folds."""

    value: float
    log_sd: float

    def __post_init__(self) -> None:
        if not (0 < self.value < math.inf and 0 < self.log_sd < math.inf):
            raise ValueError(f"a prior of value {self.value} and spread {self.log_sd} is none; both must be above 0.")


@dataclass(frozen=True)
class LawFit:
    """A fitted law, in raw units.

    ``objective``: sum of squares of the whitened log residuals. ``residuals``: log measured - log fitted, one a point.
    ``jacobian``: (n, 7) derivative of the log law by (alpha, a, beta, b, xi, c, eps) in normalised units.
    ``flags``: what is degenerate about the fit. ``start_objectives``: where each start ended, best first;
    ``converged``: share of the starts that ended at the best, to 0.1%; ``spread``: of those, largest minus smallest.
    """

    law: Law
    objective: float
    residuals: Array
    jacobian: Array
    flags: tuple[str, ...]
    start_objectives: tuple[float, ...]
    converged: float
    spread: float

    @property
    def exponents(self) -> tuple[float, float, float]:
        return self.law.a, self.law.b, self.law.c


def law_logs(log_x: Array, log_t: Array, exponent: float | None = None) -> Array:
    """The terms x^-a, x^b t^-c, t^-c, 1 for `varpro.solve`: (4, 3, n), or (4, 2, n) with c = s (a + b) for a given s."""
    zero = np.zeros_like(log_x)
    if exponent is None:
        rows = [[-log_x, zero, zero], [zero, log_x, -log_t], [zero, zero, -log_t], [zero, zero, zero]]
    else:
        slow = -exponent * log_t
        rows = [[-log_x, zero], [slow, log_x + slow], [slow, slow], [zero, zero]]
    return np.array(rows)


def fit_law(
    x: ArrayLike,
    t: ArrayLike,
    error: ArrayLike,
    *,
    noise: Noise | None = None,
    starts: Sequence[Sequence[float]] = (),
    exponent: float | None = None,
    priors: Mapping[str, Prior] | None = None,
    sigma: float = 0.0,
) -> LawFit:
    """Fit the law to points (n,): minimise the sum of squares of the (whitened) log residuals.

    ``t`` in GFLOPs. ``starts``: exponents (a, b, c) to start from instead of the cold starts. ``exponent``: hold
    s = c / (a + b) at this value (at most `MAX_EXPONENT`), for profile likelihoods. ``priors``: for any of a, b, c,
    weighed against the noise ``sigma`` of an evaluation. The paper states only that the relative error is minimised
    (SoViT, Section 4.1); log residuals are the choice of arXiv 2209.06640. Raises ValueError for fewer than 8 points,
    sizes or compute that do not vary, values without a logarithm, or priors that have no meaning.
    """
    x, t, error = (np.atleast_1d(np.asarray(values, float)) for values in (x, t, error))
    _check(x, t, error)
    if exponent is not None and not 0 < exponent <= MAX_EXPONENT:
        raise ValueError(f"exponent={exponent} cannot be held; give a value above 0 and at most {MAX_EXPONENT:g}.")
    log_x, log_t, log_error = np.log(x), np.log(t), np.log(error)
    mean_x, mean_t = float(log_x.mean()), float(log_t.mean())
    log_x, log_t = log_x - mean_x, log_t - mean_t
    first = np.array([start if exponent is None else start[:2] for start in starts], float) if len(starts) else None
    high = BOX[1] if exponent is None else min(BOX[1], BOX[1] / exponent)
    solution = solve(
        law_logs(log_x, log_t, exponent),
        log_error,
        noise or equal_noise(len(x)),
        starts=first,
        grid=_GRID if exponent is None else _HELD_GRID,
        high=high,
        pull=_pull(priors, sigma, exponent),
    )
    return _law_fit(solution, x, t, error, (mean_x, mean_t), exponent)


def _check(x: Array, t: Array, error: Array) -> None:
    if not x.shape == t.shape == error.shape or x.ndim != 1:
        raise ValueError(f"x, t and error have shapes {x.shape}, {t.shape}, {error.shape}; give three equal vectors.")
    for name, values in (("x", x), ("t", t), ("error", error)):
        good = np.isfinite(values) & (values > 0)
        if not good.all():
            raise ValueError(f"{name} holds {values[~good][0]}, which has no logarithm; leave that point out.")
    if len(x) < MIN_POINTS:
        raise ValueError(
            f"{len(x)} points cannot fit a law of {NUM_PARAMETERS} parameters; give at least {MIN_POINTS}."
        )
    if x.min() == x.max() or t.min() == t.max():
        raise ValueError("x and t must each take at least two values for the law to be fitted.")


def _pull(priors: Mapping[str, Prior] | None, sigma: float, exponent: float | None) -> Pull | None:
    if not priors:
        return None
    unknown = set(priors) - set("abc")
    if unknown or exponent is not None or not sigma > 0:
        raise ValueError(f"priors {sorted(priors)} need names among a, b, c, a sigma above 0, and a free exponent.")
    known = [priors.get(name) for name in "abc"]
    return Pull(
        np.array([math.log(prior.value) if prior else 0.0 for prior in known]),
        np.array([(sigma / prior.log_sd) ** 2 if prior else 0.0 for prior in known]),
    )


def _law_fit(
    solution: Solution, x: Array, t: Array, error: Array, means: tuple[float, float], exponent: float | None
) -> LawFit:
    """The solution in raw units, with the columns of its Jacobian in the order of the law's fields."""
    if exponent is None:
        a, b, c = (float(value) for value in solution.exponents)
    else:
        a, b = (float(value) for value in solution.exponents)
        c = exponent * (a + b)
    jacobian = _jacobian(np.log(x) - means[0], np.log(t) - means[1], solution)
    # A term below 1e-9 of every error is rounding: it is 0, and flagged as such.
    share = solution.coefficients * solution.jacobian[:, :4].max(0)
    alpha, beta, xi, eps = (float(value) for value in np.where(share > 1e-9, solution.coefficients, 0.0))
    mean_x, mean_t = math.exp(means[0]), math.exp(means[1])
    law = Law(alpha * mean_x**a, a, beta * mean_x**-b * mean_t**c, b, xi * mean_t**c, c, eps)
    return LawFit(
        law=law,
        objective=solution.objective,
        residuals=np.log(error) - solution.log_fit,
        jacobian=jacobian,
        flags=_flags(law, x, t, error, exponent is None),
        start_objectives=solution.start_objectives,
        converged=solution.converged,
        spread=solution.spread,
    )


def _jacobian(log_x: Array, log_t: Array, solution: Solution) -> Array:
    """(n, 7), with c a parameter of its own also where the fit held s."""
    size, cost, decay, one = solution.jacobian[:, :4].T
    alpha, beta, xi, _ = solution.coefficients
    by_exponent = (-alpha * log_x * size, beta * log_x * cost, -log_t * (beta * cost + xi * decay))
    return np.column_stack((size, by_exponent[0], cost, by_exponent[1], decay, by_exponent[2], one))


def _flags(law: Law, x: Array, t: Array, error: Array, free: bool) -> tuple[str, ...]:
    flags = [f"{name}=0" for name in ("alpha", "beta", "xi", "eps") if getattr(law, name) == 0]
    if law.eps >= 0.95 * error.min():
        flags.append("eps at the smallest error")
    for name in ("a", "b", "c") if free else ("a", "b"):
        value = getattr(law, name)
        if value <= BOX[0] * 1.001:
            flags.append(f"{name} at its lower bound")
        elif value >= BOX[1] * 0.999:
            flags.append(f"{name} at its upper bound")
    best = law.optimum(t)
    if not np.any((best >= x.min()) & (best <= x.max())):
        flags.append("optimum outside the data")
    return tuple(flags)
