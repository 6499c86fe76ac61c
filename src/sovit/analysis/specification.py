"""Does the model of law plus noise hold? Tests of a fitted arm whose thresholds are simulated from the fit itself.

Three questions: does a run not belong with the others, does the data exponent c change at some compute, and is there
any smooth structure the law leaves in the residuals (Ramsey's RESET, 1969). Every test is linear in the residuals
(the law is linearised at the fit), chooses tau / sigma anew by REML as an interval does, and gets its p-value from data
drawn under the fit with its own sigma and tau, because a run effect inflates all of them.

What these tests cannot see, at any number of runs: an error that is smooth in log x at every compute, such as a
learning rate that suits the middle of an arm better than its ends, or a floor that is not additive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sovit.analysis.fit import NUM_PARAMETERS, Array, Noise, law_logs
from sovit.analysis.intervals import RATIOS, RunFit, index_runs
from sovit.analysis.varpro import refit

Index = NDArray[np.intp]

NUM_DRAWS = 999
NUM_RUN_DRAWS = 199  # each is refitted without every run
_EDGE = 3  # a break leaves this many durations on either side, the one it is at counted on both
_MOST_KNOTS = 20


@dataclass(frozen=True)
class RunTest:
    """``t``: for each run, its distance from what the others predict over its standard error. ``p``: family-wise."""

    t: Array
    p: Array


@dataclass(frozen=True)
class BreakTest:
    """A change of c: ``factor`` times c beyond ``t_gflops``, the most likely place, with the p-value of any change."""

    t_gflops: float
    factor: float
    p: float


@dataclass(frozen=True)
class _Design:
    """Whitened Jacobian of the law and whitened residuals (n, B) at one tau / sigma."""

    ratio: float
    noise: Noise
    jacobian: Array
    residuals: Array


def draw_residuals(whole: RunFit, num_draws: int = NUM_DRAWS, seed: int = 0) -> Array:
    """Log residuals (n, num_draws) as they would be under the fit: an offset per run and independent evaluations.

    Each draw has a tau / sigma of its own, as likely as the restricted likelihood says (flat in its logarithm): seven
    runs leave it uncertain by a factor of two, and one value for all would raise false alarms.
    """
    rng = np.random.default_rng(seed)
    residuals = whole.fit.residuals[:, None]
    designs = _designs(whole, residuals)
    criteria, rests = zip(*(_restricted(design) for design in designs), strict=True)
    criterion = np.array(criteria)[:, 0]
    likely = np.exp(-0.5 * (criterion - criterion.min()))
    index = rng.choice(len(designs), size=num_draws, p=likely / likely.sum())
    sigma = np.sqrt(np.array(rests)[:, 0] / (len(residuals) - _scaled(whole.fit.jacobian).shape[1]))
    ratio = np.array([design.ratio for design in designs])
    alone = whole.noise.scale[:, None] * rng.normal(size=(len(residuals), num_draws))
    offsets = rng.normal(size=(whole.num_runs, num_draws))[whole.noise.run]
    return sigma[index] * (alone + ratio[index] * offsets)


def _restricted(design: _Design) -> tuple[Array, Array]:
    """-2 log restricted likelihood (B,) of the linearised model and its residual sum of squares (B,)."""
    left, singular, _ = _svd(design.jacobian)
    rest = np.maximum(np.sum(design.residuals**2, 0) - np.sum((left.T @ design.residuals) ** 2, 0), 1e-300)
    free = len(design.residuals) - left.shape[1]
    return free * np.log(rest) + design.noise.log_det() + 2 * np.log(singular).sum(), rest


def run_test(x: ArrayLike, t: ArrayLike, whole: RunFit, *, num_draws: int = NUM_RUN_DRAWS, seed: int = 0) -> RunTest:
    """Which runs do not belong: each run's mean log error from what the law fitted to the others predicts.

    ``x``, ``t`` (n,) of the fit's points. The distance is in standard errors with a tau / sigma chosen again without
    the run, as an outlier would hide in an inflated tau. The law is refitted without each run, here and in every
    simulated sweep: linearised, seven runs give twice the nominal false alarms. ``p`` is the share of simulated sweeps
    whose most extreme run is at least as extreme; nan where too few points remain without the run.
    """
    drawn = np.column_stack((whole.fit.residuals, draw_residuals(whole, num_draws, seed)))
    values = _prediction_misses(np.asarray(x, float), np.asarray(t, float), whole, drawn) / _miss_errors(whole, drawn)
    worst = np.nanmax(np.abs(values[:, 1:]), axis=0)
    observed = values[:, 0]
    p = np.array([_p_value(abs(value), worst) if math.isfinite(value) else math.nan for value in observed])
    return RunTest(observed, p)


def _prediction_misses(x: Array, t: Array, whole: RunFit, residuals: Array) -> Array:
    """(G, B): mean log error of each run less what the law refitted without it predicts."""
    run, scale = whole.noise.run, whole.noise.scale
    logs = law_logs(np.log(x) - np.log(x).mean(), np.log(t) - np.log(t).mean())
    errors = np.log(whole.fit.law.error(x, t))[:, None] + residuals
    misses = np.full((whole.num_runs, residuals.shape[1]), np.nan)
    for design, chosen in _chosen(whole, residuals):
        for one in range(whole.num_runs):
            keep = run != one
            if keep.sum() <= NUM_PARAMETERS:
                continue
            noise = Noise(index_runs(run[keep]), design.ratio, scale[keep])
            _, exponents, coefficients = refit(
                logs[:, :, keep], errors[np.ix_(keep, chosen)].T, noise, whole.fit.exponents
            )
            terms = np.exp(np.einsum("jkn,bk->bjn", logs[:, :, ~keep], exponents))
            predicted = np.log(np.einsum("bj,bjn->bn", coefficients, terms))
            misses[one, chosen] = (errors[np.ix_(~keep, chosen)].T - predicted).mean(1)
    return misses


def _miss_errors(whole: RunFit, residuals: Array) -> Array:
    """(G, B): standard error of the difference between a run's mean and what the others predict, law linearised."""
    designs = _designs(whole, residuals)
    run, scale = whole.noise.run, whole.noise.scale
    plain = _scaled(whole.fit.jacobian)
    sums = [_sum_by_run(design.residuals**2, run, whole.num_runs) for design in designs]
    values = np.full((whole.num_runs, residuals.shape[1]), np.nan)
    for one in range(whole.num_runs):
        keep = run != one
        free = keep.sum() - plain.shape[1]
        if free <= 0:
            continue
        best = np.full(residuals.shape[1], np.inf)
        mean, spread = plain[~keep].mean(0), float(np.sum(scale[~keep] ** 2)) / (~keep).sum() ** 2
        for design, by_run in zip(designs, sums, strict=True):
            left, singular, rows = _svd(design.jacobian[keep])
            along = left.T @ design.residuals[keep]
            sigma2 = np.maximum(by_run.sum(0) - by_run[one] - np.sum(along**2, 0), 1e-300) / free
            log_det = design.noise.log_det() - _log_det_run(design.noise, one)
            criterion = free * np.log(sigma2) + log_det + 2 * np.log(singular).sum()
            weight = rows @ mean / singular
            better = criterion < best
            best = np.where(better, criterion, best)
            expected = spread + design.ratio**2 + weight @ weight
            values[one] = np.where(better, np.sqrt(sigma2 * expected), values[one])
    return values


