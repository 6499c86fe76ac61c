"""The laws and designs the studies of the fit share: three dimensions in units of the middle of their arms.

No measured amplitudes are published. These are guesses with the published exponents s = 0.22, 0.45 and 0.60, errors
between 0.2 and 0.45, the published range of sizes and the optimum in the middle of the arm at the middle compute.
"""

from __future__ import annotations

import numpy as np

from sovit.analysis.law import Law

SIGMA = 0.005  # relative noise of one evaluation
NUM_SIZES, NUM_DURATIONS, T_RANGE = 7, 14, 32.0


def _law(a: float, b: float) -> Law:
    return Law(0.07 * b / a, a, 0.07, b, 0.03, 0.35, 0.15)


LAWS = {"width": _law(1.10, 0.49), "depth": _law(0.45, 0.328), "mlp": _law(0.30, 0.283)}
SIZE_RANGE = {"width": 3.2, "depth": 5.0, "mlp": 5.6}  # of the published arms


def design(dimension: str, num_seeds: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, t and run index (n,) of one arm: seven sizes at fourteen durations."""
    sizes = SIZE_RANGE[dimension] ** np.linspace(-0.5, 0.5, NUM_SIZES)
    num_runs = NUM_SIZES * num_seeds
    x = np.tile(np.repeat(sizes, NUM_DURATIONS), num_seeds)
    t = np.tile(T_RANGE ** np.linspace(-0.5, 0.5, NUM_DURATIONS), num_runs)
    return x, t, np.repeat(np.arange(num_runs), NUM_DURATIONS)


def draw(
    rng: np.random.Generator, truth: np.ndarray, t: np.ndarray, run: np.ndarray, tau: float, slope: float = 0.0
) -> np.ndarray:
    """Errors with noise `SIGMA` an evaluation, an offset ``tau`` a run and a slope in log t a run."""
    num_runs = int(run.max()) + 1
    noise = SIGMA * rng.normal(size=len(run)) + tau * rng.normal(size=num_runs)[run]
    return truth * np.exp(noise + slope * rng.normal(size=num_runs)[run] * np.log(t))


def write(path: str, command: str, lines: list[str]) -> None:
    """Print a table and keep it, with the command that makes it, in ``path``."""
    text = "\n".join([f"`{command}`", "", *lines]) + "\n"
    print(text)
    with open(path, "w") as file:
        file.write(text)
