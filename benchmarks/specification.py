"""Do the tests of the model alarm when they should, and only then?

    python benchmarks/specification.py       about twenty minutes on two cores

A clean arm should alarm in 5%. "run" makes one run, chosen at random, 2% worse; named = the alarm names that run and no
worse one. "c" halves the data exponent from the middle compute on.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from scipy.linalg import null_space, solve_triangular
from scipy.special import logsumexp

from sovit.analysis.fit import fit_law
from sovit.analysis.intervals import fit_with_runs
from sovit.analysis.specification import break_test, run_test, structure_test
from truths import LAWS, SIGMA, design, draw, write

CASES = {"clean": (0.5, 1.0, 2.0), "run": (0.0, 0.25, 0.5, 1.0), "c": (0.0, 0.5, 1.0)}


def study(case: tuple[str, int, str, float, int]) -> str:
    dimension, num_seeds, kind, tau, replicates = case
    law = LAWS[dimension]
    x, t, run = design(dimension, num_seeds)
    truth = law.error(x, t)
    if kind == "c":
        slow = law.alpha * x**-law.a + (law.beta * x**law.b + law.xi) * t ** (-law.c / 2) + law.eps
        truth = np.where(t <= 1, truth, slow)
    rng = np.random.default_rng([num_seeds, int(100 * tau), len(kind), len(dimension)])
    alarms, named = np.zeros(3), 0
    for _ in range(replicates):
        error = draw(rng, truth, t, run, tau * SIGMA)
        bad = int(rng.integers(run.max() + 1))
        if kind == "run":
            error = error * np.where(run == bad, 1.02, 1.0)
        whole = fit_with_runs(x, t, error, run)
        found = run_test(x, t, whole, num_draws=199)
        p = (np.nanmin(found.p), break_test(x, t, whole, num_draws=199).p, structure_test(x, t, whole, num_draws=199))
        alarms += np.array(p) <= 0.05
        named += p[0] <= 0.05 and int(np.nanargmax(np.abs(found.t))) == bad
    shares = [f"{share:.1%}" for share in alarms / replicates]
    name = f"{named / replicates:.1%}" if kind == "run" else "-"
    cells = [dimension, str(7 * num_seeds), kind, f"{tau:g}", str(replicates), shares[0], name, *shares[1:]]
    return f"| {' | '.join(cells)} |"


def ceiling(num_seeds: int, tau: float, num_draws: int = 20_000) -> float:
    """The power against a run 2% worse that no test has, however clever, if it alarms falsely in at most 6.5% at any tau.

    The law is linearised and sigma known, so what differs between the hypotheses is Gaussian; against one tau of the null
    the likelihood ratio with tau and the size of the shift known is the most powerful test (Neyman and Pearson), and
    the least of these over the null's taus is a bound for all tests. ``tau`` in units of sigma.
    """
    law = LAWS["depth"]
    x, t, run = design("depth", num_seeds)
    jacobian = fit_law(x, t, law.error(x, t), starts=[(law.a, law.b, law.c)]).jacobian
    of_run = np.equal.outer(run, np.arange(run.max() + 1)).astype(float)
    seen = null_space((jacobian / np.linalg.norm(jacobian, axis=0)).T).T @ of_run
    left, *_ = np.linalg.svd(seen, full_matrices=False)
    seen = left.T @ seen
    num_runs, shift = len(seen), np.log(1.02) / SIGMA
    rng = np.random.default_rng(0)

    def white(ratio: float, columns: np.ndarray) -> tuple[np.ndarray, float]:
        lower = np.linalg.cholesky(np.eye(num_runs) + ratio**2 * seen @ seen.T)
        return solve_triangular(lower, columns, lower=True), float(np.log(np.diag(lower)).sum())

    def log_ratio(data: np.ndarray, null: float) -> np.ndarray:
        (clean, size), (moved, _) = white(tau, data), white(tau, shift * seen)
        each = np.array([-0.5 * np.sum((clean - one[:, None]) ** 2, 0) for one in moved.T])
        plain, null_size = white(null, data)
        return logsumexp(each, 0) - np.log(num_runs) - size + 0.5 * np.sum(plain**2, 0) + null_size

    def draw_runs(ratio: float, moved: float) -> np.ndarray:
        data = rng.normal(size=(num_runs, num_draws)) + ratio * seen @ rng.normal(size=(num_runs, num_draws))
        return data + moved * seen[:, rng.integers(num_runs, size=num_draws)]

    least = 1.0
    for null in (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0):
        threshold = np.quantile(log_ratio(draw_runs(null, 0.0), null), 1 - 0.065)
        least = min(least, float(np.mean(log_ratio(draw_runs(tau, shift), null) > threshold)))
    return least


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicates", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/specification.md")
    arguments = parser.parse_args()
    cases = [
        ("depth", seeds, kind, tau, arguments.replicates // (1 if seeds == 1 else 2))
        for seeds in (1, 3)
        for kind, taus in CASES.items()
        for tau in taus
    ]
    study((*cases[0][:4], 1))  # compiles, so that the workers find it done
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        rows = []
        for row in pool.map(study, cases):
            rows.append(row)
            print(row, flush=True)
    head = [
        f"Depth arm, 7 sizes x 14 durations, sigma = {SIGMA:.1%}, tests at 5%.",
        "",
        "| arm | runs | truth | tau / sigma | arms | a run is off | and is named | c changes | RESET |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    taus = CASES["run"]
    limits = [
        "",
        "Power against a run 2% off that no test can have if it alarms falsely in at most 6.5% whatever tau is:",
        "",
        f"| runs | {' | '.join(f'tau = {tau:g} sigma' for tau in taus)} |",
        f"|---|{'---|' * len(taus)}",
        *(f"| {7 * seeds} | {' | '.join(f'{ceiling(seeds, tau):.1%}' for tau in taus)} |" for seeds in (1, 3)),
    ]
    command = f"python benchmarks/specification.py --replicates {arguments.replicates}"
    write(arguments.out, command, head + rows + limits)


if __name__ == "__main__":
    main()
