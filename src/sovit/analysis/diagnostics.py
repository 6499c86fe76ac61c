"""What speaks for or against an arm's fit, computed without the law or by taking something away.

Isocompute slices (the measured U at one compute), where their minima sit, the parabola of each slice and the slope of
their minima (approach 2 of Hoffmann et al., arXiv 2203.15556: biased for wide or off-centre arms, so it stands beside
the law's exponent and never replaces it), and points or runs that look wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as t_distribution

from sovit.analysis.fit import MIN_POINTS, Array, LawFit, Noise, fit_law
from sovit.analysis.intervals import Jackknife, RunFit, index_runs
from sovit.analysis.points import Point
from sovit.analysis.scale import ERROR, Scale
from sovit.analysis.specification import run_test

ALIGNED = 1.1  # points of one duration whose compute agrees to 10% form a slice as they are
MIN_SLICE_SIZES = 3
_RISE = 1.1
_MAX_DROPPED = 3
Size = Callable[[Point], Hashable]


@dataclass(frozen=True)
class Slice:
    """Errors at one compute, a value for each size (any sortable key), averaged over the runs of that size.

    ``spreads``: standard error of each mean: between runs where a size has several, else the point's own.
    """

    t_gflops: float
    sizes: tuple
    errors: Array
    spreads: Array

    @property
    def best(self) -> int:
        return int(np.argmin(self.errors))


def isocompute(points: Sequence[Point], size: Size) -> list[Slice]:
    """Slices of equal compute, by increasing compute, of at least three sizes.

    Where the durations are given in compute, a slice is a duration. Otherwise (durations in images, compute differs
    between shapes) each run's log error is interpolated in log t, never beyond its ends, at twice as many common
    points, and a slice must hold five sizes (or all, if there are fewer).
    """
    if not points:
        return []
    by_duration: dict[str, list[Point]] = {}
    for point in points:
        by_duration.setdefault(point.duration, []).append(point)
    compute = {name: [point.t_gflops for point in group] for name, group in by_duration.items()}
    slices = []
    if all(max(ts) <= ALIGNED * min(ts) for ts in compute.values()):
        for name, group in by_duration.items():
            cells = [(size(point), point.error, point.stderr) for point in group]
            slices.append(_slice(math.exp(float(np.mean(np.log(compute[name])))), cells))
        least = MIN_SLICE_SIZES
    else:
        runs: dict[str, list[Point]] = {}
        for point in sorted(points, key=lambda point: point.t_gflops):
            runs.setdefault(point.run_id, []).append(point)
        ends = [point.t_gflops for point in points]
        for t in np.geomspace(min(ends), max(ends), 2 * len(by_duration) + 1):
            covering = [run for run in runs.values() if run[0].t_gflops <= t <= run[-1].t_gflops]
            if covering:
                slices.append(_slice(float(t), [(size(run[0]), *_interpolate(run, float(t))) for run in covering]))
        least = min(5, len({size(point) for point in points}))
    kept = [piece for piece in slices if len(piece.sizes) >= max(least, MIN_SLICE_SIZES)]
    return sorted(kept, key=lambda piece: piece.t_gflops)


def _interpolate(run: list[Point], t: float) -> tuple[float, float]:
    log_t = np.log([point.t_gflops for point in run])
    error = np.exp(np.interp(math.log(t), log_t, np.log([point.error for point in run])))
    return float(error), float(np.interp(math.log(t), log_t, [point.stderr for point in run]))


def _slice(t: float, cells: list[tuple[Hashable, float, float]]) -> Slice:
    groups: dict[Hashable, list[tuple[float, float]]] = {}
    for key, error, stderr in cells:
        groups.setdefault(key, []).append((error, stderr))
    sizes = tuple(sorted(groups))  # type: ignore[type-var]
    errors = [float(np.mean([error for error, _ in groups[key]])) for key in sizes]
    spreads = []
    for key in sizes:
        values = [error for error, _ in groups[key]]
        between = float(np.std(values, ddof=1)) if len(values) > 1 else groups[key][0][1]
        spreads.append(between / math.sqrt(len(values)))
    return Slice(t, sizes, np.array(errors), np.array(spreads))


@dataclass(frozen=True)
class Edge:
    """Where the minima of an arm's slices sit. ``share`` is the interior share; None without a slice."""

    num_slices: int
    num_smallest: int
    num_largest: int

    @property
    def share(self) -> float | None:
        inside = self.num_slices - self.num_smallest - self.num_largest
        return inside / self.num_slices if self.num_slices else None


