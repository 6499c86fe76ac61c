"""Least squares of the law on log errors, by variable projection.

For given exponents (a, b, c) the law is linear in (alpha, beta, xi, eps) >= 0, so the fit searches three exponents and
solves a non-negative least squares inside (Golub and Pereyra 1973; derivative of Kaufman 1975). Log residuals are
reached by Gauss-Newton: each pass fits the law linearised around the last one. x and t are divided by their geometric
means first, without which the problem is too ill-conditioned to solve. The objective is a sum over points, never a mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from sovit.analysis.law import Law

Array = NDArray[np.float64]

BOX = (0.02, 6.0)  # bounds of each exponent
MAX_EXPONENT = BOX[1] / (2 * BOX[0])
NUM_PARAMETERS = 7
MIN_POINTS = NUM_PARAMETERS + 1

# Cold starts: the best (b, c) for each a. Spread over a, because at alpha = 0 the objective is flat in a.
_START_A = (0.12, 0.4, 1.2, 3.5)
_START_BC = tuple(itertools.product((0.12, 0.5, 1.6), (0.12, 0.35, 0.9)))
_PASSES, _STEPS = 40, 80
_End = tuple[float, Array, Array]  # objective, theta, coefficients
_SAME = 1e-3  # a start has converged if its objective is within this share of the best


@dataclass(frozen=True)
class Noise:
    """Covariance of the log errors up to sigma^2: diag(scale^2) + ratio^2 for two points of one run.

    ``run``: whole numbers naming each point's run. ``ratio``: tau / sigma, the spread of a run's own offset over that
    of a single evaluation. ``scale``: relative standard deviation of each point, 1 where all are equal.
    """

    run: NDArray[np.intp]
    ratio: float
    scale: Array
    _loading: Array = field(init=False, repr=False)
    _shrink: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.ratio < 0 or not np.all(self.scale > 0):
            raise ValueError("noise needs a ratio of at least 0 and positive scales.")
        loading = np.zeros((len(self.run), int(self.run.max()) + 1))
        loading[np.arange(len(self.run)), self.run] = 1 / self.scale
        size = np.maximum((loading**2).sum(0), 1e-300)
        object.__setattr__(self, "_loading", loading)
        object.__setattr__(self, "_shrink", (1 - 1 / np.sqrt(1 + self.ratio**2 * size)) / size)

    def whiten(self, columns: Array) -> Array:
        """W @ columns for (points, k) or (points,), where W W^T is the inverse covariance."""
        scaled = (columns.T / self.scale).T
        if self.ratio == 0:
            return scaled
        return scaled - self._loading @ (self._shrink * (self._loading.T @ scaled).T).T

    def log_det(self) -> float:
        """log determinant of the covariance (up to sigma^2)."""
        size = (self._loading**2).sum(0)
        return float(2 * np.log(self.scale).sum() + np.log1p(self.ratio**2 * size).sum())


def equal_noise(num_points: int) -> Noise:
    """Independent points of equal relative precision."""
    return Noise(np.zeros(num_points, dtype=np.intp), 0.0, np.ones(num_points))


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


@dataclass(frozen=True)
class _State:
    """The projected problem at one (a, b, c)."""

    objective: float
    coefficients: Array
    gradient: Array
    curvature: Array


def project(exponents: Array, log_x: Array, log_t: Array, inverse: Array, target: Array, noise: Noise) -> _State:
    """All the arithmetic of a fit: the best coefficients at (a, b, c), and how to move the exponents.

    Minimises |target - W diag(inverse) Phi p|^2 over p >= 0, Phi the four columns of the law (points, 4) and W the
    whitening. ``gradient`` (3,) is that of half the objective by (a, b, c), exact; ``curvature`` (3, 3) is J^T J with
    J = d residual / d (a, b, c) of Kaufman, which leaves out a term that vanishes with the residual.
    """
    a, b, c = exponents
    table = np.empty((8, len(log_x)))
    table[0] = size = np.exp(-a * log_x)
    table[2] = decay = np.exp(-c * log_t)
    table[1] = cost = np.exp(b * log_x) * decay
    table[3] = 1.0
    table[4] = -log_x * size
    table[5] = log_x * cost
    table[6] = -log_t * cost
    table[7] = -log_t * decay
    whitened = noise.whiten((table * inverse).T)
    columns = whitened[:, :4]
    coefficients, _ = nnls(columns, target)
    alpha, beta, xi, _ = coefficients
    residual = target - columns @ coefficients
    mix = np.array([[alpha, 0, 0], [0, beta, 0], [0, 0, beta], [0, 0, xi]])
    gram = whitened.T @ whitened
    active = np.flatnonzero(coefficients > 0)
    cross = gram[active, 4:] @ mix
    inside = gram[active[:, None], active]
    inside.flat[:: len(active) + 1] *= 1 + 1e-13  # two columns can coincide when an exponent is near 0
    curvature = mix.T @ gram[4:, 4:] @ mix - cross.T @ np.linalg.solve(inside, cross)
    gradient = -mix.T @ (whitened[:, 4:].T @ residual)
    return _State(float(residual @ residual), coefficients, gradient, curvature)


def _expand(theta: Array, exponent: float | None) -> tuple[Array, Array]:
    """(a, b, c) and its derivative by theta: theta is log (a, b, c), or log (a, b) with c = s (a + b) for a given s."""
    values = np.exp(theta)
    if exponent is None:
        return values, np.diag(values)
    a, b = values
    return np.array([a, b, exponent * (a + b)]), np.array([[a, 0.0], [0.0, b], [exponent * a, exponent * b]])


@dataclass(frozen=True)
class _Problem:
    log_x: Array
    log_t: Array
    log_error: Array
    noise: Noise
    exponent: float | None

    def at(self, theta: Array, log_fit: Array) -> _State:
        """The projected problem linearised around exp(log_fit), where the log residual is (target - law) / law.

        Gradient and curvature are by theta. The objective is inf where a given s takes c out of the box.
        """
        target = self.noise.whiten(1 + self.log_error - log_fit)
        exponents, mix = _expand(theta, self.exponent)
        if exponents[2] > BOX[1] * (1 + 1e-9):
            return _State(np.inf, np.zeros(4), np.zeros(len(theta)), np.eye(len(theta)))
        state = project(exponents, self.log_x, self.log_t, np.exp(-log_fit), target, self.noise)
        return _State(state.objective, state.coefficients, mix.T @ state.gradient, mix.T @ state.curvature @ mix)

    def log_law(self, theta: Array, coefficients: Array) -> Array:
        (a, b, c), _ = _expand(theta, self.exponent)
        alpha, beta, xi, eps = coefficients
        decay = np.exp(-c * self.log_t)
        return np.log(alpha * np.exp(-a * self.log_x) + (beta * np.exp(b * self.log_x) + xi) * decay + eps)

    def objective(self, log_fit: Array) -> float:
        return float(np.sum(self.noise.whiten(self.log_error - log_fit) ** 2))

    def descend(self, theta: Array, log_fit: Array) -> tuple[Array, Array]:
        """Levenberg-Marquardt in the box, linearised around ``log_fit``: (theta, coefficients).

        ``missing`` learns, by symmetric rank-one updates, what Kaufman's curvature leaves out (as NL2SOL does, Dennis,
        Gay and Welsch 1981); without it steps overshoot to and fro along the valley when runs have large offsets.
        """
        low, high = np.log(BOX)
        state = self.at(theta, log_fit)
        missing = np.zeros((len(theta), len(theta)))
        damping = 1e-4
        for _ in range(_STEPS):
            gradient = state.gradient
            free = ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))
            if not np.any(gradient[free]):
                break
            scale = np.maximum(state.curvature.diagonal(), 1e-12 * np.trace(state.curvature) + 1e-300)
            lifted = state.curvature + np.diag(damping * scale)
            step = np.zeros_like(theta)
            step[free] = np.linalg.solve((lifted + missing)[free][:, free], -gradient[free])
            if step @ gradient > 0:
                missing[:] = 0
                step[free] = np.linalg.solve(lifted[free][:, free], -gradient[free])
            trial = np.clip(theta + np.clip(step, -1.0, 1.0), low, high)
            trial_state = self.at(trial, log_fit)
            gain = state.objective - trial_state.objective
            if gain <= 0:
                missing[:] = 0
                damping *= 10
                if damping > 1e6 or gain > -1e-13 * state.objective:
                    break
                continue
            moved = trial - theta
            surprise = trial_state.gradient - gradient - (trial_state.curvature + missing) @ moved
            along = float(surprise @ moved)
            if np.abs(moved).max() > 0.3:
                missing[:] = 0  # learnt from afar, it misleads
            elif abs(along) > 1e-6 * float(np.linalg.norm(surprise) * np.linalg.norm(moved)):
                missing += np.outer(surprise, surprise) / along
            done = gain < 1e-8 * state.objective and damping < 1e-2
            theta, state, damping = trial, trial_state, max(damping / 10, 1e-10)
            if done or state.objective < 1e-28 * len(self.log_x):
                break
        return theta, state.coefficients

    def solve(self, theta: Array, known: list[tuple[Array, _End]]) -> _End:
        """From one start to the log objective's minimum.

        A first pass on relative errors finds the valley. If it ends where an earlier start's did (``known``, which
        grows), the passes that follow would repeat that start's, and its end is returned.
        """
        theta, coefficients = self.descend(theta, self.log_error)
        for met, end in known:
            if np.allclose(theta, met, rtol=0, atol=1e-3):
                return end
        end = self.polish(theta, coefficients)
        known.append((theta, end))
        return end

    def polish(self, theta: Array, coefficients: Array) -> _End:
        """Gauss-Newton passes until the log objective stands still."""
        log_fit = self.log_law(theta, coefficients)
        best = self.objective(log_fit), theta, coefficients
        for _ in range(_PASSES):
            theta, coefficients = self.descend(theta, log_fit)
            log_fit = self.log_law(theta, coefficients)
            objective = self.objective(log_fit)
            if objective >= best[0] * (1 - 1e-9):
                break
            best = objective, theta, coefficients
        return best

    def inside(self, exponents: Sequence[float]) -> Array:
        """theta of the exponents moved into the box; for a given s, a and b shrink until c = s (a + b) is inside too."""
        low, high = np.log(BOX)
        if self.exponent is None:
            return np.clip(np.log(np.asarray(exponents, float)), low, high)
        sizes = np.clip(np.asarray(exponents[:2], float), *BOX)
        sizes = np.maximum(sizes * min(1.0, BOX[1] / (self.exponent * sizes.sum())), BOX[0])
        return np.log(sizes) if self.exponent * sizes.sum() <= BOX[1] else np.array([low, low])

    def cold_starts(self) -> list[Array]:
        """For each a of a coarse grid, the theta of least projected objective."""
        starts = []
        for a in _START_A:
            tries = [self.inside((a, *bc)) for bc in _START_BC]
            starts.append(min(tries, key=lambda theta: self.at(theta, self.log_error).objective))
        return starts


def fit_law(
    x: ArrayLike,
    t: ArrayLike,
    error: ArrayLike,
    *,
    noise: Noise | None = None,
    starts: Sequence[Sequence[float]] = (),
    exponent: float | None = None,
) -> LawFit:
    """Fit the law to points (n,): minimise the sum of squares of the (whitened) log residuals.

    ``t`` in GFLOPs. ``starts``: exponents (a, b, c) to start from instead of the cold starts. ``exponent``: hold
    s = c / (a + b) at this value (at most `MAX_EXPONENT`), for profile likelihoods. The paper states only that the
    relative error is minimised (SoViT, Section 4.1); log residuals are the choice of arXiv 2209.06640.
    Raises ValueError for fewer than 8 points, sizes or compute that do not vary, or values without a logarithm.
    """
    x, t, error = (np.atleast_1d(np.asarray(values, float)) for values in (x, t, error))
    if not x.shape == t.shape == error.shape or x.ndim != 1:
        raise ValueError(f"x, t and error have shapes {x.shape}, {t.shape}, {error.shape}; give three equal vectors.")
    for name, values in (("x", x), ("t", t), ("error", error)):
        if not np.all(np.isfinite(values) & (values > 0)):
            bad = values[~(np.isfinite(values) & (values > 0))][0]
            raise ValueError(f"{name} holds {bad}, which has no logarithm; leave that point out.")
    if len(x) < MIN_POINTS:
        raise ValueError(
            f"{len(x)} points cannot fit a law of {NUM_PARAMETERS} parameters; give at least {MIN_POINTS}."
        )
    if exponent is not None and not 0 < exponent <= MAX_EXPONENT:
        raise ValueError(f"exponent={exponent} cannot be held; give a value above 0 and at most {MAX_EXPONENT:g}.")
    if x.min() == x.max() or t.min() == t.max():
        raise ValueError("x and t must each take at least two values for the law to be fitted.")
    mean_x, mean_t = math.exp(np.log(x).mean()), math.exp(np.log(t).mean())
    noise = noise or equal_noise(len(x))
    problem = _Problem(np.log(x / mean_x), np.log(t / mean_t), np.log(error), noise, exponent)
    if starts:
        thetas = [problem.inside(start) for start in starts]
        ends = [problem.polish(theta, problem.at(theta, problem.log_error).coefficients) for theta in thetas]
    else:
        known: list[tuple[Array, _End]] = []
        ends = [problem.solve(theta, known) for theta in problem.cold_starts()]
    ends.sort(key=lambda end: end[0])
    objective, theta, coefficients = ends[0]
    a, b, c = (float(value) for value in _expand(theta, exponent)[0])
    log_fit = problem.log_law(theta, coefficients)
    jacobian = _full_jacobian(problem, np.array([a, b, c]), coefficients, log_fit)
    # A term below 1e-9 of every error is rounding: it is 0, and flagged as such.
    share = coefficients * jacobian[:, [0, 2, 4, 6]].max(0)
    alpha, beta, xi, eps = (float(value) for value in np.where(share > 1e-9, coefficients, 0.0))
    law = Law(alpha * mean_x**a, a, beta * mean_x**-b * mean_t**c, b, xi * mean_t**c, c, eps)
    objectives = tuple(end[0] for end in ends)
    reached = [value for value in objectives if value <= objective * (1 + _SAME) + 1e-24 * len(x)]
    return LawFit(
        law=law,
        objective=objective,
        residuals=problem.log_error - log_fit,
        jacobian=jacobian,
        flags=_flags(law, x, t, error, exponent is None),
        start_objectives=objectives,
        converged=len(reached) / len(objectives),
        spread=reached[-1] - reached[0],
    )


def _full_jacobian(problem: _Problem, exponents: Array, coefficients: Array, log_fit: Array) -> Array:
    a, b, c = exponents
    alpha, beta, xi, _ = coefficients
    size, decay = np.exp(-a * problem.log_x), np.exp(-c * problem.log_t)
    cost = np.exp(b * problem.log_x) * decay
    columns = np.column_stack(
        (
            size,
            -alpha * problem.log_x * size,
            cost,
            beta * problem.log_x * cost,
            decay,
            -problem.log_t * (beta * cost + xi * decay),
            np.ones_like(size),
        )
    )
    return columns * np.exp(-log_fit)[:, None]


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
