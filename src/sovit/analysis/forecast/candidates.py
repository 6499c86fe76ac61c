"""Whole shapes near a predicted optimum: hardware-friendly sizes, what they cost, and what the rounding wastes.

The first candidate is the rule's own rounding, nearest multiple by nearest multiple, as the published shapes are
multiples of 16. The others are what runs well: widths and MLP dimensions in multiples of 64 and 128, and widths that are
whole numbers of heads of a usual dimension. Of all shapes with such multiples each is the nearest, by compute regret
where laws are known, else by distance in the logarithms of the sizes.

Compute regret of a shape at budget T: it reaches the error that the unrounded optimum reaches with T' < T, so a share
1 - T'/T is wasted. The laws of a star know one dimension at a time, with the others at the center, so there

    regret = 1 - exp(-sum_k delta_k / eta_k),  delta_k = log(f_k(q_k x_k*, t) / f_k(x_k*, t)),  eta_k = -d log f_k* / d log t

with q_k the shape's ratio to the predicted optimum, f_k the law of arm k (Eq. 2), x_k* its optimum, and t the largest
compute the star measured (or T, if less): curvature and slope come from where there are data. Terms add up as in the
paper's separable law (Eq. 3). Where a joint law is given, T' is solved for exactly, against that law's own optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import brentq

from sovit.analysis.forecast.exponents import Sizes, largest_compute
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Dimensions
from sovit.flops import forward_gflops, num_params
from sovit.shape import Shape

TINY_WIDTH = 192  # of Ti, the smallest published model: below it the usual multiples are too coarse
STEPS, HEAD_DIMS = (16, 64, 128), (64, 72, 80, 96, 128)
TINY_STEPS, TINY_HEAD_DIMS = (8, 16, 32), (4, 8, 16, 32)
RULE = "the rule"  # begins the label of its own rounding
NUM_HEADS = 16  # at every width of the published sweeps
Regret = Callable[[Sequence[float]], float]

OPTIONS = (
    "pos_embed",
    "block",
    "qk_norm",
    "qkv_bias",
    "norm",
)  # of the model: they change its parameters, not its FLOPs


@dataclass(frozen=True)
class Rounding:
    """How sizes become whole. ``steps``: multiples of width and MLP dimension, fine to coarse.

    The rule's own rounding uses ``width``, ``depth`` and ``mlp_dim``. Heads: ``num_heads`` or ``head_dim`` if they are
    settled, else ``usual_heads`` for the rule's rounding and ``head_dims`` for the others. Raises ValueError if both are
    settled.
    """

    width: int
    depth: int
    mlp_dim: int
    steps: tuple[int, ...]
    head_dims: tuple[int, ...]
    usual_heads: int = NUM_HEADS
    num_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads and self.head_dim:
            raise ValueError(f"heads={self.num_heads} and head_dim={self.head_dim}: give one of the two.")

    def grain(self, step: int, head_dim: int | None = None) -> int:
        """What a width has to be a multiple of."""
        return math.lcm(step, self.head_dim or head_dim or self.num_heads or 1)


def rounding(
    optimum: Sizes,
    *,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    usual_heads: int = NUM_HEADS,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> Rounding:
    """The rounding for a shape of this size: multiples of 16, 64 and 128, or 8, 16 and 32 for a tiny one."""
    steps, head_dims = (TINY_STEPS, TINY_HEAD_DIMS) if optimum[0] < TINY_WIDTH else (STEPS, HEAD_DIMS)
    fine = steps[0]
    return Rounding(width or fine, depth or 1, mlp_dim or fine, steps, head_dims, usual_heads, num_heads, head_dim)


@dataclass(frozen=True)
class Candidate:
    """A whole shape. ``label``: what its sizes are multiples of; ``heads``: (number, dimension) that fit its width.

    The first heads are those meant. ``images``: to train on within the budget; ``regret``: share of compute wasted; None
    where unknown. ``off``: by dimension, the size over the unrounded one, less 1.
    """

    width: int
    depth: int
    mlp_dim: int
    label: str
    heads: tuple[tuple[int, int], ...]
    num_params: int
    forward_gflops: float
    images: float | None
    regret: float | None
    off: Sizes

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions(self.width, self.depth, self.mlp_dim)

    def shape(self, patch_size: int) -> Shape:
        return Shape(self.width, self.depth, self.mlp_dim, self.heads[0][0], patch_size)


def candidates(
    optimum: Sizes,
    how: Rounding,
    geometry: Mapping[str, Any],
    *,
    target: float | None = None,
    regret: Regret | None = None,
) -> tuple[Candidate, ...]:
    """The rule's rounding, then the others by regret (or by distance).

    ``geometry``: image_size, channels, pool, num_classes, patch_size, and any of OPTIONS; ``target``: T in GFLOPs.
    """
    score = regret or (lambda shape: _distance(shape, optimum))
    first = Dimensions(
        nearest(optimum[0], how.grain(how.width)), nearest(optimum[1], how.depth), nearest(optimum[2], how.mlp_dim)
    )
    multiples: dict[Dimensions, list[int]] = {}
    for step in how.steps[1:]:
        multiples.setdefault(best_near(optimum, (how.grain(step), how.depth, step), score), []).append(step)
    in_heads: dict[Dimensions, list[int]] = {}
    for head_dim in () if how.num_heads or how.head_dim else how.head_dims:
        grains = (how.grain(how.steps[0], head_dim), how.depth, how.steps[-1])
        in_heads.setdefault(best_near(optimum, grains, score), []).append(head_dim)
    labels = {shape: f"heads of {' or '.join(map(str, found))}" for shape, found in in_heads.items()}
    labels |= {shape: f"multiples of {max(found)}" for shape, found in multiples.items()}
    labels[first] = "; ".join((f"{RULE}, rounded", *filter(None, (labels.get(first),))))
    ordered = [first, *sorted((shape for shape in labels if shape != first), key=score)]
    return tuple(candidate(shape, labels[shape], optimum, how, geometry, target, regret) for shape in ordered)


def nearest(value: float, step: int) -> int:
    """The multiple of ``step`` nearest to a value, at least one step."""
    return max(step, step * math.floor(value / step + 0.5))


def best_near(optimum: Sizes, grains: Sequence[int], score: Callable[[Dimensions], float]) -> Dimensions:
    """Of the multiples on either side of the optimum in every dimension, the shape of the least score."""
    sides = []
    for value, grain in zip(optimum, grains, strict=True):
        below = grain * math.floor(value / grain)
        sides.append(sorted({max(grain, below), below + grain}))
    return min((Dimensions(*choice) for choice in itertools.product(*sides)), key=score)


def _distance(shape: Sequence[float], optimum: Sizes) -> float:
    return sum(math.log(here / there) ** 2 for here, there in zip(shape, optimum, strict=True))


def candidate(
    shape: Dimensions,
    label: str,
    optimum: Sizes,
    how: Rounding,
    geometry: Mapping[str, Any],
    target: float | None,
    regret: Regret | None,
) -> Candidate:
    """A whole shape with what it costs; arguments as for `candidates`."""
    fitting = heads(shape.width, how, usual_first=label.startswith(RULE))
    built = Shape(*shape, fitting[0][0], geometry["patch_size"])
    cost = {name: geometry[name] for name in ("image_size", "channels", "pool", "num_classes")}
    options = {name: geometry[name] for name in OPTIONS if name in geometry}
    gflops = forward_gflops(built, **cost)
    off = tuple(here / there - 1 for here, there in zip(shape, optimum, strict=True))
    return Candidate(
        *shape,
        label=label,
        heads=fitting,
        num_params=sum(num_params(built, **cost, **options).values()),
        forward_gflops=gflops,
        images=target / gflops if target else None,
        regret=regret(shape) if regret else None,
        off=off,  # type: ignore[arg-type]
    )


def heads(width: int, how: Rounding, *, usual_first: bool = True) -> tuple[tuple[int, int], ...]:
    """(number, dimension) of the heads meant, then the others that fit."""
    if how.num_heads:
        return ((how.num_heads, width // how.num_heads),)
    if how.head_dim:
        return ((width // how.head_dim, how.head_dim),)
    friendly = [(width // one, one) for one in how.head_dims if width % one == 0]
    friendly.sort(key=lambda pair: abs(math.log(pair[0] / how.usual_heads)))
    usual = [(how.usual_heads, width // how.usual_heads)] if width % how.usual_heads == 0 else []
    ordered = [*usual, *friendly] if usual_first else [*friendly, *usual]
    return tuple(dict.fromkeys(ordered or [(1, width)]))


def star_regret(fit: Mapping[str, Any], optimum: Sizes, target: float) -> Regret | None:
    """Compute regret by the laws of a star's fit.json against the predicted ``optimum``; None without all three laws."""
    t = min(target, largest_compute(fit))
    arms = []
    for name in DIMENSIONS:
        arm = fit["arms"].get(name)
        if not arm or not arm["identified"] or not arm["law"]:
            return None
        law = Law(**arm["law"])
        if not (law.alpha > 0 and law.beta > 0):
            return None
        best = float(law.optimum(t))
        least = float(law.error(best, t))
        slope = law.c * (law.beta * best**law.b + law.xi) * t**-law.c / least  # -d log f* / d log t, envelope theorem
        arms.append((law, best, least, slope))

    def regret(shape: Sequence[float]) -> float:
        wasted = 0.0
        for size, predicted, (law, best, least, slope) in zip(shape, optimum, arms, strict=True):
            wasted += math.log(float(law.error(best * size / predicted, t)) / least) / slope
        return -math.expm1(-wasted)

    return regret


class JointLaw(Protocol):
    """What `sovit.analysis.forecast.joint.FlopsLaw` offers: the error of a shape at t GFLOPs, and the least there is."""

    def error(self, x: Any, t: Any) -> Any: ...
    def frontier(self, t: float) -> float: ...


def joint_regret(law: JointLaw, target: float) -> Regret:
    """Compute regret by a law of all three dimensions, against its own optimum at the same budget; solved exactly."""

    def regret(shape: Sequence[float]) -> float:
        reached = float(law.error(np.asarray(shape, float), target))

        def excess(log_share: float) -> float:
            return math.log(law.frontier(target * math.exp(log_share)) / reached)

        if excess(0.0) >= 0:
            return 0.0
        low = -1.0
        while excess(low) < 0 and low > -60:
            low *= 2
        return -math.expm1(float(brentq(excess, low, 0.0, xtol=1e-12)))

    return regret
