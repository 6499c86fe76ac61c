"""A grid sweep: which shape to start scaling from, and from which compute (SoViT, arXiv 2305.13035, Section 4.2).

The origin is the shape that is best over a range of compute and lies strictly inside the grid in every dimension; t0 is
the smallest compute of that range, which favours larger scaled models. If no such shape exists the grid is to be
extended, and the result says where.
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
from sovit.analysis.points import DIMENSIONS, Dimensions, Exclusion, HasShape, Point, dimensions, plain

SCHEMA = 1


def sweep_kind(shapes: Iterable[HasShape]) -> str:
    """``"star"`` if all shapes differ from one center in at most one dimension, ``"grid"`` if they are a cross product.

    Half of a cross product is enough, for cells may have failed. Raises ValueError if the shapes are neither.
    """
    distinct = {dimensions(shape) for shape in shapes}
    if len(distinct) < 2:
        raise ValueError(f"{len(distinct)} distinct shapes are no sweep; give at least two.")
    values = [sorted({shape[k] for shape in distinct}) for k in range(3)]
    centers = [Dimensions(*choice) for choice in itertools.product(*values)]
    if any(all(len(shape.differs(center)) <= 1 for shape in distinct) for center in centers):
        return "star"
    if 2 * len(distinct) >= len(centers):
        return "grid"
    raise ValueError(
        f"{len(distinct)} shapes are neither a star (one center, one dimension varied at a time) nor half of their "
        f"{len(centers)}-cell cross product; analyse a sweep of one kind at a time."
    )


@dataclass(frozen=True)
class Winner:
    """The best shape of the grid at one compute.

    ``interior``: by dimension, whether it is strictly inside the grid. ``difference``: the runner-up's error minus the
    best one's, with ``difference_se``, its standard error (between seeds where there are several, else of the metric).
    ``complete``: every shape of the grid was measured there.
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


@dataclass(frozen=True)
class Origin:
    """Where scaling starts: the shape, and the compute range over which it is the best. t0_gflops is its low end."""

    width: int
    depth: int
    mlp_dim: int
    t0_gflops: float
    t_hi_gflops: float
    num_slices: int


@dataclass(frozen=True)
class GridFit:
    """``shapes``: every shape's error and t_gflops at the longest duration that most shapes share.

    If no shape qualifies, ``origin`` is None, ``why`` says so and ``extend`` where to extend the grid.
    """

    sweep: str
    metric: dict[str, Any]
    grid: dict[str, tuple[int, ...]]
    shapes: tuple[dict[str, Any], ...]
    winners: tuple[Winner, ...]
    origin: Origin | None
    why: str | None
    extend: tuple[str, ...]
    points: tuple[dict[str, Any], ...]
    excluded: tuple[Exclusion, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the content of fit.json."""
        return {"schema": SCHEMA, "kind": "grid", **plain(self)}

    def write(self, path: Path) -> None:
        records.write_json(path, self.as_dict())


def fit_grid(
    points: Sequence[Point],
    *,
    sweep: str = "",
    dataset: str = "",
    shots: int = 0,
    exclusions: Sequence[Exclusion] = (),
) -> GridFit:
    """The best shape at each compute, and the origin. Raises ValueError if no compute is shared by three shapes."""
    reasons = unusable(points)
    used = [point for point in points if (point.run_id, point.duration) not in reasons]
    slices = isocompute(used, dimensions)
    if not slices:
        raise ValueError(
            "no compute is shared by three shapes of the grid; train the shapes for overlapping durations."
        )
    grid = {name: tuple(sorted({getattr(point, name) for point in points})) for name in DIMENSIONS}
    num_shapes = len({dimensions(point) for point in points})
    winners = tuple(_winner(piece, grid, num_shapes) for piece in slices)
    origin = _origin(winners)
    extend = () if origin else _extend(winners, grid)
    why = None
    if origin is None:
        why = "no shape strictly inside the grid is the best at two neighbouring computes"
    warnings = []
    close = sum(winner.difference <= winner.difference_se for winner in winners)
    if close:
        warnings.append(f"the best shape leads its runner-up by less than a standard error at {_of(close, winners)}")
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
    metric = {"dataset": dataset, "shots": shots}
    return GridFit(sweep, metric, grid, shapes, winners, origin, why, extend, rows, tuple(exclusions), tuple(warnings))


def _of(count: int, winners: Sequence[Winner]) -> str:
    return f"{count} of {len(winners)} computes"


def _winner(piece: Slice, grid: Mapping[str, tuple[int, ...]], num_shapes: int) -> Winner:
    order = piece.errors.argsort(kind="stable")
    first, second = int(order[0]), int(order[1])
    best, runner_up = piece.sizes[first], piece.sizes[second]
    return Winner(
        t_gflops=piece.t_gflops,
        best=best._asdict(),
        error=float(piece.errors[first]),
        interior={name: grid[name][0] < getattr(best, name) < grid[name][-1] for name in DIMENSIONS},
        runner_up=runner_up._asdict(),
        difference=float(piece.errors[second] - piece.errors[first]),
        difference_se=math.hypot(piece.spreads[first], piece.spreads[second]),
        num_shapes=len(piece.sizes),
        complete=len(piece.sizes) == num_shapes,
    )


def _origin(winners: Sequence[Winner]) -> Origin | None:
    """The interior shape that stays the best over the widest range of compute, of at least two neighbouring slices."""
    found = None
    for _, group in itertools.groupby(winners, key=lambda winner: winner.best):
        streak = list(group)
        low, high = streak[0].t_gflops, streak[-1].t_gflops
        if len(streak) < 2 or not all(streak[0].interior.values()):
            continue
        if found is None or high / low > found.t_hi_gflops / found.t0_gflops:
            found = Origin(**streak[0].best, t0_gflops=low, t_hi_gflops=high, num_slices=len(streak))
    return found


def _extend(winners: Sequence[Winner], grid: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """A sentence for each side of the grid at which a winner sits, most frequent first."""
    sides = Counter(
        (name, "smallest" if winner.best[name] == grid[name][0] else "largest")
        for winner in winners
        for name, inside in winner.interior.items()
        if not inside
    )
    sentences = []
    for (name, side), count in sides.most_common():
        direction, value = ("below", grid[name][0]) if side == "smallest" else ("above", grid[name][-1])
        sentences.append(
            f"extend the grid {direction} {name} {value}: the best shape has the {side} {name} at {_of(count, winners)}"
        )
    return tuple(sentences)
