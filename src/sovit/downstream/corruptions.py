"""Errors of a classifier on frozen features when the images are corrupted, against a baseline's.

The mean corruption error divides, for each kind, the errors over all severities by the baseline's, and averages over the
kinds (arXiv 1903.12261): below 1 the model suffers less. The classifier is fitted on clean images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sovit import records
from sovit.config import ConfigError, RunConfig
from sovit.downstream import heads, sets
from sovit.downstream.corrupt import KINDS, SEVERITIES, corrupt
from sovit.downstream.frozen import features_and_labels
from sovit.downstream.metrics.accuracy import mean_corruption_error
from sovit.downstream.metrics.proportion import bootstrap_many, share
from sovit.lit.evaluation import extract
from sovit.lit.trained import Trained, load
from sovit.strict import nearest

MOST_PIXELS = 2**26  # numbers of the train part, beyond which raw pixels are no baseline
BATCH = 256
Wrong = NDArray[np.bool_]  # (kinds, severities, images)


@dataclass
class Config:
    name: str = "corruptions"
    data: str = "digits"
    head: str = "probe"
    shots: int | None = None
    kinds: list[str] | None = None
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES))
    num_images: int = 1000
    seed: int = 0
    against: str | None = None


def check(cfg: Config, trained: Trained) -> None:
    sets.check(cfg.data, trained.cfg, training=True)
    heads.check(cfg.head, cfg.data, trained, cfg.shots)
    for kind in cfg.kinds or ():
        if kind not in KINDS:
            raise ConfigError(f"task.kinds: {kind!a} is no corruption{nearest(kind, KINDS)}")
    if cfg.kinds is not None and (not cfg.kinds or len(set(cfg.kinds)) < len(cfg.kinds)):
        raise ConfigError(f"task.kinds={cfg.kinds} must name at least one, and none twice; null takes all.")
    if not cfg.severities or set(cfg.severities) - set(SEVERITIES) or len(set(cfg.severities)) < len(cfg.severities):
        raise ConfigError(f"task.severities={cfg.severities} must be different whole numbers from 1 to 5.")
    if cfg.num_images < 1 or cfg.seed < 0:
        raise ConfigError(f"task.num_images={cfg.num_images} must be at least 1, and task.seed={cfg.seed} at least 0.")
    if trained.cfg.model.channels not in (1, 3):
        raise ConfigError(f"Images of {trained.cfg.model.channels} channels cannot be compressed as JPEG; 1 or 3 can.")
    if cfg.against is not None:
        other = _other(cfg.against)
        sets.check(cfg.data, other.cfg, training=True)
        heads.check(cfg.head, cfg.data, other, cfg.shots)


def depends(trained: Trained, cfg: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"data": sets.fingerprint(cfg.data, trained.cfg)}
    if cfg.against is not None:
        other = _other(cfg.against)
        found["against"] = [records.config_hash(other.cfg), other.weights.kind, other.weights.step]
    return found


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    _, test = sets.parts(cfg.data, trained.cfg)
    rows = np.sort(np.random.default_rng(cfg.seed).permutation(len(test))[: cfg.num_images])
    mine = _of_model(trained, cfg, rows, work / "model")
    if cfg.against is not None:
        other = _other(cfg.against)
        other.model.to(next(trained.model.parameters()).device)
        base: tuple[NDArray[np.bool_], Wrong] | None = _of_model(other, cfg, rows, work / "against")
        named = f"{other.weights.run_id} ({other.weights.step:,} steps)"
    else:
        base = _of_pixels(trained.cfg, cfg, rows)
        named = "ridge regression on raw pixels"
    kinds = cfg.kinds or list(KINDS)
    clean, wrong = mine
    base_clean, base_wrong = base if base else (None, None)

    def statistics(drawn: NDArray[np.int64]) -> list[float]:
        errors = wrong[:, :, drawn].mean(2)
        found = [*errors.mean(1), errors.mean()]
        if base_wrong is not None:
            found.append(mean_corruption_error(errors, base_wrong[:, :, drawn].mean(2)))
        return [value if math.isfinite(value) else math.nan for value in found]

    values = statistics(np.arange(len(rows)))
    ends = bootstrap_many(statistics, len(rows))
    shown = [
        {"value": value, "lo": lo, "hi": hi} if math.isfinite(value) else None
        for value, (lo, hi) in zip(values, ends, strict=True)
    ]
    return {
        "dataset": test.name,
        "head": cfg.head,
        "num_images": len(rows),
        "severities": cfg.severities,
        "chance": 1 - 1 / len(test.classes),
        "interval": "95 %: clean and single errors Wilson, means bootstrap over images",
        "clean": share(clean),
        "baseline": {"what": named if base else None, "clean": None if base_clean is None else share(base_clean)},
        "mean_error": shown[len(kinds)],
        "mean_corruption_error": shown[len(kinds) + 1] if base else None,
        "rows": [
            {
                "kind": kind,
                "error": shown[k],
                "errors": [share(of_severity) for of_severity in wrong[k]],
                "baseline": None if base_wrong is None else float(base_wrong[k].mean()),
            }
            for k, kind in enumerate(kinds)
        ],
    }


def text(result: dict[str, Any]) -> list[str]:
    clean, mean, base = result["clean"], result["mean_error"], result["baseline"]
    lines = [
        f"{result['dataset']}, {result['num_images']:,} images, head {result['head']}: error {clean['value']:.3f} "
        f"({clean['lo']:.3f} .. {clean['hi']:.3f}) on clean images, chance {result['chance']:.3f}",
        f"{'corruption':<16} {'error':>6}  {'95 % interval':<15} {'baseline':>8}   at severity "
        + " ".join(f"{severity:>5}" for severity in result["severities"]),
    ]
    for row in result["rows"]:
        error = row["error"]
        baseline = "-" if row["baseline"] is None else f"{row['baseline']:.3f}"
        lines.append(
            f"{row['kind']:<16} {error['value']:>6.3f}  {error['lo']:.3f} .. {error['hi']:.3f}  {baseline:>8}"
            f"{'':>15}" + " ".join(f"{one['value']:.3f}" for one in row["errors"])
        )
    lines.append(f"{'mean':<16} {mean['value']:>6.3f}  {mean['lo']:.3f} .. {mean['hi']:.3f}")
    ratio = result["mean_corruption_error"]
    if ratio:
        lines.append(
            f"mean corruption error {ratio['value']:.3f} ({ratio['lo']:.3f} .. {ratio['hi']:.3f}) against {base['what']}, "
            f"whose error on clean images is {base['clean']['value']:.3f}"
        )
    else:
        lines.append("no mean corruption error: there is no baseline, or it makes no errors of some kind")
    return lines


def _other(source: str) -> Trained:
    try:
        return load(Path(source).expanduser(), images=True)
    except ConfigError as error:
        raise ConfigError(f"task.against: {error}") from None


def _of_model(trained: Trained, cfg: Config, rows: NDArray[np.int64], work: Path) -> tuple[NDArray[np.bool_], Wrong]:
    """Which of the test images ``rows`` are classified wrongly: as they are (N,), and corrupted."""
    work.mkdir(exist_ok=True)
    train, test = sets.parts(cfg.data, trained.cfg)
    if len(rows) and rows[-1] >= len(test):
        raise ConfigError(f"{cfg.data} has another number of test images for the other model; give a folder.")
    if cfg.head == "own":
        heads.check_classes(trained, test)
        head = heads.own(trained)
    else:
        features, labels = features_and_labels(trained, train, work, "train")
        head = heads.fit(cfg.head, trained, features, labels, len(train.classes), shots=cfg.shots)
    images, truth = sets.taken(test.images, rows), test.labels[rows]
    path = work / "done.json"
    done = records.read_object(path) or {}
    clean = head(extract(trained.model, images).double().numpy()).argmax(1) != truth
    found = []
    for kind in cfg.kinds or KINDS:
        for severity in cfg.severities:
            key = f"{kind} {severity}"
            if key not in done:
                features = np.concatenate(
                    [
                        extract(trained.model, corrupt(images[a : a + BATCH], kind, severity, first=a, seed=cfg.seed))
                        .double()
                        .numpy()
                        for a in range(0, len(images), BATCH)
                    ]
                )
                done[key] = np.packbits(head(features).argmax(1) != truth).tobytes().hex()
                records.write_json(path, done)
            packed = np.frombuffer(bytes.fromhex(done[key]), np.uint8)
            found.append(np.unpackbits(packed, count=len(rows)).astype(bool))
    return clean, np.reshape(found, (-1, len(cfg.severities), len(rows)))


def _of_pixels(run: RunConfig, cfg: Config, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], Wrong] | None:
    """The same of a ridge regression on raw pixels, or None where those are too many."""
    train, test = sets.parts(cfg.data, run)
    if len(train) * math.prod(train.images[:1].shape) > MOST_PIXELS:
        return None
    pixels = train.images[: len(train)].flatten(1).double().numpy()
    head = heads.ridge(pixels, train.labels, len(train.classes), "loo")
    images, truth = sets.taken(test.images, rows), test.labels[rows]

    def wrong(seen: torch.Tensor) -> NDArray[np.bool_]:
        return head(seen.flatten(1).double().numpy()).argmax(1) != truth

    found = [
        wrong(corrupt(images, kind, severity, seed=cfg.seed))
        for kind in cfg.kinds or KINDS
        for severity in cfg.severities
    ]
    return wrong(images), np.reshape(found, (-1, len(cfg.severities), len(rows)))
