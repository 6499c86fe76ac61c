"""Calibration of a classifier on frozen features: ECE, log loss and Brier score, before and after temperature scaling.

The temperature is fitted on images that neither the head nor the figures have seen: a part of train for a head that is
fitted here, a part of test for the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit.config import ConfigError
from sovit.downstream import heads, sets
from sovit.downstream.frozen import features_and_labels
from sovit.downstream.metrics import calibration
from sovit.downstream.metrics.proportion import bootstrap_many, share
from sovit.lit.trained import Trained

METRICS = ("ece", "ece_mass", "nll", "brier")


@dataclass
class Config:
    name: str = "calibration"
    data: str = "digits"
    head: str = "probe"
    shots: int | None = None
    heldout: float = 0.2
    bins: int = calibration.BINS


def check(cfg: Config, trained: Trained) -> None:
    sets.check(cfg.data, trained.cfg, training=True)
    heads.check(cfg.head, cfg.data, trained, cfg.shots)
    if not 0 < cfg.heldout < 1:
        raise ConfigError(f"task.heldout={cfg.heldout} must be a share of the images, above 0 and below 1.")
    if cfg.bins < 2:
        raise ConfigError(f"task.bins={cfg.bins} must be at least 2.")


def depends(trained: Trained, cfg: Config) -> str:
    return sets.fingerprint(cfg.data, trained.cfg)


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    train, test = sets.parts(cfg.data, trained.cfg)
    num_classes = len(test.classes)
    x, y = features_and_labels(trained, test, work, "test")
    if cfg.head == "own":
        heads.check_classes(trained, test)
        head = heads.own(trained)
        out = heads.held_out(y, cfg.heldout)
        fit_on, x, y = (head(x[out]), y[out]), x[~out], y[~out]
    else:
        features, labels = features_and_labels(trained, train, work, "train")
        out = heads.held_out(labels, cfg.heldout)
        head = heads.fit(cfg.head, trained, features[~out], labels[~out], num_classes, shots=cfg.shots)
        fit_on = head(features[out]), labels[out]
    if not len(fit_on[1]) or not len(y):
        raise ConfigError(
            f"{cfg.data} has too few images to fit a temperature on some and measure on others; add some."
        )
    temperature = calibration.fit_temperature(*fit_on)
    logits = head(x)
    right = logits.argmax(1) == y
    return {
        "dataset": test.name,
        "head": cfg.head,
        "num_classes": num_classes,
        "num_test": len(y),
        "num_heldout": len(fit_on[1]),
        "accuracy": share(right),
        "chance": 1 / num_classes,
        "temperature": temperature,
        "interval": "95 %: accuracy Wilson, the rest bootstrap over test images",
        "before": _measured(logits, y, right, 1.0, cfg.bins),
        "after": _measured(logits, y, right, temperature, cfg.bins),
        "blind": {"nll": float(np.log(num_classes)), "brier": 1 - 1 / num_classes},
    }


def text(result: dict[str, Any]) -> list[str]:
    accuracy, blind = result["accuracy"], result["blind"]
    lines = [
        f"{result['dataset']}, {result['num_test']:,} images of {result['num_classes']} classes, head {result['head']}: "
        f"accuracy {accuracy['value']:.3f} ({accuracy['lo']:.3f} .. {accuracy['hi']:.3f}), chance {result['chance']:.3f}",
        f"temperature {result['temperature']:.3f}, fitted on {result['num_heldout']:,} others",
        f"{'':<22} {'as it is':>8}  {'95 % interval':<15} {'scaled':>8}  {'95 % interval':<15} {'blind':>7}",
    ]
    names = {"ece": "ECE, equal width", "ece_mass": "ECE, equal mass", "nll": "log loss", "brier": "Brier score"}
    for key, name in names.items():
        cells = [
            f"{side['value']:>8.4f}  {side['lo']:.4f} .. {side['hi']:.4f}"
            for side in (result["before"][key], result["after"][key])
        ]
        lines.append(f"{name:<22} {cells[0]} {cells[1]} {f'{blind[key]:.4f}' if key in blind else '-':>7}")
    lines.append(f"{'confidence, scaled':<22} {'images':>8}  {'right':<7} {'95 % interval'}")
    for row in result["after"]["reliability"]:
        lines.append(
            f"{row['from']:.2f} .. {row['to']:.2f}, mean {row['confidence']:.2f} {row['n']:>5}  {row['right']:<7.3f} "
            f"{row['lo']:.3f} .. {row['hi']:.3f}"
        )
    return lines


def _measured(
    logits: calibration.Floats, labels: np.ndarray, right: np.ndarray, temperature: float, bins: int
) -> dict[str, Any]:
    probability = calibration.probabilities(logits, temperature)
    confidence = probability.max(1)
    index = np.arange(len(labels))
    losses = -np.log(np.maximum(probability[index, labels], np.finfo(float).tiny))
    squares = np.square(probability).sum(1) - 2 * probability[index, labels] + 1

    def statistics(rows: np.ndarray) -> list[float]:
        seen = confidence[rows], right[rows]
        errors = [calibration.ece(*seen, bins, mass=mass) for mass in (False, True)]
        return [*errors, float(losses[rows].mean()), float(squares[rows].mean())]

    values = [
        calibration.ece(confidence, right, bins),
        calibration.ece(confidence, right, bins, mass=True),
        calibration.nll(logits, labels, temperature),
        calibration.brier(probability, labels),
    ]
    ends = bootstrap_many(statistics, len(labels))
    found: dict[str, Any] = {
        name: {"value": value, "lo": lo, "hi": hi} for name, value, (lo, hi) in zip(METRICS, values, ends, strict=True)
    }
    return found | {"reliability": calibration.reliability(confidence, right, bins)}
