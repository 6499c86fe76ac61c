"""Zero-shot classification: the images of a data set against the names of its classes, by a text tower and its image tower.

Each class is the mean of its name in several prompts (`sovit.language.zeroshot`). Nothing is trained or chosen here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sovit.config import ConfigError
from sovit.data.sources import read_class_list
from sovit.downstream.rates import rate, shown
from sovit.language.prompts import prompts
from sovit.language.zeroshot import PHOTO_TEMPLATES, Share, class_weights, errors, in_words, predictions
from sovit.lit.locked import Locked
from sovit.lit.text_evaluation import BATCH, encoder_of, image_features
from sovit.lit.text_targets import SCENE_TEMPLATES, SCENES, Named, folder_of, labelled, named_scenes, templates_of
from sovit.lit.trained import Trained
from sovit.schema import LARGEST_EMBEDDED

KS = (1, 5)
_SHOWN = 5  # classes at either end of the table


@dataclass
class Config:
    name: str = "zeroshot"
    data: str = SCENES
    classes: str | None = None
    templates: str | None = None


def check(cfg: Config, trained: Trained) -> None:
    check_tower(trained, cfg.name)
    if cfg.data != SCENES and "/" not in cfg.data:
        raise ConfigError(
            f"task.data: {cfg.data!a} is not known; write {SCENES}, or the path of a folder with a slash in it."
        )
    check_size(cfg.data, trained)
    _templates(cfg, trained)
    if cfg.classes is not None:
        _names(cfg)


def check_tower(trained: Trained, task: str) -> None:
    """Raise ConfigError unless it is a text tower."""
    if trained.locked is None:
        raise ConfigError(
            f"task={task} compares images with texts, and {trained.weights.run_id} has no text tower; train one on it with "
            f"python -m sovit.train experiment=lit_tiny text.encoder={trained.weights.source.parent}."
        )


def check_size(data: str, trained: Trained) -> None:
    """Raise ConfigError where the embedded scenes cannot be drawn as large as the image tower takes them."""
    if data == SCENES and trained.cfg.model.image_size > LARGEST_EMBEDDED:
        raise ConfigError(
            f"task.data: scenes are drawn up to {LARGEST_EMBEDDED} pixels, and the image tower takes "
            f"{trained.cfg.model.image_size}; give images of your own."
        )


def depends(trained: Trained, cfg: Config) -> list[Any]:
    images = SCENES if cfg.data == SCENES else _as_task(lambda: folder_of(cfg.data)).fingerprint
    names = None if cfg.classes is None else _names(cfg)
    return [locked_of(trained).sha256, images, names, _templates(cfg, trained)]


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """Top-1 and top-5 accuracy with Wilson's intervals and chance, and every class's own."""
    target, locked = _target(cfg, trained), locked_of(trained)
    images = image_features(locked, trained.model, target.images)
    if not images.isfinite().all():
        raise ConfigError(f"The features of {locked.encoder.source} are not finite: the model has diverged.")
    weights = _weights(trained, locked, target)
    right = {str(k): accuracy(share) for k, share in errors(images, weights, target.labels, KS).items()}
    found = predictions(images, weights)
    return {
        "dataset": target.name,
        "num_images": len(target.labels),
        "num_classes": len(target.classes),
        "templates": list(target.templates),
        "num_cut": _num_cut(target, locked, trained.cfg.text.length),
        "length": trained.cfg.text.length,
        "interval": "95 %, Wilson, over the images",
        "top": right,
        "classes": [_of_class(k, target, found) for k in range(len(target.classes))],
        "encoder": locked.encoder.record(),
        "vocabulary": locked.record()["vocabulary"],
    }


def accuracy(share: Share) -> dict[str, Any]:
    """An error with its interval, as what is right."""
    found = asdict(share)
    return found | {
        "value": 1 - share.value,
        "lo": 1 - share.hi,
        "hi": 1 - share.lo,
        "chance": 1 - share.chance,
    }


def text(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['dataset']}, {result['num_images']:,} images of {result['num_classes']:,} classes, "
        f"{len(result['templates'])} prompts a class",
        f"{'':<8} {'accuracy':>8}  {'95 % interval':<17} {'chance':>7}",
    ]
    for k, row in result["top"].items():
        lines.append(f"top-{k:<4} {row['value']:>8.3f}  {row['lo']:.3f} .. {row['hi']:.3f}    {row['chance']:>7.3f}")
    rows = sorted((row for row in result["classes"] if row["num"]), key=lambda row: -row["value"])
    cut = [*rows[:_SHOWN], None, *rows[-_SHOWN:]] if len(rows) > 2 * _SHOWN else rows
    lines += ["", f"{'class':<20} {'top-1, 95 % interval':<22} {'of':>6}  most often taken for"]
    for row in cut:
        if row is None:
            lines.append(f"... {len(rows) - 2 * _SHOWN} more in the file")
            continue
        taken = f"{row['taken_for']} ({row['taken_for_share']:.0%})" if row["taken_for"] is not None else "nothing else"
        lines.append(f"{row['class'][:20]:<20} {shown(row):<22} {row['num']:>6}  {taken}")
    if result["num_cut"]:
        lines.append(f"{result['num_cut']:,} prompts had more than {result['length']} tokens and were cut.")
    return lines


def _of_class(k: int, target: Named, found: torch.Tensor) -> dict[str, Any]:
    """How many images of a class are right, and what the others are taken for most often."""
    guesses = found[target.labels == k]
    counts = torch.bincount(guesses, minlength=len(target.classes))
    right, num = int(counts[k]), len(guesses)
    counts[k] = 0
    most = int(counts.argmax())
    wrong = int(counts[most])
    return {
        "class": target.classes[k],
        **rate(right, num),
        "taken_for": target.classes[most] if wrong else None,
        "taken_for_share": wrong / num if num else None,
    }


def _target(cfg: Config, trained: Trained) -> Named:
    target = named_scenes(trained.cfg) if cfg.data == SCENES else _as_task(lambda: labelled(trained.cfg, cfg.data))
    target = replace(target, templates=_templates(cfg, trained))
    if cfg.classes is None:
        return target
    names = _names(cfg)
    if len(names) != len(target.classes):
        raise ConfigError(
            f"task.classes={cfg.classes} holds {len(names)} names, and {target.name} has {len(target.classes)} classes; "
            "give one name a line, in the order of the labels."
        )
    return replace(target, classes=names)


def _weights(trained: Trained, locked: Locked, target: Named) -> torch.Tensor:
    encode, length = encoder_of(trained.model), trained.cfg.text.length
    try:
        return class_weights(encode, locked.vocabulary, target.classes, target.templates, length, batch_size=BATCH)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _num_cut(target: Named, locked: Locked, length: int) -> int:
    """How many prompts are longer than the text tower reads."""
    said = [text for name in target.classes for text in prompts(target.templates, in_words(name))]
    return locked.vocabulary.batch(said, length)[1]


def locked_of(trained: Trained) -> Locked:
    assert trained.locked is not None
    return trained.locked


def _templates(cfg: Config, trained: Trained) -> tuple[str, ...]:
    usual = SCENE_TEMPLATES if cfg.data == SCENES else PHOTO_TEMPLATES
    return templates_of(cfg.templates or trained.cfg.text.templates, usual)


def _names(cfg: Config) -> tuple[str, ...]:
    assert cfg.classes is not None
    try:
        return read_class_list(cfg.classes)
    except ValueError as error:
        raise ConfigError(f"task.classes: {error}") from None


def _as_task(function: Any) -> Any:
    try:
        return function()
    except ValueError as error:
        raise ConfigError(str(error).replace("eval.datasets", "task.data")) from None
