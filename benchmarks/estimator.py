"""How near to the statistical limit is the fit, and how fast? Against the Cramér-Rao bound, rivals and other solvers.

    python benchmarks/estimator.py           about a quarter of an hour on one core

Efficiency: RMSE and bias of s over the Cramér-Rao standard error, over simulated arms with independent errors.
Rivals on the first arms of the same draws: scipy's curve_fit from ones in raw units, least squares of log residuals over
seven log parameters from one start, parabolas per compute, and the 4,500-start grid of Chinchilla refits (log-sum-exp,
Huber at 1e-3, L-BFGS-B; here with hand-written gradients, which is several times faster than finite differences).
Optimum: on hard random truths, against the best of twenty trust-region starts. Speed: medians, all in one process.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy.optimize import curve_fit, least_squares, minimize

from sovit.analysis.fit import BOX, Noise, equal_noise, fit_law, law_logs
from sovit.analysis.intervals import exponent_interval, fit_with_runs, log_standard_error
from sovit.analysis.law import Law
from sovit.analysis.varpro import refit
from truths import LAWS, SIGMA, design, draw, write

HUBER = 1e-3
GRID = tuple(
    itertools.product((-5.0, -2.5, -0.0), (0.0, 0.5, 1.0, 1.5, 2.0), (-5.0, -2.5), (0.0, 0.5, 1.0, 1.5, 2.0),
                      (-5.0, -2.5), (0.0, 0.5, 1.0, 1.5, 2.0), (-2.0, -1.0, 0.0))
)  # log alpha, a, log beta, b, log xi, c, log eps: 4,500 starts  # fmt: skip


def centred(x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.log(x) - np.log(x).mean(), np.log(t) - np.log(t).mean()


def general(x, t, error, noise, starts, seed) -> tuple[float, float]:
    """(objective, s) of the best of scipy's bounded trust-region fits over seven log parameters."""
    log_x, log_t = centred(x, t)
    log_error = np.log(error)

    def pieces(p):
        alpha, a, beta, b, xi, c, eps = np.exp(p)
        size, decay = alpha * np.exp(-a * log_x), np.exp(-c * log_t)
        return size, beta * np.exp(b * log_x) * decay, xi * decay, np.full_like(log_x, eps)

    def residual(p):
        return noise.whiten(log_error - np.log(sum(pieces(p))))

    def jacobian(p):
        size, cost, data, floor = pieces(p)
        a, b, c = np.exp(p[[1, 3, 5]])
        columns = (size, -a * log_x * size, cost, b * log_x * cost, data, -c * log_t * (cost + data), floor)
        return -noise.whiten(np.column_stack(columns) / sum(pieces(p))[:, None])

    low = np.log([1e-9, BOX[0], 1e-9, BOX[0], 1e-9, BOX[0], 1e-9])
    high = np.log([10, BOX[1], 10, BOX[1], 10, BOX[1], 10])
    rng = np.random.default_rng(seed)
    first = np.log([0.1, 0.5, 0.1, 0.5, 0.05, 0.4, 0.1])
    best = math.inf, math.nan
    for index in range(starts):
        start = np.clip(first + (0.8 * rng.normal(size=7) if index else 0), low + 0.01, high - 0.01)
        end = least_squares(residual, start, jacobian, bounds=(low, high), max_nfev=300)
        a, b, c = np.exp(end.x[[1, 3, 5]])
        best = min(best, (2 * end.cost, c / (a + b)))
    return best


def naive(x, t, error) -> float:
    """curve_fit as one would first write it: raw units, all parameters from 1."""

    def law(points, alpha, a, beta, b, xi, c, eps):
        return alpha * points[0] ** -a + (beta * points[0] ** b + xi) * points[1] ** -c + eps

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            _, a, _, b, _, c, _ = curve_fit(law, (x, t), error, p0=np.ones(7))[0]
        except RuntimeError:
            return math.nan
    return c / (a + b)


def parabolas(x, t, error) -> float:
    """Slope of the minima of a parabola per compute (Hoffmann et al., approach 2)."""
    log_x, log_t = np.log(x), np.log(t)
    minima = []
    for value in np.unique(log_t):
        here = log_t == value
        second, first, _ = np.polyfit(log_x[here], np.log(error[here]), 2)
        minima.append((value, -first / (2 * second)))
    return float(np.polyfit(*np.array(minima).T, 1)[0])


