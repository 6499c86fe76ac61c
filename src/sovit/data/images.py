"""Images in files as a training stream, and as few-shot sets that may be larger than memory.

Image i of the stream is a pure function of (files, seed, i): its place in the order (`sovit.data.order`), its crop, flip
and RandAugment (`sovit.data.views`) and the partner and share of its mixup are all drawn from the seed and i. So batch k is
the same with any number of workers and of processes, wherever a run resumes.

An image that cannot be read is replaced by the next in the source that can, whoever reads it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import Dataset

from sovit.data.decode import BadImage
from sovit.data.order import Order, mix
from sovit.data.sources import Images
from sovit.data.stream import SUPPORT_PER_CLASS, FewShotSet
from sovit.data.views import TestView, TrainView, decoding, to_float

MOST_BAD = 1000  # unreadable images in a row that end a run: the disk is gone, or the files are no images
IN_MEMORY = 2**31  # bytes of pixels a part of a few-shot set may keep decoded
AS_TENSOR = 2**28  # bytes of floats below which it is a plain tensor
_VIEW, _MIXUP = 1, 2  # streams of random numbers


class Unreadable(ValueError):
    """So many images in a row cannot be read that the run cannot go on; the message is one sentence."""


class Batch(NamedTuple):
    """What a worker makes of its part of a batch; `finish` makes images and labels of it, on their device."""

    images: Tensor  # uint8 [B, channels, size, size]
    labels: Tensor  # int64 [B]
    shares: Tensor  # float32 [B] of mixup, or [0] without
    bad: list[tuple[str, str]]  # (name, reason) of the files another image stands in for
    failure: str = ""  # why there is no batch: an exception would come out of a worker as a traceback in its message


class ImageStream(Dataset[Batch]):
    """The endless stream of training views of a source. Raises ValueError where `Order` does."""

    def __init__(self, images: Images, view: TrainView, seed: int, *, group: int = 1, mixup: float = 0.0) -> None:
        self.images, self.view, self.seed, self.mixup = images, view, seed, mixup
        self.order = Order(images.blocks, seed, group)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The views at these positions of the stream, in one call: what the DataLoader asks for a batch."""
        positions = np.asarray(indices, np.int64)
        chosen = self.order(positions)
        seeds = mix(self.seed, _VIEW, positions) >> np.uint64(1)
        pixels = torch.empty((len(chosen), self.view.channels, self.view.size, self.view.size), dtype=torch.uint8)
        labels = np.empty(len(chosen), np.int64)
        bad: list[tuple[str, str]] = []
        failure = ""
        with decoding():
            try:
                for row, (index, seed) in enumerate(zip(chosen.tolist(), seeds.tolist(), strict=True)):
                    view = functools.partial(self.view, seed=seed)
                    pixels[row], used = _readable(self.images, _from(index, len(self.images)), view, bad)
                    labels[row] = self.images.labels[used]
            except Unreadable as error:
                failure = str(error)
        return Batch(pixels, torch.from_numpy(labels), self._shares(positions), bad, failure)

    def _shares(self, positions: NDArray[np.int64]) -> Tensor:
        if not self.mixup:
            return torch.empty(0)
        keys = mix(self.seed, _MIXUP, positions // 2).tolist()
        drawn = [np.random.Generator(np.random.Philox(key)).beta(self.mixup, self.mixup) for key in keys]
        return torch.tensor([max(share, 1 - share) for share in drawn], dtype=torch.float32)


def finish(batch: Batch, num_classes: int) -> tuple[Tensor, Tensor]:
    """(images float32 [B, channels, size, size] in [-1, 1], labels) on the batch's device; labels int64 [B].

    With mixup (arXiv 1710.09412) the images 2 j and 2 j + 1 of the stream are mixed with each other, each keeping the
    share max(l, 1 - l), l ~ Beta(mixup, mixup), as in big_vision; the labels are float32 [B, num_classes].
    Raises Unreadable for a batch that could not be read.
    """
    if batch.failure:
        raise Unreadable(batch.failure)
    images = to_float(batch.images)
    if not len(batch.shares):
        return images, batch.labels
    share = batch.shares.to(images.device)
    targets = one_hot(batch.labels, num_classes).float()
    return _mixed(images, share), _mixed(targets, share)


def _mixed(values: Tensor, share: Tensor) -> Tensor:
    own = share.reshape(-1, *[1] * (values.ndim - 1))
    partner = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return own * values + (1 - own) * partner


class FilePixels:
    """Some images of a source, decoded when a slice is asked for; kept decoded where they fit into memory.

    An unreadable image is replaced by the next of its class that can be read, and told to ``note`` with the reason.
    ``threads`` decode at once.
    """

    def __init__(
        self,
        images: Images,
        chosen: NDArray[np.intp],
        view: TestView,
        *,
        threads: int = 1,
        note: Callable[[str, str], None] | None = None,
    ) -> None:
        self.images, self.chosen, self.view, self.threads, self.note = images, chosen, view, threads, note
        self.shape = (view.channels, view.size, view.size)
        fits = len(chosen) * math.prod(self.shape) <= IN_MEMORY
        self._kept = torch.empty((len(chosen), *self.shape), dtype=torch.uint8) if fits else None
        self._ready = np.zeros(len(chosen), bool)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: slice) -> Tensor:
        """float32 [stop - start, channels, size, size] in [-1, 1]. Raises Unreadable if no image of a class can be read."""
        asked = np.arange(len(self))[rows]
        missing = asked[~self._ready[asked]]
        fresh = torch.empty((len(missing), *self.shape), dtype=torch.uint8)
        bad: list[tuple[str, str]] = []
        if len(missing):
            with decoding(), ThreadPoolExecutor(self.threads) as pool:
                for k, pixels in enumerate(pool.map(lambda row: self._decoded(row, bad), missing.tolist())):
                    fresh[k] = pixels
        for name, reason in sorted(bad) if self.note else ():
            self.note(name, reason)  # type: ignore[misc]
        if self._kept is None:
            return to_float(fresh)
        self._kept[missing] = fresh
        self._ready[missing] = True
        return to_float(self._kept[asked])

    def _decoded(self, row: int, bad: list[tuple[str, str]]) -> Tensor:
        return _readable(self.images, self._same_class(int(self.chosen[row])), self.view, bad)[0]

    def _same_class(self, index: int) -> Iterator[int]:
        yield index
        same = np.flatnonzero(self.images.labels == self.images.labels[index])
        yield from np.roll(same, -int(np.searchsorted(same, index)))[1:].tolist()


