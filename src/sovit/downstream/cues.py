"""Images of two cues drawn by the suite: eight silhouettes, eight textures, and any silhouette filled with any texture.

A silhouette without a texture is plain grey; a texture without a silhouette fills an outline that is drawn anew for each
image. So all images are one figure on a dark ground, and which cues it has is not to be seen from the rest.

Category k is the k-th silhouette and the k-th texture. An image is a pure function of (seed, part, index) and the size;
place, scale, turn, period and brightness do not depend on the size, so trial i is the same trial for models of different
image sizes. Grey, any size from 16 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sovit.data.order import mix

SMALLEST = 16
TRAIN, KNOWN, CONFLICT = 0, 1, 2  # parts: to fit a classifier on, to see what it knows, and the trials
_OVER, _FINE = 4, 64  # samples to a side of a pixel, of a silhouette; half as many in images larger than this
_Grid = NDArray[np.float64]


def _star(x: _Grid, y: _Grid) -> NDArray[np.bool_]:
    fold = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fold) % (2 * fold) - fold)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    inner = 0.5
    return (inner * math.cos(fold) - 1) * across - inner * math.sin(fold) * (along - 1) >= 0


def _blob(x: _Grid, y: _Grid, waves: _Grid, phases: _Grid) -> NDArray[np.bool_]:
    """A disc whose rim is bent by waves, two to four to the circle."""
    angle = np.arctan2(y, x)
    bent = [wave * np.cos(k * angle + phase) for k, wave, phase in zip((2, 3, 4), waves, phases, strict=True)]
    return np.hypot(x, y) < 0.75 + np.sum(bent, 0)


_SHAPES: dict[str, Callable[[_Grid, _Grid], NDArray[np.bool_]]] = {  # of x to the right and y downwards, in -1 .. 1
    "disc": lambda x, y: np.hypot(x, y) < 0.8,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.72,
    "triangle": lambda x, y: (y < 0.65) & (np.abs(x) < 0.58 * (y + 1)),
    "star": _star,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.95),
    "ring": lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x, y) > 0.5),
    "bar": lambda x, y: (np.abs(x) < 0.98) & (np.abs(y) < 0.4),
    "hourglass": lambda x, y: (np.abs(y) < 0.9) & (np.abs(x) < np.abs(y) + 0.08),
}


def _sharp(wave: _Grid) -> _Grid:
    return np.tanh(3 * wave)


def _clouds(x: _Grid, y: _Grid, rng: np.random.Generator) -> _Grid:
    """Noise whose power falls with the square of the frequency."""
    fy, fx = np.fft.fftfreq(len(x))[:, None], np.fft.rfftfreq(len(x))[None]
    frequency = np.maximum(np.hypot(fy, fx), 1 / len(x))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(x.shape)) / frequency, s=x.shape)
    return np.clip((noise - noise.mean()) / (2 * noise.std()), -1, 1)


def _carpet(x: _Grid, y: _Grid, rng: np.random.Generator) -> _Grid:
    """Sierpinski's triangle, tile by tile: binomial coefficients modulo 2."""
    i, j = (np.floor(8 * values).astype(np.int64) % 8 for values in (x / 2, y / 2))
    return np.where(i & j, -1.0, 1.0)


_TEXTURES: dict[str, Callable[[_Grid, _Grid, np.random.Generator], _Grid]] = {  # of x and y in periods, in -1 .. 1
    "vertical": lambda x, y, rng: _sharp(np.sin(2 * np.pi * x)),
    "horizontal": lambda x, y, rng: _sharp(np.sin(2 * np.pi * y)),
    "diagonal": lambda x, y, rng: _sharp(np.sin(2 * np.pi * (x + y) / math.sqrt(2))),
    "checks": lambda x, y, rng: _sharp(2 * np.sin(np.pi * x) * np.sin(np.pi * y)),
    "dots": lambda x, y, rng: _sharp(2 - 6 * np.hypot((x + 0.5) % 1 - 0.5, (y + 0.5) % 1 - 0.5)),
    "grain": lambda x, y, rng: rng.uniform(-1, 1, x.shape),
    "clouds": _clouds,
    "carpet": _carpet,
}
SHAPES, TEXTURES = tuple(_SHAPES), tuple(_TEXTURES)
NUM = len(SHAPES)


@dataclass(frozen=True)
class Trial:
    """A conflict: the silhouette of one category with the texture of another."""

    index: int
    shape: int
    texture: int

    @property
    def name(self) -> str:
        return f"{self.index:04d}-{SHAPES[self.shape]}-{TEXTURES[self.texture]}.png"


def trials(per_pair: int) -> list[Trial]:
    """``per_pair`` images of every silhouette with every texture of another category, one round after the other."""
    pairs = [(shape, texture) for shape in range(NUM) for texture in range(NUM) if shape != texture]
    return [Trial(k, *pairs[k % len(pairs)]) for k in range(per_pair * len(pairs))]


def draw(shape: int | None, texture: int | None, size: int, *, seed: int, part: int, index: int) -> NDArray[np.uint8]:
    """An image [size, size]: a silhouette (None: an outline of its own) and its texture (None: plain grey)."""
    rng = np.random.Generator(np.random.Philox(int(mix(seed, part, index))))
    scale, turn, right, down = rng.uniform([0.75, -0.2, -1, -1], [0.95, 0.2, 1, 1])
    period, lean, phase_x, phase_y = rng.uniform([0.9, -0.1, 0, 0], [1.15, 0.1, 1, 1])
    ground, level, depth, noise = rng.uniform([-0.9, 0.1, 0.4, 0.02], [-0.5, 0.4, 0.5, 0.06])
    waves, phases = rng.uniform(-0.2, 0.2, 3), rng.uniform(0, 2 * np.pi, 3)
    over = _OVER if size <= _FINE else _OVER // 2
    fine = (np.arange(size * over) + 0.5) * 2 / (size * over) - 1
    x, y = np.meshgrid(fine - (1 - scale) * right, fine - (1 - scale) * down)
    x, y = _turned(x / scale, y / scale, turn)
    inside = _blob(x, y, waves, phases) if shape is None else _SHAPES[SHAPES[shape]](x, y)
    covered = inside.reshape(size, over, size, over).mean((1, 3))
    fill: NDArray[np.float64] | float = level
    if texture is not None:
        place = (np.arange(size) + 0.5) / (max(4.0, size / 12) * period)
        x, y = np.meshgrid(place, place)
        x, y = _turned(x, y, lean)
        fill = level + depth * _TEXTURES[TEXTURES[texture]](x + phase_x, y + phase_y, rng)
    image = covered * fill + (1 - covered) * ground + noise * rng.standard_normal((size, size))
    return ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


@dataclass(frozen=True)
class Drawings:
    """Images drawn when a slice of them is asked for, float32 [N, channels, size, size] in [-1, 1].

    ``wanted``: the silhouette and the texture of each, or None.
    """

    wanted: Sequence[tuple[int | None, int | None]]
    size: int
    channels: int
    seed: int
    part: int

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, rows: slice, /) -> Tensor:
        places = range(len(self))[rows]
        drawn = [draw(*self.wanted[k], self.size, seed=self.seed, part=self.part, index=k) for k in places]
        images = torch.from_numpy(np.stack(drawn)).float().div_(127.5).sub_(1)
        return images.unsqueeze(1).repeat(1, self.channels, 1, 1)


def _turned(x: _Grid, y: _Grid, angle: float) -> tuple[_Grid, _Grid]:
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
