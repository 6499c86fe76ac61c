"""Embedded pretraining images: small grey fractals, each a pure function of (seed, split, index).

A category is an iterated function system (IFS) of 2 to 4 contractive affine maps, drawn by their singular values
(Anderson & Farrell, "Improving Fractal Pre-training", arXiv 2110.03091: the sum of s1 + 2 s2 over the n maps is
uniform between (5 + n) / 2 and (6 + n) / 2). Each category has 8 variants of jittered parameters with 1024 points of
the chaos game each. An image takes 512 of these points, moves them by a random affine map, counts them per pixel and
draws the square root of the density with random contrast and noise.

The bits of an image do not depend on machine, library version, worker layout or batch. Hence random numbers are
integer hashes of counters (splitmix64; Steele, Lea & Flood 2014), and the arithmetic is + - * / and sqrt in float64,
which IEEE 754 rounds in one way only; sine, cosine and exp are polynomials written out here, because those of libm
and numpy differ between processors. Never set fastmath: it would allow fused multiply-adds and reordered sums.

Pixels: byte = floor(48.5 + 160 (c sqrt(count / largest count) + noise z)), clipped to 0..255, where c is the contrast
and z has mean 0 and variance 1 (the sum of 8 uniform bytes, so |z| <= 4.88). An empty pixel without noise is 48.

``python -m sovit.data.fractals OUT.png`` draws a sheet of examples.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Literal

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

Split = Literal["train", "heldout"]

NUM_VARIANTS = 8
NUM_POINTS = 1024  # of the chaos game, per variant
POINTS_PER_IMAGE = 512
BURN_IN = 20  # points of the chaos game thrown away while it falls onto the attractor
MAX_SINGULAR = 0.95  # below 1, so that every map contracts
MIN_WEIGHT = 0.02  # least weight of a map in the chaos game, whose weights are the areas |det A|
FILL = 0.85  # half-size of the 3rd to 97th percentile box of a category, in units of the image's half-size

# Key spaces: the two splits draw categories and instances from four separate streams of the hash, so the held-out
# categories are the same whatever the counts.
CATEGORY_SPACE = {"train": 1, "heldout": 2}
INSTANCE_SPACE = {"train": 3, "heldout": 4}

_jit = numba.njit(cache=False, fastmath=False, nogil=True, error_model="numpy")


@dataclass(frozen=True)
class FractalWorld:
    """Everything the images depend on.

    An instance draws its own strength u ~ U(0, 1) and is then rotated by up to +-``rotation`` u radians, shifted by up
    to +-``shift`` u (units: half the image), scaled by exp(U(``log_scale_low``, ``log_scale_high``) u) and stretched to
    an aspect ratio of exp(+-``log_aspect`` u). Its contrast is uniform in 1 +- ``contrast``; the noise of a pixel has
    standard deviation ``noise``, in units of the brightest pixel at contrast 1. ``variant_jitter`` is how far the
    variants of a category scatter: radians for angles, relative for singular values, absolute for translations.

    Raises ValueError if a count, the size or a range makes no sense.
    """

    seed: int = 0
    num_classes: int = 256
    num_heldout: int = 64
    size: int = 16
    rotation: float = 1.57
    shift: float = 0.3
    log_scale_low: float = -0.5
    log_scale_high: float = 0.15
    log_aspect: float = 0.3
    contrast: float = 0.3
    noise: float = 0.1
    variant_jitter: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not in 0 .. 2^63 - 1; choose a non-negative seed.")
        for name in ("num_classes", "num_heldout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; a world needs at least one category.")
        if not 4 <= self.size <= 256:
            raise ValueError(f"size={self.size} is not in 4 .. 256; choose the image size in pixels.")
        if not -4 <= self.log_scale_low <= self.log_scale_high <= 4:
            raise ValueError(
                f"log_scale_low={self.log_scale_low}, log_scale_high={self.log_scale_high} is not a range within "
                "-4 .. 4; give the lower end first."
            )
        limits = {"rotation": 4, "shift": 4, "log_aspect": 4, "contrast": 1, "noise": 4, "variant_jitter": 1}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not in 0 .. {limit}; choose a value there, 0 turns it off."
                )


def render(
    world: FractalWorld, indices: ArrayLike, split: Split = "train"
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (uint8 [N, size, size]) and labels (int64 [N]) of the given non-negative indices.

    Training labels are uniform draws. Held-out labels count through the categories, index % num_heldout, so that any
    num_heldout consecutive indices hold each category once; index // num_heldout numbers the images of a category.

    Raises ValueError for a negative index.
    """
    index = np.ascontiguousarray(indices, dtype=np.int64)
    if index.size and index.min() < 0:
        raise ValueError(f"index {index.min()} is negative; the stream starts at index 0.")
    images = np.empty((index.size, world.size, world.size), np.uint8)
    labels = np.empty(index.size, np.int64)
    points = _points(world, split)
    ranges = np.array(
        [
            (0, len(points)),  # label
            (0, NUM_VARIANTS),
            (0, NUM_POINTS - POINTS_PER_IMAGE + 1),  # first point
            (0, 1),  # strength
            (-world.rotation, world.rotation),
            (-world.shift, world.shift),  # to the right
            (-world.shift, world.shift),  # downwards
            (world.log_scale_low, world.log_scale_high),
            (-world.log_aspect, world.log_aspect),
            (1 - world.contrast, 1 + world.contrast),
        ],
        np.float64,
    )
    scratch = np.empty((world.size + 2) ** 2, np.int32), np.empty(POINTS_PER_IMAGE, np.int32), np.empty(len(ranges))
    root = np.uint64(_draw(np.uint64(world.seed), INSTANCE_SPACE[split]))
    _render(index, split == "heldout", root, points, ranges, float(world.noise), *scratch, images, labels)
    return images, labels


