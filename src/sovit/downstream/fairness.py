"""Fairness of a yes-or-no classifier on frozen features: accuracy by group, parity, and accuracy at a given parity.

As in ViT-22B (arXiv 2302.05442): the decisions are post-processed to several levels of demographic parity, and what is
left of the accuracy is the price. The rules (`metrics.parity`) are chosen on the train part, each image scored by a head
that was fitted on the other folds; the head of the figures is fitted on all of it. A level is kept on train; how much of it
lasts on the test part is what the table shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from sovit.config import ConfigError
from sovit.downstream import attributes, heads, sets
from sovit.downstream.frozen import features_and_labels
from sovit.downstream.metrics import parity
from sovit.downstream.metrics.proportion import bootstrap_many, share
from sovit.lit.trained import Trained
from sovit.strict import nearest


@dataclass
class Config:
    name: str = "fairness"
    data: str = "digits"
    attributes: str | None = None
    attribute: str = "group"
    label: str = "label"
    positive: str | None = None
    head: str = "probe"
    levels: list[float] = field(default_factory=lambda: [0.0, 0.02, 0.05, 0.1, 0.2])
    folds: int = 5


def check(cfg: Config, trained: Trained) -> None:
    sets.check(cfg.data, trained.cfg)
    if cfg.head not in ("probe", "fewshot"):
        raise ConfigError(f"task.head={cfg.head!a} is not a choice{nearest(cfg.head, ('probe', 'fewshot'))}")
    if cfg.data == "fractals":
        raise ConfigError(
            "task.data=fractals has no attributes; write task.data=digits, or give a folder and a CSV file."
        )
    if cfg.data != "digits" and cfg.attributes is None:
        raise ConfigError(
            "task.attributes has no value; give the CSV file with file names, groups and labels of task.data."
        )
    if cfg.data == "digits" and cfg.attributes is not None:
        raise ConfigError("task.attributes is for images in files; the groups of the digits are made from their ink.")
    if cfg.folds < 2:
        raise ConfigError(f"task.folds={cfg.folds} must be at least 2.")
    if not cfg.levels or not all(0 <= level <= 1 for level in cfg.levels):
        raise ConfigError(f"task.levels={cfg.levels} must be shares from 0 to 1, at least one.")


def depends(trained: Trained, cfg: Config) -> list[str]:
    found = [sets.fingerprint(cfg.data, trained.cfg)]
    if cfg.attributes is not None:
        found.append(sets.digest(cfg.attributes, key="task.attributes"))
    return found


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    train, test = sets.parts(cfg.data, trained.cfg)
    if cfg.attributes is None:
        names, yes, fit, seen = attributes.of_digits(train, test)
    else:
        path = Path(cfg.attributes).expanduser()
        names, yes, fit, seen = attributes.from_csv(path, cfg.attribute, cfg.label, cfg.positive, train, test)
    features, _ = features_and_labels(trained, train, work, "train")
    tested, _ = features_and_labels(trained, test, work, "test")
    for part, where in ((fit, "train"), (seen, "test")):
        counts = np.bincount(2 * part.group + part.answer, minlength=2 * len(names))
        if (counts < 2).any():
            g, worst = divmod(int(counts.argmin()), 2)
            raise ConfigError(
                f"The {where} part has {counts.min()} images of the group {names[g]!a} with the answer "
                f"{'yes' if worst else 'no'}; each group needs at least two of both."
            )
    x, answer = features[fit.rows], fit.answer.astype(np.int64)
    fold = heads.folds(2 * fit.group + answer, cfg.folds)
    held = np.empty(len(answer))
    for k in range(cfg.folds):
        if (fold == k).any():
            held[fold == k] = _yes(heads.fit(cfg.head, trained, x[fold != k], answer[fold != k], 2), x[fold == k])
    score = _yes(heads.fit(cfg.head, trained, x, answer, 2), tested[seen.rows])
    truth, group = seen.answer, seen.group
    plain = score > 0.5
    edges = parity.score_edges(held)
    bins, held_bins = parity.bins_of(score, edges), parity.bins_of(held, edges)
    num_bins = len(edges) + 1

    def statistics(chances: np.ndarray) -> list[dict[str, Any]]:
        def of(rows: np.ndarray) -> list[float]:
            there = chances[rows], truth[rows], group[rows]
            values = [parity.expected_accuracy(there[0], there[1]), parity.parity_gap(there[0], there[2])]
            return [*values, parity.odds_gap(*there)]

        ends = bootstrap_many(of, len(truth), most=1)
        values = of(np.arange(len(truth)))
        return [{"value": v, "lo": lo, "hi": hi} for v, (lo, hi) in zip(values, ends, strict=True)]

    def row(chances: np.ndarray) -> dict[str, Any]:
        accuracy, gap, odds = statistics(chances)
        by_group = [parity.expected_accuracy(chances[group == g], truth[group == g]) for g in range(len(names))]
        return {"accuracy": accuracy, "parity": gap, "odds": odds, "by_group": by_group}

    rows = []
    for level in cfg.levels:
        rule = parity.fair_rule(held_bins, fit.answer, fit.group, num_bins, level)
        of_train = parity.parity_gap(rule[fit.group, held_bins], fit.group)
        rows.append({"level": level, "train_parity": of_train, **row(rule[group, bins])})
    return {
        "dataset": test.name,
        "head": cfg.head,
        "yes": yes,
        "num_train": len(answer),
        "num_test": len(truth),
        "chance": float(max(truth.mean(), 1 - truth.mean())),
        "interval": "95 %: groups Wilson, the rest bootstrap over test images; drawn decisions count by their mean",
        "groups": [
            {
                "group": name,
                "yes_truth": float(truth[group == g].mean()),
                "yes": share(plain[group == g]),
                "accuracy": share(plain[group == g] == truth[group == g]),
            }
            for g, name in enumerate(names)
        ],
        "plain": {
            "train_parity": parity.parity_gap(np.asarray(held > 0.5, np.float64), fit.group),
            **row(plain.astype(np.float64)),
        },
        "rows": rows,
    }


def text(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['dataset']}, {result['num_test']:,} test images, yes: {result['yes']}; head {result['head']}; always the "
        f"commoner answer: accuracy {result['chance']:.3f}",
        f"{'group':<14} {'images':>6} {'truly yes':>9} {'said yes':>8}  {'accuracy':>8}  95 % interval",
    ]
    for one in result["groups"]:
        accuracy = one["accuracy"]
        lines.append(
            f"{one['group']:<14} {accuracy['n']:>6} {one['yes_truth']:>9.3f} {one['yes']['value']:>8.3f}  "
            f"{accuracy['value']:>8.3f}  {accuracy['lo']:.3f} .. {accuracy['hi']:.3f}"
        )
    lines.append(f"{'rule':<14} {'accuracy':<23} {'parity difference':<23} on train  {'equalised odds difference'}")
    for name, row in (("as it is", result["plain"]), *((f"parity {r['level']:g}", r) for r in result["rows"])):
        accuracy, gap, odds = (
            f"{row[key]['value']:.3f} ({row[key]['lo']:.3f} .. {row[key]['hi']:.3f})"
            for key in ("accuracy", "parity", "odds")
        )
        lines.append(f"{name:<14} {accuracy:<23} {gap:<23} {row['train_parity']:>8.3f}  {odds}")
    return [
        *lines,
        f"the rules were chosen on the {result['num_train']:,} images of train, scored by heads that had not seen them",
    ]


def _yes(head: heads.Head, features: np.ndarray) -> np.ndarray:
    """A score of yes (N,) that is above 0.5 where the head says so."""
    logits = head(features)
    return np.asarray(expit(logits[:, 1] - logits[:, 0]))
