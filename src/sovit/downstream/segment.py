"""Dense features: a linear head on the frozen tokens of the patches, upsampled bilinearly, scored by mean IoU.

The head is one layer on tokens standardised by the training images, from zero weights, trained by softmax cross-entropy of
each pixel. Its weights start a convex problem, so the features are all that differs between two models. Beside it stand the
same head on the raw pixels of each patch, and every pixel called the most common class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit.config import ConfigError
from sovit.data.fractals import fingerprint
from sovit.data.images import IN_MEMORY
from sovit.data.order import Order
from sovit.derived import fewshot_name, shape_of
from sovit.downstream import iou, pairs, scenes
from sovit.downstream.adapted import POSITIONS, adapted, check_size
from sovit.downstream.rates import shown
from sovit.downstream.training import Recipe, ResumeFile, train
from sovit.lit.data import world_of
from sovit.lit.trained import Trained
from sovit.strict import nearest

GRID = 8  # patches to a side of an embedded scene, at least
_STANDARD = 64  # training images whose tokens give mean and deviation
_AT_ONCE = 32  # images in one forward pass


@dataclass
class Config:
    name: str = "segment"
    data: str = "digits"  # scenes of digits | of fractals | a folder with images and masks of a train and a test part
    image_size: int | None = None  # null: the model's own; of embedded scenes 8 patches to a side at least
    positions: str = "bilinear"  # at another image_size: bilinear (big_vision's rule) | bicubic (timm's default)
    num_classes: int | None = None  # of a folder; null: the lines of its classes.txt, or the largest number in a mask
    ignore: int = 255  # the number in a mask that stands for no class
    num_train: int = 256  # embedded scenes
    num_test: int = 256
    lr: float = 10.0
    steps: int = 400
    global_batch_size: int = 16
    warmup_steps: int = 20
    pixels: bool = True  # the same head on raw pixels too, to compare with
    seed: int = 0  # the order of the images; of embedded scenes the scenes too
    checkpoint_every_s: float = 60.0


class Masked(Protocol):
    """Images with masks: scenes or pairs."""

    def __len__(self) -> int: ...

    def images(self, rows: Sequence[int]) -> Tensor: ...

    def masks(self, rows: Sequence[int]) -> Tensor: ...

    def mask(self, row: int) -> Tensor: ...


def check(cfg: Config, trained: Trained) -> None:
    if cfg.positions not in POSITIONS:
        raise ConfigError(f"task.positions={cfg.positions!a} is not a choice{nearest(cfg.positions, POSITIONS)}")
    if cfg.data not in scenes.KINDS and "/" not in cfg.data:
        known = nearest(cfg.data, scenes.KINDS)
        raise ConfigError(f"task.data: {cfg.data!a} is not known{known} The path of a folder has a slash in it.")
    for key in ("num_train", "num_test", "steps", "global_batch_size"):
        if getattr(cfg, key) < 1:
            raise ConfigError(f"task.{key}={getattr(cfg, key)} must be at least 1.")
    if not 0 <= cfg.warmup_steps < cfg.steps:
        raise ConfigError(f"task.warmup_steps={cfg.warmup_steps} is not within task.steps={cfg.steps}.")
    if not cfg.lr > 0:
        raise ConfigError(f"task.lr={cfg.lr} must be positive.")
    if cfg.seed < 0:
        raise ConfigError(f"task.seed={cfg.seed} must not be negative.")
    if cfg.num_classes is not None and (cfg.num_classes < 2 or cfg.data in scenes.KINDS):
        raise ConfigError(f"task.num_classes={cfg.num_classes} is of a folder and at least 2; write null.")
    check_size(trained, _size(cfg, trained))
    if cfg.data not in scenes.KINDS:
        if trained.cfg.model.channels not in (1, 3):
            raise ConfigError(f"task.data: images in files have 1 or 3 channels, not {trained.cfg.model.channels}.")
        for part in pairs.part_names(cfg.data):
            pairs.pairs(cfg.data, part, size=1, channels=1)


def depends(trained: Trained, cfg: Config) -> str:
    if cfg.data in scenes.KINDS:
        return cfg.data if cfg.data == "digits" else fingerprint(world_of(trained.cfg))
    return pairs.fingerprint_of(cfg.data)


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """mIoU and pixel accuracy of the head on tokens and on pixels, with 95 % intervals, and of the most common class."""
    size, device = _size(cfg, trained), next(trained.model.parameters()).device
    parts, classes = _parts(cfg, trained, size)
    model = adapted(trained, image_size=size, num_classes=trained.cfg.data.num_classes, positions=cfg.positions)
    model.to(device).eval().requires_grad_(False)
    patch = shape_of(trained.cfg).patch_size
    kinds: dict[str, Callable[[Tensor], Tensor]] = {"tokens": lambda images: tokens(model, images)}
    if cfg.pixels:
        kinds["pixels"] = lambda images: F.pixel_unshuffle(images, patch)
    resume = ResumeFile(work / "resume.ckpt", cfg.checkpoint_every_s)
    result: dict[str, Any] = {}
    for kind, of in kinds.items():
        head, rows = _fit(cfg, Features(parts[0], of, device), len(classes), device, resume, kind)
        found = counted(head, Features(parts[1], of, device), len(classes), cfg.ignore)
        result[kind] = iou.with_intervals(found) | {"loss": rows[-1]["loss"]}
        result["one_class"] = iou.one_class(found)
    return {
        "dataset": fewshot_name(cfg.data),
        "image_size": size,
        "grid": tokens(model, parts[0].images([0]).to(device)).shape[-1],
        "classes": classes,
        "num_train": len(parts[0]),
        "num_test": len(parts[1]),
        "interval": "95 %, drawing test images anew; not the luck of the training images",
        **result,
    }


def text(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['dataset']}: {len(result['classes'])} classes, {result['num_train']:,} images to train on and "
        f"{result['num_test']:,} to test on, {result['image_size']} pixels, {result['grid']} x {result['grid']} tokens",
        f"{'':<22} {'mIoU':<22} {'pixel accuracy':<22}",
    ]
    for key, name in (("tokens", "linear on tokens"), ("pixels", "linear on raw pixels")):
        if key in result:
            lines.append(f"{name:<22} {shown(result[key]['miou']):<22} {shown(result[key]['accuracy']):<22}".rstrip())
    chance = result["one_class"]
    if chance["miou"] is not None:
        lines.append(f"{'most common class':<22} {chance['miou']:<22.3f} {chance['accuracy']:.3f}")
    named = [pair for pair in zip(result["classes"], result["tokens"]["classes"], strict=True) if pair[1] is not None]
    worst, best = min(named, key=lambda pair: pair[1]), max(named, key=lambda pair: pair[1])
    return [*lines, f"IoU of a class on tokens: from {worst[1]:.3f} ({worst[0]}) to {best[1]:.3f} ({best[0]})"]


@torch.no_grad()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Features of the patches [B, width, h, w] after the last norm, without class token."""
    found: Tensor = model.forward_features(images)  # type: ignore[operator]
    if found.ndim == 4:
        return found.permute(0, 3, 1, 2)
    found = found[:, getattr(model, "num_prefix_tokens", 0) :]
    side = math.isqrt(found.shape[1])
    return found.transpose(1, 2).unflatten(2, (side, side))


