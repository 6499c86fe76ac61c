"""Promised against obtained: does the standard error that a plan promises come out when the plan is run and fitted?

    python benchmarks/promised.py [--replicates 1000] [--out benchmarks/promised.md]

For each case (law, sizes, durations, noise) the Fisher information promises the standard errors of log s and of
log x*(T), the optimum at ten times the longest duration. Then so many sweeps are drawn from the law with an offset per
run, each is fitted as `sovit fit` does, not knowing the noise, and the root mean square error is set beside the promise.
About five minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit.analysis.intervals import fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.planning.design import Task, best_design, middle_compute
from sovit.analysis.planning.exchange import shifted
from sovit.analysis.planning.information import ASSUMED, WIDE, Arm, Spread, assumed_law, expect, half_width
from sovit.analysis.points import Dimensions
from sovit.config import compose

ALLOWED = 0.15
PAPER_RANGE = {"width": 3.2, "depth": 5.0, "mlp_dim": 5.6}
NUM_DURATIONS, T_RANGE = 14, 32.0


@dataclass(frozen=True)
class Result:
    case: str
    points: Arm
    promised: float
    obtained: float
    bias: float
    promised_best: float
    obtained_best: float

    @property
    def wide(self) -> bool:
        """The plan warns that this arm tells too little."""
        return half_width(self.promised, self.points) > WIDE


def star_arm(name: str, law: Law, spread: Spread, log_sizes: np.ndarray, size_range: float) -> Arm:
    """Runs at sizes around x = 1, evaluated at durations around t = 1. ``log_sizes``: -0.5 the smallest, 0.5 the largest."""
    t = T_RANGE ** np.linspace(-0.5, 0.5, NUM_DURATIONS)
    run = np.repeat(np.arange(len(log_sizes)), len(t))
    return Arm(name, law, spread, (size_range**log_sizes)[run], np.tile(t, len(log_sizes)), run)


def cases() -> Iterator[tuple[str, Arm]]:
    seven = np.linspace(-0.5, 0.5, 7)
    few = np.array([-0.5, -0.5, -0.25, 0, 0, 0.25, 0.5, 0.5])
    laws = {name: assumed_law(name, 1, 1) for name in ASSUMED}
    for name, law in laws.items():
        for sigma, tau in ((0.005, 0.0), (0.005, 0.0025), (0.005, 0.005), (0.01, 0.005)):
            yield f"7 sizes x{PAPER_RANGE[name]:g}", star_arm(name, law, Spread(sigma, tau), seven, PAPER_RANGE[name])
    for name, law in laws.items():
        for tau in (0.0025, 0.005, 0.01):
            yield "7 sizes x16, 3 seeds", star_arm(name, law, Spread(0.005, tau), np.tile(seven, 3), 16)
        yield "5 sizes x16, seeds 2-1-2-1-2", star_arm(name, law, Spread(0.005, 0.005), few, 16)
    a, b = ASSUMED["depth"]
    steep = Law(0.07 * b / a, 2 * a, 0.07, 2 * b, 0.03, 0.7, 0.15)
    yield "exponents doubled, 7 sizes x5", star_arm("depth", steep, Spread(0.005, 0.005), seven, 5)
    for factor in (0.6, 1.7):
        law = shifted(laws["depth"], factor)
        yield f"optimum x{factor:g} off, 7 sizes x16", star_arm("depth", law, Spread(0.005, 0.005), seven, 16)
    drift = Spread(0.005, 0.005, slope=0.0025)
    yield "runs drift, 7 sizes x16, 3 seeds", star_arm("depth", laws["depth"], drift, np.tile(seven, 3), 16)
    yield from proposed()


def proposed() -> Iterator[tuple[str, Arm]]:
    """The arms of a star that `sovit design` proposes for the tiny configuration."""
    budget, center = 130_000.0, Dimensions(32, 4, 128)
    cfg = compose([])
    middle = middle_compute(cfg, center, budget)
    laws = {name: assumed_law(name, getattr(center, name), middle) for name in ASSUMED}
    noise = dict.fromkeys(laws, Spread(0.01, 0.01))
    task = Task(center, cfg, laws, noise, budget, 25_600.0, middle)
    for points in best_design(task).arms.values():
        yield "proposed by sovit design", points


def study(case: str, points: Arm, replicates: int, seed: int) -> Result:
    """Draw and fit ``replicates`` sweeps of these points."""
    rng = np.random.default_rng(seed)
    target = 10 * points.t.max()
    expected = expect(points, target)
    log_t = np.log(points.t)
    drift = points.spread.slope * (log_t - (np.bincount(points.run, log_t) / np.bincount(points.run))[points.run])
    clean = points.law.error(points.x, points.t)
    shifts, best = [], []
    for _ in range(replicates):
        offsets, slopes = rng.normal(size=(2, points.num_runs))
        noise = points.spread.sigma * rng.normal(size=len(clean)) + points.spread.tau * offsets[points.run]
        error = clean * np.exp(noise + slopes[points.run] * drift)
        law = fit_with_runs(points.x, points.t, error, points.run).fit.law
        shifts.append(math.log(law.exponent / points.law.exponent))
        best.append(math.log(np.clip(law.optimum(target) / points.law.optimum(target), 1e-6, 1e6)))
    return Result(
        case,
        points,
        promised=expected.log_se,
        obtained=math.sqrt(np.mean(np.square(shifts))),
        bias=float(np.mean(shifts)),
        promised_best=expected.log_se_best,
        obtained_best=math.sqrt(np.mean(np.square(best))),
    )


def table(results: list[Result], replicates: int, seconds: float) -> str:
    lines = [
        "# Promised against obtained standard errors",
        "",
        f"Made by `python benchmarks/promised.py --replicates {replicates}` in {seconds / 60:.0f} minutes of one core. "
        f"{replicates:,} sweeps a row, each drawn from the law and fitted without knowledge of the noise; the sampling "
        f"error of a ratio is {1 / math.sqrt(2 * replicates):.1%}. Promised: the Fisher information. Obtained: root mean "
        "square error of log s, and of log x*(T) at ten times the longest duration. *Wide*: the plan itself warns that the "
        f"expected 95% interval of s exceeds a factor of {math.exp(WIDE):g} either way.",
        "",
        "| case | arm | runs | sigma, tau | promised log s | obtained | ratio | bias / promised "
        "| promised log x*(T) | obtained | ratio | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        spread = row.points.spread
        noise = f"{spread.sigma:.2%}, {spread.tau:.2%}"
        lines.append(
            f"| {row.case} | {row.points.name} | {row.points.num_runs} | {noise} "
            f"| {row.promised:.4f} | {row.obtained:.4f} | {row.obtained / row.promised:.2f} "
            f"| {row.bias / row.promised:+.2f} | {row.promised_best:.3f} | {row.obtained_best:.3f} "
            f"| {row.obtained_best / row.promised_best:.2f} | {'wide' if row.wide else ''} |"
        )
    sound = [row for row in results if not row.wide]
    kept = sum(abs(row.obtained / row.promised - 1) <= ALLOWED for row in sound)
    kept_best = sum(abs(row.obtained_best / row.promised_best - 1) <= ALLOWED for row in sound)
    lines += [
        "",
        f"Within {ALLOWED:.0%}: log s in {kept} and log x*(T) in {kept_best} of the {len(sound)} rows without the warning.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="markdown file for the table (default: print it)")
    arguments = parser.parse_args()
    begun = time.process_time()
    results = [study(*case, arguments.replicates, seed) for seed, case in enumerate(cases())]
    text = table(results, arguments.replicates, time.process_time() - begun)
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
