"""95 % intervals of what is scored on images: the luck of the images, not of the training.

Images count as drawn, each with all of its captions or questions, since those of one image are right or wrong together.
A share has Wilson's interval, every other score the percentiles of drawing images anew, which is of no width where all
examples score alike. Document frequencies of CIDEr stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sovit.language.metrics.scores import Floats, Scores

NUM_DRAWS = 1000
_ENDS = (0.025, 0.975)
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval; ``num``: of how many examples."""

    value: float
    lo: float
    hi: float
    num: int


def bootstrap(scores: Scores, images: Sequence[Hashable] | None = None, *, seed: int = 0) -> Interval:
    """Of a corpus by drawing its images anew (Efron, 1979); ``images`` names that of each example, None: one each."""
    parts = _of_images(scores.parts, images)
    rng = np.random.default_rng(seed)
    size = len(parts)
    times = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(NUM_DRAWS))
    lo, hi = np.quantile([scores.corpus(drawn @ parts) for drawn in times], _ENDS).tolist()
    return Interval(scores.value, lo, hi, len(scores.parts))


def share(right: ArrayLike, images: Sequence[Hashable] | None = None) -> Interval:
    """Of 0s and 1s, such as exact matches: Wilson's of as many independent examples as these are worth.

    That number is p (1 - p) over the variance of p between images (Kish, 1965), at least what it would be if all examples
    of an image were alike, which is taken where p is 0 or 1. Raises ValueError for nothing, or for what is neither 0 nor 1.
    """
    hits = np.asarray(right, np.float64)
    num = len(hits)
    if not num or not np.isin(hits, (0, 1)).all():
        raise ValueError("A share is of zeros and ones, at least one of them; give the bootstrap other scores.")
    value = float(hits.mean())
    sizes, sums = _of_images(np.stack([np.ones(num), hits], 1), images).T
    least = num**2 / float(sizes @ sizes)
    between = float(np.square(sums - value * sizes).sum()) / num**2 * len(sizes) / max(1, len(sizes) - 1)
    spread = value * (1 - value)
    worth = min(num, max(least, spread / between if between else math.inf)) if spread else least
    lo, hi = wilson(value, worth)
    return Interval(value, lo, hi, num)


def wilson(value: float, num: float) -> tuple[float, float]:
    """Of a share of ``num`` independent examples, which need not be a whole number (Wilson, 1927)."""
    center = (value + _Z**2 / (2 * num)) / (1 + _Z**2 / num)
    half = _Z / (1 + _Z**2 / num) * math.sqrt(value * (1 - value) / num + _Z**2 / (4 * num**2))
    # The share lies inside, but for the rounding where it is 0 or 1.
    return max(0.0, min(value, center - half)), min(1.0, max(value, center + half))


def _of_images(parts: Floats, images: Sequence[Hashable] | None) -> Floats:
    """The sums [M, K] over the examples of each image of parts [N, K]."""
    if images is None:
        return parts
    if len(images) != len(parts):
        raise ValueError(f"{len(parts)} examples but {len(images)} images; name the image of every example.")
    place = {image: at for at, image in enumerate(dict.fromkeys(images))}
    sums = np.zeros((len(place), parts.shape[1]))
    np.add.at(sums, [place[image] for image in images], parts)
    return sums
