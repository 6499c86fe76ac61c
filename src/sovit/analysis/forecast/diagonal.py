"""A diagonal sweep: how far to go along the star's direction for a given compute.

A star gives the directions in which the dimensions grow, but each with the others frozen. How far to go when all of them
share one budget it cannot say: the published rule takes 1/D of the way (SoViT, arXiv 2305.13035, Section 3). Here the
origin x0 is scaled jointly along a direction d,

    x_k = x0_k G^d_k,

each shape is trained at several durations, and Eq. 2 is fitted with x = G. The exponent of that fit is the *step* g: the
best G grows as t^g, so x_k grows as t^(g d_k). The measured anchor G*(t) also corrects an origin that was not optimal.

What a step means depends on the direction's length. Only if d holds the star's exponents s_k is g to be compared with
the paper's 1/D. Twice the direction has half the step; the growth exponents g d_k stay the same. By default the
direction is deduced from the shapes themselves and scaled to a sum of 1, so that G is the product of the three ratios
x_k / x0_k; the paper's rule then has the step (s_width + s_depth + s_mlp_dim) / D. `step_along` converts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sovit import records
from sovit.analysis import diagnostics as check
from sovit.analysis import star
from sovit.analysis.intervals import Interval, fit_with_runs, index_runs
from sovit.analysis.law import Law
from sovit.analysis.planning.information import Spread, exponent_gradient, information, optimum_gradient, variance
from sovit.analysis.points import DIMENSIONS, Dimensions, Exclusion, HasShape, Point, dimensions, plain
from sovit.analysis.scale import ERROR, Scale

SCHEMA = 1
_STRAIGHT = 0.97  # share of the shapes' log variance along their line; rounding takes below 1%, a bend more
HELD_OUT = 1.9  # the largest budgets: two of a progression by sqrt 2
AnyPoint = TypeVar("AnyPoint", bound=Point)


@dataclass(frozen=True)
class ScaledPoint(Point):
    """A point of a diagonal sweep, with its place ``g`` on the line (1 at the origin)."""

    g: float


def is_diagonal(shapes: Iterable[HasShape]) -> bool:
    """Whether the shapes grow in all three dimensions together, along one line in log space.

    From the smallest to the largest shape no dimension shrinks and each grows; the steps may be rounded.
    """
    distinct = sorted({dimensions(shape) for shape in shapes})
    if len(distinct) < 3:
        return False
    log_x = np.log(np.array(distinct, float))
    if np.any(np.diff(log_x, axis=0) < 0) or np.any(log_x[-1] <= log_x[0]):
        return False
    singular = np.linalg.svd(log_x - log_x.mean(0), compute_uv=False)
    return bool(singular[0] ** 2 >= _STRAIGHT * np.sum(singular**2))


def principal_direction(shapes: Iterable[HasShape]) -> dict[str, float]:
    """The direction of the line through the shapes in log space, by principal components, scaled to a sum of 1.

    Raises ValueError if the shapes are no diagonal.
    """
    distinct = sorted({dimensions(shape) for shape in shapes})
    if not is_diagonal(distinct):
        raise ValueError(
            f"{', '.join(map(str, distinct[:4]))}, ... are no diagonal sweep: all three dimensions must grow together "
            "from shape to shape, along one line in log space."
        )
    log_x = np.log(np.array(distinct, float))
    line = np.linalg.svd(log_x - log_x.mean(0))[2][0]
    return dict(zip(DIMENSIONS, map(float, line / line.sum()), strict=True))


def place(shape: HasShape, direction: Mapping[str, float], origin: HasShape) -> float:
    """G of a shape: least squares of log (x / x0) on the direction."""
    along = np.array([direction[name] for name in DIMENSIONS])
    log_ratio = np.log(np.array(dimensions(shape), float)) - np.log(np.array(dimensions(origin), float))
    return math.exp(float(along @ log_ratio / (along @ along)))


def star_direction(fit: Mapping[str, Any]) -> dict[str, float]:
    """The direction that a star's fit.json gives: its exponents. Raises ValueError if one is not identified."""
    if fit.get("kind") != "star":
        raise ValueError(f"a fit of kind {fit.get('kind')!r} has no star's exponents; give the fit.json of a star.")
    open_arms = [name for name in DIMENSIONS if not (fit["arms"].get(name) or {}).get("s")]
    if open_arms:
        raise ValueError(f"{fit['sweep']} does not identify {' and '.join(open_arms)}; give the direction's exponents.")
    return {name: float(fit["arms"][name]["s"]["estimate"]) for name in DIMENSIONS}


