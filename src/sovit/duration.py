"""Training durations in any unit: ``500K steps``, ``64M images``, ``32 gflops``, ``2e11 flops``, ``10 epochs``.

gflops and flops are compute t = forward FLOPs per image x images seen (SoViT, arXiv 2305.13035; 2 FLOP per
multiply-add), so a duration in compute means more images for a smaller shape. Training costs about three times t.
Examples are images, or pairs of an image and a text; epochs are passes over data of a known number of them.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from decimal import Decimal

_SUFFIXES = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_UNITS = ("steps", "images", "examples", "epochs", "gflops", "flops")
_EXAMPLES = 'write for example "500K steps", "64M images", "32 gflops" or "2e11 flops" (suffixes K, M, B, T)'
_PATTERN = re.compile(
    r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([kmbt]?)\s*(step|image|example|epoch|gflop|flop)s?", re.IGNORECASE
)


@dataclass(frozen=True)
class Duration:
    """A positive number of one of the units. Its text form parses back to the same value."""

    value: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"{self.unit!r} is not a unit of duration; use one of {', '.join(_UNITS)}.")
        if not 0 < self.value < math.inf:
            raise ValueError(f"A duration of {self.value} {self.unit} is not positive and finite; {_EXAMPLES}.")

    def __str__(self) -> str:
        value = Decimal(repr(self.value))
        suffix = max((s for s, power in _SUFFIXES.items() if value >= 10**power), key=_SUFFIXES.__getitem__, default="")
        digits = f"{value.scaleb(-_SUFFIXES[suffix]):f}"
        if "." in digits:
            digits = digits.rstrip("0").rstrip(".")
        return f"{digits}{suffix} {self.unit}"


def parse_duration(text: str) -> Duration:
    """Read a number, an optional suffix K, M, B or T, and a unit, in any letter case.

    Raises ValueError for any other text and for a duration of zero.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"Cannot read the duration {text!r}; {_EXAMPLES}.")
    number, exponent, suffix, unit = match.groups(default="")
    # In decimal, or 2.01M would not be 2010000.
    value = Decimal(number + exponent).scaleb(_SUFFIXES[suffix.upper()])
    return Duration(float(value), unit.lower() + "s")


def to_steps(
    duration: Duration, *, forward_gflops: float, global_batch_size: int, examples_per_epoch: int | None = None
) -> int:
    """The number of updates nearest to ``duration``, at least 1.

    ``forward_gflops``: of one image; ``global_batch_size``: images an update, over all devices. Raises ValueError if
    either is not positive, or for epochs of data whose ``examples_per_epoch`` are not known.
    """
    if not 0 < forward_gflops < math.inf:
        raise ValueError(f"forward_gflops={forward_gflops} is not positive and finite.")
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size={global_batch_size} is not at least 1.")
    if duration.unit == "steps":
        steps = duration.value
    elif duration.unit in ("images", "examples"):
        steps = duration.value / global_batch_size
    elif duration.unit == "epochs":
        if examples_per_epoch is None:
            raise ValueError(
                f"A duration of {duration} needs data.num_examples, how many pairs an epoch of images with texts has "
                "(data=scenes, pairs or coco); give it, or write steps or examples."
            )
        steps = duration.value * examples_per_epoch / global_batch_size
    else:
        gflops = duration.value / 1e9 if duration.unit == "flops" else duration.value
        steps = gflops / forward_gflops / global_batch_size
    return max(1, round(steps))


def geometric(first: str, last: str, num: int) -> list[str]:
    """``num`` durations in geometric progression from ``first`` to ``last``, both kept exactly, as texts.

    Those between are rounded to 4 significant digits, steps, images and examples also to whole numbers.
    ``geometric("50B flops", "200B flops", 3)`` is ``["50B flops", "100B flops", "200B flops"]``. Raises ValueError for
    ``num`` below 2, different units, a ``last`` not above ``first``, or a progression so tight that texts repeat.
    """
    low, high = parse_duration(first), parse_duration(last)
    if num < 2:
        raise ValueError(f"num={num} durations cannot span from {first!r} to {last!r}; ask for at least 2.")
    if low.unit != high.unit:
        raise ValueError(
            f"{first!r} and {last!r} have different units; give both in {low.unit} or both in {high.unit}."
        )
    if low.value >= high.value:
        raise ValueError(f"{first!r} is not less than {last!r}; give the shorter duration first.")
    ratio = high.value / low.value
    between = [float(f"{low.value * ratio ** (i / (num - 1)):.4g}") for i in range(1, num - 1)]
    if low.unit in ("steps", "images", "examples"):
        between = [float(round(value)) for value in between]
    values = [low.value, *between, high.value]
    if any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{num} durations from {first!r} to {last!r} lie too close to tell apart; ask for fewer.")
    return [str(Duration(value, low.unit)) for value in values]
