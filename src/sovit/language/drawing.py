"""Facts to pixels: the embedded scenes as they are drawn, so that every word of their captions can be seen at 16 pixels.

A picture has four quarters. A large thing is as wide as its quarter, a small one 0.62 of it, at a random place inside.
Brightness is the peak of the ink: the ground is -0.62 (as in the images the encoder is trained on), a dim thing rises to 0
and a bright one to 0.93. The noise of a pixel has a standard deviation of 0.06 and is at most 0.3.

Fractals are instances of held-out categories, hardly turned and not moved; digits are scikit-learn's. Parts share no object
image: their fractals are other instances, their digits the support and the test images of `sovit.data.digits`. The
choices are exact on any machine, the pixels up to the rounding of a resize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sovit.data.digits import digits
from sovit.data.fractals import FractalWorld, render
from sovit.data.order import mix
from sovit.language.facts import DIGIT, DIGITS, NAMES, PARTS, Dice, Facts

GROUND, RANGE, NOISE = -0.62, 1.55, 0.06
SIDE = {"small": 0.62, "large": 1.0}  # of a quarter
PEAK = {"dim": 0.4, "bright": 1.0}  # of RANGE
DRAWN = 24  # pixels of a fractal before it is brought to its size
PER_CATEGORY = 200  # fractals of a part
POOL = 64  # held-out categories among which the named ones are chosen
_PLACING, _GRAIN = 11, 12  # streams of choices

Key = tuple[int, str, int]  # seed, part, row


def draw(world: FractalWorld, part: str, size: int, shown: Sequence[Facts], keys: Sequence[Key]) -> Tensor:
    """Pictures float32 [B, size, size] in [-1, 1] of the facts; the key of each chooses instances, places and noise."""
    half = size // 2
    groups: dict[tuple[str, str], list[tuple[int, int, int, int, float]]] = {}  # by kind and size: one resize each
    for b, (facts, key) in enumerate(zip(shown, keys, strict=True)):
        dice = Dice(*_numbers(key), _PLACING)
        for thing in facts.things:
            chosen = dice.pick(_instances(world, part, thing.kind)[thing.name])
            free = half - round(half * SIDE[thing.size]) + 1
            top, left = half * thing.row + dice.below(free), half * thing.column + dice.below(free)
            groups.setdefault((thing.kind, thing.size), []).append((b, chosen, top, left, PEAK[thing.brightness]))
    canvas = torch.zeros(len(shown), size, size)
    for (kind, size_word), entries in groups.items():
        side = round(half * SIDE[size_word])
        objects = _objects(world, part, kind)[0][[chosen for _, chosen, *_ in entries]]
        ink = F.interpolate(objects.unsqueeze(1), size=(side, side), mode="bilinear", antialias=True)[:, 0]
        ink = ink / ink.amax((1, 2), keepdim=True)
        for (b, _, top, left, peak), one in zip(entries, ink, strict=True):
            canvas[b, top : top + side, left : left + side] = peak * one
    return (GROUND + RANGE * canvas + NOISE * _grain(keys, size)).clamp(-1, 1)


@lru_cache(maxsize=8)
def categories(world: FractalWorld) -> tuple[int, ...]:
    """The held-out categories that are named: those that look least alike, each the farthest from all before it.

    Distances are of mean images and whole numbers, so that the choice is the same on any machine.
    """
    drawn, _ = render(_still(world), np.arange(16 * POOL), "heldout")
    small = drawn.astype(np.int64).reshape(16, POOL, 8, DRAWN // 8, 8, DRAWN // 8).sum((0, 3, 5)).reshape(POOL, -1)
    distances = ((small[:, None] - small[None]) ** 2).sum(-1)
    chosen = [0]
    while len(chosen) < len(NAMES):
        chosen.append(int(distances[chosen].min(0).argmax()))
    return tuple(sorted(chosen))


@lru_cache(maxsize=8)
def _objects(world: FractalWorld, part: str, kind: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Object images of a part, ink float32 [N, side, side] >= 0, and the place of their name in NAMES or DIGITS."""
    if kind == DIGIT:
        support, support_labels, test, test_labels = digits(8)  # their own resolution
        images, labels = (support, support_labels) if part == "train" else (test, test_labels)
        return (images[:, 0] + 1) / 2, labels.numpy()
    instances = np.arange(PER_CATEGORY) + PARTS[part] * PER_CATEGORY
    drawn, _ = render(_still(world), (instances[:, None] * POOL + np.array(categories(world))).ravel(), "heldout")
    ink = (torch.from_numpy(drawn).float() - 48).clamp(min=0) / 160  # 48 is an empty pixel
    return ink, np.tile(np.arange(len(NAMES)), PER_CATEGORY)


@lru_cache(maxsize=8)
def _instances(world: FractalWorld, part: str, kind: str) -> dict[str, list[int]]:
    """Which object images are called what."""
    labels = _objects(world, part, kind)[1]
    return {name: np.flatnonzero(labels == k).tolist() for k, name in enumerate(DIGITS if kind == DIGIT else NAMES)}


def _still(world: FractalWorld) -> FractalWorld:
    """The world without noise and hardly any motion: in a scene the facts say how large, how bright and where."""
    return replace(
        world,
        size=DRAWN,
        num_heldout=POOL,
        rotation=0.3,
        shift=0.0,
        log_scale_low=0.0,
        log_scale_high=0.0,
        log_aspect=0.1,
        contrast=0.0,
        noise=0.0,
    )


def _grain(keys: Sequence[Key], size: int) -> Tensor:
    """Noise [B, size, size] of mean 0 and variance 1: the sum of the 8 bytes of a hash, as in `sovit.data.fractals`."""
    roots = mix(*np.array([_numbers(key) for key in keys], np.int64).reshape(-1, 3).T, _GRAIN)
    bits = mix(roots[:, None], np.arange(size * size))
    total = np.zeros(bits.shape, np.int64)
    for byte in range(8):  # by shifts: a view as bytes would depend on the order of the machine's
        total += (bits >> np.uint64(8 * byte) & np.uint64(255)).astype(np.int64)
    return torch.from_numpy(((total - 1020) / 209.02152999092864).astype(np.float32)).reshape(-1, size, size)


def _numbers(key: Key) -> tuple[int, int, int]:
    return key[0], PARTS[key[1]], key[2]
