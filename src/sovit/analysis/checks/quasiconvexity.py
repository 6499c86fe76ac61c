"""Does the error at fixed compute fall and then rise, with no second dip? One dimension of an arm, or pairs in a grid.

A function is quasiconvex if no point lies above all the corners of a segment or triangle around it (SoViT,
arXiv 2305.13035, Appendix A.1, proves it for Eq. 2; of trained networks it is an assumption). A **bump** is a size whose
log error lies above both of some two others around it (in a pair of dimensions: above all corners of some triangle
around it), on average over the durations they share or over the earlier or later half of them.

A run's own luck makes bumps too, at all its durations alike, so a bump counts by how far its runs lie above what the
law fitted to the others predicts, in standard errors of that prediction with tau / sigma chosen again without them.
The largest such t is compared with 1,000 sweeps drawn from the fitted law, which has no bump, with an offset per run;
the law is linearised around its fit. All arms of a star share one sigma and one tau: an arm of six single runs alone can
hardly tell a bump from luck. A bump as wide as several sizes is partly taken up by the law, and is harder to see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag
from scipy.sparse import csr_matrix, lil_matrix

from sovit.analysis import diagnostics as check
from sovit.analysis.intervals import RATIOS, fit_with_runs, index_runs
from sovit.analysis.points import DIMENSIONS, Point, dimensions
from sovit.analysis.varpro import Noise, solve

Array = NDArray[np.float64]

DRAWS, GRID_DRAWS = 1000, 400
_MIN_SIZES = 4
_NEAR = 2  # triangles in a grid reach at most this many steps from their middle
_POWER = 0.8


@dataclass(frozen=True)
class Bump:
    """The worst bump of an arm or of a pair of dimensions.

    ``at``: its size or sizes, None if there is no bump at all (then ``height`` is 0 and ``t`` None). ``height``: how far
    it rises above both sides, a share of the error. ``t``: how far above the law of the others, in standard errors;
    ``p``: of such a t at any size in a sweep without bumps. ``detectable``: the height above the law that the test sees
    four times in five, at the size where least is needed, ``detectable_at``; on a steep flank only what is as high as
    the flank is a bump at all.
    """

    subject: str
    at: tuple[int, ...] | None
    height: float
    t: float | None
    p: float
    detectable: float
    detectable_at: tuple[int, ...]
    num_sizes: int
    num_slices: int


@dataclass(frozen=True)
class _Family:
    """Candidates for a bump. ``columns`` (n, S): ones at a candidate's points. ``table`` (S T, n) makes the log errors
    by candidate and slice, ``measured`` (S, T) says which exist; ``around``: for each candidate the sets of others
    whose segment or triangle holds it."""

    subject: str
    sizes: tuple[tuple[int, ...], ...]
    columns: Array
    table: csr_matrix
    measured: NDArray[np.bool_]
    around: tuple[tuple[tuple[int, ...], ...], ...]

    def heights(self, log_errors: Array) -> Array:
        """(S, B) for log errors (n, B): mean rise of each candidate over the lowest set around it, over all slices they
        share, their earlier or their later half, whichever is most; -inf with no set."""
        table = (self.table @ log_errors).reshape(*self.measured.shape, -1)
        best = np.full((len(self.sizes), log_errors.shape[1]), -np.inf)
        for one, sets in enumerate(self.around):
            for corners in sets:
                shared = np.flatnonzero(self.measured[[one, *corners]].all(0))
                if len(shared) < min(2, self.measured.shape[1]):
                    continue
                rise = table[one, shared] - table[list(corners)][:, shared].max(0)
                half = (len(shared) + 1) // 2
                for part in (rise, rise[:half], rise[-half:]) if len(shared) > 3 else (rise,):
                    best[one] = np.maximum(best[one], part.mean(0))
        return best


def star_bumps(arms: Mapping[str, Sequence[Point]], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Bump | str]:
    """The worst bump of each arm (name -> its usable points), or in words why an arm cannot be tested."""
    found: dict[str, Bump | str] = {}
    for name, points in arms.items():
        sizes = {getattr(point, name) for point in points}
        if len(sizes) < _MIN_SIZES or check.too_few(name, points):
            found[name] = f"{len(points)} points at {len(sizes)} sizes are too few to show a second dip"
    names = [name for name in arms if name not in found]
    if not names:
        return found
    everything = [point for name in names for point in arms[name]]
    fits = [fit_with_runs(*check.vectors(name, arms[name])) for name in names]
    families, start = [], 0
    for name in names:
        families.append(_family(name, (name,), (), arms[name], start, len(everything)))
        start += len(arms[name])
    law = _Linear(
        np.log([point.error for point in everything]),
        np.concatenate([fit.fit.residuals for fit in fits]),
        block_diag(*(_directions(fit.fit.jacobian) for fit in fits)),
        index_runs([point.run_id for point in everything]),
        np.concatenate([fit.noise.scale for fit in fits]),
    )
    return found | _test(families, law, draws, seed)


def grid_bumps(points: Sequence[Point], *, draws: int = GRID_DRAWS, seed: int = 0) -> dict[str, Bump | str]:
    """The worst bump of each pair of dimensions of a grid, at any value of the third, or why it cannot be tested.

    The law behind the null is the sum of alpha_k x_k^-a_k over dimensions, plus beta t^-c prod x_k^b_k, xi t^-c and eps.
    """
    varied = [name for name in DIMENSIONS if len({getattr(point, name) for point in points}) > 1]
    found: dict[str, Bump | str] = {}
    families = []
    for pair in itertools.combinations(varied, 2):
        others = tuple(name for name in DIMENSIONS if name not in pair)
        family = _family(" x ".join(pair), pair, others, points, 0, len(points))
        if any(family.around):
            families.append(family)
        else:
            found[family.subject] = "no shape lies between others of the pair"
    num_shapes = len({dimensions(point) for point in points})
    needed = 3 * len(varied) + 5
    if families and num_shapes < needed:
        why = f"{num_shapes} shapes are too few to fit a law of {len(varied)} dimensions; at least {needed} are needed"
        return found | {family.subject: why for family in families}
    if not families:
        return found or {"grid": "fewer than two dimensions vary; a pair needs two"}
    log_error, run = np.log([point.error for point in points]), index_runs([point.run_id for point in points])
    log_fit, jacobian = _grid_law(points, varied, log_error, run)
    law = _Linear(log_error, log_error - log_fit, _directions(jacobian), run, np.ones(len(points)))
    return found | _test(families, law, draws, seed)


def _grid_law(
    points: Sequence[Point], varied: Sequence[str], log_error: Array, run: NDArray[np.intp]
) -> tuple[Array, Array]:
    """(log fit (n,), its Jacobian (n, p)) of the grid's law; exponents (a_k of each dimension, b_k of each, c)."""
    log_x = np.log([[getattr(point, name) for point in points] for name in varied])
    log_t = np.log([point.t_gflops for point in points])
    log_x, log_t = log_x - log_x.mean(1, keepdims=True), log_t - log_t.mean()
    num = len(varied)
    logs = np.zeros((num + 3, 2 * num + 1, len(points)))
    for k in range(num):
        logs[k, k] = -log_x[k]
        logs[num, num + k] = log_x[k]
    logs[[num, num + 1], -1] = -log_t
    grid = [(0.12, 0.5, 1.6), *[(0.5,)] * (num - 1), *[(0.3,)] * num, (0.2, 0.5)]
    noise = Noise(run, 1.0, np.ones(len(points)))
    found = solve(logs, log_error, noise, grid=grid)
    return found.log_fit, found.jacobian


