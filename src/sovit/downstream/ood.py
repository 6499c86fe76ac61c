"""Out-of-distribution detection: how well a score of one image tells the data set at hand from another one.

Scores: the largest softmax probability (arXiv 1610.02136), the largest logit (arXiv 1911.11132), the energy, which is
logsumexp of the logits (arXiv 2010.03759), and the Mahalanobis distance of the features from the class means (arXiv
1807.03888). No score has seen an image of the other data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp, softmax

from sovit.config import ConfigError
from sovit.derived import fewshot_name
from sovit.downstream import heads, sets
from sovit.downstream.frozen import features_and_labels
from sovit.downstream.metrics import detection
from sovit.downstream.metrics.proportion import bootstrap, share
from sovit.downstream.rates import wilson
from sovit.fewshot import support_indices
from sovit.lit.trained import Trained

TPR = 0.95
Floats = detection.Floats


@dataclass
class Config:
    name: str = "ood"
    data: str = "digits"
    out: list[str] = field(default_factory=lambda: ["fractals"])
    head: str = "probe"
    shots: int | None = None


def check(cfg: Config, trained: Trained) -> None:
    sets.check(cfg.data, trained.cfg, training=True)
    heads.check(cfg.head, cfg.data, trained, cfg.shots)
    if not cfg.out or len({fewshot_name(data) for data in cfg.out}) < len(cfg.out):
        raise ConfigError(f"task.out={cfg.out} must name at least one data set, and none of them alike.")
    for data in cfg.out:
        sets.check(data, trained.cfg, key="task.out")
        if data.rstrip("/") == cfg.data.rstrip("/"):
            raise ConfigError(f"task.out names {data}, which is task.data itself; give data of another kind.")


def depends(trained: Trained, cfg: Config) -> list[str]:
    of_out = [sets.fingerprint(data, trained.cfg, key="task.out") for data in cfg.out]
    return [sets.fingerprint(cfg.data, trained.cfg), *of_out]


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    train, test = sets.parts(cfg.data, trained.cfg)
    num_classes = len(train.classes)
    features, labels = features_and_labels(trained, train, work, "train")
    inside, truth = features_and_labels(trained, test, work, "test")
    if cfg.head == "own":
        heads.check_classes(trained, test)
    head = heads.fit(cfg.head, trained, features, labels, num_classes, shots=cfg.shots)
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(missing):
        raise ConfigError(f"{cfg.data} has no image of {train.classes[missing[0]]!r} to fit its mean on; add some.")
    if cfg.shots is not None:
        rows = np.concatenate(support_indices(labels, num_classes, cfg.shots, 0))
        features, labels = features[rows], labels[rows]
    gaussians = detection.class_gaussians(features, labels, num_classes)
    scores = _scores(head, gaussians, inside)
    rows_out = []
    for k, data in enumerate(cfg.out):
        other = sets.tested(data, trained.cfg, key="task.out")
        outside, _ = features_and_labels(trained, other, work, f"out{k}")
        against = _scores(head, gaussians, outside)
        rows_out += [
            {"out": other.name, "score": name, "num_out": len(outside), **_measured(scores[name], against[name])}
            for name in scores
        ]
    return {
        "dataset": test.name,
        "num_in": len(inside),
        "head": cfg.head,
        "accuracy": share(head(inside).argmax(1) == truth),
        "chance_accuracy": 1 / num_classes,
        "interval": "95 %: AUROC and AUPR bootstrap over the images of both sets; FPR and accuracy Wilson",
        "rows": rows_out,
    }


def text(result: dict[str, Any]) -> list[str]:
    accuracy = result["accuracy"]
    lines = [
        f"{result['dataset']} ({result['num_in']:,} test images, head {result['head']}, accuracy {accuracy['value']:.3f}, "
        f"{accuracy['lo']:.3f} .. {accuracy['hi']:.3f}) against others",
        f"{'other':<14} {'score':<12} {'AUROC':>6}  {'95 % interval':<15} {'AUPR':>6} {'chance':>6}  FPR at 95 % TPR",
    ]
    for row in result["rows"]:
        auroc, aupr, fpr = row["auroc"], row["aupr"], row["fpr"]
        lines.append(
            f"{row['out']:<14} {row['score']:<12} {auroc['value']:>6.3f}  {auroc['lo']:.3f} .. {auroc['hi']:.3f}  "
            f"{aupr['value']:>6.3f} {aupr['chance']:>6.3f}  {fpr['value']:.3f} ({fpr['lo']:.3f} .. {fpr['hi']:.3f})"
        )
    return [*lines, "chance: AUROC 0.5, FPR 0.95; below 0.5 the other images look more like the data set than its own"]


def _scores(head: heads.Head, gaussians: tuple[Floats, Floats], features: Floats) -> dict[str, Floats]:
    logits = head(features)
    return {
        "max softmax": softmax(logits, axis=1).max(1),
        "max logit": logits.max(1),
        "energy": np.asarray(logsumexp(logits, axis=1)),
        "mahalanobis": detection.mahalanobis(*gaussians, features),
    }


def _measured(inside: Floats, outside: Floats) -> dict[str, Any]:
    found: dict[str, Any] = {}
    of_inside = len(inside) / (len(inside) + len(outside))
    statistics = {
        "auroc": (detection.auroc, 0.5),
        "aupr": (detection.average_precision, of_inside),
        "aupr_out": (lambda a, b: detection.average_precision(-b, -a), 1 - of_inside),
    }
    for name, (statistic, chance) in statistics.items():
        lo, hi = bootstrap(statistic, inside, outside)
        found[name] = {"value": statistic(inside, outside), "lo": lo, "hi": hi, "chance": chance}
    fpr = detection.fpr_at_tpr(inside, outside, TPR)
    let_in = wilson(round(fpr * len(outside)), len(outside))
    found["fpr"] = {"value": fpr, "lo": let_in[0], "hi": let_in[1], "chance": TPR}
    assert all(math.isfinite(one["value"]) for one in found.values())
    return found
