"""What a text tower is judged on: images with class names for zero-shot classification, images with captions for retrieval.

``scenes``: embedded pictures of one thing of a held-out category each, and embedded scenes with their captions. A folder of
labelled images gives classes by its names, a ``.json`` in COCO's layout captions; with data=coco its
images lie in ``data.root``, and otherwise, or where none of them is there, beside it. Computes no features.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sovit.config import ConfigError, RunConfig
from sovit.data.images import FilePixels
from sovit.data.sources import Images, kind_of, open_images
from sovit.data.stream import Slices
from sovit.data.views import TestView
from sovit.derived import fewshot_name
from sovit.language.examples import TextImages
from sovit.language.facts import NAMES
from sovit.language.files import FileTexts, open_texts
from sovit.language.prompts import read_templates
from sovit.language.scenes import named, scenes
from sovit.language.zeroshot import PHOTO_TEMPLATES
from sovit.lit.data import bad_files, checked, has_part, world_of

SCENES = "scenes"
NAMED_PER_CLASS = 64  # pictures of one thing, of each of 16 classes
NUM_SCENES = 512  # with five captions each
SCENE_TEMPLATES = ("a picture of a {}", "one thing: a {}", "a large {}", "a small {}", "a bright {}", "a dim {}")


@dataclass(frozen=True)
class Named:
    """Images [N] with labels [N], the names of their classes, and prompts for these."""

    name: str
    images: Tensor | Slices
    labels: Tensor
    classes: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Captioned:
    """Images [N] and texts [M], of which text k belongs to image ``owner[k]``."""

    name: str
    images: Slices
    texts: tuple[str, ...]
    owner: Tensor


@dataclass(frozen=True)
class _Rows:
    """Some images of a source, made when a slice of them is asked for."""

    source: TextImages
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.source.images(self.rows[rows].tolist())


def targets_of(cfg: RunConfig, dataset: str, rank: int = 0) -> list[Named | Captioned]:
    """What an entry of eval.datasets means. Raises ConfigError."""
    if dataset == SCENES:
        return [named_scenes(cfg), captioned(scenes_of(cfg), SCENES)]
    if dataset.endswith(".json"):
        return [captioned(caption_file(cfg, dataset), Path(dataset).stem)]
    return [labelled(cfg, dataset, rank)]


def named_scenes(cfg: RunConfig, templates: str | None = None) -> Named:
    """Embedded pictures of one thing each, of the named held-out categories."""
    about = {"size": cfg.model.image_size, "channels": cfg.model.channels, "world": world_of(cfg)}
    images, labels = checked(named, "test", num_per_class=NAMED_PER_CLASS, **about)
    return Named(SCENES, images, labels, NAMES, templates_of(templates or cfg.text.templates, SCENE_TEMPLATES))


def scenes_of(cfg: RunConfig) -> TextImages:
    """The embedded scenes of the test part."""
    about = {"size": cfg.model.image_size, "channels": cfg.model.channels, "world": world_of(cfg)}
    return checked(scenes, "test", num=NUM_SCENES, **about)


def caption_file(cfg: RunConfig, path: str, images: str | None = None) -> FileTexts:
    """The images that a file in COCO's layout describes. Raises ConfigError."""
    beside = os.path.dirname(path) or "."
    own = cfg.data.root if cfg.data.name == "coco" else None
    size, channels = cfg.model.image_size, cfg.model.channels
    if own and not images:
        with suppress(ConfigError):
            return _captions(os.path.expanduser(path), own, size, channels)
    return _captions(os.path.expanduser(path), images or beside, size, channels)


@lru_cache(maxsize=4)
def _captions(path: str, folder: str, size: int, channels: int) -> FileTexts:
    return checked(open_texts, folder, captions=path, size=size, channels=channels, threads=_threads())


def captioned(source: TextImages, name: str) -> Captioned:
    """All images of a source that have captions, with all of these."""
    said = [source.captions(row) for row in range(len(source))]
    rows = np.array([row for row, captions in enumerate(said) if captions], np.int64)
    texts = [(place, text) for place, row in enumerate(rows.tolist()) for text in said[row]]
    owner = torch.tensor([place for place, _ in texts], dtype=torch.int64)
    return Captioned(name, _Rows(source, rows), tuple(text for _, text in texts), owner)


def labelled(cfg: RunConfig, dataset: str, rank: int = 0) -> Named:
    """The labelled images of a folder: its part called test or val, or all of it. Raises ConfigError."""
    images = folder_of(dataset)
    view = TestView(cfg.model.image_size, cfg.model.channels)
    note = bad_files(cfg, rank).note
    pixels = FilePixels(images, np.arange(len(images)), view, threads=_threads(), note=note)
    labels = torch.from_numpy(images.labels.astype(np.int64))
    name = fewshot_name(dataset)
    return Named(name, pixels, labels, images.classes, templates_of(cfg.text.templates, PHOTO_TEMPLATES))


def folder_of(dataset: str) -> Images:
    kind = checked(kind_of, dataset)
    parts = [part for part in ("test", "testing", "val", "valid", "validation") if has_part(kind, dataset, part)]
    return checked(open_images, kind, os.path.normpath(Path(dataset).expanduser()), parts[0] if parts else None)


def folders_of(cfg: RunConfig) -> list[Any]:
    """The lists of files among eval.datasets."""
    found: list[Any] = []
    for dataset in cfg.eval.datasets:
        if dataset != SCENES:
            found.append(caption_file(cfg, dataset) if dataset.endswith(".json") else folder_of(dataset))
    return found


def templates_of(path: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts of a text file, one a line, or the usual ones. Raises ConfigError."""
    if path is None:
        return usual
    return checked(read_templates, path)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
