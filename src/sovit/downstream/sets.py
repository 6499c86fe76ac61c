"""The labelled images of a downstream task: the embedded sets by name, or folders and shards of the user's own.

``fractals`` are the held-out categories of the run's own world, ``digits`` the handwritten ones; anything with a slash is
a folder in one of the forms that training reads. Images come in the view of an evaluation at the model's size. Notes what
cannot be read and goes on; computes no features.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sovit.config import ConfigError, RunConfig
from sovit.data.bad_files import BadFiles
from sovit.data.fractals import fingerprint as fingerprint_of_world
from sovit.data.images import FilePixels, fewshot_set
from sovit.data.sources import Images, kind_of, open_images
from sovit.data.stream import FewShotSet, FractalDataset, Slices, digits_fewshot, fractal_fewshot
from sovit.data.views import TestView
from sovit.derived import fewshot_name
from sovit.lit.data import fewshot_images, world_of
from sovit.schema import EVAL_DATASETS, LARGEST_EMBEDDED
from sovit.strict import nearest

TRAINING = "training"  # the classes that the model was trained on
_OTHER_STREAM = 2**22  # added to the run's seed: images of the training classes that no step has seen
_TRAINING_IMAGES = (4096, 2048)  # of those, of the two parts
T = TypeVar("T")


@dataclass(frozen=True)
class Labelled:
    """Images with a class each. ``images`` float32 [N, channels, size, size] in [-1, 1], perhaps made slice by slice;
    ``labels`` int64 [N]; ``file_names`` below the data set's folder, None of embedded images."""

    name: str
    images: Tensor | Slices
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    file_names: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Window:
    """Some consecutive images of a set, made when a slice of them is asked for."""

    images: Tensor | Slices
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, rows: slice, /) -> Tensor:
        begin, end, _ = rows.indices(len(self))
        return self.images[self.begin + begin : self.begin + end]


def check(data: str, cfg: RunConfig, *, key: str = "task.data", training: bool = False) -> None:
    """Raise ConfigError unless ``data`` is a known name or the path of a folder that the model can look at.

    ``training``: whether the classes that the model was trained on will do as well.
    """
    known = (*EVAL_DATASETS, *((TRAINING,) if training else ()))
    if "/" not in data and data not in known:
        raise ConfigError(f"{key}: {data!a} is not known{nearest(data, known)} The path of a folder has a slash in it.")
    if (data == "fractals" or (data == TRAINING and cfg.data.name == "fractals")) and (
        cfg.model.image_size > LARGEST_EMBEDDED
    ):
        raise ConfigError(
            f"{key}: fractals are drawn up to {LARGEST_EMBEDDED} pixels, and the model takes {cfg.model.image_size}; "
            "give a folder."
        )
    if "/" in data and cfg.model.channels not in (1, 3):
        raise ConfigError(
            f"{key}: images in files have 1 or 3 channels, and the model takes {cfg.model.channels}; give an embedded set."
        )


def fingerprint(data: str, cfg: RunConfig, *, key: str = "task.data") -> str:
    """A short name that changes with the images of a data set: of files, with their names and sizes. Raises ConfigError."""
    if data == "digits":
        return data
    if data == "fractals" or (data == TRAINING and cfg.data.name == "fractals"):
        return fingerprint_of_world(world_of(cfg))
    return " ".join(images.fingerprint for images in _files(_folder(data, cfg), key))


