"""Do the intervals hold? Coverage and width of the nominal 95% interval over simulated arms whose truth is known.

    python benchmarks/intervals.py            1,000 arms a case, about a quarter of an hour on two cores

Width is the median half-width of log s over 1.96 times the Cramér-Rao standard error at the true noise, what an oracle
that knows tau would report. A slope is a run effect that grows with log t, which the noise model does not have.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from sovit.analysis.fit import Noise, fit_law
from sovit.analysis.intervals import exponent_interval, fit_with_runs, jackknife_runs, log_standard_error
from truths import LAWS, SIGMA, design, draw, write

TAUS = (0.5, 1.0, 2.0, 0.0)  # in units of sigma
SLOPE = 0.5  # spread of a run's slope in log t, in units of sigma an e-fold, beside tau = sigma
DISAGREE = 2.0  # the jackknife's half-width over the headline's from which the noise model is called wrong


def study(case: tuple[str, int, float, float, int]) -> str:
    dimension, num_seeds, tau, slope, replicates = case
    law = LAWS[dimension]
    x, t, run = design(dimension, num_seeds)
    truth = law.error(x, t)
    oracle = 1.96 * log_standard_error(fit_law(x, t, truth), Noise(run, tau, np.ones(len(x))), SIGMA)
    rng = np.random.default_rng([num_seeds, int(10 * tau), int(10 * slope), len(dimension)])
    covered = by_jackknife = disagree = num_open = 0
    halves, misses = [], []
    for _ in range(replicates):
        error = draw(rng, truth, t, run, tau * SIGMA, slope * SIGMA)
        whole = fit_with_runs(x, t, error, run)
        interval = exponent_interval(x, t, error, whole)
        jackknife = jackknife_runs(x, t, error, run, whole)
        closed = interval.lo > 0 and math.isfinite(interval.hi)
        half = math.log(interval.hi / interval.lo) / 2 if closed else math.inf
        covered += interval.lo <= law.exponent <= interval.hi
        by_jackknife += jackknife.lo <= law.exponent <= jackknife.hi
        disagree += not 1 / DISAGREE <= jackknife.half / half <= DISAGREE
        num_open += not closed
        halves.append(half)
        misses.append(math.log(interval.estimate / law.exponent))
    noise = f"tau = {tau:g} sigma" if tau else "no run effect"
    if slope:
        noise += f", slopes {slope:g} sigma"
    rms = float(np.sqrt(np.mean(np.square(misses)))) / (oracle / 1.96)
    return (
        f"| {dimension} | {7 * num_seeds} | {noise} | {oracle / 1.96:.3f} | {covered / replicates:.1%} "
        f"| {np.median(halves) / oracle:.2f} | {num_open / replicates:.1%} | {by_jackknife / replicates:.1%} "
        f"| {disagree / replicates:.1%} | {rms:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/intervals.md")
    arguments = parser.parse_args()
    noises = [(tau, 0.0) for tau in TAUS] + [(1.0, SLOPE)]
    cases = [
        (dimension, seeds, *noise, arguments.replicates)
        for dimension in ("width", "depth")
        for seeds in (1, 3)
        for noise in noises
    ]
    study((*cases[0][:4], 1))  # compiles, so that the workers find it done
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(study, cases))
    head = [
        f"{arguments.replicates} arms a case, 7 sizes x 14 durations, sigma = {SIGMA:.1%}; standard error of a coverage "
        f"of 95%: {math.sqrt(0.95 * 0.05 / arguments.replicates):.1%}.",
        "",
        "| arm | runs | noise | Cramér-Rao s.e. of log s | coverage | width | open | jackknife covers "
        "| disagrees | RMSE of log s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    write(arguments.out, f"python benchmarks/intervals.py --replicates {arguments.replicates}", head + rows)


if __name__ == "__main__":
    main()
