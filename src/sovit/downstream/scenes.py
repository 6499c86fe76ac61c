"""Embedded scenes to segment: one to four digits, or fractals of ten held-out categories, each in a quarter of a canvas.

Scene i of a part is a pure function of (seed, part, i) and the size. Its mask holds 0 for the ground and 1 + the
category for an object, which is its ink and the gaps in it up to a tenth of its width. Training and test scenes share no
object image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sovit.config import RunConfig
from sovit.data.digits import digits
from sovit.data.fractals import render
from sovit.data.order import mix
from sovit.lit.data import world_of

KINDS = ("digits", "fractals")
CATEGORIES = 10
_GROUND, _NOISE = -0.6, 0.12
_DRAWN = {"digits": 64, "fractals": 20}  # pixels of an object before it is brought to its size
_PER_CATEGORY = 40  # fractals of a part
_PARTS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Scenes:
    """One part: ``objects`` float32 [N, side, side], ink in [0, 1], with ``labels`` [N] below CATEGORIES."""

    part: str
    objects: Tensor
    labels: Tensor
    num: int
    size: int
    channels: int
    seed: int

    def __len__(self) -> int:
        return self.num

    def images(self, rows: Sequence[int]) -> Tensor:
        """float32 [B, channels, size, size] in [-1, 1]."""
        return torch.stack([self._scene(row)[0] for row in rows]).unsqueeze(1).repeat(1, self.channels, 1, 1)

    def masks(self, rows: Sequence[int]) -> Tensor:
        """int64 [B, size, size]."""
        return torch.stack([self._scene(row)[1] for row in rows])

    def mask(self, row: int) -> Tensor:
        """int64 [size, size], at the resolution that is scored."""
        return self._scene(row)[1]

    def _scene(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.Generator(np.random.Philox(int(mix(self.seed, _PARTS[self.part], index))))
        noise = rng.standard_normal((self.size, self.size), np.float32)
        canvas = torch.from_numpy(_GROUND + _NOISE * noise)
        mask = torch.zeros(self.size, self.size, dtype=torch.int64)
        half = self.size // 2
        for quarter in rng.permutation(4)[: rng.integers(1, 5)]:
            chosen = int(rng.integers(len(self.objects)))
            side = round(half * rng.uniform(0.65, 1.0))
            top, left = (half * place + int(rng.integers(half - side + 1)) for place in divmod(int(quarter), 2))
            ink = F.interpolate(self.objects[None, None, chosen], size=(side, side), mode="bilinear", antialias=True)[0]
            window = (slice(top, top + side), slice(left, left + side))
            contrast = float(rng.uniform(0.7, 1.0))
            canvas[window] += contrast * ink[0] * (0.9 - canvas[window])
            mask[window][_filled(ink)] = 1 + self.labels[chosen]
        return canvas.clamp(-1, 1), mask


def scenes(kind: str, part: str, cfg: RunConfig, *, num: int, size: int, seed: int = 0) -> Scenes:
    """``num`` scenes of ``digits`` or ``fractals`` in a part, ``train`` or ``test``."""
    if kind == "digits":
        support, support_labels, test, test_labels = digits(_DRAWN[kind])
        images, labels = (support, support_labels) if part == "train" else (test, test_labels)
        objects = (images[:, 0] + 1) / 2
    else:
        world = replace(world_of(cfg), size=_DRAWN[kind], noise=0.0)
        places = np.arange(world.num_heldout * _PER_CATEGORY) + _PARTS[part] * world.num_heldout * _PER_CATEGORY
        drawn, categories = render(world, places[places % world.num_heldout < CATEGORIES], "heldout")
        objects = (torch.from_numpy(drawn).float() - 48).clamp(min=0) / 207  # 48 is an empty pixel without noise
        objects, labels = objects / objects.amax((1, 2), keepdim=True), torch.from_numpy(categories)
    return Scenes(part, objects, labels, num, size, cfg.model.channels, seed)


def _filled(ink: Tensor) -> Tensor:
    """Where an object [1, side, side] lies: its ink, spread by a twentieth of its width to every side."""
    reach = max(1, round(ink.shape[-1] / 20))
    return F.max_pool2d(ink[None], 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0.25
