"""Accuracy where an image has several right classes, only some of the classes count, or some images are harder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def hits(
    logits: NDArray[np.float64], right: NDArray[np.bool_], k: int = 1, allowed: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Whether one of the k highest logits (N, C) is a right class (N, C) of the image, among the ``allowed`` (C,)."""
    scores = logits if allowed is None else np.where(allowed, logits, -np.inf)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.asarray(np.take_along_axis(right, top, 1).any(1))


def chance(right: NDArray[np.bool_], k: int, allowed: NDArray[np.bool_]) -> float:
    """The accuracy of k different classes drawn blindly from the ``allowed`` (C,): the mean over images (N, C)."""
    n = int(allowed.sum())
    num = (right & allowed).sum(1)
    values = {r: 1 - math.comb(n - r, k) / math.comb(n, k) if k < n else float(r > 0) for r in np.unique(num).tolist()}
    return float(np.mean([values[r] for r in num.tolist()]))


def mean_corruption_error(errors: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> float:
    """Mean over kinds of (sum of errors over severities) / (that of the baseline) (arXiv 1903.12261).

    Rows are kinds, columns severities. A baseline without errors of a kind gives infinity.
    """
    above, below = np.sum(errors, axis=1), np.sum(baseline, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(above / below))
