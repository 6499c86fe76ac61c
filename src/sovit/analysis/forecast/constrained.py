"""The best shape that a deployment allows: the least predicted error at a budget among shapes within limits of use.

Whole shapes are searched, not derived: a lattice of multiples over the sizes that both the law and the latency model were
measured for, thinned to `COUNT` values a dimension, then again around the best that it holds. What is listed is the Pareto
front, the shapes that no other beats in both error and cost. Costs are functions given from outside
(`sovit.analysis.latency`, `sovit.inference`), and so is the score, lower being better: the error by a law of all
dimensions, or the regret by the laws of a star.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit.analysis.forecast.candidates import Rounding, nearest
from sovit.analysis.points import DIMENSIONS, Dimensions

COUNT = 16  # values a dimension at once
ROUNDS = 3  # of looking closer
SHOWN = 10
Span = Mapping[str, tuple[float, float]]
Costs = Callable[[Dimensions], Mapping[str, float]]
Scores = Callable[[Sequence[Dimensions]], Sequence[float]]


@dataclass(frozen=True)
class Option:
    """A whole shape, its score (lower is better) and what it costs by name, such as latency_s."""

    dimensions: Dimensions
    score: float
    costs: Mapping[str, float]

    def within(self, limits: Mapping[str, float]) -> bool:
        return all(self.costs[name] <= limit for name, limit in limits.items())


def lattice(how: Rounding, span: Span) -> list[list[int]]:
    """The multiples of each dimension within its span: at most `COUNT`, about evenly spaced in their logarithm."""
    grains = (how.grain(how.width), how.depth, how.mlp_dim)
    return [_thin(grain, *span[name]) for name, grain in zip(DIMENSIONS, grains, strict=True)]


def _thin(grain: int, lo: float, hi: float) -> list[int]:
    first, last = math.ceil(lo / grain - 1e-9), math.floor(hi / grain + 1e-9)
    first = max(1, first)
    if last < first:
        return []
    if last - first < COUNT:
        return [grain * number for number in range(first, last + 1)]
    return sorted({nearest(value, grain) for value in np.geomspace(grain * first, grain * last, COUNT)})


def search(
    how: Rounding,
    span: Span,
    scores: Scores,
    costs: Costs,
    limits: Mapping[str, float],
    *,
    also: Iterable[Dimensions] = (),
) -> list[Option]:
    """The shapes looked at: the lattice over the span with ``also``, then `ROUNDS` times around the best within the limits.

    A shape whose ``costs`` are empty is left out: nothing is known of it.
    """
    found: dict[Dimensions, Option] = {}

    def look(shapes: Iterable[Dimensions]) -> None:
        fresh = [shape for shape in dict.fromkeys(shapes) if shape not in found]
        priced = [(shape, price) for shape in fresh if (price := costs(shape))]
        values = scores([shape for shape, _ in priced]) if priced else ()
        for (shape, price), value in zip(priced, values, strict=True):
            found[shape] = Option(shape, float(value), price)

    values = lattice(how, span)
    look([*also, *(Dimensions(*sizes) for sizes in itertools.product(*values))])
    for _ in range(ROUNDS):
        fitting = [option for option in found.values() if option.within(limits)]
        if not fitting:
            break
        centre = min(fitting, key=_rank).dimensions
        near = {}
        for name, size, known in zip(DIMENSIONS, centre, values, strict=True):
            below = max((value for value in known if value < size), default=size)
            above = min((value for value in known if value > size), default=size)
            near[name] = (float(below), float(above))
        values = lattice(how, near)
        look(Dimensions(*sizes) for sizes in itertools.product(*values))
    return list(found.values())


def _rank(option: Option) -> tuple[float, ...]:
    return (option.score, *option.costs.values())


def best(
    options: Sequence[Option], limits: Mapping[str, float], in_words: Mapping[str, Callable[[float], str]]
) -> Option:
    """The option of the least score within the limits; of equals the cheaper one.

    Raises ValueError if none is: it names the least cost that can be met, ``in_words`` of each cost.
    """
    fitting = [option for option in options if option.within(limits)]
    if fitting:
        return min(fitting, key=_rank)
    asked = " and ".join(in_words[name](limit) for name, limit in limits.items())
    for name in limits:
        others = {other: limit for other, limit in limits.items() if other != name}
        rest = [option for option in options if option.within(others)]
        if rest:
            least = min(rest, key=lambda option: option.costs[name])
            beside = (
                f" beside {' and '.join(in_words[other](limit) for other, limit in others.items())}" if others else ""
            )
            raise ValueError(
                f"no shape meets {asked}: the least that can be met{beside} is {in_words[name](least.costs[name])}, by "
                f"{'x'.join(map(str, least.dimensions))}; allow that, or make the budget or the images smaller."
            )
    raise ValueError(f"no shape meets {asked}, nor any of these alone; allow more.")


def front(options: Sequence[Option], cost: str) -> list[Option]:
    """The options that no other beats: none has both a cost and a score as low, and one of them lower. Ascending in cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.costs[cost], option.score)):
        if not kept or option.score < kept[-1].score:
            kept.append(option)
    return kept


def spread(options: Sequence[Option], cost: str, keep: Option) -> list[Option]:
    """At most `SHOWN` of a front, about evenly spaced in the logarithm of their cost, its ends and ``keep`` among them."""
    if len(options) <= SHOWN:
        return list(options)
    costs = np.log([option.costs[cost] for option in options])
    wanted = np.linspace(costs[0], costs[-1], SHOWN - 1)
    chosen = {int(np.abs(costs - value).argmin()) for value in wanted}
    return [option for number, option in enumerate(options) if number in chosen or option is keep]
