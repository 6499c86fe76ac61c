"""How often two metrics of one star are called different that are not, how often the intervals hold, and the power.

    python benchmarks/domains.py [--stars 100] [--out benchmarks/domains.md]

Draws a depth arm scored by two metrics of known exponents and best sizes, compares them as `sovit compare RUNS --metrics`
does, and counts. The arm: 6 sizes over a factor 16, 6 durations over a factor 32, one seed. Noise is sigma per evaluation,
and tau = sigma per run; both correlate by 0.6 between the metrics. The second metric has another floor. About five minutes
on one core.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit.analysis.domains import beside
from sovit.analysis.law import Law
from sovit.analysis.points import Dimensions, Point
from sovit.analysis.scale import log_perplexity
from sovit.analysis.star import fit_star

CENTER, SIZES = Dimensions(32, 64, 128), (16, 28, 48, 84, 147, 256)
COMPUTE = np.geomspace(8, 256, 6)
MIDDLE, DECAY, ALIKE, TIMES, BLIND = 45.0, 0.7, 0.6, 3.0, 2.2


@dataclass(frozen=True)
class Case:
    """``factor`` of the second's exponent, ``apart``: of its best size at the middle compute."""

    noise: float
    factor: float = 1.0
    apart: float = 1.0


CASES = [Case(0.01), Case(0.03), Case(0.01, apart=1.3), Case(0.01, factor=1.3), Case(0.01, factor=1.6)]


def law(s: float, place: float, eps: float) -> Law:
    """A U at every compute, its bottom at ``place`` for the middle compute and growing as t^s."""
    a, b, beta = 0.6 * DECAY / s, 0.4 * DECAY / s, 0.07
    return Law(beta * b / a * place**a, a, beta * place**-b * MIDDLE**DECAY, b, 0.03 * MIDDLE**DECAY, DECAY, eps)


def arm(rng: np.random.Generator, case: Case) -> list[list[Point]]:
    found: list[list[Point]] = [[], []]
    laws = law(0.45, 64.0, 0.15), law(0.45 * case.factor, 64.0 * case.apart, 0.3)
    mix = np.array([[1.0, 0.0], [ALIKE, math.sqrt(1 - ALIKE**2)]])
    for size in SIZES:
        luck = mix @ rng.normal(size=2)
        for t in COMPUTE.tolist():
            noise = case.noise * (luck + mix @ rng.normal(size=2))
            for k, times in enumerate((1.0, TIMES)):
                error = times * float(laws[k].error(size, t)) * math.exp(noise[k])
                shape = CENTER._replace(depth=size)
                found[k].append(Point(f"run-{size:04d}", *shape, 0, t, f"{t:.0f} gflops", error, 0.005, 1))
    return found


def row(case: Case, stars: int, seed: int) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    exponents, sizes, widths, untested = np.zeros(2, int), np.zeros(2, int), [], 0
    for number in range(stars):
        first, second = arm(rng, case)
        fits = (fit_star(first, CENTER), first), (fit_star(second, CENTER, scale=log_perplexity(BLIND)), second)
        pair = beside(*fits, draws=400, seed=number).dimensions["depth"]
        if pair.exponents is None:
            untested += 1
            continue
        at = pair.shapes[1]
        true = case.apart * (at.t_gflops / MIDDLE) ** (0.45 * (case.factor - 1))
        for counts, tested, ratio in ((exponents, pair.exponents, case.factor), (sizes, at.tested, true)):
            counts += (tested.p <= 0.05, tested.ratio.lo <= ratio <= tested.ratio.hi)
        widths.append(pair.exponents.seen[1] or math.inf)
    known = max(1, stars - untested)
    shares = [_share(count / known, known) for count in (*exponents, *sizes)]
    return (
        f"{case.noise:.0%}", f"{case.factor:g}", f"{case.apart:g}", *shares, f"x{np.median(widths):.3g}", str(known),
        f"{untested} untested" if untested else "",
    )  # fmt: skip


def _share(share: float, num: int) -> str:
    """With its 95% interval (Wilson's), which has a width at 0 and 1 too."""
    middle, weight = (share + 1.92 / num) / (1 + 3.84 / num), 1.96 / (1 + 3.84 / num)
    half = weight * math.sqrt(share * (1 - share) / num + 0.96 / num**2)
    return f"{share:.0%} ({max(0.0, middle - half):.0%} to {min(1.0, middle + half):.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stars", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    header = ("noise", "ratio of s", "of sizes", "s: p <= 5%", "s: covered", "size: p <= 5%", "size: covered", "seen",
              "stars", "")  # fmt: skip
    rows = [header, ("---",) * len(header), *(row(case, options.stars, options.seed) for case in CASES)]
    text = "\n".join([
        "# Two metrics of one star", "",
        f"`python benchmarks/domains.py --stars {options.stars}`. `p <= 5%`: the share of stars in which the test sees a "
        "difference: the false alarms at ratio 1 (nominal 5%), the power elsewhere; of the exponents s and of the best "
        "sizes at the middle compute. `covered`: the share of 95% intervals that hold the true ratio. `seen`: the median "
        "ratio of s that is stated to be seen four times in five.", "",
        *("| " + " | ".join(cells) + " |" for cells in rows), "",
    ])  # fmt: skip
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
