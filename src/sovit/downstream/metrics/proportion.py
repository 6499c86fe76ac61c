"""Intervals of what is counted or averaged over images: Wilson's for a share, bootstrap standard errors for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sovit.downstream.rates import wilson

NUM_BOOTSTRAP = 200  # a standard error to 5 %


def share(right: ArrayLike) -> dict[str, Any]:
    """The mean of 0s and 1s with Wilson's 95 % interval: {"value", "lo", "hi", "n"}."""
    flags = np.asarray(right, bool)
    lo, hi = wilson(int(flags.sum()), flags.size)
    return {"value": float(flags.mean()), "lo": lo, "hi": hi, "n": int(flags.size)}


def bootstrap(
    statistic: Callable[..., float],
    *groups: NDArray[Any],
    num: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of ``statistic(*groups)`` in [0, 1], the rows of each group drawn with replacement on their own."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(*(group[rng.integers(len(group), size=len(group))] for group in groups)) for _ in range(num)]
    return _normal(statistic(*groups), np.array(drawn), 1.0)


def bootstrap_many(
    statistic: Callable[[NDArray[np.int64]], Sequence[float]],
    n: int,
    *,
    num: int = NUM_BOOTSTRAP,
    seed: int = 0,
    most: float = np.inf,
) -> list[tuple[float, float]]:
    """95 % intervals of several statistics of the same n images, in 0 .. ``most``; ``statistic`` takes the rows drawn."""
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(n, size=n)) for _ in range(num)], float)
    return [_normal(value, drawn[:, k], most) for k, value in enumerate(statistic(np.arange(n)))]


def _normal(value: float, drawn: NDArray[np.float64], most: float) -> tuple[float, float]:
    """The value and 1.96 bootstrap standard errors to either side.

    Not the percentiles: gaps and calibration errors, which cannot be below 0, are larger in a resample than in the sample,
    and their percentile intervals can lie wholly above the value.
    """
    half = 1.96 * float(np.std(drawn[np.isfinite(drawn)], ddof=1)) if np.isfinite(drawn).sum() > 1 else np.inf
    return max(0.0, value - half), min(most, value + half)