def digest(path: str, *, key: str) -> str:
    """SHA-256 of a small file of the user's. Raises ConfigError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read ({error.strerror}); give the path of a file.") from None


def parts(data: str, cfg: RunConfig, *, key: str = "task.data") -> tuple[Labelled, Labelled]:
    """What to fit on and what to test on: all images of the parts train, and test or val. Raises ConfigError."""
    if data == TRAINING and cfg.data.name == "fractals":
        return _unseen(cfg)
    if data in EVAL_DATASETS:
        found = fewshot(data, cfg, shots=[1])
        classes = tuple(str(k) for k in range(found.num_classes))
        return (
            Labelled(data, found.train_images, found.train_labels.numpy(), classes),
            Labelled(data, found.test_images, found.test_labels.numpy(), classes),
        )
    files = _files(_folder(data, cfg), key)
    if len(files) == 1:
        raise ConfigError(f"{key}: {data} has no part called train; it needs one to fit on and one to test on.")
    train, test = files
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ConfigError(
            f"{key}: the two parts of {data} hold different classes, such as {odd!r}; make them the same."
        )
    return _labelled(data, train, cfg), _labelled(data, test, cfg)


def tested(data: str, cfg: RunConfig, *, key: str = "task.data") -> Labelled:
    """The images to test on alone: the part test or val, or the whole of a folder that has no parts. Raises ConfigError."""
    if "/" not in data:
        return parts(data, cfg, key=key)[1]
    return _labelled(data, _files(data, key)[-1], cfg)


def fewshot(data: str, cfg: RunConfig, *, shots: Sequence[int], key: str = "task.data") -> FewShotSet:
    """A pool to draw support from and a test set, as in training. Raises ConfigError."""
    size, channels = cfg.model.image_size, cfg.model.channels
    if data == "fractals":
        return fractal_fewshot(world_of(cfg), channels)
    if data == "digits":
        return digits_fewshot(size, channels)
    files = _files(data, key)
    if len(files) == 1:
        raise ConfigError(
            f"{key}: {data} has no part called train; few-shot needs one to draw from and one to test on."
        )
    support, test = files
    view = TestView(size, channels)
    return _as_config(
        key,
        lambda: fewshot_set(
            fewshot_name(data), support, test, view, shots=shots, threads=_threads(), note=_note(support, test)
        ),
    )


def taken(images: Tensor | Slices, rows: NDArray[np.int64]) -> Tensor:
    """The images at these places, in their order."""
    if isinstance(images, Tensor):
        return images[torch.from_numpy(rows)]
    if isinstance(images, FilePixels):
        return images[rows]  # type: ignore[index]  # it decodes whatever an index of numpy picks
    return torch.cat([images[row : row + 1] for row in rows.tolist()])


def _unseen(cfg: RunConfig) -> tuple[Labelled, Labelled]:
    """Embedded images of the training classes from a stream that the run does not draw from."""
    stream = FractalDataset(world_of(cfg), (cfg.seed + _OTHER_STREAM) % 2**23, cfg.model.channels)
    fit, test = _TRAINING_IMAGES
    images, labels = stream.__getitems__(range(fit + test))
    classes = tuple(str(k) for k in range(cfg.data.num_classes))
    made = Labelled(TRAINING, images, labels.numpy(), classes)
    return tuple(
        replace(made, images=images[rows], labels=made.labels[rows]) for rows in (slice(fit), slice(fit, None))
    )  # type: ignore[return-value]


def _labelled(data: str, images: Images, cfg: RunConfig) -> Labelled:
    view = TestView(cfg.model.image_size, cfg.model.channels)
    pixels = FilePixels(images, np.arange(len(images)), view, threads=_threads(), note=_note(images))
    return Labelled(fewshot_name(data), pixels, images.labels.astype(np.int64), images.classes, images.name)


def _files(data: str, key: str) -> tuple[Images, ...]:
    """The parts to fit and to test on, or the whole folder if it has no part called train."""

    def found() -> tuple[Images, ...]:
        root = os.path.normpath(Path(data).expanduser())
        kind = kind_of(root)
        try:
            return fewshot_images(root)
        except ConfigError as error:
            if "it has neither" not in str(error):
                raise
        return (open_images(kind, root),)

    return _as_config(key, found)


def _folder(data: str, cfg: RunConfig) -> str:
    return (cfg.data.root or "") if data == TRAINING else data


def _as_config(key: str, function: Callable[[], T]) -> T:
    try:
        return function()
    except ValueError as error:
        raise ConfigError(str(error).replace("eval.datasets", key).replace("eval.shots", "task.shots")) from None


def unusable() -> int:
    """How many files this process has found that it could not use; the first few were named on standard error."""
    return len(_known().reasons) + _known().beyond


def _note(*sources: Images) -> Callable[[str, str], None]:
    """What is told of files that cannot be used; those that the listing has left out already are told at once."""
    known = _known()
    for images in sources:
        known.note_left_out(images)
    return known.note


@functools.cache
def _known() -> BadFiles:
    return BadFiles(None)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