def edges(slices: Sequence[Slice]) -> Edge:
    """Count the slices whose least error is at the smallest or largest size measured in that slice."""
    low = sum(piece.best == 0 for piece in slices)
    return Edge(len(slices), low, sum(piece.best == len(piece.sizes) - 1 for piece in slices))


def parabola_minimum(piece: Slice) -> float | None:
    """x of the minimum of a quadratic through log error over log x; None if it does not open upwards inside the slice.

    Sizes must be numbers; three sizes make it exact, more make it least squares.
    """
    log_x = np.log(np.array(piece.sizes, float))
    centre = log_x.mean()
    second, first, _ = np.polyfit(log_x - centre, np.log(piece.errors), 2)
    if second <= 0:
        return None
    vertex = centre - first / (2 * second)
    return float(np.exp(vertex)) if log_x[0] < vertex < log_x[-1] else None


@dataclass(frozen=True)
class Parabola:
    """Slope of log (parabola minimum) over log t, with its delete-one-run jackknife interval (None if it fails)."""

    slope: float
    lo: float | None
    hi: float | None


def parabola_slope(points: Sequence[Point], size: Size, level: float = 0.95) -> Parabola | None:
    """The model-free growth of the optimum, or None with fewer than three slices that have a minimum inside."""
    slope = _slope(isocompute(points, size))
    if slope is None:
        return None
    runs = sorted({point.run_id for point in points})
    without = [_slope(isocompute([point for point in points if point.run_id != run], size)) for run in runs]
    values = [value for value in without if value is not None]
    if len(values) < len(runs) or len(runs) < 3:
        return Parabola(slope, None, None)
    spread = math.sqrt((len(runs) - 1) / len(runs) * float(np.sum((np.array(values) - np.mean(values)) ** 2)))
    half = float(t_distribution.ppf((1 + level) / 2, len(runs) - 1)) * spread
    return Parabola(slope, slope - half, slope + half)


def _slope(slices: Sequence[Slice]) -> float | None:
    found = [(piece.t_gflops, parabola_minimum(piece)) for piece in slices]
    inside = [(t, x) for t, x in found if x is not None]
    if len(inside) < 3:
        return None
    log_t, log_x = np.log(np.array(inside)).T
    return float(np.polyfit(log_t - log_t.mean(), log_x, 1)[0])


def unusable(points: Sequence[Point], scale: Scale = ERROR) -> dict[tuple[str, str], str]:
    """(run id, duration) -> why the point cannot enter a fit: no logarithm, too large, or risen since earlier."""
    reasons: dict[tuple[str, str], str] = {}
    least: dict[str, float] = {}
    for point in sorted(points, key=lambda point: point.t_gflops):
        key = (point.run_id, point.duration)
        before = least.get(point.run_id, math.inf)
        if point.error <= 0:
            reasons[key] = f"{scale.name} 0 has no logarithm"
            continue
        if point.error > scale.usable:
            why = "diverged, or not learning yet" if scale.name == ERROR.name else "no better than without an image"
            reasons[key] = f"{scale.name} {point.error:.3g} is above {scale.usable:g}: {why}"
        elif point.error > _RISE * before:
            reasons[key] = f"diverged: the {scale.name} rose from {before:.3g} to {point.error:.3g}"
        least[point.run_id] = min(before, point.error)
    return reasons


def rising_runs(points: Sequence[Point], sigma: float) -> list[str]:
    """Runs whose error rises with compute by more than three standard errors of a difference (relative, 3 sqrt2 sigma)."""
    runs: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.t_gflops):
        runs.setdefault(point.run_id, []).append(point)
    allowed = math.exp(3 * math.sqrt(2) * sigma)
    return sorted(
        run
        for run, group in runs.items()
        if any(later.error > allowed * point.error for point, later in itertools.pairwise(group))
    )


@dataclass(frozen=True)
class Cutoff:
    """The exponent, at the headline's tau / sigma, when only points of at most this error are fitted.

    None if they are too few or show no optimum.
    """

    max_error: float
    s: float | None
    num_points: int
    headline: bool


@dataclass(frozen=True)
class Late:
    """The exponent when the earliest durations are dropped from the headline's points."""

    num_dropped: int
    s: float | None
    num_points: int


@dataclass(frozen=True)
class Outlier:
    """A run far from what the others predict, ``t`` standard errors off; without it s moves by ``shift``.

    ``p``: how often the farthest run of such a sweep is at least as far.
    """

    run_id: str
    shift: float
    t: float
    p: float


