"""Images to train on, a share of them held out, and images to test on, of any data set that `sets` knows.

Embedded images become small files, so that crops, flips, RandAugment and mixup are those of `sovit.data.images` for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sovit.config import ConfigError, RunConfig
from sovit.data.images import FilePixels
from sovit.data.order import mix
from sovit.data.sources import Images, LeftOut
from sovit.downstream import sets
from sovit.downstream.sets import Labelled


class DrawnImages(Images):
    """Images in memory, float32 [N, channels, size, size] in [-1, 1], as files of their first channel in grey."""

    def __init__(self, labelled: Labelled, pixels: Tensor) -> None:
        super().__init__(labelled.name, labelled.classes, labelled.labels.astype(np.int32), LeftOut(), labelled.name)
        self._pixels = pixels[:, 0].add(1).mul(127.5).round().clamp(0, 255).byte().numpy()

    def read(self, index: int) -> bytes:
        image = self._pixels[index]
        return b"P5 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()  # PGM: as cheap as a file can be

    def name(self, index: int) -> str:
        return str(index)


class SomeImages(Images):
    """Some images of a source, at ascending places."""

    def __init__(self, source: Images, chosen: NDArray[np.intp]) -> None:
        block = np.searchsorted(np.cumsum(source.blocks), chosen, side="right")
        sizes = np.unique(block, return_counts=True)[1]
        super().__init__(
            source.where, source.classes, source.labels[chosen], source.left_out, source.fingerprint, sizes
        )
        self._source, self._chosen = source, chosen

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._chosen[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))


@dataclass(frozen=True)
class Parts:
    """``train`` as files to draw views from; ``heldout``, empty if nothing is held out, and ``test`` as a test sees them."""

    train: Images
    heldout: Labelled
    test: Labelled


def parts(data: str, cfg: RunConfig, heldout: float) -> Parts:
    """The parts of a data set at the image size of ``cfg``; ``heldout`` is a share of the training part, drawn by place.

    The same images are held out whatever the size, the seed and the rest of the evaluation. Raises ConfigError.
    """
    train, test = sets.parts(data, cfg)
    num = len(train)
    order = np.argsort(mix(np.arange(num), 1), kind="stable")
    count = round(heldout * num)
    if heldout and not 0 < count < num:
        raise ConfigError(f"task.heldout={heldout} holds out {count} of {num} training images; give another share.")
    out, kept = np.sort(order[:count]), np.sort(order[count:])
    if isinstance(train.images, FilePixels):
        pixels = train.images
        source: Images = pixels.images
        view: Tensor | FilePixels = FilePixels(source, out, pixels.view, threads=pixels.threads, note=pixels.note)
    else:
        drawn = train.images[0:num]
        source, view = DrawnImages(train, drawn), drawn[out]
    return Parts(SomeImages(source, kept), replace(train, images=view, labels=train.labels[out]), test)