@dataclass(frozen=True)
class _Linear:
    """A law linearised at its fit: residuals (n,) of the log errors, ``basis`` (n, p) of its directions, runs, scales."""

    log_error: Array
    residual: Array
    basis: Array
    run: NDArray[np.intp]
    scale: Array

    def noise(self, ratio: float) -> Noise:
        return Noise(self.run, ratio, self.scale)

    def draws(self, ratio: float, sigma: float, count: int, seed: int) -> Array:
        """(n, count) log errors' noise."""
        rng = np.random.default_rng(seed)
        offsets = ratio * rng.normal(size=(int(self.run.max()) + 1, count))
        return sigma * (self.scale[:, None] * rng.normal(size=(len(self.run), count)) + offsets[self.run])

    def without_law(self, ratio: float) -> Array:
        """Residuals (n,) of the generalised least-squares fit at this tau / sigma."""
        noise = self.noise(ratio)
        moved, *_ = np.linalg.lstsq(noise.whiten(self.basis), noise.whiten(self.residual), rcond=None)
        return self.residual - self.basis @ moved


def _test(families: Sequence[_Family], law: _Linear, draws: int, seed: int) -> dict[str, Bump | str]:
    columns = np.column_stack([family.columns for family in families])
    ratio, sigma, seen, _ = _studentised(law, columns, law.residual[:, None])
    log_fit = law.log_error - law.without_law(float(ratio[0]))
    noise = law.draws(float(ratio[0]), float(sigma[0]), draws, seed)
    _, _, by_chance, spread = _studentised(law, columns, noise)
    found: dict[str, Bump | str] = {}
    start = 0
    for family in families:
        place = slice(start, start := start + len(family.sizes))
        inner = np.array([bool(sets) for sets in family.around])
        heights = family.heights(law.log_error[:, None])[:, 0]
        t = np.where(heights > 0, seen[place, 0], -np.inf)
        flank = -family.heights(log_fit[:, None] + noise)  # what lifts a size of a draw above its sides
        null = np.where(flank < 0, by_chance[place], -np.inf).max(0)
        worst = int(np.argmax(t))
        limit = max(0.0, float(np.quantile(null, 0.95, method="higher")))
        needed = np.maximum((limit - by_chance[place]) * spread[place], flank)
        visible = np.where(inner, np.quantile(needed, _POWER, axis=1, method="higher"), np.inf)
        easiest = int(np.argmin(visible))
        bump = bool(np.isfinite(t[worst]))
        found[family.subject] = Bump(
            subject=family.subject,
            at=family.sizes[worst] if bump else None,
            height=math.expm1(heights[worst]) if bump else 0.0,
            t=float(t[worst]) if bump else None,
            p=float((1 + np.sum(null >= t[worst])) / (1 + draws)) if bump else 1.0,
            detectable=math.expm1(visible[easiest]) if visible[easiest] < 5 else math.inf,
            detectable_at=family.sizes[easiest],
            num_sizes=len(family.sizes),
            num_slices=family.measured.shape[1],
        )
    return found


