"""Do the exponents of two stars differ, by how much, and how large a difference would have been seen?

For each dimension: the ratio of the exponents and their difference with an interval, and a test. Both are Welch's on
log s, from each star's own interval: its standard error with an offset per run and t(G - 3), or either side of its profile
interval where Wald's is not valid, put together as squares (Zou and Donner 2008). The stars' runs are taken as
independent. Power is by simulation: each star is drawn again from its law and its noise, the second with another exponent,
and tested. Size, coverage and power: benchmarks/comparing.md. Not here: what two arms share, other metrics of the same
runs (`checks.heterogeneity`), and any error that bends an arm in both stars alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as t_distribution

from sovit.analysis import diagnostics
from sovit.analysis.checks.stability import covariance, log_exponents, response, spreads
from sovit.analysis.fit import law_logs
from sovit.analysis.intervals import Interval, RunFit, fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.planning.information import exponent_gradient, log_jacobian
from sovit.analysis.points import Point
from sovit.analysis.specification import draw_residuals
from sovit.analysis.star import StarFit
from sovit.analysis.varpro import Noise, refit

Array = NDArray[np.float64]

SCHEMA = 1
POWER = 0.8
_DRAWS = 300  # sweeps drawn for each ratio whose power is asked for
_OMNIBUS = 100_000  # sums of squares of t drawn
_LARGEST = math.log(30)  # of a ratio looked for
_CLOSE = 0.05  # of its logarithm
_FAR = math.log(1000)  # a ratio, or an exponent, beyond this leaves its side open


@dataclass(frozen=True)
class Difference:
    """One dimension. ``ratio`` = second / first, ``change`` = second - first, both with an interval.

    ``p`` of none by ``t`` on ``df`` degrees of freedom; ``p_holm`` corrected for the number of dimensions tested. ``seen``:
    (below 1, above 1) the ratios that a test at 5% finds four times in five, None beyond a factor of 30, or if not asked
    for. ``why``: why nothing is compared.
    """

    first: Interval | None = None
    second: Interval | None = None
    ratio: Interval | None = None
    change: Interval | None = None
    p: float | None = None
    t: float = 0.0
    df: float = 1.0
    p_holm: float | None = None
    seen: tuple[float | None, float | None] | None = None
    why: str | None = None


@dataclass(frozen=True)
class Paired:
    """Runs of the same shape and seed in both stars, and how their offsets from the laws correlate, with 95% interval."""

    num_shared: int
    num_runs: tuple[int, int]
    correlation: float | None
    lo: float | None
    hi: float | None


@dataclass(frozen=True)
class Comparison:
    """``omnibus_p``: of no difference in any dimension that is compared."""

    dimensions: dict[str, Difference]
    omnibus_p: float | None
    paired: Paired


@dataclass(frozen=True)
class Arm:
    """An arm's exponent, and the fit behind it with the points it used, in its order."""

    s: Interval
    points: list[Point]
    x: Array
    t: Array
    fit: RunFit


def compare(
    first: tuple[StarFit, Sequence[Point]],
    second: tuple[StarFit, Sequence[Point]],
    *,
    level: float = 0.95,
    power: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compare two stars, each its fit and the points that were fitted, in every dimension that both vary.

    ``power``: say which ratios would be seen, which takes some seconds. Raises ValueError if no dimension is an arm of
    both.
    """
    names = [name for name in first[0].arms if name in second[0].arms]
    if not names:
        raise ValueError(f"the stars vary {_of(first[0])} and {_of(second[0])}; there is no dimension to compare.")
    found: dict[str, Difference] = {}
    pairs: dict[str, tuple[Arm, Arm]] = {}
    for number, name in enumerate(names):
        one, other = arm_of(name, *first), arm_of(name, *second)
        made = compare_arms(one, other, level=level)
        if isinstance(one, Arm) and isinstance(other, Arm) and made.p is not None:
            pairs[name] = one, other
            ends = [_seen(one, other, sign, seed + 2 * number) for sign in (-1, 1)] if power else None
            made = replace(made, seen=(ends[0], ends[1]) if ends else None)
        found[name] = replace(made, first=first[0].arms[name].s, second=second[0].arms[name].s)
    tested = {name: one.p for name, one in found.items() if one.p is not None}
    for name, p in holm(tested).items():
        found[name] = replace(found[name], p_holm=p)
    return Comparison(found, omnibus([found[name] for name in tested]), _paired(pairs, first[1], second[1]))


def omnibus(tested: Sequence[Difference]) -> float | None:
    """p of no difference in any dimension: the sum of squares of their t, against that of as many independent t."""
    if not tested:
        return None
    rng = np.random.default_rng(0)
    by_chance = np.zeros(_OMNIBUS)
    for one in tested:
        by_chance += rng.standard_t(one.df, _OMNIBUS) ** 2
    return float((1 + np.sum(by_chance >= sum(one.t**2 for one in tested))) / (1 + _OMNIBUS))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): each at most 5% only with a chance of 5% for any false one."""
    corrected, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p}


