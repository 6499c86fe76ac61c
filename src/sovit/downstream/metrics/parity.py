"""Accuracy against demographic parity for a yes-or-no decision, and decisions that keep a given parity.

As in ViT-22B (arXiv 2302.05442, fairness): a group's decisions are made by its own randomised threshold, chosen for the
most accuracy such that the shares of yes of any two groups differ by no more than a level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def parity_gap(yes: Floats, group: Ints) -> float:
    """Largest minus least share of yes over the groups (demographic parity difference); ``yes`` may be probabilities."""
    rates = _rates(yes, group)
    return float(rates.max() - rates.min())


def odds_gap(yes: Floats, truth: NDArray[np.bool_], group: Ints) -> float:
    """The larger of the groups' gaps in true and in false positive rate (equalised odds difference).

    NaN if a group lacks images of one answer.
    """
    gaps = []
    for answer in (True, False):
        inside = truth == answer
        if len(np.unique(group[inside])) < len(np.unique(group)):
            return float("nan")
        gaps.append(parity_gap(yes[inside], group[inside]))
    return max(gaps)


def expected_accuracy(yes: Floats, truth: NDArray[np.bool_]) -> float:
    """Mean chance that a decision which says yes with probability ``yes`` is right."""
    return float(np.where(truth, yes, 1 - yes).mean())


def bins_of(score: Floats, edges: Floats) -> Ints:
    """The bin of each score: as many as edges plus one."""
    return np.searchsorted(edges, score, side="right").astype(np.int64)


def score_edges(score: Floats, num_bins: int = 50) -> Floats:
    """Edges between at most ``num_bins`` bins of about equally many scores, never between equal scores; 0.5 is one too."""
    inner = np.quantile(score, np.arange(1, num_bins) / num_bins, method="inverted_cdf")
    return np.unique(np.append(inner, 0.5))


def fair_rule(bins: Ints, truth: NDArray[np.bool_], group: Ints, num_bins: int, level: float) -> Floats:
    """The chances of yes (groups, bins), rising with the bin in each group, with the most accuracy under the level.

    A linear programme: maximise the accuracy over the images given, while the shares of yes of all groups lie between l
    and l + ``level``. Always feasible: all alike will do. Raises ValueError for a level outside 0 to 1.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"A demographic parity of {level} is none; give a share of the images, from 0 to 1.")
    groups = int(group.max()) + 1
    cell = group * num_bins + bins
    size = groups * num_bins
    count = np.bincount(cell, minlength=size).reshape(groups, num_bins)
    gain = np.bincount(cell, np.where(truth, 1.0, -1.0), size)
    of_group = count.sum(1)
    share = np.zeros((groups, size + 1))
    for g in range(groups):
        share[g, g * num_bins : (g + 1) * num_bins] = count[g] / max(1, of_group[g])
    share[:, -1] = -1.0  # the variable l
    lower, upper = -share, share
    steps = np.zeros((groups * (num_bins - 1), size + 1))
    for g in range(groups):
        for b in range(num_bins - 1):
            row = g * (num_bins - 1) + b
            steps[row, g * num_bins + b], steps[row, g * num_bins + b + 1] = 1.0, -1.0
    limits = np.concatenate([np.zeros(groups), np.full(groups, level), np.zeros(len(steps))])
    found = linprog(
        np.append(-gain / len(truth), 0.0),
        A_ub=np.concatenate([lower, upper, steps]),
        b_ub=limits,
        bounds=[(0, 1)] * (size + 1),
        method="highs",
    )
    assert found.status == 0, found.message  # all alike is feasible, and the variables are bounded
    return np.clip(found.x[:-1].reshape(groups, num_bins), 0, 1)


def _rates(yes: Floats, group: Ints) -> Floats:
    return np.array([yes[group == g].mean() for g in np.unique(group)])