def grid_origin(fit: Mapping[str, Any]) -> Dimensions:
    """The origin that a grid's fit.json names. Raises ValueError if it names none."""
    if fit.get("kind") != "grid":
        raise ValueError(f"a fit of kind {fit.get('kind')!r} has no origin; give the fit.json of a grid.")
    if not fit["origin"]:
        raise ValueError(f"{fit['sweep']} has no origin ({fit['why']}); give the shape.")
    return Dimensions(*(int(fit["origin"][name]) for name in DIMENSIONS))


def step_along(step: float, direction: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The step along ``other`` that grows the dimensions as ``step`` does along ``direction`` (least squares over k).

    The growth exponents step * direction_k are what the two have in common. With the star's exponents as ``other`` the
    result is to be compared with the published 1/D.
    """
    one, two = (np.array([given[name] for name in DIMENSIONS]) for given in (direction, other))
    return step * float(one @ two / (two @ two))


@dataclass(frozen=True)
class HeldOut:
    """One of the largest budgets, predicted from the smaller ones, of which ``fitted_up_to`` is the largest.

    ``rms``, ``bias``: of log measured - log predicted error over its shapes. ``predicted_g``: the law's optimum there;
    ``measured_g``: the minimum of a parabola through the measured errors; ``excess``: by what share the parabola's
    error at the predicted G is above its minimum (None where it has no minimum inside).
    """

    t_gflops: float
    fitted_up_to: float
    num_points: int
    rms: float
    bias: float
    predicted_g: float | None
    measured_g: float | None
    excess: float | None


@dataclass(frozen=True)
class DiagonalFit:
    """The fitted step. ``step`` is None, and ``why`` says so, unless the data identify it.

    ``anchor``: G*(t) at the points' mean log t, with its log standard error and the correlation with that of the step
    (log_se); the optimum at T is x0_k G^d_k with G = anchor.g (T / anchor.t_gflops)^step. ``arm``: everything that is
    known of the fit along G, as of an arm of a star.
    """

    sweep: str
    metric: dict[str, Any]
    level: float
    direction: dict[str, float]
    direction_from: str
    origin: dict[str, int]
    step: Interval | None
    why: str | None
    log_se: float | None
    num_runs: int
    anchor: dict[str, float] | None
    law: Law | None
    minima: tuple[star.Minimum, ...]
    held_out: tuple[HeldOut, ...]
    arm: star.ArmFit
    points: tuple[dict[str, Any], ...]
    excluded: tuple[Exclusion, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the content of fit.json; an open end of an interval is null above and 0 below."""
        return {"schema": SCHEMA, "kind": "diagonal", **plain(self)}

    def write(self, path: Path) -> None:
        records.write_json(path, self.as_dict())


def fit_diagonal(
    points: Sequence[Point],
    *,
    direction: Mapping[str, float] | None = None,
    origin: HasShape | None = None,
    sweep: str = "",
    dataset: str = "",
    shots: int = 0,
    exclusions: Sequence[Exclusion] = (),
    level: float = 0.95,
    scale: Scale = ERROR,
    cutoffs: Sequence[float] | None = None,
    headline: float | None = None,
    weights: str = "equal",
) -> DiagonalFit:
    """Fit the step along a diagonal.

    ``direction``: exponent of each dimension, the star's s_k to make the step comparable with the paper's 1/D; deduced
    from the shapes, with a sum of 1, if not given (`star_direction` reads a star's fit). ``origin``: the shape at
    G = 1, the smallest if not given (`grid_origin` reads a grid's fit); it moves G, not the step. Options as of
    `star.fit_star`. Raises ValueError if the shapes are no diagonal, or an argument has no meaning.
    """
    deduced = principal_direction(points)
    if direction is None:
        along, source = deduced, "shapes"
    else:
        along, source = _checked(direction), "given"
    start = dimensions(origin) if origin is not None else min(dimensions(point) for point in points)
    scaled = [ScaledPoint(**_fields(point), g=place(point, along, start)) for point in points]
    cutoffs = scale.cutoffs if cutoffs is None else cutoffs
    headline = scale.headline if headline is None else headline
    reasons = check.unusable(scaled, scale)
    usable = [point for point in scaled if (point.run_id, point.duration) not in reasons]
    arm = star.fit_arm("g", usable, [], sorted(cutoffs, reverse=True), headline, level, weights, value=scale.name)
    used = [point for point in usable if point.error <= headline]
    warnings = [*arm.warnings, *_mismatch(along, deduced)]
    if exclusions:
        warnings.append(f"{len(exclusions)} runs of the sweep are left out")
    rows = []
    for point in scaled:
        why_not = reasons.get((point.run_id, point.duration))
        if why_not is None and point.error > headline:
            why_not = f"{scale.name} {point.error:.3g} is above the cut-off {headline:g}"
        rows.append(plain(point) | {"arm": "g", "used": why_not is None, "why_not": why_not})
    return DiagonalFit(
        sweep=sweep,
        metric={"dataset": dataset, "shots": shots},
        level=level,
        direction=along,
        direction_from=source,
        origin=start._asdict(),
        step=arm.s,
        why=arm.why,
        log_se=arm.log_se,
        num_runs=arm.num_runs,
        anchor=_anchor(used, arm) if arm.identified else None,
        law=arm.law,
        minima=arm.minima,
        held_out=_held_out(used, weights),
        arm=arm,
        points=tuple(rows),
        excluded=tuple(exclusions),
        warnings=tuple(warnings),
    )


def _fields(point: Point) -> dict[str, Any]:
    return {field.name: getattr(point, field.name) for field in dataclasses.fields(Point)}


def _checked(direction: Mapping[str, float]) -> dict[str, float]:
    if set(direction) != set(DIMENSIONS):
        raise ValueError(
            f"the direction names {', '.join(direction)}; give one exponent each for {', '.join(DIMENSIONS)}."
        )
    for name, value in direction.items():
        if not 0 < value < math.inf:
            raise ValueError(f"the direction's {name}={value} is not above 0; a diagonal grows in every dimension.")
    return {name: float(direction[name]) for name in DIMENSIONS}


def _mismatch(direction: Mapping[str, float], deduced: Mapping[str, float]) -> list[str]:
    """A warning if the shapes lie along another line than the direction they are measured by."""
    one, two = (np.array([given[name] for name in DIMENSIONS]) for given in (direction, deduced))
    cosine = float(one @ two / math.sqrt((one @ one) * (two @ two)))
    if cosine > math.cos(math.radians(15)):
        return []
    angle = math.degrees(math.acos(min(cosine, 1.0)))
    return [f"the shapes lie along a line {angle:.0f} degrees off the direction given; the step is that of the shapes"]


def _anchor(used: Sequence[ScaledPoint], arm: star.ArmFit) -> dict[str, float] | None:
    """G* at the points' mean log t, how sure it is, and how its log error correlates with that of the step."""
    law = arm.law
    if law is None or not (law.alpha and law.beta):
        return None
    x, t, _, runs = check.vectors("g", used)
    units = math.exp(float(np.log(x).mean())), math.exp(float(np.log(t).mean()))
    spread = Spread(min(max(arm.sigma or 0.0, 1e-12), 0.99), min(arm.tau or 0.0, 0.99))
    matrix = information(law, spread, x, t, index_runs(runs), units)
    place, slope = optimum_gradient(law, units[1], units), exponent_gradient(law)
    one, two = math.sqrt(variance(matrix, place)), math.sqrt(variance(matrix, slope))
    both = variance(matrix, place / one + slope / two) if math.isfinite(one) and math.isfinite(two) else math.nan
    return {
        "t_gflops": units[1],
        "g": float(law.optimum(units[1])),
        "log_se": one,
        "correlation": both / 2 - 1,
    }


def hold_out(points: Sequence[AnyPoint]) -> tuple[list[AnyPoint], list[AnyPoint]]:
    """(points of the smaller budgets, points of the largest ones: within a factor 1.9 of the largest compute)."""
    largest = max(point.t_gflops for point in points)
    late = [point for point in points if point.t_gflops > largest / HELD_OUT]
    return [point for point in points if point.t_gflops <= largest / HELD_OUT], late


def _held_out(used: Sequence[ScaledPoint], weights: str) -> tuple[HeldOut, ...]:
    """The largest budgets, predicted by a fit of the smaller ones; none if too few of those are left."""
    early, late = hold_out(used) if used else ([], [])
    if check.too_few("g", early):
        return ()
    law = fit_with_runs(*check.vectors("g", early), scale=check.scales(early, weights)).fit.law
    rows = []
    for piece in check.isocompute(late, check.size_along("g")):
        g = np.array(piece.sizes, float)
        residuals = np.log(piece.errors / law.error(g, piece.t_gflops))
        predicted = float(law.optimum(piece.t_gflops)) if law.alpha and law.beta else None
        measured = check.parabola_minimum(piece)
        excess = None
        if predicted is not None and measured is not None:
            curvature = np.polyfit(np.log(g), np.log(piece.errors), 2)[0]
            excess = math.expm1(curvature * math.log(predicted / measured) ** 2)
        rows.append(
            HeldOut(
                t_gflops=piece.t_gflops,
                fitted_up_to=max(point.t_gflops for point in early),
                num_points=len(g),
                rms=float(np.sqrt(np.mean(residuals**2))),
                bias=float(residuals.mean()),
                predicted_g=predicted,
                measured_g=measured,
                excess=excess,
            )
        )
    return tuple(rows)