def _of(star: StarFit) -> str:
    return " and ".join(star.arms) or "nothing"


def arm_of(name: str, star: StarFit, points: Sequence[Point]) -> Arm | str:
    """The points and the fit behind an arm's exponent, or why it has none."""
    arm = star.arms[name]
    if arm.s is None:
        return arm.why or "not identified"
    used = {(row["run_id"], row["duration"]) for row in star.points if row["arm"] == name and row["used"]}
    chosen = [point for point in points if (point.run_id, point.duration) in used]
    x, t, error, run = diagnostics.vectors(name, chosen)
    return Arm(arm.s, chosen, x, t, fit_with_runs(x, t, error, run))


def _moved(arm: Arm, law: Law, draws: int, seed: int) -> tuple[Array, Array] | None:
    """Error of log s (draws,) in sweeps like this one whose truth is ``law``, and the standard error each would state.

    None if the points do not determine s, or most drawn sweeps have no optimum. The others are left out, as a star
    without an exponent is not compared; drawn ones take their place.
    """
    units = math.exp(np.log(arm.x).mean()), math.exp(np.log(arm.t).mean())
    jacobian, noise = log_jacobian(law, arm.x, arm.t, *units), arm.fit.noise
    row = response(jacobian, noise, exponent_gradient(law))
    if row is None:
        return None
    drawn = draw_residuals(arm.fit, draws, seed)
    logs = law_logs(np.log(arm.x / units[0]), np.log(arm.t / units[1]))
    data = (np.log(law.error(arm.x, arm.t)) + drawn.T).copy()
    _, exponents, coefficients = refit(logs, data, noise, (law.a, law.b, law.c))
    ratios, sigmas = spreads(jacobian, noise, drawn)
    alone, shared = (covariance(row, Noise(noise.run, r, noise.scale), 1.0)[0, 0] for r in (0.0, 1.0))
    stated = sigmas * np.sqrt(alone + ratios**2 * (shared - alone))
    moved = log_exponents(exponents, coefficients) - math.log(law.exponent)
    good = np.flatnonzero(np.isfinite(moved))
    if 2 * len(good) < draws:
        return None
    kept = good[np.arange(draws) % len(good)] if len(good) < draws else good
    return moved[kept], stated[kept]


def compare_arms(first: Arm | str, second: Arm | str, *, level: float = 0.95) -> Difference:
    """The difference in one dimension; an arm that has no exponent is the reason why there is none."""
    for which, arm in (("first", first), ("second", second)):
        if isinstance(arm, str):
            return Difference(why=f"{which} star {arm}")
    assert isinstance(first, Arm) and isinstance(second, Arm)
    s, other = first.s.estimate, second.s.estimate
    free = np.array([first.fit.num_runs - 3, second.fit.num_runs - 3])
    (first_low, first_high), (second_low, second_high) = _sides(first, level), _sides(second, level)
    below, above = (
        np.array([first_high, second_low]),
        np.array([first_low, second_high]),
    )  # standard errors of the ratio
    wide = [float(t_distribution.ppf((1 + level) / 2, _welch(side, free))) for side in (below, above)]
    log_ratio = math.log(other / s)
    lo, hi = log_ratio - wide[0] * math.hypot(*below), log_ratio + wide[1] * math.hypot(*above)
    down = math.hypot(other * -math.expm1(-wide[0] * second_low), s * _grown(wide[0] * first_high))
    up = math.hypot(other * _grown(wide[1] * second_high), s * -math.expm1(-wide[1] * first_low))
    toward = below if log_ratio > 0 else above
    t, df = log_ratio / max(math.hypot(*toward), 1e-12), _welch(toward, free)
    return Difference(
        ratio=Interval(
            other / s, math.exp(lo) if lo > -_FAR else 0.0, math.exp(hi) if hi < _FAR else math.inf, _METHOD
        ),
        change=Interval(other - s, other - s - down, other - s + up, _METHOD),
        p=float(2 * t_distribution.sf(abs(t), df)),
        t=t,
        df=df,
    )


_METHOD = "Welch on log s"


