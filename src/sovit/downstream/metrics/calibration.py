"""Whether probabilities are what they say: calibration error, log loss, Brier score, and one temperature for all logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from sovit.downstream.rates import wilson

Floats = NDArray[np.float64]
BINS = 15
_LARGEST = math.log(1e4)  # of the temperature, and of its inverse


def probabilities(logits: Floats, temperature: float = 1.0) -> Floats:
    """Softmax (N, C) of logits / temperature."""
    return softmax(np.asarray(logits, np.float64) / temperature, axis=1)


def nll(logits: Floats, labels: NDArray[np.int64], temperature: float = 1.0) -> float:
    """Mean negative log likelihood of the right class, in nats."""
    return float(
        -log_softmax(np.asarray(logits, np.float64) / temperature, axis=1)[np.arange(len(labels)), labels].mean()
    )


def brier(probability: Floats, labels: NDArray[np.int64]) -> float:
    """Mean squared distance of the probabilities from the right corner, summed over the classes (Brier 1950): 0 to 2."""
    right = probability[np.arange(len(labels)), labels]
    return float((np.square(probability).sum(1) - 2 * right + 1).mean())


def bin_of(confidence: Floats, bins: int = BINS, *, mass: bool = False) -> NDArray[np.int64]:
    """The bin of each image: ``bins`` of equal width over (0, 1], or of equal counts as nearly as can be.

    Equal values stay in one bin of equal mass only by luck; ties are cut in the order of the images.
    """
    if mass:
        rank = np.empty(len(confidence), np.int64)
        rank[np.argsort(confidence, kind="stable")] = np.arange(len(confidence))
        return rank * bins // len(confidence)
    return np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def ece(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS, *, mass: bool = False) -> float:
    """Expected calibration error of the top label: sum over bins of count / N |mean right - mean confidence|.

    Naeini et al. 2015 (equal width) and Nguyen & O'Connor 2015 (equal mass). It cannot be below 0, so its mean is above 0
    for perfect probabilities too, by about sqrt(bins / N) / 2.
    """
    where = bin_of(confidence, bins, mass=mass)
    gap = np.bincount(where, right, bins) - np.bincount(where, confidence, bins)
    return float(np.abs(gap).sum() / len(confidence))


def reliability(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> list[dict[str, Any]]:
    """A row for each bin of equal width that holds images: mean confidence, share right with Wilson's interval."""
    where = bin_of(confidence, bins)
    rows = []
    for k in np.unique(where):
        inside = where == k
        hits, n = int(right[inside].sum()), int(inside.sum())
        lo, hi = wilson(hits, n)
        mean = float(confidence[inside].mean())
        about = {"from": k / bins, "to": (k + 1) / bins, "n": n}
        rows.append({**about, "confidence": mean, "right": hits / n, "lo": lo, "hi": hi})
    return rows


def fit_temperature(logits: Floats, labels: NDArray[np.int64]) -> float:
    """The temperature with the least `nll` (Guo et al., arXiv 1706.04599), between 1e-4 and 1e4.

    The loss is convex in the inverse temperature, so a bounded search on its logarithm finds the one minimum. Where all
    of the logits are right there is none, and the lower bound comes back.
    """
    found = minimize_scalar(
        lambda log: nll(logits, labels, math.exp(log)),
        bounds=(-_LARGEST, _LARGEST),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(float(found.x))
