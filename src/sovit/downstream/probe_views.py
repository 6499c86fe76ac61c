"""Augmented images for the linear probe, each a function of (image, key): crop, flip, mixup.

``crop``: the short side to size / 0.875 (256 for 224), the central square of it, and of that a random crop of the model's
size. ``inception``: a random part of that square, 5 to 100 % of its area, resized. For images in files only the central
square is ever seen; embedded images, which have no more pixels, are given a reflected rim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from sovit.config import RunConfig
from sovit.data import decode
from sovit.data.images import FilePixels
from sovit.data.stream import Slices
from sovit.data.views import CENTRAL, TestView
from sovit.downstream.sets import Labelled, taken

AUGS = ("none", "crop", "inception")
_MIN_AREA, _ASPECT = 0.05, math.log(4 / 3)


@dataclass(frozen=True)
class WholeView(TestView):
    """The central square of an image resized to it, uint8 [channels, size, size]: what the crops are taken from."""

    def __call__(self, data: bytes) -> Tensor:
        """The view of an image file. Raises BadImage."""
        image, orientation = decode.opened(data)
        decode.shrink(image, min(image.size) / (2 * self.size))
        array = np.array(decode.pixels(image, orientation, self.channels))
        pixels = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
        return v2.functional.center_crop(v2.functional.resize(pixels, [self.size], antialias=True), [self.size])


def roomy(data: str, train: Labelled, cfg: RunConfig, aug: str) -> Tensor | Slices:
    """The images of the train part with room to crop from: (N, channels, side, side), side = size / 0.875."""
    side = round(cfg.model.image_size / CENTRAL)
    images = train.images
    if isinstance(images, FilePixels):
        view = WholeView(side, cfg.model.channels)
        return FilePixels(images.images, images.chosen, view, threads=images.threads, note=images.note)
    assert isinstance(images, torch.Tensor)
    more = side - cfg.model.image_size
    return F.pad(images, (more // 2, more - more // 2) * 2, mode="reflect")


def augmented(
    images: Tensor | Slices,
    rows: NDArray[np.int64],
    labels: Tensor,
    num_classes: int,
    keys: NDArray[np.uint64],
    aug: str,
    flip: bool,
    mixup: float,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Views float32 (B, channels, size, size) and targets float32 (B, num_classes) of these images.

    Mixup as in big_vision: one share max(l, 1 - l), l ~ Beta(mixup, mixup), a batch, each image with the one before it.
    """
    views = []
    for image, key in zip(taken(images, rows), keys.tolist(), strict=True):
        views.append(_view(image[None], np.random.Generator(np.random.Philox(key)), aug, flip, size))
    made, targets = torch.cat(views), F.one_hot(labels, num_classes).float()
    if mixup:
        drawn = np.random.Generator(np.random.Philox(int(keys[0]) ^ 1)).beta(mixup, mixup)
        own = max(drawn, 1 - drawn)
        made = own * made + (1 - own) * made.roll(1, 0)
        targets = own * targets + (1 - own) * targets.roll(1, 0)
    return made, targets


def _view(image: Tensor, draw: np.random.Generator, aug: str, flip: bool, size: int) -> Tensor:
    side = image.shape[-1]
    if aug == "crop":
        height = width = size
    else:
        area, aspect = draw.uniform(_MIN_AREA, 1) * side * side, math.exp(draw.uniform(-_ASPECT, _ASPECT))
        width = min(side, max(1, round(math.sqrt(area * aspect))))
        height = min(side, max(1, round(math.sqrt(area / aspect))))
    top, left = draw.integers(side - height + 1), draw.integers(side - width + 1)
    found = image[..., top : top + height, left : left + width]
    if found.shape[-2:] != (size, size):
        found = F.interpolate(found, size=(size, size), mode="bilinear", antialias=True)
    return found.flip(-1) if flip and draw.random() < 0.5 else found
