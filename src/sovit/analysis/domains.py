"""Do the best shapes follow the same path by two metrics of the same runs, such as few-shot error and image to text?

For each dimension of a star: the ratio of the exponents (1: the paths are parallel) and the ratio of the best sizes at
equal compute (1: they are the same), each with an interval and a test. Both metrics score the same runs, so luck that a
run brings to both cancels: the standard error of a difference of logarithms is the delete-one jackknife over runs of that
difference, and what it is compared with is the same in sweeps drawn by the laws as fitted, with each metric's own noise,
correlated as measured. SoViT (arXiv 2305.13035, figure 1) has exponents that hardly differ between image classification
and image to text, and another optimal small shape. Not here: more metrics than two (`checks.heterogeneity`), two stars
(`comparison`). Size, coverage and power by simulation: benchmarks/domains.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sovit.analysis.checks.heldout import optimum_at
from sovit.analysis.checks.heterogeneity import DRAWS, Common, fits_in_common, moves_by_chance
from sovit.analysis.checks.stability import EXPONENT, Function
from sovit.analysis.comparison import holm
from sovit.analysis.intervals import Interval
from sovit.analysis.law import Law
from sovit.analysis.points import Point
from sovit.analysis.star import StarFit

Array = NDArray[np.float64]
SCHEMA = 1
FIRST, SECOND = "first", "second"
_METHOD = "jackknife over runs of the difference of logarithms, quantile of sweeps drawn from the fits"
_FAR = math.log(1000)  # a ratio beyond this leaves its side open
_LEAST = 1e-9  # standard error of a logarithm below which two metrics are one


@dataclass(frozen=True)
class Tested:
    """A ratio, second / first, with its interval; ``p`` of 1; ``seen``: (below 1, above 1) the ratios that a test at 5%
    finds about four times in five, None beyond a factor of 1000. ``t``: log ratio over its standard error."""

    ratio: Interval
    p: float
    t: float
    seen: tuple[float | None, float | None]


@dataclass(frozen=True)
class Shapes:
    """The best size of a dimension at one compute by both laws, the others held at the center."""

    t_gflops: float
    first: float
    second: float
    tested: Tested


@dataclass(frozen=True)
class Pair:
    """One dimension. ``first``, ``second``: the exponents as `star.fit_star` has them, of all points of each metric.

    ``exponents``: their ratio, and ``shapes`` the best sizes, at the least, the middle and the largest compute that both
    fits use, of the ``num_points`` evaluations that both metrics can use; ``same``: the exponents of these.
    ``correlation`` of the two log exponents over the runs. ``p_holm``, ``shapes_p_holm``: corrected for the number of
    dimensions. ``why``: why nothing is compared.
    """

    first: Interval | None = None
    second: Interval | None = None
    exponents: Tested | None = None
    shapes: tuple[Shapes, ...] = ()
    same: tuple[float, float] | None = None
    correlation: float | None = None
    num_runs: int = 0
    num_points: int = 0
    p_holm: float | None = None
    shapes_p_holm: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Domains:
    """``parallel_p``: of equal exponents, ``same_p``: of equal best sizes at the middle compute, in all dimensions."""

    dimensions: dict[str, Pair]
    parallel_p: float | None
    same_p: float | None


def beside(
    first: tuple[StarFit, Sequence[Point]],
    second: tuple[StarFit, Sequence[Point]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Domains:
    """Compare two fits of one star by two metrics, each with its points. Raises ValueError if they are of other runs."""
    runs = [{point.run_id for point in points} for _, points in (first, second)]
    if not runs[0] & runs[1]:
        raise ValueError("the two metrics share no run; compare two stars instead.")
    found: dict[str, Pair] = {}
    squares: dict[str, tuple[Array, Array]] = {}
    for number, name in enumerate(first[0].arms):
        made = _pair(name, first, second, draws, seed + number)
        if isinstance(made, str):
            pair = Pair(why=made)
        else:
            pair, squares[name] = made
        own = [star.arms[name].s if name in star.arms else None for star, _ in (first, second)]
        found[name] = replace(pair, first=own[0], second=own[1])
    tested = {name: pair for name, pair in found.items() if pair.exponents is not None}
    parallel = holm({name: pair.exponents.p for name, pair in tested.items() if pair.exponents})
    same = holm({name: _middle(pair).p for name, pair in tested.items()})
    for name in tested:
        found[name] = replace(found[name], p_holm=parallel[name], shapes_p_holm=same[name])
    by_exponent = [(pair.exponents.t, squares[name][0]) for name, pair in tested.items() if pair.exponents]
    by_shape = [(_middle(pair).t, squares[name][1]) for name, pair in tested.items()]
    return Domains(found, _together(by_exponent, seed), _together(by_shape, seed))


def _middle(pair: Pair) -> Tested:
    return pair.shapes[len(pair.shapes) // 2].tested


def _together(tested: Sequence[tuple[float, Array]], seed: int) -> float | None:
    """p of the sum of squares of t over the dimensions, whose arms share no run."""
    if not tested:
        return None
    rng = np.random.default_rng(seed)
    num = 10_000
    by_chance = np.sum([rng.choice(squares, num) for _, squares in tested], axis=0)
    return float((1 + np.sum(by_chance >= sum(t**2 for t, _ in tested))) / (1 + num))


def _pair(
    name: str, first: tuple[StarFit, Sequence[Point]], second: tuple[StarFit, Sequence[Point]], draws: int, seed: int
) -> tuple[Pair, tuple[Array, Array]] | str:
    """One dimension, and the squares of t by chance of its exponents and of its best sizes; or why there is none."""
    used: dict[str, list[Point]] = {}
    for label, (star, points) in ((FIRST, first), (SECOND, second)):
        if name not in star.arms:
            return f"the {label} metric has no {name} arm"
        why = star.arms[name].why
        if why is not None:
            return f"by the {label} metric {why}"
        keys = {(row["run_id"], row["duration"]) for row in star.points if row["arm"] == name and row["used"]}
        used[label] = [point for point in points if (point.run_id, point.duration) in keys]
    common = fits_in_common(name, used)
    if isinstance(common, str):
        return f"of the evaluations that both metrics can use, {common}"
    times = _times(common)
    if not all(np.all(_bounded(law, times)) for one in common.fits.values() for law in one.without):
        return "without one of the runs the best law has no optimum"
    functions: list[Function] = [EXPONENT, *(optimum_at(time, common.x, common.t) for time in times)]
    drawn = moves_by_chance(common, draws, seed, functions)
    if drawn is None:
        return "without one of the runs the data do not determine it"
    tested, squares = [], []
    for k, function in enumerate(functions):
        whole, without = _values(common, function)
        one, by_chance = _test(whole, without, drawn[0][k], drawn[1][k])
        tested.append(one)
        squares.append(by_chance)
    whole, without = _values(common, EXPONENT)
    fits = list(common.fits.values())
    shapes = []
    for time, one in zip(times, tested[1:], strict=True):
        best = [float(fit.fit.fit.law.optimum(time)) for fit in fits]
        shapes.append(Shapes(time, best[0], best[1], one))
    pair = Pair(
        exponents=tested[0],
        shapes=tuple(shapes),
        same=(fits[0].s.estimate, fits[1].s.estimate),
        correlation=float(np.corrcoef(without[0], without[1])[0, 1]),
        num_runs=fits[0].fit.num_runs,
        num_points=len(common.x),
    )
    return pair, (squares[0], squares[1 + len(times) // 2])


def _times(common: Common) -> list[float]:
    """The least, the middle and the largest compute."""
    low, high = float(common.t.min()), float(common.t.max())
    return [low, math.sqrt(low * high), high]


def _bounded(law: Law, times: Sequence[float]) -> NDArray[np.bool_]:
    best = law.optimum(times)
    return (best > 0) & (best < math.inf)


def _values(common: Common, function: Function) -> tuple[Array, Array]:
    """A function of both laws (2,), and without each run (2, G)."""
    fits = list(common.fits.values())
    whole = np.array([function.of_law(fit.fit.fit.law) for fit in fits])
    return whole, np.array([[function.of_law(law) for law in fit.without] for fit in fits])


def _test(whole: Array, without: Array, moves: Array, moves_without: Array) -> tuple[Tested, Array]:
    """The difference of two logarithms (2,) and, of the same without each run (2, G), its standard error; by what these
    two are in drawn sweeps, (2, B) and (2, G, B). And the squares of t in those."""
    difference, log_se = float(whole[1] - whole[0]), float(_jackknife(without[1] - without[0]))
    spread = np.maximum(_jackknife(moves_without[1] - moves_without[0]), _LEAST)
    by_chance = np.abs(moves[1] - moves[0]) / spread
    t = difference / max(log_se, _LEAST)
    p = float((1 + np.sum(by_chance >= abs(t))) / (1 + len(by_chance)))
    limit, typical = (float(np.quantile(by_chance, share, method="higher")) for share in (0.95, 0.6))
    half, least = limit * log_se, (limit + typical) * log_se
    lo = math.exp(difference - half) if half < _FAR else 0.0
    hi = math.exp(difference + half) if half < _FAR else math.inf
    seen = (math.exp(-least), math.exp(least)) if least < _FAR else (None, None)
    return Tested(Interval(math.exp(difference), lo, hi, _METHOD), p, t, seen), by_chance**2


def _jackknife(without: Array) -> Any:
    """Standard error (...,) of a function from its values (G, ...) without each of G runs."""
    num = len(without)
    return np.sqrt((num - 1) / num * np.sum((without - without.mean(0)) ** 2, 0))