def break_test(
    x: ArrayLike, t: ArrayLike, whole: RunFit, *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> BreakTest | None:
    """Does c change at some compute: the largest |t| of a change of slope in log t over all places for it.

    ``t`` (n,) in GFLOPs. None if there are fewer than 6 durations or the law has no term in t.
    """
    x, t = np.asarray(x, float), np.asarray(t, float)
    law, log_t = whole.fit.law, np.log(t)
    durations = np.unique(np.round(log_t, 2))
    share = (law.beta * x**law.b + law.xi) * t**-law.c / law.error(x, t)
    if len(durations) < 2 * _EDGE or not np.any(share):
        return None
    inner = durations[_EDGE - 1 : len(durations) - _EDGE + 1]
    knots = inner if len(inner) <= _MOST_KNOTS else np.linspace(inner[0], inner[-1], _MOST_KNOTS)
    columns = np.array([-share * np.maximum(log_t - knot, 0.0) for knot in knots])  # d log f / d c beyond the knot
    drawn = np.column_stack((whole.fit.residuals, draw_residuals(whole, num_draws, seed)))
    values = np.zeros((len(knots), drawn.shape[1]))
    changes = np.zeros((len(knots), drawn.shape[1]))
    for design, chosen in _chosen(whole, drawn):
        left, *_ = _svd(design.jacobian)
        extra = _off(design.noise.whiten(columns.T), left)
        clean = _off(design.residuals[:, chosen], left)
        size = np.maximum(np.sum(extra**2, 0), 1e-300)
        change = (extra.T @ clean) / size[:, None]
        total = np.sum(clean**2, 0)
        rest = np.maximum(total - change**2 * size[:, None], 1e-300) / (len(t) - left.shape[1] - 1)
        values[:, chosen] = np.abs(change) * np.sqrt(size[:, None] / rest)
        changes[:, chosen] = change
    where = int(values[:, 0].argmax())
    return BreakTest(
        t_gflops=math.exp(knots[where]),
        factor=1 + float(changes[where, 0]) / whole.fit.law.c,
        p=_p_value(values[where, 0], values[:, 1:].max(0)),
    )


def structure_test(
    x: ArrayLike, t: ArrayLike, whole: RunFit, *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> float | None:
    """p-value of RESET: do quadratic and cubic terms in log x and log t explain what the law leaves?

    None if there are too few points for the seven extra terms.
    """
    x, t = np.asarray(x, float), np.asarray(t, float)
    log_x, log_t = np.log(x), np.log(t)
    u, v = (log_x - log_x.mean()) / max(log_x.std(), 1e-12), (log_t - log_t.mean()) / max(log_t.std(), 1e-12)
    columns = np.column_stack((u**2, v**2, u * v, v * u**2, u * v**2, u**3, v**3))
    free = len(x) - NUM_PARAMETERS - columns.shape[1]
    if free < columns.shape[1] or whole.num_sizes < 5:
        return None
    drawn = np.column_stack((whole.fit.residuals, draw_residuals(whole, num_draws, seed)))
    values = np.zeros(drawn.shape[1])
    for design, chosen in _chosen(whole, drawn):
        left, *_ = _svd(design.jacobian)
        extra, singular, _ = np.linalg.svd(_off(design.noise.whiten(columns), left), full_matrices=False)
        extra = extra[:, singular > 1e-6 * singular[0]]
        clean = _off(design.residuals[:, chosen], left)
        explained = np.sum((extra.T @ clean) ** 2, 0)
        values[chosen] = explained / np.maximum(np.sum(clean**2, 0) - explained, 1e-300)
    return _p_value(values[0], values[1:])


def _p_value(observed: float, drawn: Array) -> float:
    return float((1 + np.sum(drawn >= observed)) / (1 + len(drawn)))


def _designs(whole: RunFit, residuals: Array) -> list[_Design]:
    jacobian = _scaled(whole.fit.jacobian)
    designs = []
    for ratio in RATIOS:
        noise = Noise(whole.noise.run, float(ratio), whole.noise.scale)
        designs.append(_Design(float(ratio), noise, noise.whiten(jacobian), noise.whiten(residuals)))
    return designs


def _chosen(whole: RunFit, residuals: Array) -> list[tuple[_Design, Index]]:
    """For each tau / sigma that REML chooses for some column of ``residuals``, its design and which columns."""
    designs = _designs(whole, residuals)
    criteria = [_restricted(design)[0] for design in designs]
    best = np.argmin(criteria, axis=0)
    return [(design, np.flatnonzero(best == index)) for index, design in enumerate(designs) if np.any(best == index)]


def _scaled(jacobian: Array) -> Array:
    """Columns of unit length, those without information left out."""
    norms = np.linalg.norm(jacobian, axis=0)
    return jacobian[:, norms > 0] / norms[norms > 0]


def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    """A singular value decomposition without the directions the data do not determine."""
    left, singular, rows = np.linalg.svd(matrix, full_matrices=False)
    keep = singular > 1e-10 * singular[0]
    return left[:, keep], singular[keep], rows[keep]


def _off(columns: Array, basis: Array) -> Array:
    return columns - basis @ (basis.T @ columns)


def _sum_by_run(values: Array, run: Index, num_runs: int) -> Array:
    sums = np.zeros((num_runs, values.shape[1]))
    np.add.at(sums, run, values)
    return sums


def _log_det_run(noise: Noise, one: int) -> float:
    """The part of the covariance's log determinant that belongs to one run."""
    inverse = noise.inverse_scale[noise.run == one]
    return float(-2 * np.log(inverse).sum() + math.log1p(noise.ratio**2 * np.sum(inverse**2)))