def chinchilla(x, t, error, starts) -> tuple[float, float]:
    """(least-squares objective, s) of the best of many starts of a Huber loss on log-sum-exp residuals."""
    log_x, log_t = centred(x, t)
    log_error = np.log(error)
    zero = np.zeros_like(log_x)

    def loss(p):
        alpha, a, beta, b, xi, c, eps = p
        terms = np.array([alpha - a * log_x, beta + b * log_x - c * log_t, xi - c * log_t, eps + zero])
        top = terms.max(0)
        weights = np.exp(terms - top)
        total = weights.sum(0)
        residual = top + np.log(total) - log_error
        weights /= total
        small = np.abs(residual) <= HUBER
        value = np.where(small, residual**2 / 2, HUBER * (np.abs(residual) - HUBER / 2)).sum()
        pull = np.clip(residual, -HUBER, HUBER)
        size, cost, data, floor = weights * pull
        return value, np.array(
            [size.sum(), -(size @ log_x), cost.sum(), cost @ log_x, data.sum(), -((cost + data) @ log_t), floor.sum()]
        )

    best = math.inf, None
    for start in starts:
        end = minimize(loss, np.array(start), jac=True, method="L-BFGS-B")
        if end.fun < best[0]:
            best = end.fun, end.x
    alpha, a, beta, b, xi, c, eps = best[1]
    fitted = np.logaddexp.reduce([alpha - a * log_x, beta + b * log_x - c * log_t, xi - c * log_t, eps + zero])
    return float(np.sum((log_error - fitted) ** 2)), c / (a + b)


def efficiency(replicates: int) -> list[str]:
    lines = [
        f"## Efficiency: {replicates} arms of 7 sizes x 14 durations a case, independent errors",
        "",
        "| arm | sigma | bound / s | RMSE / bound | bias / bound | median / bound |",
        "|---|---|---|---|---|---|",
    ]
    for name, law in LAWS.items():
        x, t, _ = design(name)
        truth = law.error(x, t)
        logs = law_logs(*centred(x, t))
        first = fit_law(x, t, truth)
        for factor in (1, 2):
            bound = law.exponent * log_standard_error(first, equal_noise(len(x)), factor * SIGMA)
            rng = np.random.default_rng(factor)
            errors = np.exp(factor * SIGMA * rng.normal(size=(replicates, len(x)))) * truth
            found = np.array([fit_law(x, t, error).law.exponent for error in errors])
            warm = refit(logs, np.log(errors), equal_noise(len(x)), first.exponents)[1]
            assert np.median(np.abs(warm[:, 2] / (warm[:, 0] + warm[:, 1]) / found - 1)) < 1e-3
            miss = found - law.exponent
            lines.append(
                f"| {name} | {factor * SIGMA:.1%} | {bound / law.exponent:.2f} | {np.sqrt(np.mean(miss**2)) / bound:.3f} "
                f"| {miss.mean() / bound:+.2f} | {np.median(miss) / bound:+.2f} |"
            )
    lines += ["", f"Sampling error of an RMSE ratio: {1 / math.sqrt(2 * replicates):.1%}; of a bias: "
              f"{1 / math.sqrt(replicates):.2f}.", ""]  # fmt: skip
    return lines


