"""How often each check of `sovit check` alarms for nothing, and how often it sees an effect of a stated size.

    python benchmarks/power.py [--sweeps 1000] [--jobs 2] [--only held] [--out benchmarks/power.md]

Draws synthetic sweeps with a known truth, runs a check on each, and counts p <= 5% (for rival laws: intervals that
exclude 0). Without an effect that is the false-alarm rate, nominally 5%. Noise is sigma per evaluation and tau = sigma
per run. Designs: "7 runs" has 7 sizes over a factor 5 and 14 durations over a factor 32, at the published exponent of
the depth arm; "21 runs" the same with three seeds; "steep" 6 sizes over a factor 16 and 6 durations with exponents a, b,
c twice as large, as in the embedded star. More than an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sovit.analysis import diagnostics
from sovit.analysis.checks.heldout import HeldOut, held_out
from sovit.analysis.checks.heterogeneity import across_metrics
from sovit.analysis.checks.quasiconvexity import grid_bumps, star_bumps
from sovit.analysis.checks.rivals import compare
from sovit.analysis.checks.stability import influence, two_stars, without_center
from sovit.analysis.intervals import RunFit, fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Dimensions, Point

DRAWS = 99  # simulated sweeps behind each p-value; the command has 400 to 1,000
CENTER = Dimensions(1000, 1000, 1000)
EXPONENTS = {"width": (1.10, 0.49), "depth": (0.45, 0.328), "mlp_dim": (0.30, 0.283)}  # a, b; c = 0.35
Effect = Callable[[float, float], float]  # (x, t) -> added to the log error


@dataclass(frozen=True)
class Design:
    name: str
    num_sizes: int
    span: float
    num_durations: int
    seeds: int = 1
    steep: float = 1.0

    @property
    def sizes(self) -> list[int]:
        return [round(1000 * self.span**place) for place in np.linspace(-0.5, 0.5, self.num_sizes)]

    @property
    def compute(self) -> list[float]:
        return [float(t) for t in 1000 * 32 ** np.linspace(-0.5, 0.5, self.num_durations)]


SEVEN = Design("7 runs", 7, 5, 14)
MANY = Design("21 runs", 7, 5, 14, seeds=3)
STEEP = Design("steep", 6, 16, 6, steep=2)
DESIGNS = (SEVEN, MANY, STEEP)


def law_of(name: str, steep: float = 1.0, *, factor: float = 1.0, eps: float = 0.15, beta: float = 0.07) -> Law:
    """The optimum is at 1000 for t = 1000, and grows with ``factor`` times the arm's exponent."""
    a, b = (value * steep / factor for value in EXPONENTS[name])
    c = 0.35 * steep
    return Law(beta * b / a * 1000**a, a, beta * 1000**-b * 1000**c, b, 0.03 * 1000**c, c, eps)


def arm(
    rng: np.random.Generator, design: Design, noise: float, *, name: str = "depth", law: Law | None = None,
    effect: Effect | None = None, offsets: np.ndarray | None = None,
) -> list[Point]:  # fmt: skip
    """Points of one arm. ``offsets``: of each run, drawn if not given."""
    law = law or law_of(name, design.steep)
    luck = noise * rng.normal(size=design.seeds * design.num_sizes) if offsets is None else offsets
    points = []
    for number in range(design.seeds * design.num_sizes):
        seed, x = number // design.num_sizes, design.sizes[number % design.num_sizes]
        shape = CENTER._replace(**{name: x})
        for t in design.compute:
            log_error = math.log(float(law.error(x, t))) + luck[number] + noise * rng.normal()
            log_error += effect(x, t) if effect else 0.0
            run = f"{name}-{x:05d}-s{seed}"
            points.append(Point(run, *shape, seed, t, f"{t:.0f} gflops", math.exp(log_error), 0.005, 4))
    return points


def fit(points: Sequence[Point]) -> RunFit:
    return fit_with_runs(*diagnostics.vectors("depth", points))


