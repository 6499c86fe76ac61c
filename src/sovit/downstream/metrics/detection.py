"""How well a score tells two sets apart, the in-distribution one high: AUROC, AUPR, FPR at a TPR."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]


def auroc(inside: Floats, outside: Floats) -> float:
    """The chance that an image of the first set scores above one of the second, ties counted half (Mann-Whitney)."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)].sum()
    return float((ranks - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def average_precision(positive: Floats, negative: Floats) -> float:
    """Area under precision over recall as a step function, ties taken together: sum (R_k - R_(k-1)) P_k."""
    scores = np.concatenate([positive, negative])
    truth = np.arange(len(scores)) < len(positive)
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # the end of each run of equal scores
    hits = np.cumsum(truth)[last]
    return float((np.diff(hits, prepend=0) / len(positive) * hits / (last + 1)).sum())


def fpr_at_tpr(inside: Floats, outside: Floats, tpr: float = 0.95) -> float:
    """The share of the second set at or above the highest threshold that lets at least ``tpr`` of the first in."""
    needed = math.ceil(tpr * len(inside) - 1e-9)
    threshold = np.sort(inside)[len(inside) - needed]
    return float((outside >= threshold).mean())


def mahalanobis(mean: Floats, precision: Floats, features: Floats) -> Floats:
    """Minus the least squared Mahalanobis distance (N,) of features (N, D) from the class means (C, D).

    Lee et al., arXiv 1807.03888: one covariance for all classes, ``precision`` (D, D) its inverse.
    """
    projected = features @ precision
    squared = (projected * features).sum(1)[:, None] - 2 * projected @ mean.T + ((mean @ precision) * mean).sum(1)
    return -squared.min(1)


def class_gaussians(features: Floats, labels: NDArray[np.int64], num_classes: int) -> tuple[Floats, Floats]:
    """Class means (C, D) and the inverse of the shared covariance (D, D), shrunk by Ledoit and Wolf's rule.

    The rule (scikit-learn's) keeps the covariance invertible where there are fewer images than dimensions.
    """
    from sklearn.covariance import ledoit_wolf

    mean = np.stack([features[labels == c].mean(0) for c in range(num_classes)])
    covariance, _ = ledoit_wolf(features - mean[labels], assume_centered=True)
    return mean, np.linalg.pinv(covariance, hermitian=True)