def _sides(arm: Arm, level: float) -> tuple[float, float]:
    """Standard errors of log s below and above: those that give the arm's interval with t(G - 3), inf for an open side."""
    wide = float(t_distribution.ppf((1 + level) / 2, arm.fit.num_runs - 3))
    s, lo, hi = arm.s.estimate, arm.s.lo, arm.s.hi
    return math.log(s / lo) / wide if lo > 0 else math.inf, math.log(hi / s) / wide if hi < math.inf else math.inf


def _welch(errors: Array, free: NDArray[np.int64]) -> float:
    """Degrees of freedom of a difference (Welch 1947): the least of those whose error is infinite, if one is."""
    if np.isinf(errors).any():
        return float(free[np.isinf(errors)].min())
    squares = np.maximum(errors, 1e-12) ** 2
    return float(squares.sum() ** 2 / np.sum(squares**2 / free))


def _grown(half: float) -> float:
    """exp(half) - 1, infinite where that says nothing any more."""
    return math.expm1(half) if half < _FAR else math.inf


def steepened(law: Law, factor: float, x: float, t: float) -> Law:
    """A law whose exponent is ``factor`` times that of ``law``: a and b divided by it, every term as before at (x, t).

    So the U at t keeps its place and its depth.
    """
    a, b = law.a / factor, law.b / factor
    return Law(law.alpha * x ** (a - law.a), a, law.beta * x ** (law.b - b), b, law.xi, law.c, law.eps)


def _seen(first: Arm, second: Arm, sign: int, seed: int) -> float | None:
    """The ratio nearest 1, on one side, that a test at 5% finds with a chance of 80%; None beyond a factor of 30.

    The second star's law is given an exponent so many times the first's, its noise kept, and drawn again.
    """
    before = _moved(first, first.fit.fit.law, _DRAWS, seed)
    errors = np.array([max(_sides(arm, 0.95)) for arm in (first, second)])
    free = np.array([arm.fit.num_runs - 3 for arm in (first, second)])
    limit = float(t_distribution.ppf(0.975, _welch(errors, free)))
    own = second.fit.fit.law
    middle = math.exp(np.log(second.t).mean())
    place = float(own.optimum(middle))
    place = min(max(place, float(second.x.min())), float(second.x.max()))

    def power(log_ratio: float) -> float:
        factor = math.exp(log_ratio) * first.fit.fit.law.exponent / own.exponent
        after = _moved(second, steepened(own, factor, place, middle), _DRAWS, seed + 1)
        if before is None or after is None:
            return 0.0
        spread, miss = np.hypot(before[1], after[1]), after[0] - before[0]
        return float(np.mean(np.abs(log_ratio + miss) / spread > limit))

    low, high = 0.0, 2 * _CLOSE
    while power(sign * high) < POWER:
        if high >= _LARGEST:
            return None
        low, high = high, min(2 * high, _LARGEST)
    while high - low > _CLOSE:
        between = (low + high) / 2
        low, high = (low, between) if power(sign * between) >= POWER else (between, high)
    return math.exp(sign * high)


def _paired(pairs: Mapping[str, tuple[Arm, Arm]], first: Sequence[Point], second: Sequence[Point]) -> Paired:
    """What the stars share, and whether runs that share shape and seed are lucky together."""
    known = [{_key(point): point.run_id for point in points} for points in (first, second)]
    mine, theirs = [], []
    for pair in pairs.values():
        here, there = (_offsets(arm) for arm in pair)
        for key in sorted(here.keys() & there.keys()):
            mine.append(here[key])
            theirs.append(there[key])
    shared = len(known[0].keys() & known[1].keys())
    sizes = (len(known[0]), len(known[1]))
    if len(mine) < 5 or np.std(mine) == 0 or np.std(theirs) == 0:
        return Paired(shared, sizes, None, None, None)
    r = float(np.corrcoef(mine, theirs)[0, 1])
    z, half = math.atanh(min(max(r, -0.999999), 0.999999)), float(norm.ppf(0.975)) / math.sqrt(len(mine) - 3)
    return Paired(shared, sizes, r, math.tanh(z - half), math.tanh(z + half))


def _key(point: Point) -> tuple[object, ...]:
    return tuple(value for name, value in vars(point).items() if name not in _NOT_A_SHAPE)


_NOT_A_SHAPE = ("run_id", "t_gflops", "duration", "error", "stderr", "num_draws")


def _offsets(arm: Arm) -> dict[tuple[object, ...], float]:
    """Mean residual of each run, by its shape and seed."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for point, residual in zip(arm.points, arm.fit.fit.residuals, strict=True):
        groups.setdefault(_key(point), []).append(float(residual))
    return {key: float(np.mean(values)) for key, values in groups.items()}