def _studentised(law: _Linear, columns: Array, errors: Array) -> tuple[Array, Array, Array, Array]:
    """tau / sigma (B,) and sigma (B,) by REML for log errors (n, B); and for each candidate column (n, S) how far its
    points lie off the law of the others over the standard error, t (S, B), and that standard error (S, B), with
    tau / sigma chosen again in its presence."""
    num_points, num_draws = errors.shape
    free = num_points - law.basis.shape[1]
    best, ratios, sigmas = np.full(num_draws, np.inf), np.zeros(num_draws), np.zeros(num_draws)
    shape = columns.shape[1], num_draws
    best_each, t, spread = np.full(shape, np.inf), np.zeros(shape), np.full(shape, np.inf)
    for ratio in RATIOS:
        noise = law.noise(float(ratio))
        basis, triangle = np.linalg.qr(noise.whiten(law.basis))
        beside = noise.whiten(columns)
        beside = beside - basis @ (basis.T @ beside)
        squared = np.sum(beside**2, axis=0)[:, None]
        whitened = noise.whiten(errors)
        rest = np.maximum(np.sum(whitened**2, axis=0) - np.sum((basis.T @ whitened) ** 2, axis=0), 1e-300)
        volume = noise.log_det() + 2 * float(np.log(np.abs(np.diag(triangle))).sum())
        criterion = free * np.log(rest) + volume
        better = criterion < best
        best[better], ratios[better], sigmas[better] = criterion[better], ratio, np.sqrt(rest[better] / free)
        along = beside.T @ whitened / np.sqrt(np.maximum(squared, 1e-300))
        left = np.maximum(rest - along**2, 1e-300)
        sigma = np.sqrt(left / (free - 1))
        criterion = (free - 1) * np.log(left) + volume + np.log(np.maximum(squared, 1e-300))
        better = (criterion < best_each) & (squared > 1e-9)
        best_each[better], t[better] = criterion[better], (along / sigma)[better]
        spread[better] = (sigma / np.sqrt(np.maximum(squared, 1e-300)))[better]
    return ratios, sigmas, t, spread


def _directions(jacobian: Array) -> Array:
    """An orthonormal basis (n, p) of the directions in which a law can move, without those the data do not determine."""
    norms = np.linalg.norm(jacobian, axis=0)
    left, singular, _ = np.linalg.svd(jacobian[:, norms > 0] / norms[norms > 0], full_matrices=False)
    return left[:, singular > 1e-10 * singular[0]]


