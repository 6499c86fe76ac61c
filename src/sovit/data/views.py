"""What of an image the model gets to see: a random crop in training, a fixed one in an evaluation.

Training: the crop of torchvision's `RandomResizedCrop` (area from ``min_area`` to 1, aspect ratio 3/4 to 4/3, bilinear
with antialiasing: the inception crop of big_vision), a flip with probability 1/2, RandAugment if asked for; the random
numbers come from a seed a view and leave torch's generator as it was. Evaluation: the short side to size / 0.875 (256
for 224), then the central square. Results are bytes; `to_float` brings them to [-1, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sovit.data import decode

CENTRAL = 0.875  # share of the short side that an evaluation sees
_MARGIN = 2.0  # a JPEG keeps at least so many times the pixels needed, so that what is left out cannot be seen


@dataclass(frozen=True)
class TrainView:
    """A random view, uint8 [channels, size, size]."""

    size: int
    channels: int = 3
    min_area: float = 0.05
    flip: bool = True
    randaugment_ops: int = 0
    randaugment_magnitude: int = 10

    def __call__(self, data: bytes, seed: int) -> Tensor:
        """The view of an image file that the seed draws; torch's global generator is used up. Raises BadImage."""
        torch.default_generator.manual_seed(seed)
        image, orientation = decode.opened(data)
        width, height = decode.upright_size(image, orientation)
        crop = self._crop.make_params([torch.empty(1, height, width, device="meta")])
        decode.shrink(image, min(crop["width"], crop["height"]) / (_MARGIN * self.size))
        image = decode.pixels(image, orientation, self.channels)
        x, y = image.width / width, image.height / height  # below 1 for a JPEG that was decoded small
        left, top = round(crop["left"] * x), round(crop["top"] * y)
        right, bottom = round((crop["left"] + crop["width"]) * x), round((crop["top"] + crop["height"]) * y)
        view = v2.functional.resize(_bytes(image.crop((left, top, right, bottom))), [self.size] * 2, antialias=True)
        if self.flip and torch.rand(()) < 0.5:
            view = v2.functional.horizontal_flip(view)
        if self.randaugment_ops:
            view = _bytes(self._randaugment(v2.functional.to_pil_image(view)))  # its operations are PIL's
        return view

    @cached_property
    def _crop(self) -> v2.RandomResizedCrop:
        return v2.RandomResizedCrop(self.size, scale=(self.min_area, 1.0), ratio=(3 / 4, 4 / 3))

    @cached_property
    def _randaugment(self) -> v2.RandAugment:
        return v2.RandAugment(self.randaugment_ops, self.randaugment_magnitude)


@dataclass(frozen=True)
class TestView:
    """The central view, uint8 [channels, size, size]. Draws no random numbers, so threads may share it."""

    __test__ = False  # no test case, whatever pytest makes of the name

    size: int
    channels: int = 3

    def __call__(self, data: bytes) -> Tensor:
        """The view of an image file. Raises BadImage."""
        image, orientation = decode.opened(data)
        side = round(self.size / CENTRAL)
        decode.shrink(image, min(image.size) / (_MARGIN * side))
        view = v2.functional.resize(_bytes(decode.pixels(image, orientation, self.channels)), [side], antialias=True)
        return v2.functional.center_crop(view, [self.size])


@contextmanager
def decoding() -> Iterator[None]:
    """Leaves torch's global CPU generator and the warning filters as they were: a process that trains may draw views.

    PIL warns of damaged metadata and large images; whether an image can be read is judged in `sovit.data.decode`.
    """
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_rng_state(state)


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], on the same device."""
    return images.float().div_(127.5).sub_(1)


def _bytes(image: Image.Image) -> Tensor:
    """uint8 [channels, height, width]: torch resizes bytes three times as fast as PIL, and to the same within one level."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
