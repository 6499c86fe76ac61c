"""Few-shot evaluation: l2-regularised linear regression from frozen features to class targets, in closed form.

The published evaluator of "Scaling Vision Transformers" (arXiv 2106.04560) and SoViT (arXiv 2305.13035), whose public
settings are shots 1, 5, 10 and 25, three random draws of the support and l2 = 2^10. That l2 suits features of width
768 and more; for small models choose it by leave-one-out on the support (``l2="loo"``). Test data never choose anything.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

PUBLISHED_L2 = 2.0**10
LOO_GRID = tuple(2.0**k for k in range(-10, 20))  # the grid of older public few-shot code
_BIAS = 100.0  # of the constant column: the bias is penalised like any weight, but 1e4 times more weakly
_STD_FLOOR = 1e-5  # added to the standard deviations


def support_indices(labels: NDArray, num_classes: int, max_shots: int, draw: int) -> list[NDArray[np.intp]]:
    """For every class at most ``max_shots`` positions of its images in ``labels`` (N,), in the random order ``draw``.

    The supports of S shots are the first S of each: nested, and independent of ``max_shots``. A class with fewer
    images gives all it has, as published. Raises ValueError for a label outside 0..num_classes-1 or a class without
    images.
    """
    _check_labels(labels, num_classes)
    rng = np.random.default_rng(draw)
    chosen = []
    for c in range(num_classes):
        positions = np.flatnonzero(labels == c)
        if not len(positions):
            raise ValueError(f"Class {c} of {num_classes} has no image to draw a support from; drop it or add images.")
        chosen.append(rng.permutation(positions)[:max_shots])
    return chosen


@dataclass(frozen=True)
class Ridge:
    """Solutions for L values of l2_reg: ``weights`` (L, D + 1, C), the bias last, on features standardised by
    ``mean`` and ``std`` (D,)."""

    l2_reg: tuple[float, ...]
    weights: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Classes (L, N) of ``features`` (N, D)."""
        # Folding the standardisation into the weights spares a copy of the features for every support.
        slope = self.weights[:, :-1] / self.std[:, None]
        offset = _BIAS * self.weights[:, -1:] - self.mean @ slope[:, None]
        offset = offset.reshape(len(self.l2_reg), 1, -1)
        return (features.to(slope.dtype) @ slope).add_(offset).argmax(-1)  # in place: pages cost more than sums


def fit_ridge(
    features: torch.Tensor,
    labels: ArrayLike,
    num_classes: int,
    l2: float | Sequence[float] | Literal["loo"],
    dtype: torch.dtype = torch.float64,
) -> Ridge:
    """Regress features (N, D) on targets +1 for the class and -1 for the others, penalised by ``l2 * |W|^2``.

    Features are standardised by the mean and population deviation of this support and get a constant column. The
    solution is the primal ``(X'X + l2)^-1 X'Y`` if N >= D + 1, else the equal dual ``X'(XX' + l2)^-1 Y``; one
    eigendecomposition serves any number of ``l2``. float32 is what was published, and coarse: the constant column makes
    the largest eigenvalue 1e4 N.

    ``"loo"`` takes the l2 of LOO_GRID with the least squared error of leaving out one image at a time, in closed form,
    with the standardisation held fixed. Why squared error and not misclassification: it is smooth in the features, so
    the choice does not jump between neighbouring checkpoints, and it still ranks values where an image left out was
    the only one of its class, which no l2 classifies. On the embedded images and a 32x4x128 model after
    300 to 3000 steps both come within 3% of the error of the best l2 at 10 shots; 2^10 is 11% off at 300 steps. At
    one shot no choice on the support can be good, and this one shrinks strongly.

    Raises ValueError for an l2 that is not positive, non-finite features or labels outside 0..num_classes-1.
    """
    grid = LOO_GRID if l2 == "loo" else tuple(float(v) for v in np.atleast_1d(np.asarray(l2, dtype=float)))
    if not all(0 < v < math.inf for v in grid):
        raise ValueError(f"l2={l2} is not positive and finite; the published value is {PUBLISHED_L2:g}.")
    label_array = np.asarray(labels)
    _check_labels(label_array, num_classes)
    label_array = label_array.astype(np.int64)  # torch would read uint8 as a mask
    _check_features(features, label_array)

    x = features.to(dtype)
    mean, std = x.mean(0), x.std(0, correction=0) + _STD_FLOOR
    x = torch.cat([(x - mean) / std, torch.full_like(x[:, :1], _BIAS)], dim=1)
    y = torch.full((len(x), num_classes), -1.0, dtype=dtype, device=x.device)
    y[torch.arange(len(x)), torch.from_numpy(label_array)] = 1.0

    primal = x.shape[0] >= x.shape[1]
    eigenvalues, q = torch.linalg.eigh(x.T @ x if primal else x @ x.T)
    eigenvalues = eigenvalues.clamp(min=0)  # rounding can make the least ones negative
    z = x @ q if primal else q
    right = z.T @ y
    if l2 == "loo":
        grid = (_leave_one_out(z, right, eigenvalues, y if primal else None),)
    left = q if primal else x.T @ q
    weights = torch.stack([left @ (right / (eigenvalues + v)[:, None]) for v in grid])
    return Ridge(grid, weights, mean, std)