class Features:
    """Features [B, width, h, w] of a part by row, and its masks to train on, kept where all of them fit into memory."""

    def __init__(self, part: Masked, of: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.part, self._of, self._device = part, of, device
        one = self._made([0])
        fits = len(part) * one.numel() * 4 <= IN_MEMORY
        self._kept = torch.cat([self._made(rows) for rows in _batches(len(part))]) if fits else None
        self._masks: Tensor | None = None

    def __call__(self, rows: Sequence[int]) -> Tensor:
        return self._made(rows) if self._kept is None else self._kept[rows]

    def masks(self, rows: Sequence[int]) -> Tensor:
        """int64 [B, size, size]."""
        if self._masks is None and 8 * len(self.part) * self.part.masks([0]).numel() <= IN_MEMORY:
            self._masks = torch.cat([self.part.masks(batch) for batch in _batches(len(self.part))])
        return (self.part.masks(rows) if self._masks is None else self._masks[rows]).to(self._device)

    def _made(self, rows: Sequence[int]) -> Tensor:
        return self._of(self.part.images(rows).to(self._device)).float()


class Head(nn.Module):
    """Logits [B, classes, height, width] of features; the division by sqrt(width) makes one rate serve any width."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor, num_classes: int) -> None:
        super().__init__()
        std, mean = torch.std_mean(features, (0, 2, 3), correction=0, keepdim=True)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (std + 1e-5) * math.sqrt(features.shape[1]))
        self.linear = nn.Conv2d(features.shape[1], num_classes, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:
        logits = self.linear((features - self.mean) / self.scale)
        return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def counted(head: nn.Module, features: Features, num_classes: int, ignore: int) -> np.ndarray[Any, Any]:
    """Counts [images, 3, classes] (`iou.counts`), each at its own mask's resolution."""
    found = []
    for rows in _batches(len(features.part)):
        for row, one in zip(rows, features(rows).split(1), strict=True):
            mask = features.part.mask(row)
            predicted = head(one, mask.shape)[0].argmax(0).cpu().numpy()
            found.append(iou.counts(predicted, mask.numpy(), num_classes, ignore))
    return np.stack(found)


def _fit(
    cfg: Config, features: Features, num_classes: int, device: torch.device, resume: ResumeFile, name: str
) -> tuple[Head, list[dict[str, Any]]]:
    head = Head(features(range(min(_STANDARD, len(features.part)))), num_classes).to(device)
    order = Order([len(features.part)], cfg.seed)

    def batches(step: int) -> Iterator[list[int]]:
        for k in range(step, cfg.steps):
            yield order(np.arange(k * cfg.global_batch_size, (k + 1) * cfg.global_batch_size)).tolist()

    def losses(rows: list[int]) -> Iterable[Tensor]:
        masks = features.masks(rows)
        if bool((masks != cfg.ignore).any()):
            yield F.cross_entropy(head(features(rows), masks.shape[1:]), masks, ignore_index=cfg.ignore)

    recipe = Recipe(cfg.lr, cfg.steps, cfg.warmup_steps, clip_norm=None)
    groups = [{"params": list(head.parameters())}]
    rows = train(head, groups, recipe, batches, losses, resume, name, look_at={cfg.steps})
    if rows[-1]["loss"] is None:
        raise ConfigError(f"The head on {name} diverged with task.lr={cfg.lr}; give a lower rate.")
    return head, rows


def _parts(cfg: Config, trained: Trained, size: int) -> tuple[tuple[Masked, Masked], list[str]]:
    if cfg.data in scenes.KINDS:
        counts = {"train": cfg.num_train, "test": cfg.num_test}
        train_part, test = (
            scenes.scenes(cfg.data, part, trained.cfg, num=num, size=size, seed=cfg.seed)
            for part, num in counts.items()
        )
        return (train_part, test), ["ground", *(str(k) for k in range(scenes.CATEGORIES))]
    channels = trained.cfg.model.channels
    found = tuple(pairs.pairs(cfg.data, part, size=size, channels=channels) for part in pairs.part_names(cfg.data))
    classes = pairs.class_names(cfg.data, found, cfg.num_classes, cfg.ignore)
    return (found[0], found[1]), classes


def _batches(num: int) -> Iterator[list[int]]:
    for start in range(0, num, _AT_ONCE):
        yield list(range(start, min(start + _AT_ONCE, num)))


def _size(cfg: Config, trained: Trained) -> int:
    own, movable = trained.cfg.model.image_size, "pos_embed" in trained.weights.tensors
    if cfg.image_size is not None or cfg.data not in scenes.KINDS or not movable:
        return cfg.image_size or own
    return max(own, GRID * shape_of(trained.cfg).patch_size)
