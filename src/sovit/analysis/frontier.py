"""The frontier of a grid, and how sure its best shapes are: the part of `sovit.analysis.grid` that is statistics.

The lowest of many noisy errors is low partly by luck, so the shape that measured best is too often the wrong one, and
noise added to the measured errors would call it surer than it is. Therefore the shapes borrow from each other: at each
compute the log errors are a smooth surface, quadratic in log width, log depth and log MLP dimension, plus a deviation
of each shape. Shares are shares of draws of that surface. The unit of noise is the run: a draw gives each run one
offset for all its computes (tau), and a smaller one for each (sigma), never an offset for each point alone.

tau and sigma come from repeated seeds if there are enough; what the surface then misses beyond them is the shapes' own
deviation. With one seed the two cannot be told apart, and all scatter about the surface counts as noise, which is safe
as long as the truth is smooth. Their own uncertainty enters every draw (chi-square). With too few shapes for a surface
there are no shares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sovit.analysis.diagnostics import ALIGNED, Slice, isocompute
from sovit.analysis.points import Dimensions, Point, dimensions

NUM_DRAWS = 2000
MIN_FREE = 5  # degrees of freedom below which no spread is estimated
Array = NDArray[np.float64]


def frontier(points: Sequence[Point]) -> tuple[dict[str, Any], ...]:
    """The (shape, duration) points that no other beats in both error and compute, by compute; seeds averaged.

    Durations given in compute count as equal for all shapes: whole steps leave them apart by less than a percent.
    """
    by_duration: dict[str, list[Point]] = {}
    for point in points:
        by_duration.setdefault(point.duration, []).append(point)
    compute = {duration: [point.t_gflops for point in group] for duration, group in by_duration.items()}
    aligned = all(max(ts) <= ALIGNED * min(ts) for ts in compute.values())
    rows = []
    for duration, together in by_duration.items():
        for shape in sorted({dimensions(point) for point in together}):
            group = [point for point in together if dimensions(point) == shape]
            errors = [point.error for point in group]
            spread = float(np.std(errors, ddof=1)) if len(errors) > 1 else group[0].stderr
            ts = compute[duration] if aligned else [point.t_gflops for point in group]
            rows.append(
                shape._asdict()
                | {
                    "duration": duration,
                    "t_gflops": math.exp(float(np.mean(np.log(ts)))),
                    "error": float(np.mean(errors)),
                    "stderr": spread / math.sqrt(len(errors)),
                    "num_runs": len(group),
                }
            )
    rows.sort(key=lambda row: (row["t_gflops"], row["error"]))
    least, kept = math.inf, []
    for row in rows:
        if row["error"] < least:
            kept.append(row)
            least = row["error"]
    return tuple(kept)


@dataclass(frozen=True)
class Scatter:
    """Relative spreads: ``tau`` of a run, ``sigma`` of one evaluation, ``misfit`` of a shape about the surface.

    ``degrees`` of freedom that tau rests on; ``basis`` says where it comes from.
    """

    tau: float
    sigma: float
    misfit: float
    degrees: int
    basis: str


@dataclass(frozen=True)
class Surfaces:
    """Log errors of a grid smoothed at each compute.

    ``shapes``: all that occur. ``smooth`` (S, K): smoothed log error, inf where a shape was not measured at a compute.
    ``winners`` (draws, K): index of the best shape in each draw. ``smoothed`` (K,): False where a compute has too few
    shapes for a surface, so that its winner is the one measured, in every draw. ``scatter``: None if all are so.
    """

    shapes: tuple[Dimensions, ...]
    smooth: Array
    winners: NDArray[np.intp]
    smoothed: NDArray[np.bool_]
    scatter: Scatter | None

    def best(self, k: int) -> Dimensions:
        """The best shape of the smoothed errors at compute k."""
        return self.shapes[int(np.argmin(self.smooth[:, k]))]

    def shares(self, k: int) -> dict[Dimensions, float] | None:
        """Share of draws in which each shape is the best at compute k, largest first; None without a surface."""
        if not self.smoothed[k]:
            return None
        count = np.bincount(self.winners[:, k], minlength=len(self.shapes)) / len(self.winners)
        order = np.argsort(-count, kind="stable")
        return {self.shapes[i]: float(count[i]) for i in order if count[i] > 0}


def surfaces(
    points: Sequence[Point], slices: Sequence[Slice], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Surfaces:
    """Smooth the errors of usable points at the computes of ``slices``, which are `isocompute` of the same points."""
    by_run = {piece.t_gflops: piece for piece in isocompute(points, lambda p: (*dimensions(p), p.run_id))}
    runs = sorted({(*dimensions(point), point.run_id) for point in points})
    index = {run: i for i, run in enumerate(runs)}
    shapes = tuple(sorted({Dimensions(*run[:3]) for run in runs}))
    of_run = np.array([shapes.index(Dimensions(*run[:3])) for run in runs])
    table = np.full((len(runs), len(slices)), np.nan)
    for k, piece in enumerate(slices):
        measured = by_run[piece.t_gflops]
        table[[index[size] for size in measured.sizes], k] = np.log(measured.errors)

    member = (of_run == np.arange(len(shapes))[:, None]).astype(float)  # (S, R)
    count = member @ ~np.isnan(table)  # runs of a shape at each compute
    mean = member @ np.nan_to_num(table) / np.maximum(count, 1)
    smoothers = [_smoother(shapes, column > 0) for column in count.T]
    scatter = _scatter(table, member, mean, count, smoothers)
    return _draw(mean, count, smoothers, scatter, shapes, num_draws, np.random.default_rng(seed))


def _smoother(shapes: Sequence[Dimensions], here: NDArray[np.bool_]) -> Array | None:
    """(S, S) projection of log errors on a quadratic surface, 0 outside ``here``.

    Without the mixed terms where they would leave too few degrees of freedom; None if there are too few anyway.
    """
    sizes = np.log(np.array(shapes, float)[here])
    scaled = [(axis - axis.mean()) / np.ptp(axis) for axis in sizes.T if len(axis) and np.ptp(axis) > 0]
    plain = [np.ones(len(sizes)), *scaled, *(axis**2 for axis in scaled)]
    for columns in (plain + [one * other for one, other in itertools.combinations(scaled, 2)], plain):
        left, singular, _ = np.linalg.svd(np.array(columns).T, full_matrices=False)
        basis = left[:, singular > 1e-9 * max(singular, default=0.0)]
        if len(sizes) - basis.shape[1] >= MIN_FREE:
            projection = np.zeros((len(shapes), len(shapes)))
            projection[np.ix_(here, here)] = basis @ basis.T
            return projection
    return None


def _scatter(
    table: Array, member: Array, mean: Array, count: Array, smoothers: Sequence[Array | None]
) -> Scatter | None:
    """The spreads from runs (R, K) and shapes (S, K); None without a surface."""
    used = [k for k, smoother in enumerate(smoothers) if smoother is not None]
    if not used:
        return None
    about = [(np.diag((count[:, k] > 0).astype(float)) - smoothers[k], mean[:, k]) for k in used]
    seeds = []
    for k in used:
        here = (~np.isnan(table[:, k])).astype(float)
        same = (member * here).T @ (member * here / np.maximum(count[:, k], 1)[:, None])
        seeds.append((np.diag(here) - same, np.nan_to_num(table[:, k])))
    free = round(max(np.trace(projection) for projection, _ in seeds))
    if free < MIN_FREE:
        free = round(max(np.trace(projection) for projection, _ in about))
        return Scatter(*_components(about), 0.0, free, "the shapes' scatter about a smooth surface")
    tau, sigma = _components(seeds)
    whole, _ = _components(about)
    per_shape = float(np.mean(tau**2 / count[:, used][count[:, used] > 0]))
    return Scatter(tau, sigma, math.sqrt(max(0.0, whole**2 - per_shape)), free, "repeated seeds")


def _components(parts: Sequence[tuple[Array, Array]]) -> tuple[float, float]:
    """(tau, sigma) of values y at several computes from residuals R y: their squares hold both, their products tau.

    E |R_k y_k|^2 = (tau^2 + sigma^2) tr R_k and E (R_k y_k) . (R_l y_l) = tau^2 tr(R_k R_l), whatever is missing. With
    one compute the two cannot be told apart, and all is tau.
    """
    rest = [projection @ values for projection, values in parts]
    both = sum(float(one @ one) for one in rest) / sum(np.trace(projection) for projection, _ in parts)
    pairs = list(itertools.combinations(range(len(parts)), 2))
    weight = sum(float(np.sum(parts[i][0] * parts[j][0])) for i, j in pairs)
    if weight < MIN_FREE:
        return math.sqrt(both), 0.0
    tau2 = min(max(0.0, sum(float(rest[i] @ rest[j]) for i, j in pairs) / weight), both)
    return math.sqrt(tau2), math.sqrt(both - tau2)


def _draw(
    mean: Array,
    count: Array,
    smoothers: Sequence[Array | None],
    scatter: Scatter | None,
    shapes: tuple[Dimensions, ...],
    num_draws: int,
    rng: np.random.Generator,
) -> Surfaces:
    """Draws of the log errors given the measured ones: a flat prior on the surface, N(0, misfit^2) on deviations.

    theta = (1 - trust) (H y + H w) + trust y + sqrt(trust) z, with H the smoother, w the whole scatter of a shape, z its
    noise, and trust = misfit^2 / (misfit^2 + noise^2), the share of a deviation that is believed.
    """
    measured = count > 0
    smooth = np.where(measured, mean, np.inf)
    smoothed = np.array([smoother is not None for smoother in smoothers])
    winners = np.tile(smooth.argmin(0), (num_draws, 1))
    if scatter is None:
        return Surfaces(shapes, smooth, winners, smoothed, None)
    seeds = np.maximum(count, 1)
    noise2 = (scatter.tau**2 + scatter.sigma**2) / seeds
    trust = scatter.misfit**2 / np.maximum(scatter.misfit**2 + noise2, 1e-300)
    factor = np.sqrt(scatter.degrees / rng.chisquare(scatter.degrees, (num_draws, 1)))
    shared = [rng.standard_normal((num_draws, len(shapes))) for _ in range(3)]  # of a run, the same at every compute
    for k, smoother in enumerate(smoothers):
        own = [rng.standard_normal((num_draws, len(shapes))) for _ in range(2)]
        if smoother is None:
            continue
        run, one, believed = scatter.tau / np.sqrt(seeds[:, k]), scatter.sigma / np.sqrt(seeds[:, k]), trust[:, k]
        z = factor * (run * shared[0] + one * own[0])
        w = factor * (run * shared[1] + one * own[1] + scatter.misfit * shared[2])
        centre = (1 - believed) * (smoother @ mean[:, k]) + believed * mean[:, k]
        theta = centre + (1 - believed) * (w @ smoother) + np.sqrt(believed) * z
        smooth[:, k] = np.where(measured[:, k], centre, np.inf)
        winners[:, k] = np.where(measured[:, k], theta, np.inf).argmin(1)
    return Surfaces(shapes, smooth, winners, smoothed, scatter)
