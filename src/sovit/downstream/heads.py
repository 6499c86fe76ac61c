"""A linear classifier on frozen features, of one of three kinds: what several tasks ask their questions of.

``own``: the model's classifier, over the classes it was trained on. ``fewshot``: the ridge regression of `sovit.fewshot`,
with l2 as in training; its scores are no log probabilities. ``probe``: logistic regression (scikit-learn) on standardised
features, the quick cousin of `task=probe`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sovit.config import ConfigError
from sovit.data.sources import read_class_list
from sovit.downstream.sets import TRAINING, Labelled
from sovit.fewshot import fit_ridge, support_indices
from sovit.lit.trained import Trained
from sovit.strict import nearest

KINDS = ("own", "fewshot", "probe")
_BIAS = 100.0  # the constant column of sovit.fewshot


@dataclass(frozen=True)
class Head:
    """Logits = features (N, D) @ ``slope`` (D, C) + ``offset`` (C,), in float64."""

    kind: str
    slope: NDArray[np.float64]
    offset: NDArray[np.float64]

    def __call__(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        return features @ self.slope + self.offset


def check(kind: str, data: str, trained: Trained, shots: int | None) -> None:
    """Raise ConfigError for a head that cannot be, as far as the configuration tells."""
    if kind not in KINDS:
        raise ConfigError(f"task.head={kind!a} is not a choice{nearest(kind, KINDS)}")
    if shots is not None and shots < 1:
        raise ConfigError(f"task.shots={shots} must be at least 1, or null for all images.")
    if kind == "own" and data in ("fractals", "digits"):
        raise ConfigError(
            f"task.head=own knows the {trained.cfg.data.num_classes} training classes, and {data} has others; write "
            "task.data=training, or task.head=probe."
        )


def check_classes(trained: Trained, labelled: Labelled) -> None:
    """Raise ConfigError unless a data set has the classes that the model was trained on."""
    data, num = trained.cfg.data, trained.cfg.data.num_classes
    if len(labelled.classes) != num:
        raise ConfigError(
            f"{labelled.name} has {len(labelled.classes)} classes, but the model was trained on {num}; give a data set with "
            "those, or task.head=probe."
        )
    if data.class_list and labelled.name != TRAINING:
        try:
            own = read_class_list(data.class_list)
        except ValueError:
            return  # it stayed where the model was trained; the number has to do
        odd = next(((a, b) for a, b in zip(own, labelled.classes, strict=True) if a != b), None)
        if odd:
            raise ConfigError(
                f"{labelled.name} has the class {odd[1]!r} where the model was trained on {odd[0]!r}; give a data set with "
                "the same classes in the same order, or task.head=probe."
            )


def fit(
    kind: str,
    trained: Trained,
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    num_classes: int,
    *,
    shots: int | None = None,
) -> Head:
    """A head from features (N, D) and labels (N,), of at most ``shots`` images a class (draw 0); ``own`` looks at neither.

    Raises ConfigError for a class without images.
    """
    if kind == "own":
        return own(trained)
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(missing):
        raise ConfigError(f"Class {missing[0]} of {num_classes} has no image to fit a classifier on; add some.")
    if shots is not None:
        rows = np.concatenate(support_indices(labels, num_classes, shots, 0))
        features, labels = features[rows], labels[rows]
    if kind == "fewshot":
        return ridge(features, labels, num_classes, trained.cfg.eval.l2_reg)
    return logistic(features, labels, num_classes)


def own(trained: Trained) -> Head:
    """The classifier that the model was trained with. Raises ConfigError if it has none."""
    layer = trained.model.get_classifier()
    if not isinstance(layer, torch.nn.Linear):
        raise ConfigError(f"{trained.weights.source} holds no linear classifier of its own; write task.head=probe.")
    weight, bias = layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu()
    return Head("own", weight.T.numpy(), bias.numpy())


def ridge(features: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int, l2: float | str) -> Head:
    """The few-shot regression with its standardisation folded in."""
    found = fit_ridge(torch.from_numpy(features), labels, num_classes, l2)  # type: ignore[arg-type]
    slope = found.weights[0, :-1] / found.std[:, None]
    offset = _BIAS * found.weights[0, -1] - found.mean @ slope
    return Head("fewshot", slope.numpy(), offset.numpy())


def logistic(features: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int) -> Head:
    """Softmax regression with scikit-learn's penalty |W|^2 / 2 beside the summed log loss, on standardised features."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0) + 1e-5
    model = LogisticRegression(C=1.0, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after a thousand steps what is left changes no figure
        model.fit((features - mean) / std, labels)
    weight, bias = model.coef_, model.intercept_
    if num_classes == 2:  # one row, of the second class
        weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.array([0.0, bias[0]])
    slope = weight.T / std[:, None]
    return Head("probe", slope, bias - mean @ slope)


def held_out(labels: NDArray[np.int64], share: float, seed: int = 0) -> NDArray[np.bool_]:
    """Which images (N,) to keep out of a fit: about ``share`` of each class, and at least one image stays in."""
    out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        out[rows[: min(len(rows) - 1, int(np.ceil(share * len(rows))))]] = True
    return out


def folds(labels: NDArray[np.int64], num: int, seed: int = 0) -> NDArray[np.int64]:
    """The fold (N,) of each image: of each class as many in every fold, but for one."""
    found = np.empty(len(labels), np.int64)
    rng = np.random.default_rng(seed)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        found[rows] = np.arange(len(rows)) % num
    return found