@dataclass(frozen=True)
class OutlierPoint:
    """An evaluation so far from its run's level that it counts with ``weight`` below 1."""

    run_id: str
    duration: str
    weight: float


def size_along(name: str) -> Size:
    """The size of a point along one dimension."""
    return lambda point: getattr(point, name)


def vectors(name: str, points: Sequence[Point]) -> tuple[Array, Array, Array, list[str]]:
    """(x along one dimension, t in GFLOPs, error, run id), a value for each point."""
    x = np.array([getattr(point, name) for point in points], float)
    t = np.array([point.t_gflops for point in points])
    return x, t, np.array([point.error for point in points]), [point.run_id for point in points]


def scales(points: Sequence[Point], weights: str) -> Array:
    """Relative standard deviation of each point (``"stderr"``), or ones (``"equal"``)."""
    return np.array([point.stderr / point.error if weights == "stderr" else 1.0 for point in points])


def too_few(name: str, points: Sequence[Point]) -> str | None:
    """Why these points cannot be fitted, or None if they can."""
    sizes = {getattr(point, name) for point in points}
    if len(points) >= MIN_POINTS and len(sizes) >= 3 and len({point.t_gflops for point in points}) >= 2:
        return None
    return f"{len(points)} usable points at {len(sizes)} sizes are too few to fit the law"


def optimal_exponent(fit: LawFit) -> float | None:
    """s, or None for a law that has no optimum."""
    return None if {"alpha=0", "beta=0"} & set(fit.flags) else fit.law.exponent


def _refit(name: str, points: Sequence[Point], whole: RunFit | str, weights: str) -> float | None:
    """s of a subset at the whole fit's tau / sigma (at 1 without one); None if it has too few points or no optimum."""
    if too_few(name, points):
        return None
    x, t, error, runs = vectors(name, points)
    ratio = 1.0 if isinstance(whole, str) else whole.noise.ratio
    scale = scales(points, weights)
    return optimal_exponent(
        fit_law(x, t, error, noise=Noise(index_runs(runs), ratio, scale / np.exp(np.log(scale).mean())))
    )


def cutoff_fits(
    name: str,
    points: Sequence[Point],
    whole: RunFit | str,
    weights: str,
    cutoffs: Sequence[float],
    headline: float,
) -> tuple[Cutoff, ...]:
    """The exponent for each largest error allowed."""
    refits: dict[int, float | None] = {}  # by number of points, as the subsets are nested
    rows = []
    for cutoff in cutoffs:
        kept = [point for point in points if point.error <= cutoff]
        if len(kept) not in refits:
            refits[len(kept)] = _refit(name, kept, whole, weights)
        rows.append(Cutoff(cutoff, refits[len(kept)], len(kept), cutoff == headline))
    return tuple(rows)


def late_fits(name: str, used: Sequence[Point], whole: RunFit | str, weights: str) -> tuple[Late, ...]:
    """The exponent without the one, two and three earliest durations, as long as two remain."""
    earliest: dict[str, float] = {}
    for point in used:
        earliest[point.duration] = min(point.t_gflops, earliest.get(point.duration, math.inf))
    order = sorted(earliest, key=lambda duration: earliest[duration])
    rows = []
    for count in range(1, min(_MAX_DROPPED, len(order) - 2) + 1):
        kept = [point for point in used if point.duration not in order[:count]]
        rows.append(Late(count, _refit(name, kept, whole, weights), len(kept)))
    return tuple(rows)


def outliers(name: str, used: Sequence[Point], fit: RunFit, jackknife: Jackknife) -> tuple[Outlier, ...]:
    """Runs that do not belong with the others at a family-wise 5%. ``used``: the points the fit and jackknife had."""
    if fit.num_runs < 5:
        return ()
    found = run_test(*vectors(name, used)[:2], fit)
    runs = sorted({point.run_id for point in used})
    return tuple(
        Outlier(run, without - fit.fit.law.exponent, float(value), float(p))
        for run, without, value, p in zip(runs, jackknife.without, found.t, found.p, strict=True)
        if p <= 0.05
    )


def outlier_points(used: Sequence[Point], fit: RunFit) -> tuple[OutlierPoint, ...]:
    """The points that the robust fit lets count for less than half. ``used``: the points of the fit, in its order."""
    return tuple(
        OutlierPoint(point.run_id, point.duration, float(weight))
        for point, weight in zip(used, fit.weights, strict=True)
        if weight < 0.5
    )