def middle(design: Design) -> int:
    sizes = [size for size in design.sizes if size != 1000]
    return sizes[len(sizes) // 2]


def at_size(size: int, height: float) -> Effect:
    return lambda x, t: height * (x == size)


def second_dip(design: Design, height: float) -> Effect:
    """A hump as wide as one step between sizes, at the middle."""
    step, place = math.log(design.sizes[1] / design.sizes[0]), math.log(middle(design))
    return lambda x, t: height * math.exp(-0.5 * ((math.log(x) - place) / step) ** 2)


def bend(height: float) -> Effect:
    """Errors rise above the law from the middle of the durations on, to ``height`` at the last."""
    return lambda x, t: height * max(0.0, math.log(t / 1000)) / (0.5 * math.log(32))


def stalled(law: Law) -> Effect:
    """From the middle of the durations on the optimum stays where it is."""
    return lambda x, t: math.log(float(law.error(x * (max(t, 1000) / 1000) ** law.exponent, t) / law.error(x, t)))


def drawn(rng: np.random.Generator) -> dict[str, int]:
    """Other draws behind every p-value, as the error of one set of them would not average out over sweeps."""
    return {"draws": DRAWS, "seed": int(rng.integers(2**31))}


Alarm = bool | None  # None: the check said that it could not be done


def alarm(found: object, p: str = "p") -> Alarm:
    value = None if isinstance(found, str) else getattr(found, p)
    return None if value is None else bool(value <= 0.05)


def bumps(rng: np.random.Generator, design: Design, noise: float, effect: Effect | None) -> Alarm:
    """All three arms of a star; the effect is in the depth arm."""
    arms = {}
    for name in DIMENSIONS:
        points = arm(rng, design, noise, name=name, effect=effect if name == "depth" else None)
        arms[name] = [point for point in points if getattr(point, name) != 1000]
    return alarm(star_bumps(arms, **drawn(rng))["depth"])


def pairs(rng: np.random.Generator, noise: float, height: float) -> Alarm:
    """A grid of 5 widths, 5 depths and 2 MLP dimensions at 5 durations; a bump at one shape inside."""
    points = []
    sizes = [round(1000 * 6**place) for place in np.linspace(-0.5, 0.5, 5)]
    for width in sizes:
        for depth in sizes:
            for mlp_dim in (800, 1250):
                luck = noise * rng.normal()
                for t in 1000 * 32 ** np.linspace(-0.5, 0.5, 5):
                    logs = np.log(np.array([width, depth, mlp_dim]) / 1000)
                    benefit = (
                        0.02 * np.exp(-0.9 * logs[0]) + 0.03 * np.exp(-0.7 * logs[1]) + 0.02 * np.exp(-0.6 * logs[2])
                    )
                    error = benefit + 0.06 * math.exp(float(logs @ (0.6, 0.5, 0.4))) * (t / 1000) ** -0.5 + 0.1
                    bump = height if (width, depth, mlp_dim) == (1000, 1000, 800) else 0.0
                    error *= math.exp(luck + noise * rng.normal() + bump)
                    run = f"{width:05d}-{depth:05d}-{mlp_dim:05d}"
                    points.append(Point(run, width, depth, mlp_dim, 0, float(t), f"{t:.0f}", error, 0.005, 4))
    return alarm(grid_bumps(points, **drawn(rng))["width x depth"])


def center(rng: np.random.Generator, design: Design, noise: float, better: float) -> Alarm:
    """``better``: how much lower the errors next to the center are than the law has them."""
    sizes = [size for size in design.sizes if size != 1000]
    near = {max(s for s in sizes if s < 1000), min(s for s in sizes if s > 1000)}
    effect = (lambda x, t: -better * (x in near)) if better else None
    points = [point for point in arm(rng, design, noise, effect=effect) if point.depth != 1000]
    return alarm(without_center("depth", points, CENTER, fit(points), **drawn(rng)))


def stars(rng: np.random.Generator, design: Design, noise: float, factor: float) -> Alarm:
    other = law_of("depth", design.steep, factor=factor)
    return alarm(two_stars(fit(arm(rng, design, noise)), fit(arm(rng, design, noise, law=other))))


def metrics(rng: np.random.Generator, design: Design, noise: float, factor: float, count: int) -> Alarm:
    """Metrics whose run offsets are correlated by 0.8; the last one's exponent is ``factor`` times that of the others."""
    num_runs = design.seeds * design.num_sizes
    shared, by_metric = rng.normal(size=num_runs), {}
    for k in range(count):
        offsets = noise * (math.sqrt(0.8) * shared + math.sqrt(0.2) * rng.normal(size=num_runs))
        mine = factor if k == count - 1 else 1.0
        law = law_of("depth", design.steep, factor=mine, eps=0.06 + 0.04 * k, beta=0.05 + 0.02 * k)
        by_metric[f"metric {k}"] = arm(rng, design, noise, law=law, offsets=offsets)
    return alarm(across_metrics("depth", by_metric, **drawn(rng)))


def budgets(rng: np.random.Generator, design: Design, noise: float, effect: Effect | None) -> dict[str, float] | None:
    found = held_out(arm(rng, design, noise, effect=effect), "depth", **drawn(rng))
    if not isinstance(found, HeldOut) or found.optimum_p is None:
        return None
    missed = 1 - found.covered / found.num_cells
    return {"errors": found.p <= 0.05, "best size": found.optimum_p <= 0.05, "cells outside 95% intervals": missed}


def one_run(rng: np.random.Generator, design: Design, noise: float, off: float) -> Alarm:
    """The first run of the smallest size is off."""
    points = arm(rng, design, noise)
    bad = min(points, key=lambda point: point.run_id).run_id
    moved = [
        Point(**(vars(point) | {"error": point.error * math.exp(off)})) if point.run_id == bad else point
        for point in points
    ]
    return alarm(influence("depth", moved, fit(moved), **drawn(rng)))


def rivals(rng: np.random.Generator, design: Design, noise: float, effect: Effect | None) -> dict[str, float] | None:
    """Form -> 1 if it is called better than Eq. 2 at the larger budgets, -1 if worse; then the same for sizes."""
    points = arm(rng, design, noise, effect=effect)
    found = compare("depth", points, fit(points))
    if isinstance(found, str):
        return None
    signs = {"better": 1, "worse": -1}
    verdicts = {f"{form.name}, budgets": form.budgets for form in found[1:]}
    verdicts |= {f"{form.name}, sizes": form.sizes for form in found[1:]}
    return {name: signs.get(score.verdict, 0) if score else 0 for name, score in verdicts.items()}


def parabola(law: Law) -> Effect:
    """Makes the truth a quadratic of log x and log t that follows the law around its middle."""
    u, v = np.log(np.array(SEVEN.sizes) / 1000), np.log(np.array(SEVEN.compute) / 1000)
    grid_u, grid_v = (part.ravel() for part in np.meshgrid(u, v))

    def columns(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.column_stack((np.ones_like(p), p, q, p**2, p * q, q**2))

    log_error = np.log(law.error(1000 * np.exp(grid_u), 1000 * np.exp(grid_v)))
    found, *_ = np.linalg.lstsq(columns(grid_u, grid_v), log_error, rcond=None)
    found = found * (1, 1, 1, 1.5, 1, 4)  # more curved in log t than any sum of powers

    def effect(x: float, t: float) -> float:
        p, q = np.log([x / 1000]), np.log([t / 1000])
        return float((columns(p, q) @ found)[0]) - math.log(float(law.error(x, t)))

    return effect


@dataclass(frozen=True)
class Case:
    """``one``: a sweep -> whether the check alarms, or several such by name, or None where the check has no answer."""

    check: str
    design: Design | None
    noise: float
    effect: str
    one: Callable[[np.random.Generator], Mapping[str, float] | Alarm]

    def sweeps(self, asked: int) -> int:
        """A quarter with 21 runs or a grid, a fifth with an effect, as those say enough."""
        quiet = self.effect == "none" and self.check != "laws"
        return max(1, asked // (5 if not quiet else 4 if self.design in (MANY, None) else 1))


def cases() -> Iterator[Case]:
    for design in DESIGNS:
        for noise in (0.005, 0.01):
            yield from quiet_cases(design, noise)
        yield from loud_cases(design)
    for noise in (0.005, 0.01):
        yield Case("pairs of a grid", None, noise, "none", partial(pairs, noise=noise, height=0.0))
    for height in (0.03, 0.06):
        effect = f"one shape {height:.0%} up"
        yield Case("pairs of a grid", None, 0.005, effect, partial(pairs, noise=0.005, height=height))
    truth = parabola(law_of("depth"))
    yield Case(
        "laws", SEVEN, 0.005, "the truth is a parabola", partial(rivals, design=SEVEN, noise=0.005, effect=truth)
    )


def quiet_cases(design: Design, noise: float) -> Iterator[Case]:
    setting = {"design": design, "noise": noise}
    yield Case("quasiconvex", design, noise, "none", partial(bumps, effect=None, **setting))
    yield Case("center", design, noise, "none", partial(center, better=0.0, **setting))
    yield Case("two stars", design, noise, "none", partial(stars, factor=1.0, **setting))
    for count in (2, 4):
        yield Case(f"{count} metrics", design, noise, "none", partial(metrics, factor=1.0, count=count, **setting))
    yield Case("held out", design, noise, "none", partial(budgets, effect=None, **setting))
    yield Case("influence", design, noise, "none", partial(one_run, off=0.0, **setting))
    yield Case("laws", design, noise, "none", partial(rivals, effect=None, **setting))


def loud_cases(design: Design) -> Iterator[Case]:
    setting = {"design": design, "noise": 0.005}
    heights = (0.06, 0.1) if design is STEEP else (0.02, 0.04)
    for height in heights:
        up = at_size(middle(design), height)
        yield Case("quasiconvex", design, 0.005, f"one size {height:.0%} up", partial(bumps, effect=up, **setting))
    hump = second_dip(design, 1.5 * heights[1])
    wide = f"a hump of {1.5 * heights[1]:.0%} between two dips"
    yield Case("quasiconvex", design, 0.005, wide, partial(bumps, effect=hump, **setting))
    for better in (0.01, 0.03):
        effect = f"next to the center {better:.0%} too good"
        yield Case("center", design, 0.005, effect, partial(center, better=better, **setting))
    for factor in (1.5, 2.0):
        effect = f"one s {factor:g} times as large"
        yield Case("two stars", design, 0.005, effect, partial(stars, factor=factor, **setting))
        yield Case("4 metrics", design, 0.005, effect, partial(metrics, factor=factor, count=4, **setting))
    for height in (0.02, 0.05):
        effect = f"errors bend away, {height:.0%} at the end"
        yield Case("held out", design, 0.005, effect, partial(budgets, effect=bend(height), **setting))
    still = stalled(law_of("depth", design.steep))
    yield Case("held out", design, 0.005, "the optimum stalls halfway", partial(budgets, effect=still, **setting))
    for off in (0.02, 0.05):
        yield Case("influence", design, 0.005, f"an end run {off:.0%} off", partial(one_run, off=off, **setting))


def rows_of(case: Case, asked: int, seed: int) -> list[tuple[str, ...]]:
    rng = np.random.default_rng(seed)
    found = [case.one(rng) for _ in range(case.sweeps(asked))]
    values = [value if isinstance(value, Mapping) else {"": value} for value in found if value is not None]
    untested = f"{len(found) - len(values)} untested" if len(values) < len(found) else ""
    design = case.design.name if case.design else "50 runs"
    head = (design, f"{case.noise:.1%}", case.effect, str(len(values)))
    names = list(values[0]) if values else []
    table = {name: np.array([float(value[name]) for value in values]) for name in names}
    if case.check == "laws":
        return [(f"laws: {what}", *head, _verdicts(table, what), untested) for what in ("budgets", "sizes")]
    return [
        (f"{case.check}: {name}" if name else case.check, *head,
         f"{signs.mean():.1%} ± {signs.std() / math.sqrt(len(signs)):.1%}", untested)
        for name, signs in table.items()
    ]  # fmt: skip


def _verdicts(table: Mapping[str, np.ndarray], what: str) -> str:
    mine = {name.removesuffix(f", {what}"): signs for name, signs in table.items() if name.endswith(what)}
    return "; ".join(f"{form} {np.mean(signs > 0):.0%}/{np.mean(signs < 0):.0%}" for form, signs in mine.items())


def run(number: int, asked: int) -> list[tuple[str, ...]]:
    """The rows of one case, by its number: cases hold functions, which do not travel between processes."""
    return rows_of(list(cases())[number], asked, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweeps", type=int, default=1000, help="per case without an effect, fewer with one")
    parser.add_argument("--only", default="", help="cases whose check begins with this")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    options = parser.parse_args()
    table = [("check", "design", "noise", "effect", "sweeps", "alarms", ""), ("---",) * 7]
    numbers = [number for number, case in enumerate(cases()) if case.check.startswith(options.only)]
    start = time.monotonic()
    with ProcessPoolExecutor(options.jobs) as pool:
        for rows in pool.map(run, numbers, itertools.repeat(options.sweeps)):
            table += rows
            print("\n".join("  ".join(row) for row in rows), flush=True)
    minutes = (time.monotonic() - start) / 60
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    command = f"python benchmarks/power.py --sweeps {options.sweeps}" + (
        f" --only {options.only}" if options.only else ""
    )
    page = f"# False alarms and power of the checks\n\n`{command}`, {minutes:.0f} min. {NOTE}\n\n{text}\n"
    if options.out:
        options.out.write_text(page)
    print(f"{minutes:.1f} min")


NOTE = (
    "`alarms`: the share of sweeps in which the check has p <= 5% (nominal without an effect: 5%), with its binomial "
    "standard error; for rival laws, how often each is called better/worse than Eq. 2. Designs and effects are described "
    "in the file. The exponent of the arm is 0.45."
)

if __name__ == "__main__":
    main()
