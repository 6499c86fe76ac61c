"""A grid sweep: which shape to start scaling from, and from which compute (SoViT, arXiv 2305.13035, Section 4.2).

The origin is the shape that is best over a range of compute and lies strictly inside the grid in every dimension; t0 is
the smallest compute of that range, which favours larger scaled models. If no such shape exists the grid is to be
extended, and the result says where. What is best is judged on errors smoothed over the shapes, and how sure that is
stands beside it as a share (`sovit.analysis.frontier`); the shape that measured best is reported as well.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import records
from sovit.analysis.diagnostics import Slice, isocompute, unusable
from sovit.analysis.frontier import Scatter, Surfaces, frontier, surfaces
from sovit.analysis.points import (
    DIMENSIONS,
    Dimensions,
    Exclusion,
    HasShape,
    Point,
    dimensions,
    load_points,
    metrics,
    plain,
)
from sovit.analysis.scale import ERROR, Scale

SCHEMA = 1
MAX_RUNNERS = 5
NEAR_TIE = 0.1  # share of draws that elect a shape at the side of the grid, from which that is said
Grid = Mapping[str, tuple[int, ...]]


def sweep_kind(shapes: Iterable[HasShape]) -> str:
    """``"star"`` if all shapes differ from one center in at most one dimension, ``"grid"`` if they are a cross product.

    Half of a cross product is enough, for cells may have failed. Raises ValueError if the shapes are neither.
    """
    distinct = {dimensions(shape) for shape in shapes}
    if len(distinct) < 2:
        raise ValueError(f"{len(distinct)} distinct shapes are no sweep; give at least two.")
    kind = type(next(iter(distinct)))
    values = [sorted({shape[k] for shape in distinct}) for k in range(len(kind._fields))]
    centers = [kind(*choice) for choice in itertools.product(*values)]
    if any(all(len(shape.differs(center)) <= 1 for shape in distinct) for center in centers):
        return "star"
    if 2 * len(distinct) >= len(centers):
        return "grid"
    raise ValueError(
        f"{len(distinct)} shapes are neither a star (one center, one dimension varied at a time) nor half of their "
        f"{len(centers)}-cell cross product; analyse a sweep of one kind at a time."
    )


@dataclass(frozen=True)
class Runner:
    """A shape that is the best in a share of the draws, and whether it lies strictly inside the grid."""

    width: int
    depth: int
    mlp_dim: int
    share: float
    inside: bool


@dataclass(frozen=True)
class Winner:
    """The best shape of the grid at one compute: as measured, and of the smoothed errors.

    ``interior``: by dimension, whether the measured best is strictly inside the grid. ``difference``: the runner-up's
    error minus the best one's, with ``difference_se``, its standard error (between seeds where there are several, else
    of the metric). ``complete``: every shape of the grid was measured there. ``smooth``: the best of the smoothed
    errors. ``share``, ``smooth_share``: of the draws in which these two are the best, None without a surface;
    ``runners``: the shapes that most draws elect.
    """

    t_gflops: float
    best: dict[str, int]
    error: float
    interior: dict[str, bool]
    runner_up: dict[str, int]
    difference: float
    difference_se: float
    num_shapes: int
    complete: bool
    share: float | None
    smooth: dict[str, int]
    smooth_share: float | None
    runners: tuple[Runner, ...]


@dataclass(frozen=True)
class Origin:
    """Where scaling starts: the shape, and the compute range over which it is the best. t0_gflops is its low end.

    ``share`` of the draws in which this shape is the origin; None without a surface.
    """

    width: int
    depth: int
    mlp_dim: int
    t0_gflops: float
    t_hi_gflops: float
    num_slices: int
    share: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A shape and t0 that are the origin in a share of the draws."""

    width: int
    depth: int
    mlp_dim: int
    t0_gflops: float
    share: float