def check_fewshot(train: Images, test: Images, shots: Sequence[int]) -> NDArray[np.int64]:
    """How many images of each class there are to draw support from; decodes none.

    Raises ValueError if the classes of the two parts differ, or a class has fewer images than the most shots.
    """
    if train.classes != test.classes:
        example = sorted(set(train.classes) ^ set(test.classes))[:1]
        raise ValueError(
            f"{train.where} and {test.where} hold different classes{f', such as {example[0]!r}' if example else ''}; a "
            "few-shot test needs the same in both."
        )
    of_class = np.bincount(train.labels, minlength=len(train.classes))
    least = int(of_class.argmin())
    if of_class[least] < max(shots):
        raise ValueError(
            f"eval.shots asks for {max(shots)} images of each class, but {train.where} has {of_class[least]} of "
            f"{train.classes[least]!r}; write eval.shots=[{','.join(str(s) for s in shots if s <= of_class[least])}]."
        )
    return of_class


def fewshot_set(
    name: str,
    train: Images,
    test: Images,
    view: TestView,
    *,
    shots: Sequence[int],
    threads: int = 1,
    note: Callable[[str, str], None] | None = None,
) -> FewShotSet:
    """All images of ``test``, and of ``train`` a pool of at most 50 a class (or twice the shots) to draw support from.

    Raises ValueError where `check_fewshot` does, and Unreadable.
    """
    of_class = check_fewshot(train, test, shots)
    pool = max(SUPPORT_PER_CLASS, 2 * max(shots))
    order = np.argsort(mix(np.arange(len(train))), kind="stable")  # which images, if there are more than the pool takes
    order = order[np.argsort(train.labels[order], kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(of_class) - of_class, of_class)
    chosen = np.sort(order[place < pool])
    support = FilePixels(train, chosen, view, threads=threads, note=note)
    tested = FilePixels(test, np.arange(len(test)), view, threads=threads, note=note)
    return FewShotSet(
        name=name,
        train_images=_small(support),
        train_labels=torch.from_numpy(train.labels[chosen].astype(np.int64)),
        test_images=_small(tested),
        test_labels=torch.from_numpy(test.labels.astype(np.int64)),
        num_classes=len(train.classes),
    )


def _small(pixels: FilePixels) -> Tensor | FilePixels:
    return pixels[0 : len(pixels)] if 4 * len(pixels) * math.prod(pixels.shape) <= AS_TENSOR else pixels


def _from(index: int, size: int) -> Iterator[int]:
    """The place itself and those that stand in for it, in order."""
    return ((index + k) % size for k in range(size))


def _readable(
    images: Images, places: Iterable[int], view: Callable[[bytes], Tensor], bad: list[tuple[str, str]]
) -> tuple[Tensor, int]:
    """The view of the first of the places that can be read, and which it is; the others are added to ``bad``."""
    tried = 0
    for tried, place in enumerate(itertools.islice(places, MOST_BAD), 1):  # noqa: B007
        try:
            return view(images.read(place)), place
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        bad.append((images.full_name(place), reason))
    raise Unreadable(
        f"None of {tried:,} images in a row of {images.where} can be read, the last one {bad[-1][0]} ({bad[-1][1]}); see "
        "whether the folder is still there."
    )