def fingerprint(world: FractalWorld) -> str:
    """12 hexadecimal digits that change with the parameters and with any change to what is rendered."""
    digest = hashlib.sha256(repr(astuple(world)).encode())
    for split in ("train", "heldout"):
        for array in render(world, np.arange(64), split):
            digest.update(array.tobytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=8)
def _points(world: FractalWorld, split: Split) -> NDArray[np.float32]:
    """Chaos game of every category, float32 [categories, variants, 2 (x, y), points].

    Normalised per variant: the middle of the 3rd to 97th percentile box is 0 and its longer half-side is 1.
    """
    count = world.num_classes if split == "train" else world.num_heldout
    points = np.empty((count, NUM_VARIANTS, 2, NUM_POINTS))
    root = np.uint64(_draw(np.uint64(world.seed), CATEGORY_SPACE[split]))
    _chaos_game(root, float(world.variant_jitter), np.empty((4, 8)), np.empty((4, 7)), points)
    ordered = np.sort(points, axis=-1)  # order statistics, not np.percentile: no rounding of an interpolation
    low, high = (ordered[..., int(share * NUM_POINTS), None] for share in (0.03, 0.97))
    half = ((high - low) / 2).max(axis=2, keepdims=True)
    return ((points - (low + high) / 2) / half).astype(np.float32)


# ---------------------------------------------------------------------------------------- exact scalar arithmetic


@_jit
def _draw(key, counter):
    """Draw number ``counter`` of the stream ``key``: 64 random bits, also used as the key of a stream of its own."""
    x = key + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_jit
def _uniform(key, counter, low, high):
    """Draw number ``counter`` of the stream ``key``, uniform in [low, high): the upper 53 bits."""
    return low + (high - low) * (np.float64(_draw(key, counter) >> np.uint64(11)) * 2.0**-53)


@_jit
def _sincos(x):
    """Sine and cosine of |x| < 1000 radians to 1e-13: quarter turns taken off, then Taylor on [-pi/4, pi/4]."""
    quarter = np.int64(np.floor(x * 0.6366197723675814 + 0.5))
    r = x - quarter * 1.5707963267341256 - quarter * 6.077100506506192e-11  # pi/2 in two parts (Cody & Waite)
    q = r * r
    s = -1.0 / 1307674368000.0
    for k in (6227020800.0, -39916800.0, 362880.0, -5040.0, 120.0, -6.0, 1.0):
        s = s * q + 1.0 / k
    s *= r
    c = 1.0 / 20922789888000.0
    for k in (-87178291200.0, 479001600.0, -3628800.0, 40320.0, -720.0, 24.0, -2.0, 1.0):
        c = c * q + 1.0 / k
    turn = quarter & 3
    if turn == 1:
        return c, -s
    if turn == 2:
        return -s, -c
    if turn == 3:
        return -c, s
    return s, c


@_jit
def _exp(x):
    """exp(x) for |x| <= 8 to a relative 1e-13: Taylor of x / 64, squared six times."""
    r = x / 64.0
    e = 1.0
    for k in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        e = 1.0 + r / k * e
    for _ in range(6):
        e *= e
    return e


# -------------------------------------------------------------------------------------------------------- kernels


@_jit
def _chaos_game(root, jitter, drawn, maps, points):
    """Fill ``points`` [categories, variants, 2, points]; category i depends on the stream (root, i) alone.

    Scratch: ``drawn`` [4, 8] holds a map's two singular values, two angles, two signs and the translation; ``maps``
    [4, 7] the matrix, the translation and the cumulative weight.
    """
    for category in range(points.shape[0]):
        key = _draw(root, category)
        at = 0  # a variable, because numba compiles a called function anew for every literal argument
        n = np.int64(_uniform(key, at, 2.0, 5.0))
        left = _uniform(key, at + 1, 0.5 * (5 + n), 0.5 * (6 + n))  # what is left of the sum of s1 + 2 s2
        for k in range(n):
            room = 3.0 * MAX_SINGULAR * (n - 1 - k)  # the most that the maps to come can take
            at = 8 * k + 2
            s1 = _uniform(key, at, max(0.0, (left - room) / 3.0), min(MAX_SINGULAR, left))
            s2 = _uniform(key, at + 1, max(0.0, (left - s1 - room) / 2.0), min(s1, (left - s1) / 2.0))
            left -= s1 + 2.0 * s2
            drawn[k, 0], drawn[k, 1] = s1, s2
            drawn[k, 2] = _uniform(key, at + 2, 0.0, 6.283185307179586)
            drawn[k, 3] = _uniform(key, at + 3, 0.0, 6.283185307179586)
            drawn[k, 4] = 1.0 if _uniform(key, at + 4, -1.0, 1.0) < 0.0 else -1.0
            drawn[k, 5] = 1.0 if _uniform(key, at + 5, -1.0, 1.0) < 0.0 else -1.0
            drawn[k, 6] = _uniform(key, at + 6, -1.0, 1.0)
            drawn[k, 7] = _uniform(key, at + 7, -1.0, 1.0)

        for variant in range(points.shape[1]):
            own = _draw(key, 1000 + variant)
            total = 0.0
            for k in range(n):
                at = 6 * k
                s1 = min(MAX_SINGULAR, drawn[k, 0] * (1.0 + _uniform(own, at, -jitter, jitter)))
                s2 = min(MAX_SINGULAR, drawn[k, 1] * (1.0 + _uniform(own, at + 1, -jitter, jitter)))
                sin1, cos1 = _sincos(drawn[k, 2] + _uniform(own, at + 2, -jitter, jitter))
                sin2, cos2 = _sincos(drawn[k, 3] + _uniform(own, at + 3, -jitter, jitter))
                s1, s2 = s1 * drawn[k, 4], s2 * drawn[k, 5]
                maps[k, 0] = cos1 * s1 * cos2 - sin1 * s2 * sin2
                maps[k, 1] = -cos1 * s1 * sin2 - sin1 * s2 * cos2
                maps[k, 2] = sin1 * s1 * cos2 + cos1 * s2 * sin2
                maps[k, 3] = -sin1 * s1 * sin2 + cos1 * s2 * cos2
                maps[k, 4] = drawn[k, 6] + _uniform(own, at + 4, -jitter, jitter)
                maps[k, 5] = drawn[k, 7] + _uniform(own, at + 5, -jitter, jitter)
                total += max(MIN_WEIGHT, abs(s1 * s2))
                maps[k, 6] = total
            x = 0.0
            y = 0.0
            for step in range(BURN_IN + points.shape[3]):
                pick = _uniform(own, 1000 + step, 0.0, total)
                k = 0
                while k < n - 1 and pick >= maps[k, 6]:
                    k += 1
                x, y = (
                    maps[k, 0] * x + maps[k, 1] * y + maps[k, 4],
                    maps[k, 2] * x + maps[k, 3] * y + maps[k, 5],
                )
                if step >= BURN_IN:
                    points[category, variant, 0, step - BURN_IN] = x
                    points[category, variant, 1, step - BURN_IN] = y


