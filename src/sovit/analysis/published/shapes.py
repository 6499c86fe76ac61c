"""The shapes SoViT arrived at, and which rule gives them back from where it started (arXiv 2305.13035).

From the origin (608, 10, 928) the paper scaled to one shape for the compute of ViT-B/14 on 4B images and one for that
of ViT-g/14 on 16B. `shape_rules` asks which x_k = x0_k (t / t0)^(e_k) reproduces both, and within what error: t0 was
not published, and the rule is printed without its exponents. Six numbers carry no more than that: a rule that
fits shows what was done, not that it was the best thing to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sovit.analysis.intervals import Interval
from sovit.analysis.points import DIMENSIONS
from sovit.analysis.report.drawing import ACCENT, BLUE, GREY, INK, style
from sovit.analysis.report.words import ARMS
from sovit.analysis.varpro import Array
from sovit.flops import forward_gflops
from sovit.shape import parse_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Getting ViT in Shape, arXiv 2305.13035: the origin, the exponents, and the two shapes with the run whose compute each
# was made for (forward GFLOPs at 224 pixels times images).
ORIGIN = (608, 10, 928)
EXPONENTS = (0.22, 0.45, 0.60)
SHAPES = {"So150m": (880, 18, 2320), "So400m": (1152, 27, 4304)}
BUDGETS = {"So150m": ("B/14", 4e9), "So400m": ("g/14", 16e9)}
ROUNDED_TO = (16, 1, 16)  # the published sizes are multiples of these
_TICKS = (8, 10, 15, 20, 30, 40, 60, 600, 800, 1000, 1500, 2000, 3000, 4000, 6000, 8000)


def budgets() -> dict[str, float]:
    """Forward GFLOPs times images of the run that each published shape was to match."""
    return {name: forward_gflops(parse_shape(model), 224) * images for name, (model, images) in BUDGETS.items()}


def growth() -> Array:
    """log (size / origin) of the two published shapes: (2 shapes, 3 dimensions)."""
    return np.log(np.array(list(SHAPES.values()), float) / np.array(ORIGIN))


@dataclass(frozen=True)
class ShapeRule:
    """x_k = x0_k (t / t0)^exponents_k with ``num_fitted`` numbers fitted to the six logarithms by least squares.

    ``shapes``: what the rule gives, unrounded; ``errors``: relative, of width, depth, MLP dimension; ``worst``: the
    largest of them in size.
    """

    name: str
    num_fitted: int
    exponents: tuple[float, ...]
    t0_gflops: float
    shapes: dict[str, tuple[float, ...]]
    errors: dict[str, tuple[float, ...]]
    worst: float


def _rule(name: str, num_fitted: int, exponents: Array, log_t0: float) -> ShapeRule:
    predicted = {
        shape: np.array(ORIGIN) * np.exp(np.asarray(exponents) * (math.log(t) - log_t0))
        for shape, t in budgets().items()
    }
    errors = {shape: predicted[shape] / np.array(SHAPES[shape]) - 1 for shape in SHAPES}
    return ShapeRule(
        name=name,
        num_fitted=num_fitted,
        exponents=tuple(float(value) for value in exponents),
        t0_gflops=math.exp(log_t0),
        shapes={shape: tuple(float(value) for value in sizes) for shape, sizes in predicted.items()},
        errors={shape: tuple(float(value) for value in values) for shape, values in errors.items()},
        worst=max((float(value) for values in errors.values() for value in values), key=abs),
    )


def _fit_t0(exponents: Array, grown: Array, log_t: Array) -> float:
    """log t0 by least squares for given exponents."""
    return float(np.sum((exponents * log_t[:, None] - grown) * exponents) / (len(log_t) * np.sum(exponents**2)))


def _free(grown: Array, log_t: Array) -> tuple[Array, float]:
    """Exponents and log t0 by least squares: the best product of (log t - log t0) and exponents, by its SVD."""
    left, size, right = np.linalg.svd(grown, full_matrices=False)
    per_unit = (log_t[1] - log_t[0]) / (left[1, 0] - left[0, 0])
    return size[0] * right[0] / per_unit, float(log_t[0] - per_unit * left[0, 0])


def shape_rules() -> tuple[ShapeRule, ...]:
    """The rules that could have made the published shapes, with the error each leaves, the simplest first."""
    from scipy.optimize import least_squares

    s, grown, log_t = np.array(EXPONENTS), growth(), np.log(list(budgets().values()))
    grid_t0 = math.log(forward_gflops(parse_shape("grid-origin"), 224) * 600e6)
    along = grown @ s / (s @ s)
    step = float((along[1] - along[0]) / (log_t[1] - log_t[0]))

    def weighted(p: Array) -> Array:
        weights = np.array([p[0], p[1], 1 - p[0] - p[1]])
        return (s * weights * (log_t[:, None] - p[2]) - grown).ravel()

    found = least_squares(weighted, [1 / 3, 1 / 3, 22.0], x_scale=[0.1, 0.1, 1.0]).x
    weights = np.array([found[0], found[1], 1 - found[0] - found[1]])
    return (
        _rule("t^(s/3), t0 = 600M images of the origin", 0, s / 3, grid_t0),
        _rule("t^(1/3), as printed", 1, np.full(3, 1 / 3), _fit_t0(np.full(3, 1 / 3), grown, log_t)),
        _rule("t^s", 1, s, _fit_t0(s, grown, log_t)),
        _rule("t^(s/3)", 1, s / 3, _fit_t0(s / 3, grown, log_t)),
        _rule("t^(g s), fitted step g", 2, step * s, float(log_t[0] - along[0] / step)),
        _rule("t^(s w), fitted weights w of sum 1", 3, s * weights, float(found[2])),
        _rule("t^e, fitted exponents e", 4, *_free(grown, log_t)),
    )


def fitted_growth(*, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """The exponents and t0 (GFLOPs) that give both shapes back, over what their rounding may hide.

    The interval is that of fits to sizes drawn evenly from those that round to the published ones. It says nothing of
    how sure the exponents behind the shapes were.
    """
    grown, log_t = growth(), np.log(list(budgets().values()))
    sizes = np.array(list(SHAPES.values()), float)
    rng = np.random.default_rng(seed)
    draws = [
        _free(np.log((sizes + rng.uniform(-0.5, 0.5, sizes.shape) * ROUNDED_TO) / np.array(ORIGIN)), log_t)
        for _ in range(2000)
    ]
    table = np.array([[*exponents, math.exp(log_t0)] for exponents, log_t0 in draws])
    exponents, log_t0 = _free(grown, log_t)
    lo, hi = np.quantile(table, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        name: Interval(float(value), float(lo[k]), float(hi[k]), "range of what rounds to the published sizes")
        for k, (name, value) in enumerate(zip((*DIMENSIONS, "t0_gflops"), (*exponents, math.exp(log_t0)), strict=True))
    }


def implied_factors() -> dict[str, dict[str, tuple[float, ...]]]:
    """log of the growth in compute that each dimension implies, under t^s and under t^(s/3): equal if the rule held."""
    once = {shape: row / EXPONENTS for shape, row in zip(SHAPES, growth(), strict=True)}
    return {
        shape: {"t^s": tuple(map(float, row)), "t^(s/3)": tuple(map(float, 3 * row))} for shape, row in once.items()
    }


def draw_rules(names: Sequence[str] = ("t^s", "t^(s/3)", "t^e, fitted exponents e")) -> Figure:
    """Each dimension against compute: the published shapes and what the named rules make of them."""
    from matplotlib.figure import Figure

    rules = [rule for rule in shape_rules() if rule.name in names]
    budget = np.array(list(budgets().values()))
    with style():
        figure = Figure(figsize=(11.5, 3.8), layout="constrained")
        for k, (axis, name) in enumerate(zip(figure.subplots(1, len(DIMENSIONS)), DIMENSIONS, strict=True)):
            sizes = [shape[k] for shape in SHAPES.values()]
            for rule, color in zip(rules, (GREY, ACCENT, BLUE), strict=False):
                t = np.array([rule.t0_gflops, *budget])
                axis.plot(t, ORIGIN[k] * (t / rule.t0_gflops) ** rule.exponents[k], color=color, label=rule.name)
                axis.plot(rule.t0_gflops, ORIGIN[k], "s", color=color, ms=4)
            axis.plot(budget, sizes, "o", color=INK, ms=6, label="published")
            for t, size, shape in zip(budget, sizes, SHAPES, strict=True):
                axis.annotate(shape, (t, size), xytext=(-6, 8), textcoords="offset points", ha="right")
            axis.set(xscale="log", yscale="log", xlabel="t: forward GFLOPs per image × images", title=ARMS[name])
            axis.xaxis.set_major_formatter(lambda t, _: f"1e{math.log10(t):.0f}")
            axis.set_ylim(ORIGIN[k] / 1.15, 2.2 * sizes[-1])
            ticks = [value for value in _TICKS if ORIGIN[k] / 1.15 <= value <= 2.2 * sizes[-1]]
            axis.set_yticks(ticks, labels=[f"{value:,}" for value in ticks])
            axis.set_yticks([], minor=True)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure
