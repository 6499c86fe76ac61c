"""The shapes that a prediction is held against at the same compute: those people would have picked, and its neighbours.

Conventional proportions are those of ViT-Ti, S and B: MLP dimension 4 x width, heads of 64, depth 12 ("Scaling Vision
Transformers", arXiv 2106.04560, Table 2). SoViT (arXiv 2305.13035, Section 4.3) compares with a model of such proportions
and the same number of parameters, and with its own shape perturbed in one dimension at equal compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sovit.analysis.forecast.candidates import OPTIONS, TINY_WIDTH, nearest
from sovit.analysis.points import HasShape, vit_dimensions
from sovit.flops import forward_gflops, num_params
from sovit.shape import Shape

DEPTH, MLP_RATIO, HEAD_DIM = 12, 4, 64
STEP = 1.35  # between neighbours: about the spacing of the published grid, and more than rounding moves a tiny shape
_WIDEST = 16_384  # of the widths tried
PREDICTED, CONVENTIONAL, SAME_PARAMETERS, PUBLISHED, NEIGHBOUR = (
    "predicted",
    "conventional",
    "same size",
    "published",
    "best neighbour",
)


@dataclass(frozen=True)
class Rival:
    """A shape, its role in the proof, and in words where it comes from."""

    role: str
    shape: Shape
    why: str


def cost(shape: Shape, geometry: Mapping[str, Any]) -> float:
    """Forward GFLOPs an image. ``geometry``: as of `candidates.candidates`."""
    return forward_gflops(shape, **{name: geometry[name] for name in ("image_size", "channels", "pool", "num_classes")})


def parameters(shape: Shape, geometry: Mapping[str, Any]) -> int:
    names = ("image_size", "channels", "pool", "num_classes", *(name for name in OPTIONS if name in geometry))
    return sum(num_params(shape, **{name: geometry[name] for name in names}).values())


def conventional(predicted: Shape, geometry: Mapping[str, Any]) -> Rival:
    """Depth 12, heads of 64, MLP 4 x width: the width whose cost per image is nearest to the predicted shape's."""
    widths = range(HEAD_DIM, _WIDEST, HEAD_DIM)
    shape = _nearest((_habit(width, width // HEAD_DIM, predicted) for width in widths), predicted, geometry, cost)
    times = cost(shape, geometry) / cost(predicted, geometry)
    return Rival(
        CONVENTIONAL,
        shape,
        f"depth {DEPTH}, heads of {HEAD_DIM}, MLP {MLP_RATIO} x width; {times:.2g} x the cost an image",
    )


def same_parameters(predicted: Shape, geometry: Mapping[str, Any], head_dim: int | None = None) -> Rival:
    """Depth 12, MLP 4 x width, and as many parameters as the predicted shape; heads as there, for widths that fit.

    ``head_dim``: of all heads, where the star settles that instead of their number.
    """
    grain = head_dim or predicted.num_heads
    grain = grain if predicted.width < TINY_WIDTH else math.lcm(16, grain)
    found = (_habit(width, _heads(width, predicted, head_dim), predicted) for width in range(grain, _WIDEST, grain))
    shape = _nearest(found, predicted, geometry, parameters)
    times = parameters(shape, geometry) / parameters(predicted, geometry)
    return Rival(SAME_PARAMETERS, shape, f"depth {DEPTH}, MLP {MLP_RATIO} x width; {times:.2f} x the parameters")


def neighbours(predicted: Shape, head_dim: int | None = None) -> list[Shape]:
    """The local grid: a step of about 1.35 up and down in each dimension, and in all of them at once, without repeats.

    ``head_dim``: as of `same_parameters`.
    """
    tiny = predicted.width < TINY_WIDTH
    fit = head_dim or predicted.num_heads
    grains = {"width": math.lcm(fit, 1 if tiny else 16), "depth": 1, "mlp_dim": 8 if tiny else 16}
    sizes = predicted.as_dict()
    up = {name: _stepped(sizes[name], grain, STEP) for name, grain in grains.items()}
    down = {name: _stepped(sizes[name], grain, 1 / STEP) for name, grain in grains.items()}
    moves = [{name: ends[name]} for name in grains for ends in (up, down)] + [up, down]
    shapes = [
        replace(predicted, **move, num_heads=_heads(move.get("width", predicted.width), predicted, head_dim))
        for move in moves
    ]
    return [shape for shape in dict.fromkeys(shapes) if shape != predicted]


def moved(shape: HasShape, predicted: HasShape) -> str:
    """In which direction a shape lies from another: "width +35%, depth -20%"."""
    here, there = vit_dimensions(shape)._asdict(), vit_dimensions(predicted)._asdict()
    words = {"width": "width", "depth": "depth", "mlp_dim": "MLP dimension"}
    changes = [f"{words[name]} {here[name] / there[name] - 1:+.0%}" for name in words if here[name] != there[name]]
    return ", ".join(changes) or "the same shape"


def _stepped(size: int, grain: int, factor: float) -> int:
    """The multiple nearest to size x factor that lies beyond the size, or the size itself if there is none below it."""
    found = nearest(size * factor, grain)
    if factor > 1:
        return found if found > size else grain * (size // grain + 1)
    return found if found < size else max(grain * math.ceil(size / grain - 1), grain)


def _heads(width: int, predicted: Shape, head_dim: int | None) -> int:
    return width // head_dim if head_dim else predicted.num_heads


def _habit(width: int, num_heads: int, predicted: Shape) -> Shape:
    return replace(predicted, width=width, depth=DEPTH, mlp_dim=MLP_RATIO * width, num_heads=num_heads)


def _nearest(
    shapes: Iterable[Shape],
    predicted: Shape,
    geometry: Mapping[str, Any],
    measure: Callable[[Shape, Mapping[str, Any]], float],
) -> Shape:
    wanted = math.log(measure(predicted, geometry))
    return min(shapes, key=lambda shape: abs(math.log(measure(shape, geometry)) - wanted))