@dataclass(frozen=True)
class Shots:
    """What the grid says at another number of shots. ``same``: the same origin, or none in both cases.

    ``num_same`` of ``num_slices`` computes elect the same shape (of the smoothed errors).
    """

    shots: int
    origin: Origin | None
    same: bool
    num_same: int
    num_slices: int


@dataclass(frozen=True)
class GridFit:
    """``shapes``: every shape's error and t_gflops at the longest duration that most shapes share.

    If no shape qualifies, ``origin`` is None, ``why`` says so and ``extend`` where to extend the grid. ``origins``: what
    the draws elect, most frequent first; what is missing of a share of 1 elects none. ``frontier``: the points that no
    other beats in both error and compute. ``agreement``: the other numbers of shots, if they were given.
    """

    sweep: str
    metric: dict[str, Any]
    grid: dict[str, tuple[int, ...]]
    shapes: tuple[dict[str, Any], ...]
    winners: tuple[Winner, ...]
    origin: Origin | None
    origins: tuple[Drawn, ...]
    why: str | None
    extend: tuple[str, ...]
    frontier: tuple[dict[str, Any], ...]
    agreement: tuple[Shots, ...]
    noise: Scatter | None
    points: tuple[dict[str, Any], ...]
    excluded: tuple[Exclusion, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the content of fit.json."""
        return {"schema": SCHEMA, "kind": "grid", **plain(self)}

    def write(self, path: Path) -> None:
        records.write_json(path, self.as_dict())


def load_shots(sweep_dir: str | Path, dataset: str, *, retried: bool = False) -> dict[int, list[Point]]:
    """The points of every number of shots that all finished runs of a sweep hold for a data set, for `fit_grid`.

    ``retried`` as in `load_points`. Raises what `load_points` raises.
    """
    held = [shots for name, shots in metrics(sweep_dir, retried=retried) if name == dataset]
    return {shots: load_points(sweep_dir, dataset, shots, retried=retried)[0] for shots in held}


def fit_grid(
    points: Sequence[Point],
    *,
    sweep: str = "",
    dataset: str = "",
    shots: int = 0,
    exclusions: Sequence[Exclusion] = (),
    by_shots: Mapping[int, Sequence[Point]] | None = None,
    scale: Scale = ERROR,
) -> GridFit:
    """The frontier, the best shape at each compute, and the origin.

    ``by_shots``: the same runs at every number of shots (`load_shots`), to see whether they agree. Raises ValueError if
    no compute is shared by three shapes.
    """
    reasons = unusable(points, scale)
    used = [point for point in points if (point.run_id, point.duration) not in reasons]
    slices = isocompute(used, dimensions)
    if not slices:
        raise ValueError(
            "no compute is shared by three shapes of the grid; train the shapes for overlapping durations."
        )
    grid = {name: tuple(sorted({getattr(point, name) for point in points})) for name in DIMENSIONS}
    num_shapes = len({dimensions(point) for point in points})
    smoothed = surfaces(used, slices)
    winners = tuple(_winner(piece, grid, num_shapes, smoothed, k) for k, piece in enumerate(slices))
    origin, origins = _origin(winners, grid, smoothed)
    warnings = [*_sureness(winners, smoothed), *_near_ties(winners, origin, grid, smoothed)]
    others = [(other, group) for other, group in sorted((by_shots or {}).items()) if other != shots]
    agreement = tuple(_agree(other, group, winners, origin) for other, group in others)
    if any(not row.same for row in agreement):
        said = [f"{row.shots} shots: {_named(row.origin)}" for row in agreement]
        here = f"the origin is {_named(origin)} at {shots} shots, but not at every number of shots"
        warnings.append(f"{here} ({', '.join(said)})")
    partial = sum(not winner.complete for winner in winners)
    if partial:
        warnings.append(f"some shapes of the grid were not measured at {_of(partial, winners)}")
    rows = tuple(
        plain(point) | {"used": key not in reasons, "why_not": reasons.get(key)}
        for point, key in ((point, (point.run_id, point.duration)) for point in points)
    )
    full = max(slices, key=lambda piece: (len(piece.sizes), piece.t_gflops))
    shapes = tuple(
        shape._asdict() | {"t_gflops": full.t_gflops, "error": float(error), "stderr": float(stderr)}
        for shape, error, stderr in zip(full.sizes, full.errors, full.spreads, strict=True)
    )
    return GridFit(
        sweep=sweep,
        metric={"dataset": dataset, "shots": shots},
        grid=grid,
        shapes=shapes,
        winners=winners,
        origin=origin,
        origins=origins,
        why=None if origin else "no shape strictly inside the grid is the best at two neighbouring computes",
        extend=() if origin else _extend(winners, grid),
        frontier=frontier(used),
        agreement=agreement,
        noise=smoothed.scatter,
        points=rows,
        excluded=tuple(exclusions),
        warnings=tuple(warnings),
    )


def _of(count: int, winners: Sequence[Winner]) -> str:
    return f"{count} of {len(winners)} computes"


def _inside(shape: Mapping[str, int], grid: Grid) -> dict[str, bool]:
    return {name: grid[name][0] < shape[name] < grid[name][-1] for name in DIMENSIONS}


def _winner(piece: Slice, grid: Grid, num_shapes: int, smoothed: Surfaces, k: int) -> Winner:
    order = piece.errors.argsort(kind="stable")
    first, second = int(order[0]), int(order[1])
    best, runner_up = piece.sizes[first], piece.sizes[second]
    shares, smooth = smoothed.shares(k), smoothed.best(k)
    electable = list(shares.items())[:MAX_RUNNERS] if shares else []
    return Winner(
        t_gflops=piece.t_gflops,
        best=best._asdict(),
        error=float(piece.errors[first]),
        interior=_inside(best._asdict(), grid),
        runner_up=runner_up._asdict(),
        difference=float(piece.errors[second] - piece.errors[first]),
        difference_se=math.hypot(piece.spreads[first], piece.spreads[second]),
        num_shapes=len(piece.sizes),
        complete=len(piece.sizes) == num_shapes,
        share=shares.get(best, 0.0) if shares else None,
        smooth=smooth._asdict(),
        smooth_share=shares.get(smooth, 0.0) if shares else None,
        runners=tuple(
            Runner(*shape, share, all(_inside(shape._asdict(), grid).values())) for shape, share in electable
        ),
    )


def _streak(best: Sequence[Dimensions], t: Sequence[float], grid: Grid) -> tuple[Dimensions, int, int] | None:
    """(shape, first slice, last slice) of the interior shape that stays the best over the widest range of compute.

    At least two neighbouring slices; the first of several as wide.
    """
    found, widest, first = None, 0.0, 0
    for shape, group in itertools.groupby(best):
        last = first + len(list(group)) - 1
        if last > first and all(_inside(shape._asdict(), grid).values()) and t[last] / t[first] > widest * (1 + 1e-9):
            found, widest = (shape, first, last), t[last] / t[first]
        first = last + 1
    return found


def _origin(winners: Sequence[Winner], grid: Grid, smoothed: Surfaces) -> tuple[Origin | None, tuple[Drawn, ...]]:
    """The origin by the smoothed errors, and those of the draws."""
    t = [winner.t_gflops for winner in winners]
    drawn: Counter[tuple[Dimensions, float]] = Counter()
    for row, count in Counter(map(tuple, smoothed.winners.tolist())).items():
        if streak := _streak([smoothed.shapes[i] for i in row], t, grid):
            drawn[streak[0], t[streak[1]]] += count
    num = len(smoothed.winners)
    origins = tuple(Drawn(*shape, t0, count / num) for (shape, t0), count in drawn.most_common())
    streak = _streak([Dimensions(**winner.smooth) for winner in winners], t, grid)
    if streak is None:
        return None, origins
    shape, first, last = streak
    share = sum(count for (other, _), count in drawn.items() if other == shape) / num if smoothed.scatter else None
    return Origin(*shape, t[first], t[last], last - first + 1, share), origins if smoothed.scatter else ()


def _extend(winners: Sequence[Winner], grid: Grid) -> tuple[str, ...]:
    """A sentence for each side of the grid at which the best of the smoothed errors sits, most frequent first."""
    flat = [name for name in DIMENSIONS if len(grid[name]) < 3]
    sides = Counter(
        (name, "smallest" if winner.smooth[name] == grid[name][0] else "largest")
        for winner in winners
        for name, inside in _inside(winner.smooth, grid).items()
        if not inside and name not in flat
    )
    sentences = [
        f"give the grid at least three values of {name}: with {len(grid[name])} no shape lies strictly inside it"
        for name in flat
    ]
    for (name, side), count in sides.most_common():
        direction, value = ("below", grid[name][0]) if side == "smallest" else ("above", grid[name][-1])
        where = f"the best shape has the {side} {name} at {_of(count, winners)}"
        if value == 1 and side == "smallest":
            sentences.append(f"train for longer: {where}, and there is no {name} below 1")
        else:
            sentences.append(f"extend the grid {direction} {name} {value}: {where}")
    return tuple(sentences)


def _sureness(winners: Sequence[Winner], smoothed: Surfaces) -> list[str]:
    """How close the decisions are."""
    texts = []
    close = sum(winner.difference <= winner.difference_se for winner in winners)
    if close:
        texts.append(f"the best shape leads its runner-up by less than a standard error at {_of(close, winners)}")
    different = sum(winner.smooth != winner.best for winner in winners)
    if different:
        texts.append(
            f"the shape that measured best is not the best of the errors smoothed over the shapes at "
            f"{_of(different, winners)}; the origin follows the smoothed ones, as the lowest of many errors is low by luck"
        )
    if smoothed.scatter is None:
        texts.append(
            f"{len(smoothed.shapes)} shapes are too few to smooth their errors; how sure the best is stays open"
        )
    return texts


def _near_ties(winners: Sequence[Winner], origin: Origin | None, grid: Grid, smoothed: Surfaces) -> list[str]:
    """A sentence if shapes at a side of the grid come near the origin within its range of compute."""
    if origin is None:
        return []
    texts = []
    inside = [k for k, w in enumerate(winners) if origin.t0_gflops <= w.t_gflops <= origin.t_hi_gflops]
    rivals: Counter[Dimensions] = Counter()
    for k in inside:
        rivals.update(smoothed.shares(k) or {})
    for name in DIMENSIONS:
        for value, direction in ((grid[name][0], "below"), (grid[name][-1], "above")):
            edge = {shape: share / len(inside) for shape, share in rivals.items() if getattr(shape, name) == value}
            share = sum(edge.values())
            if share >= NEAR_TIE:
                most = max(edge, key=lambda shape: edge[shape])
                mend = "train for longer" if value == 1 else f"extend the grid {direction} {name} {value}"
                texts.append(
                    f"a near-tie at the edge: in {share:.0%} of the draws a shape with {name} {value}, most often {most}, "
                    f"beats the origin {_named(origin)}; to be sure, {mend}"
                )
    return texts


def _agree(shots: int, points: Sequence[Point], winners: Sequence[Winner], origin: Origin | None) -> Shots:
    other = fit_grid(points, shots=shots)
    best = {winner.t_gflops: winner.smooth for winner in winners}
    shared = [winner for winner in other.winners if winner.t_gflops in best]
    num_same = sum(winner.smooth == best[winner.t_gflops] for winner in shared)
    return Shots(shots, other.origin, _named(other.origin) == _named(origin), num_same, len(shared))


def _named(origin: Origin | None) -> str:
    return f"{origin.width}x{origin.depth}x{origin.mlp_dim}" if origin else "none"
