"""A classifier on another version of its data, whose classes are a subset, renamed, merged, or several an image.

The class map (`class_map`) says which classes are right for an image. With ``labels`` of single images the top-1 accuracy
is that of ReaL (arXiv 2006.07159): over images with at least one right class, is the first choice one of them?
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit.config import ConfigError
from sovit.data.sources import read_class_list
from sovit.downstream import class_map, heads, sets
from sovit.downstream.frozen import features_and_labels
from sovit.downstream.metrics.accuracy import chance, hits
from sovit.downstream.metrics.proportion import share
from sovit.lit.data import train_images
from sovit.lit.trained import Trained


@dataclass
class Config:
    name: str = "variants"
    data: str = "digits"
    head: str = "probe"
    train: str = "digits"
    shots: int | None = None
    class_map: str | None = None
    restrict: bool = True


def check(cfg: Config, trained: Trained) -> None:
    sets.check(cfg.data, trained.cfg, training=True)
    heads.check(cfg.head, "", trained, cfg.shots)
    if cfg.head != "own":
        sets.check(cfg.train, trained.cfg, key="task.train")
    if cfg.class_map is not None:
        class_map.read(Path(cfg.class_map).expanduser())


def depends(trained: Trained, cfg: Config) -> list[str]:
    found = [sets.fingerprint(cfg.data, trained.cfg)]
    if cfg.head != "own":
        found.append(sets.fingerprint(cfg.train, trained.cfg, key="task.train"))
    if cfg.class_map is not None:
        found.append(sets.digest(cfg.class_map, key="task.class_map"))
    return found


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    test = sets.tested(cfg.data, trained.cfg)
    if cfg.head == "own":
        own, head = own_classes(trained), heads.own(trained)
    else:
        train, _ = sets.parts(cfg.train, trained.cfg, key="task.train")
        own = train.classes
        features, labels = features_and_labels(trained, train, work, "train")
        head = heads.fit(cfg.head, trained, features, labels, len(own), shots=cfg.shots)
    read = None if cfg.class_map is None else class_map.read(Path(cfg.class_map).expanduser())
    names = None if test.file_names is None else [test.file_names(k) for k in range(len(test))]
    right, known = class_map.right_classes(read, str(cfg.class_map), test.classes, test.labels, names, own)
    allowed = known if cfg.restrict else np.ones(len(own), bool)
    counted = right.any(1)
    if not counted.any() or allowed.sum() < 2:
        raise ConfigError(
            f"No image of {cfg.data} is left to count, or fewer than two classes to choose from; see the map."
        )
    features, _ = features_and_labels(trained, test, work, "variant")
    logits, right = head(features[counted]), right[counted]
    used = np.unique(test.labels[counted])
    found: dict[str, Any] = {
        "dataset": test.name,
        "head": cfg.head,
        "labels": "of single images" if read and read.labels is not None else "of classes",
        "num_classes": int(allowed.sum()),
        "num_classifier": len(own),
        "left_out_images": int((~counted).sum()),
        "left_out_classes": len(test.classes) - len(used),
        "right_per_image": float(right.sum(1).mean()),
        "interval": "95 %, Wilson: images",
    }
    for k in (1, 5):
        if k < allowed.sum():
            found[f"top{k}"] = {**share(hits(logits, right, k, allowed)), "chance": chance(right, k, allowed)}
    return found


def text(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['dataset']}, head {result['head']}, labels {result['labels']}: {result['top1']['n']:,} images, "
        f"{result['num_classes']} of the classifier's {result['num_classifier']} classes to choose from"
    ]
    for key in ("top1", "top5"):
        if key in result:
            one = result[key]
            lines.append(
                f"{key}: accuracy {one['value']:.3f} ({one['lo']:.3f} .. {one['hi']:.3f}), chance {one['chance']:.3f}"
            )
    if result["left_out_images"]:
        lines.append(
            f"left out: {result['left_out_images']:,} images without a right class, all of "
            f"{result['left_out_classes']} classes among them"
        )
    return lines


def own_classes(trained: Trained) -> tuple[str, ...]:
    """The names of the classes that the model was trained on: from the class list or the training images, where they still
    are; their numbers otherwise."""
    cfg = trained.cfg
    if cfg.data.name != "fractals":
        try:
            names = read_class_list(cfg.data.class_list) if cfg.data.class_list else train_images(cfg).classes
        except ValueError:
            names = ()
        if len(names) == cfg.data.num_classes:
            return tuple(names)
    return tuple(str(k) for k in range(cfg.data.num_classes))
