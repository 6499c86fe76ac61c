"""The order of images in files: epoch after epoch, each a permutation that is computed and never stored.

Position i of the stream lies in epoch ``i // N``, at place ``p = i % N``. The order of an epoch is a bijection of the N
images, keyed by the seed and the epoch: a Feistel network over the least even number of bits that hold N, walked along
its cycle until it falls below N (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). It takes no
memory, so a worker can stand anywhere in an epoch of a billion images at once.

Images that are stored together (a shard) stay near each other: the shards are permuted, cut into groups of ``group``,
and the images of each group are permuted. One group of all shards, or one shard, is a permutation of all images.

Does not read images, and does not know their labels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6  # four make a pseudo-random permutation of long words (Luby & Rackoff 1988); the halves here can be short
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of whole numbers (arrays broadcast): splitmix64 (Steele, Lea & Flood 2014) folded over the parts."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            z = state + np.asarray(part).astype(np.uint64) + _GAMMA
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return np.asarray(state, np.uint64)


def permute(places: ArrayLike, size: int, *key: int) -> NDArray[np.int64]:
    """Where a permutation of 0 .. size - 1, chosen by the key, sends the places. Raises ValueError for one outside."""
    found = np.atleast_1d(np.asarray(places, np.int64))
    if ((found < 0) | (found >= size)).any():
        raise ValueError(f"Places from {found.min()} to {found.max()} are not in 0 .. {size - 1}.")
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    keys = [int(mix(*key, k)) for k in range(ROUNDS)]
    values = found.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> bits, values[outside] & mask
        for k in keys:
            left, right = right, left ^ (mix(np.uint64(k), right) & mask)
        values[outside] = left << bits | right
        outside = values >= size
    return values.astype(np.int64)


class Order:
    """The order in which a stream sees the images of blocks of the given sizes (shards; all else is one block).

    Raises ValueError if there is no image at all, or a group of no blocks.
    """

    def __init__(self, blocks: ArrayLike, seed: int, group: int = 1) -> None:
        self.blocks = np.asarray(blocks, np.int64)
        self.size, self.seed, self.group = int(self.blocks.sum()), seed, group
        if self.size < 1 or group < 1:
            raise ValueError(f"{self.size} images in groups of {group} blocks have no order.")
        self.starts = np.concatenate([[0], np.cumsum(self.blocks)])

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The image at each position of the stream, counted from its start over all epochs."""
        epochs, places = np.divmod(np.atleast_1d(np.asarray(positions, np.int64)), self.size)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = self._of_epoch(int(epoch), places[inside])
        return found

    def _of_epoch(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(self.blocks) == 1:
            return permute(places, self.size, self.seed, epoch)
        shards, ends = _shards_of_epoch(self, epoch)
        found = np.empty_like(places)
        group_of = np.searchsorted(ends[self.group - 1 :: self.group], places, side="right")
        for group in np.unique(group_of):
            inside = group_of == group
            members = slice(group * self.group, (group + 1) * self.group)
            first = int(ends[group * self.group - 1]) if group else 0
            inner_ends = ends[members] - first
            within = permute(places[inside] - first, int(inner_ends[-1]), self.seed, epoch, 1 + int(group))
            member = np.searchsorted(inner_ends, within, side="right")
            before = np.concatenate([[0], inner_ends])[member]
            found[inside] = self.starts[shards[members][member]] + within - before
        return found


@lru_cache(maxsize=4)
def _shards_of_epoch(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The shards in the order of an epoch, and where each of them ends."""
    shards = permute(np.arange(len(order.blocks)), len(order.blocks), order.seed, epoch, 0)
    return shards, np.cumsum(order.blocks[shards])