def _family(
    subject: str, along: Sequence[str], others: Sequence[str], points: Sequence[Point], start: int, total: int
) -> _Family:
    """Candidates of some points, which stand at ``start`` of ``total`` points; bumps along some dimensions at equal
    values of the others."""
    keys = [tuple(getattr(point, name) for name in (*along, *others)) for point in points]
    sizes = tuple(sorted(set(keys)))
    columns = np.zeros((total, len(sizes)))
    for number, key in enumerate(keys):
        columns[start + number, sizes.index(key)] = 1.0
    table, measured = _table(points, [sizes.index(key) for key in keys], len(sizes), start, total)
    around: list[tuple[tuple[int, ...], ...]] = [()] * len(sizes)
    for _, group in itertools.groupby(sorted(sizes, key=lambda size: size[len(along) :]), lambda s: s[len(along) :]):
        members = [sizes.index(size) for size in group]
        for member, sets in zip(members, _around([sizes[m][: len(along)] for m in members]), strict=True):
            around[member] = tuple(tuple(members[corner] for corner in corners) for corners in sets)
    return _Family(subject, sizes, columns, table, measured, tuple(around))


def _around(sizes: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """For each size, the pairs of others whose segment holds it, and for two dimensions the triangles (in log size)."""
    place = np.log(np.array(sizes, float))
    if place.shape[1] == 1:
        x = place[:, 0]
        below, above = [np.flatnonzero(x < one).tolist() for one in x], [np.flatnonzero(x > one).tolist() for one in x]
        return [list(itertools.product(left, right)) for left, right in zip(below, above, strict=True)]
    step = np.column_stack([np.unique(column, return_inverse=True)[1] for column in place.T])
    return [_holding(place, np.flatnonzero(np.abs(step - step[j]).max(1) <= _NEAR), j) for j in range(len(place))]


def _holding(place: Array, near: NDArray[np.intp], middle: int) -> list[tuple[int, ...]]:
    """Segments and triangles of the points ``near`` that hold the middle one, a point on an edge to the segment only."""
    near = near[near != middle]
    offset = {int(one): place[one] - place[middle] for one in near}

    def turn(one: int, other: int) -> float:
        first, second = offset[one], offset[other]
        sine = (first[0] * second[1] - first[1] * second[0]) / math.hypot(*first) / math.hypot(*second)
        return sine if abs(sine) > 1e-6 else 0.0

    sets: list[tuple[int, ...]] = []
    for pair in itertools.combinations(offset, 2):
        if turn(*pair) == 0 and offset[pair[0]] @ offset[pair[1]] < 0:
            sets.append(pair)
    for one, two, three in itertools.combinations(offset, 3):
        turns = turn(one, two), turn(two, three), turn(three, one)
        if min(turns) > 0 or max(turns) < 0:
            sets.append((one, two, three))
    return sets


def _table(
    points: Sequence[Point], candidate: Sequence[int], num_candidates: int, start: int, total: int
) -> tuple[csr_matrix, NDArray[np.bool_]]:
    """The matrix from log errors to log errors by candidate and slice of equal compute, and which of those exist.

    Slices as in `diagnostics.isocompute`: the durations where their compute agrees, else common points in log t between
    which each run is interpolated. Runs of one candidate are averaged.
    """
    by_duration: dict[str, list[float]] = {}
    for point in points:
        by_duration.setdefault(point.duration, []).append(point.t_gflops)
    weights: dict[tuple[int, int], list[list[tuple[int, float]]]] = {}
    if all(max(ts) <= check.ALIGNED * min(ts) for ts in by_duration.values()):
        slices = {
            name: number for number, name in enumerate(sorted(by_duration, key=lambda name: by_duration[name][0]))
        }
        for number, point in enumerate(points):
            weights.setdefault((candidate[number], slices[point.duration]), []).append([(number, 1.0)])
        count = len(slices)
    else:
        times = np.geomspace(
            min(map(min, by_duration.values())), max(map(max, by_duration.values())), 2 * len(by_duration) + 1
        )
        count = len(times)
        runs: dict[str, list[int]] = {}
        for number in sorted(range(len(points)), key=lambda number: points[number].t_gflops):
            runs.setdefault(points[number].run_id, []).append(number)
        for run in runs.values():
            log_t = np.log([points[number].t_gflops for number in run])
            for piece, time in enumerate(np.log(times)):
                if log_t[0] <= time <= log_t[-1]:
                    share = [float(np.interp(time, log_t, np.arange(len(run)) == one)) for one in range(len(run))]
                    parts = [(number, part) for number, part in zip(run, share, strict=True) if part]
                    weights.setdefault((candidate[run[0]], piece), []).append(parts)
    matrix = lil_matrix((num_candidates * count, total))
    measured = np.zeros((num_candidates, count), dtype=bool)
    for (one, piece), runs_there in weights.items():
        measured[one, piece] = True
        for parts in runs_there:
            for number, part in parts:
                matrix[one * count + piece, start + number] += part / len(runs_there)
    return matrix.tocsr(), measured
