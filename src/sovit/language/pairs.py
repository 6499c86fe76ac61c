"""Images with captions as a training stream.

Pair i of the stream is a pure function of (source, seed, i): its place in the order (`sovit.data.order`) and which of its
image's captions it shows. So batch k is the same with any number of workers and of processes, wherever a run resumes.
An epoch shows every image once, with one of its captions.

Images come in the view of an evaluation, without augmentation, as in LiT (arXiv 2111.07991; SoViT's table 7): the
encoder is locked, so that a crop could only part the image from what its caption says. A pair whose image cannot be read
is replaced by the next that can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sovit.data.images import ImageStream, Unreadable
from sovit.data.order import Order, mix
from sovit.data.sources import Images
from sovit.data.views import TestView, to_float
from sovit.language.examples import TextImages
from sovit.language.files import FileTexts
from sovit.language.vocabulary import Vocabulary

_CAPTION = 3  # stream of random numbers, beside those of sovit.data.images


class Pairs(NamedTuple):
    """What a worker makes of its part of a batch; `finish_pairs` makes images and tokens of it, on their device."""

    images: Tensor  # uint8 of files, or float32 of embedded scenes, [B, channels, size, size]
    tokens: Tensor  # int64 [B, length]
    rows: Tensor  # int64 [B]: which images of the source
    choices: Tensor  # int64 [B]: which of their captions
    cut: int  # captions that were longer than length
    bad: list[tuple[str, str]]  # (name, reason) of the images another pair stands in for
    failure: str = ""  # why there is no batch: an exception would come out of a worker as a traceback in its message


class PairStream(Dataset[Pairs]):
    """The endless stream of pairs of a source. ``group``: shards whose pairs are mixed with each other.

    Raises ValueError if no image of the source has a caption.
    """

    def __init__(self, source: TextImages, vocabulary: Vocabulary, length: int, seed: int, *, group: int = 1) -> None:
        self.source, self.vocabulary, self.length, self.seed = source, vocabulary, length, seed
        if not isinstance(source, FileTexts):
            self.order = Order([len(source)], seed, group)
            return
        rows = source.captioned()
        if not len(rows):
            raise ValueError(f"{source.where} has questions but no captions; a text tower needs captions to train on.")
        view = _Central(source.view.size, source.view.channels)
        self.stream = ImageStream(_Captioned(source.pictures, rows), view, seed, group=group)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Pairs:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Pairs:
        """The pairs at these positions of the stream, in one call: what the DataLoader asks for a batch."""
        positions = np.asarray(indices, np.int64)
        bad: list[tuple[str, str]] = []
        failure, texts = "", [""] * len(positions)
        choices = np.zeros(len(positions), np.int64)
        if isinstance(self.source, FileTexts):
            batch = self.stream.__getitems__(indices)
            images, rows, bad, failure = batch.images, batch.labels, batch.bad, batch.failure
        else:
            rows = torch.from_numpy(self.order(positions))
            images = self.source.images(rows.tolist())
        drawn = mix(self.seed, _CAPTION, positions)
        try:
            for k, row in enumerate(() if failure else rows.tolist()):
                captions = self.source.captions(row)
                choices[k] = int(drawn[k]) % len(captions)
                texts[k] = captions[choices[k]]
        except OSError as error:
            failure = f"A caption cannot be read ({error.strerror or error}); see whether the shards are still there."
        tokens, cut = self.vocabulary.batch(texts, self.length)
        return Pairs(images, tokens, rows, torch.from_numpy(choices), cut, bad, failure)


def finish_pairs(batch: Pairs) -> tuple[Tensor, Tensor]:
    """(images float32 [B, channels, size, size] in [-1, 1], tokens int64 [B, length]) on the batch's device.

    Raises Unreadable for a batch that could not be read.
    """
    if batch.failure:
        raise Unreadable(batch.failure)
    return to_float(batch.images) if batch.images.dtype == torch.uint8 else batch.images, batch.tokens


class _Captioned(Images):
    """The images with captions, labelled with their rows."""

    def __init__(self, pictures: Images, rows: NDArray[np.int64]) -> None:
        block_of = np.searchsorted(np.cumsum(pictures.blocks), rows, side="right")
        blocks = np.bincount(block_of, minlength=len(pictures.blocks))
        super().__init__(
            pictures.where, (), rows.astype(np.int32), pictures.left_out, pictures.fingerprint, blocks.tolist()
        )
        self.pictures = pictures

    def read(self, index: int) -> bytes:
        return self.pictures.read(int(self.labels[index]))

    def name(self, index: int) -> str:
        return self.pictures.name(int(self.labels[index]))


@dataclass(frozen=True)
class _Central:
    """The view of an evaluation in the place of a training view: it draws nothing from the seed."""

    size: int
    channels: int

    def __call__(self, data: bytes, seed: int) -> Tensor:
        return TestView(self.size, self.channels)(data)