def rivals(replicates: int, grid_starts: int) -> list[str]:
    law = LAWS["depth"]
    x, t, run = design("depth")
    bound = law.exponent * log_standard_error(fit_law(x, t, law.error(x, t)), equal_noise(len(x)), SIGMA)
    rng = np.random.default_rng(3)
    pick = np.random.default_rng(0).choice(len(GRID), grid_starts, replace=False)
    methods: dict[str, Callable[[np.ndarray], float]] = {
        "sovit": lambda error: fit_law(x, t, error).law.exponent,
        "curve_fit, raw units, from 1": lambda error: naive(1000 * x, 1e6 * t, error),
        "least squares, 7 log parameters, 1 start": lambda error: general(x, t, error, equal_noise(len(x)), 1, 0)[1],
        "isocompute parabolas": lambda error: parabolas(x, t, error),
        f"Huber 1e-3, {grid_starts} of the 4,500 starts": lambda error: chinchilla(
            x, t, error, [GRID[k] for k in pick]
        )[1],
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for index in range(replicates):
        error = draw(rng, law.error(x, t), t, run, 0.0)
        for name, method in methods.items():
            if name.startswith("Huber") and index >= replicates // 5:
                continue
            start = time.perf_counter()
            found[name].append(method(error))
            taken[name].append(time.perf_counter() - start)
    lines = [
        f"## Rivals: depth, sigma {SIGMA:.1%}, the same {replicates} arms (a fifth of them for the grid)",
        "",
        "| method | RMSE / bound | bias / bound | median ms | times sovit's |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        miss = np.array(values) - law.exponent
        miss = miss[np.isfinite(miss)]
        ms = 1e3 * statistics.median(taken[name])
        ratio = ms / (1e3 * statistics.median(taken["sovit"]))
        lines.append(
            f"| {name} | {np.sqrt(np.mean(miss**2)) / bound:.2f} | {miss.mean() / bound:+.2f} | {ms:.3g} | {ratio:.3g} |"
        )
    return [*lines, ""]


def hard_truths(count: int) -> list[str]:
    """Objectives against the best of twenty general starts, on truths as hard as they come."""
    rng = np.random.default_rng(20)
    excess = []
    for case in range(count):
        share = rng.uniform(0, 0.8)
        a, b = np.exp(rng.uniform(np.log(0.1), np.log(2))), np.exp(rng.uniform(np.log(0.1), np.log(1.5)))
        c, off = rng.uniform(0.15, 0.9), np.exp(rng.uniform(-1, 1))
        beta = 0.1 * (1 - share)
        law = Law(beta * b / a * off ** (a + b), a, beta, b, 0.1 * share, c, 0.15)
        num_sizes = int(rng.choice([5, 7]))
        x = np.repeat(rng.uniform(3, 8) ** np.linspace(-0.5, 0.5, num_sizes), 14)
        t = np.tile(32 ** np.linspace(-0.5, 0.5, 14), num_sizes)
        sigma = float(rng.choice([0.005, 0.01, 0.02]))
        noise = Noise(np.repeat(np.arange(num_sizes), 14), float(case % 2), np.ones(len(x)))
        error = law.error(x, t) * np.exp(sigma * rng.normal(size=len(x)))
        excess.append(
            (fit_law(x, t, error, noise=noise).objective - general(x, t, error, noise, 20, case)[0]) / sigma**2
        )
    good = np.mean(np.array(excess) <= 0.1)
    return [
        f"## Optimum: {count} hard random truths, half of them with run effects",
        "",
        f"Within 0.1 chi-square of the best of 20 trust-region starts: {good:.1%} (largest excess {max(excess):.2g}; "
        f"better by more than 0.1 in {np.mean(np.array(excess) < -0.1):.1%}).",
        "",
    ]


def speed(full_grid: bool) -> list[str]:
    law = LAWS["depth"]
    x, t, run = design("depth")
    error = draw(np.random.default_rng(5), law.error(x, t), t, run, SIGMA)
    whole = fit_with_runs(x, t, error, run)
    logs, noise = law_logs(*centred(x, t)), equal_noise(len(x))
    drawn = np.log(law.error(x, t)) + SIGMA * np.random.default_rng(6).normal(size=(1000, len(x)))

    def median_s(task: Callable[[], object], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    one = median_s(lambda: fit_law(x, t, error), 200)
    interval = median_s(lambda: exponent_interval(x, t, error, fit_with_runs(x, t, error, run)), 50)
    many = median_s(lambda: refit(logs, drawn, noise, whole.fit.exponents), 7)
    trust = median_s(lambda: general(x, t, error, noise, 20, 0), 3)
    starts = GRID if full_grid else GRID[::75]
    start = time.perf_counter()
    grid_objective, grid_s = chinchilla(x, t, error, starts)
    grid = (time.perf_counter() - start) * len(GRID) / len(starts)
    ours = fit_law(x, t, error)
    note = "" if full_grid else f", extrapolated from {len(starts)} starts"
    return [
        "## Speed: depth, 98 points, one process, one thread",
        "",
        "| task | seconds | times one fit |",
        "|---|---|---|",
        f"| one fit from cold | {one:.2e} | 1 |",
        f"| fit with run effects by REML, and its interval | {interval:.2e} | {interval / one:.3g} |",
        f"| 1,000 warm refits | {many:.2e} | {many / one:.3g} |",
        f"| scipy trust region, 20 starts, analytic Jacobian | {trust:.2e} | {trust / one:.3g} |",
        f"| 4,500-start grid, Huber, analytic gradient{note} | {grid:.2e} | {grid / one:.3g} |",
        "",
        f"Sum of squared log residuals: sovit {ours.objective:.6e} (s = {ours.law.exponent:.3f}), the grid "
        f"{grid_objective:.6e} (s = {grid_s:.3f}).",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--hard", type=int, default=400)
    parser.add_argument("--rivals", type=int, default=100)
    parser.add_argument("--grid-starts", type=int, default=50)
    parser.add_argument("--part-of-grid", action="store_true", help="time 60 of the 4,500 starts and extrapolate")
    parser.add_argument("--out", default="benchmarks/estimator.md")
    arguments = parser.parse_args()
    lines = speed(not arguments.part_of_grid) + efficiency(arguments.replicates)
    lines += rivals(arguments.rivals, arguments.grid_starts) + hard_truths(arguments.hard)
    write(arguments.out, "python benchmarks/estimator.py", lines)


if __name__ == "__main__":
    main()