def _leave_one_out(z: torch.Tensor, right: torch.Tensor, eigenvalues: torch.Tensor, y: torch.Tensor | None) -> float:
    """The l2 of LOO_GRID with the least leave-one-out squared error, the larger one of equals.

    Every fourth value is tried, then the neighbours of the best, at 2 and at 1: a shrinkage eig / (eig + l2) takes six
    octaves to go from 0.1 to 0.9, so the error has no finer structure than that.

    Primal, given targets y: residual of the fit over ``1 - H_ii`` with the hat matrix ``H = Z (eig + l2)^-1 Z'``. Dual
    (y None): the same number as ``(G^-1 Y)_i / (G^-1)_ii``, ``G = XX' + l2``, which does not cancel where ``H_ii`` is
    near 1.
    """
    z_squared = z.square()
    errors: dict[int, float] = {}  # by position in LOO_GRID
    candidates: Sequence[int] = range(0, len(LOO_GRID), 4)
    for step in (2, 1, 0):
        for i in candidates:
            inverse = 1 / (eigenvalues + LOO_GRID[i])
            solution, diagonal = right * inverse[:, None], z_squared @ inverse
            if y is None:
                residual = z @ solution
            else:
                residual, diagonal = torch.addmm(y, z, solution, alpha=-1), 1 - diagonal
            errors[i] = (residual.square_().sum(1) / diagonal.square()).sum().item()
        best = min(errors, key=lambda i: (errors[i], -i))
        candidates = [i for i in (best - step, best + step) if 0 <= i < len(LOO_GRID)]
    return LOO_GRID[best]


@dataclass(frozen=True)
class FewshotRow:
    """Error rate in [0, 1] on the whole test set after a fit on one support; ``stderr`` is the test set's binomial."""

    shots: int
    draw: int
    l2_reg: float
    error: float
    stderr: float


def fewshot_errors(
    train_features: torch.Tensor,
    train_labels: ArrayLike,
    test_features: torch.Tensor,
    test_labels: ArrayLike,
    num_classes: int,
    shots: Sequence[int] = (1, 5, 10, 25),
    num_draws: int = 3,
    l2: float | Literal["loo"] = PUBLISHED_L2,
) -> list[FewshotRow]:
    """One row per (draw, shots): fit on ``shots`` images a class of the training set, count errors on the test set.

    Features (N, D), labels (N,) in 0..num_classes-1; in float64 and deterministic. Draw k is
    ``numpy.random.default_rng(k)``. Raises ValueError for shots or draws below 1, an empty test set, a class without a
    training image, and what :func:`fit_ridge` raises.
    """
    if not shots or min(shots) < 1 or num_draws < 1:
        raise ValueError(f"shots={tuple(shots)} and num_draws={num_draws} must all be at least 1.")
    train_array, test_array = np.asarray(train_labels), np.asarray(test_labels)
    _check_labels(test_array, num_classes)
    _check_features(test_features, test_array)
    if not len(test_array):
        raise ValueError("The test set is empty; an error rate needs at least one image.")
    train, test = train_features.double(), test_features.double()
    truth = torch.from_numpy(test_array).to(test.device)

    rows = []
    for draw in range(num_draws):
        support = support_indices(train_array, num_classes, max(shots), draw)
        for num in shots:
            chosen = np.concatenate([positions[:num] for positions in support])
            ridge = fit_ridge(train[torch.from_numpy(chosen)], train_array[chosen], num_classes, l2)
            error = (ridge.predict(test)[0] != truth).double().mean().item()
            stderr = math.sqrt(error * (1 - error) / len(test_array))
            rows.append(FewshotRow(num, draw, ridge.l2_reg[0], error, stderr))
    return rows


@dataclass(frozen=True)
class FewshotSummary:
    """Mean error over the draws and its standard error."""

    shots: int
    num_draws: int
    error: float
    stderr: float


def summarise(rows: Iterable[FewshotRow]) -> list[FewshotSummary]:
    """Mean error over the draws for every number of shots, and ``stderr = sqrt(s^2 / K + mean(stderr_k^2))``.

    s is the standard deviation of the K draws' errors (n - 1), so the first term is the luck of the supports, which
    averages out. All draws share one test set, whose luck does not: the second term is its binomial variance, not
    divided by K. It is slightly too large, because s already holds the part of the test luck that draws do not share.
    One draw has no s: its stderr is the binomial one alone, and too small. Raises ValueError if a draw occurs twice.
    """
    by_shots: dict[int, dict[int, FewshotRow]] = defaultdict(dict)
    for row in rows:
        if row.draw in by_shots[row.shots]:
            raise ValueError(f"Draw {row.draw} of {row.shots} shots occurs twice; summarise one data set at a time.")
        by_shots[row.shots][row.draw] = row
    summaries = []
    for num, of_draw in by_shots.items():
        errors = [row.error for row in of_draw.values()]
        between = float(np.var(errors, ddof=1)) / len(errors) if len(errors) > 1 else 0.0
        within = float(np.mean([row.stderr**2 for row in of_draw.values()]))
        summaries.append(FewshotSummary(num, len(errors), float(np.mean(errors)), math.sqrt(between + within)))
    return summaries


def _check_labels(labels: NDArray, num_classes: int) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Labels of shape {labels.shape} and type {labels.dtype} are not a vector of whole numbers.")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"Labels from {labels.min()} to {labels.max()} do not fit {num_classes} classes from 0.")


def _check_features(features: torch.Tensor, labels: NDArray) -> None:
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"Features of shape {tuple(features.shape)} do not match {len(labels)} labels; give (N, D).")
    if not torch.isfinite(features).all():
        raise ValueError("Features hold NaN or infinite values; the model has diverged.")
