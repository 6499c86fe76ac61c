"""The endless training stream as a DataLoader, and the embedded few-shot sets.

Batch k of the stream is the images k B .. (k + 1) B - 1. The position is a function of the training step and of
nothing else, so a resumed run sees the images it would have seen, with any number of workers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sovit.data.digits import digits
from sovit.data.fractals import FractalWorld, render

SUPPORT_PER_CLASS = 50  # pool from which the draws of a few-shot evaluation take their shots
TEST_PER_CLASS = 64


class Slices(Protocol):
    """Images float32 [N, channels, size, size] in [-1, 1] that are made when a slice of them is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class FewShotSet:
    """A labelled support pool and a test set: images float32 [N, channels, size, size] in [-1, 1], labels int64 [N].

    Sets that are larger than memory give their images slice by slice.
    """

    name: str
    train_images: Tensor | Slices
    train_labels: Tensor
    test_images: Tensor | Slices
    test_labels: Tensor
    num_classes: int


def fractal_fewshot(world: FractalWorld, channels: int = 1) -> FewShotSet:
    """The held-out categories: 50 images of each to draw support from and 64 others of each as the test set."""
    pool = world.num_heldout * SUPPORT_PER_CLASS
    train_images, train_labels = render(world, np.arange(pool), "heldout")
    test = np.arange(pool, pool + world.num_heldout * TEST_PER_CLASS)
    test_images, test_labels = render(world, test, "heldout")
    return FewShotSet(
        name="fractals",
        train_images=_to_float(train_images, channels),
        train_labels=torch.from_numpy(train_labels),
        test_images=_to_float(test_images, channels),
        test_labels=torch.from_numpy(test_labels),
        num_classes=world.num_heldout,
    )


def digits_fewshot(size: int, channels: int = 1) -> FewShotSet:
    """Handwritten digits at the given size: 600 images to draw support from and 1197 as the test set."""
    train_images, train_labels, test_images, test_labels = digits(size)
    train_images, test_images = (images.expand(-1, channels, -1, -1) for images in (train_images, test_images))
    return FewShotSet("digits", train_images, train_labels, test_images, test_labels, num_classes=10)


class FractalDataset(Dataset[tuple[Tensor, Tensor]]):
    """Training images of a world, of no length: every index is a new image, the grey repeated over the channels.

    ``stream`` picks one of 2^23 streams of 2^40 images of the same categories, so that two seeds of a run are two draws
    of the data as well. Making a data set compiles the renderer and builds its tables, so that worker processes forked
    afterwards share both. Raises ValueError for a stream out of range.
    """

    def __init__(self, world: FractalWorld, stream: int = 0, channels: int = 1) -> None:
        if not 0 <= stream < 2**23:
            raise ValueError(f"stream={stream} is not in 0 .. 2^23 - 1; choose a smaller seed for the run.")
        self.world, self.first, self.channels = world, stream * 2**40, channels
        render(world, [0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image [channels, size, size] and label []."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [N, channels, size, size] and labels [N], in one call: what the DataLoader asks for a batch."""
        images, labels = render(self.world, np.asarray(indices, np.int64) + self.first)
        return _to_float(images, self.channels), torch.from_numpy(labels)


class StepSampler(Sampler[list[int]]):
    """Batch sampler whose batch k is the indices k B .. (k + 1) B - 1, from ``start_step`` up to ``total_steps``.

    Process ``rank`` of ``world`` gets its even share of each batch, so that the shares in order of rank are the batch.
    Its length is ``total_steps`` wherever it starts: a resumed trainer counts the batches behind it too.
    Raises ValueError unless global_batch_size >= 1, world divides it, and 0 <= start_step <= total_steps.
    """

    def __init__(
        self, global_batch_size: int, start_step: int, total_steps: int, *, rank: int = 0, world: int = 1
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} is below 1; a batch needs an image.")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step={start_step} is not in 0 .. total_steps={total_steps}; start within the run.")
        if not 0 <= rank < world or global_batch_size % world:
            raise ValueError(f"Process {rank} of {world} has no even share of global_batch_size={global_batch_size}.")
        self.share = global_batch_size // world
        self.first = rank * self.share
        self.global_batch_size = global_batch_size
        self.start_step = start_step
        self.total_steps = total_steps

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.total_steps):
            begin = step * self.global_batch_size + self.first
            yield list(range(begin, begin + self.share))


def make_loader(
    dataset: Dataset[Any], sampler: StepSampler, num_workers: int = 0, *, pin_memory: bool = False
) -> DataLoader[Any]:
    """Loader of what the data set makes of each batch of indices; it does not depend on ``num_workers``, at most one a core.

    torch's global generator is left alone: a loader draws a seed for its workers as it starts, wherever a run resumes.

    Workers are forks of this process where there are any. A cell of a sweep comes from a fork server, and would have its
    workers from one of their own: each imports everything anew, and a killed cell leaves them behind, as their parent lives.
    """
    num_workers = min(num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_workers)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )


def _identity(batch: Any) -> Any:
    return batch  # a named function, because a lambda cannot be sent to a spawned worker


def _leave_signals_to_the_parent(worker: int) -> None:
    """Slurm and a terminal signal the whole group; a worker that went first would fail a run that is to be stopped."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _to_float(images: NDArray[np.uint8], channels: int) -> Tensor:
    """uint8 [N, size, size] to float32 [N, channels, size, size] in [-1, 1]."""
    return torch.from_numpy(images).unsqueeze(1).float().div_(127.5).sub_(1).expand(-1, channels, -1, -1)