@_jit
def _render(indices, heldout, root, points, ranges, noise, counts, cells, draws, images, labels):
    """Fill ``images`` [N, size, size] and ``labels`` [N].

    Draw k of an instance is uniform in ``ranges`` [k]; the noise of pixel p is draw 16 + p. Scratch: ``counts``
    [(size + 2)^2] are the pixels with a rim that catches the points outside the image, ``cells`` [POINTS_PER_IMAGE]
    the pixel of each point, ``draws`` one value for each range.
    """
    num_categories = points.shape[0]
    size = images.shape[1]
    stride = size + 2
    half = 0.5 * size
    last = size + 1.0
    for i in range(indices.shape[0]):
        index = indices[i]
        label = index % num_categories
        key = _draw(_draw(root, label), index // num_categories) if heldout else _draw(root, index)
        for k in range(ranges.shape[0]):
            draws[k] = _uniform(key, k, ranges[k, 0], ranges[k, 1])
        if not heldout:
            label = np.int64(draws[0])
        labels[i] = label
        start = np.int64(draws[2])
        x = points[label, np.int64(draws[1]), 0, start : start + POINTS_PER_IMAGE]
        y = points[label, np.int64(draws[1]), 1, start : start + POINTS_PER_IMAGE]

        u = draws[3]
        sine, cosine = _sincos(u * draws[4])
        x0 = 1.0 + half * (1.0 + u * draws[5])  # 1: the rim
        y0 = 1.0 + half * (1.0 + u * draws[6])
        scale_x = half * FILL * _exp(u * (draws[7] + 0.5 * draws[8]))
        scale_y = half * FILL * _exp(u * (draws[7] - 0.5 * draws[8]))
        xx, xy = cosine * scale_x, -sine * scale_y
        yx, yy = sine * scale_x, cosine * scale_y
        for j in range(POINTS_PER_IMAGE):  # apart from the counting, so that the compiler can vectorise it
            column = xx * x[j] + xy * y[j] + x0
            line = yx * x[j] + yy * y[j] + y0
            column = 0.0 if column < 0.0 else (last if column > last else column)
            line = 0.0 if line < 0.0 else (last if line > last else line)
            cells[j] = np.int32(line) * stride + np.int32(column)
        counts[:] = 0
        for j in range(POINTS_PER_IMAGE):
            counts[cells[j]] += 1

        largest = 1
        for row in range(size):
            for column in range(size):
                largest = max(largest, counts[(row + 1) * stride + column + 1])
        gain = 160.0 * draws[9] / np.sqrt(np.float64(largest))
        spread = 160.0 * noise / 209.02152999092864  # standard deviation of the sum of 8 uniform bytes
        for row in range(size):
            for column in range(size):
                bits = _draw(key, 16 + row * size + column)
                mask = np.uint64(0x00FF00FF00FF00FF)
                lanes = (bits & mask) + ((bits >> np.uint64(8)) & mask)  # four sums of two bytes
                total = np.int64((lanes * np.uint64(0x0001000100010001)) >> np.uint64(48))  # the sum of the four
                density = np.sqrt(np.float64(counts[(row + 1) * stride + column + 1]))
                value = 48.5 + gain * density + spread * (total - 1020)
                images[i, row, column] = np.uint8(min(max(value, 0.0), 255.0))


# ---------------------------------------------------------------------------------------------------------- sheet


def write_sheet(path: str, world: FractalWorld, rows_per_split: int = 6, columns: int = 20) -> None:
    """Draw examples, one category a row: first pretraining categories, then held-out ones."""
    from matplotlib.figure import Figure  # the object interface: no pyplot, no global state

    rows = 2 * rows_per_split
    figure = Figure(figsize=(0.45 * columns + 1.4, 0.45 * rows), facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    left = 1.3 / figure.get_figwidth()  # room for the row labels
    figure.subplots_adjust(left=left, right=0.998, top=0.995, bottom=0.005, wspace=0.05, hspace=0.05)
    for row in range(rows):
        split: Split = "train" if row < rows_per_split else "heldout"
        category = row % rows_per_split
        count = world.num_classes if split == "train" else world.num_heldout
        images, labels = render(world, np.arange(4 * columns * count), split)
        for axis, image in zip(axes[row], images[labels == category], strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_axis_off()
        figure.text(0.95 * left, 1 - (row + 0.5) / rows, f"{split} {category}", ha="right", va="center")
    figure.savefig(path, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sovit.data.fractals OUT.png")
    write_sheet(sys.argv[1], FractalWorld())
