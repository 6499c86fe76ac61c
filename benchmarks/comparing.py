"""How often `sovit compare` sees a difference that is not there, covers the true ratio, and finds one of a stated size.

    python benchmarks/comparing.py [--stars 100] [--out benchmarks/comparing.md]

Draws pairs of stars' arms with known exponents, compares each pair as the command does, and counts. "small" is an arm of
6 sizes over a factor 16 and 6 durations over a factor 32, one seed, as the embedded star's; "3 seeds" the same three times.
The second star has another floor and another cost of size than the first. Noise is sigma per evaluation and tau = sigma
per run; "twins" share 80% of the variance of their offsets, as runs of one shape and seed may. Two minutes on
one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from power import STEEP, Design, arm, law_of
from sovit.analysis import diagnostics
from sovit.analysis.comparison import Arm, compare_arms
from sovit.analysis.intervals import Interval, exponent_interval, fit_with_runs

SEEDS = Design("3 seeds", STEEP.num_sizes, STEEP.span, STEEP.num_durations, seeds=3, steep=STEEP.steep)
SMALL = Design("small", STEEP.num_sizes, STEEP.span, STEEP.num_durations, steep=STEEP.steep)


@dataclass(frozen=True)
class Case:
    design: Design
    noise: float
    factor: float
    twins: bool = False


CASES = [
    *(Case(SMALL, noise, factor) for noise in (0.01, 0.03) for factor in (1.0, 1.5, 2.0)),
    Case(SMALL, 0.01, 1.0, twins=True),
    *(Case(SEEDS, 0.01, factor) for factor in (1.0, 1.5)),
]


def sample(rng: np.random.Generator, case: Case) -> tuple[Arm | str, Arm | str]:
    """A pair of arms; the second's exponent is ``factor`` times the first's."""
    runs = case.design.seeds * case.design.num_sizes
    shared = math.sqrt(0.8) * rng.normal(size=runs)
    laws = (
        law_of("depth", case.design.steep),
        law_of("depth", case.design.steep, factor=case.factor, eps=0.2, beta=0.05),
    )
    found: list[Arm | str] = []
    for law in laws:
        own = rng.normal(size=runs)
        offsets = case.noise * (shared + math.sqrt(0.2) * own if case.twins else own)
        points = arm(rng, case.design, case.noise, law=law, offsets=offsets)
        x, t, error, run = diagnostics.vectors("depth", points)
        whole = fit_with_runs(x, t, error, run)
        interval = exponent_interval(x, t, error, whole) if diagnostics.optimal_exponent(whole.fit) else "no optimum"
        known = isinstance(interval, Interval) and not interval.is_open
        found.append(Arm(interval, points, x, t, whole) if known else "without an exponent")
    return found[0], found[1]


def row(case: Case, stars: int, seed: int) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    seen, covered, widths, change, untested = 0, 0, [], 0, 0
    truth = [law_of("depth", case.design.steep, factor=f).exponent for f in (1.0, case.factor)]
    for _ in range(stars):
        made = compare_arms(*sample(rng, case))
        if made.ratio is None or made.change is None or made.p is None:
            untested += 1
            continue
        one, difference = made.ratio, made.change
        seen += made.p <= 0.05
        covered += one.lo <= case.factor <= one.hi
        change += difference.lo <= truth[1] - truth[0] <= difference.hi
        widths.append(math.log(one.hi / one.lo) / 2 if one.lo > 0 else math.inf)
    n = max(stars - untested, 1)
    name = f"{case.design.name}{', twins' if case.twins else ''}"
    width = f"x{math.exp(float(np.median(widths))):.2f}" if widths else "-"
    rates = (_share(seen, n), _share(covered, n), _share(change, n), width, str(n))
    return (name, f"{case.noise:.0%}", f"{case.factor:g}", *rates, f"{untested} untested" if untested else "")


def _share(hits: int, n: int) -> str:
    p = hits / n
    return f"{p:.0%} ± {math.sqrt(max(p * (1 - p), 1 / n) / n):.0%}"


def table(stars: int) -> Iterator[tuple[str, ...]]:
    yield ("stars", "noise", "ratio", "p <= 5%", "ratio covered", "difference covered", "half-width", "pairs", "")
    yield ("---",) * 9
    for number, case in enumerate(CASES):
        yield row(case, stars, number)


NOTE = (
    "`p <= 5%`: the share of pairs in which the test sees a difference: the false alarms at ratio 1 (nominal 5%), the power "
    "elsewhere. `covered`: the share of 95% intervals that hold the true ratio, and the true difference of s. `half-width`: "
    "the median factor from the estimate to an end of the ratio's interval. The first star's exponent is 0.45."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stars", type=int, default=100, help="pairs of stars for each row")
    parser.add_argument("--out", type=Path, help="write the table to this file, row by row")
    options = parser.parse_args()
    lines = []
    for cells in itertools.chain(table(options.stars)):
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        if options.out:
            text = "\n".join(lines)
            command = f"python benchmarks/comparing.py --stars {options.stars}"
            options.out.write_text(f"# Comparing two stars\n\n`{command}`. {NOTE}\n\n{text}\n")


if __name__ == "__main__":
    main()
