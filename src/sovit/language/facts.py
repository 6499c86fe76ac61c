"""What is true of an embedded scene: one to four things, each in a quarter of the picture.

A thing is a fractal of one of 16 named categories or a handwritten digit; it is small or large, and bright or dim. No name
occurs twice in a scene. The facts of row i are a pure function of (seed, part, i): whole numbers from splitmix64 (Steele,
Lea & Flood 2014), so they are the same on any machine and with any version of a library.

Does not draw (`sovit.language.scenes`) and does not speak (`sentences`, `questions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

FRACTAL, DIGIT = "fractal", "digit"
NAMES = (
    *("moru", "tavi", "kelo", "binu", "rapu", "sefa", "dogi", "luma"),
    *("pazo", "wiko", "gude", "fimo", "nepu", "jala", "cuvo", "hesi"),
)  # of the fractal categories; invented, so that no text tower has met them
DIGITS = tuple("0123456789")
SIZES = ("small", "large")
BRIGHTNESSES = ("dim", "bright")
PLACES = ("upper left", "upper right", "lower left", "lower right")  # reading order: place = 2 row + column
PARTS = {"train": 0, "test": 1}
_GAMMA, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in the words of its captions."""

    kind: str  # FRACTAL or DIGIT
    name: str  # of NAMES or DIGITS
    size: str  # of SIZES
    brightness: str  # of BRIGHTNESSES
    place: str  # of PLACES

    @property
    def row(self) -> int:
        """0 above, 1 below."""
        return PLACES.index(self.place) // 2

    @property
    def column(self) -> int:
        """0 left, 1 right."""
        return PLACES.index(self.place) % 2

    def along(self, axis: int) -> int:
        """The row (axis 0) or the column (axis 1)."""
        return self.column if axis else self.row


@dataclass(frozen=True)
class Facts:
    """The things of a scene in reading order."""

    things: tuple[Thing, ...]

    def at(self, row: int, column: int) -> Thing | None:
        """The thing in a quarter, or None if that is empty."""
        return next((thing for thing in self.things if (thing.row, thing.column) == (row, column)), None)

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind == kind)


class Dice:
    """A stream of random choices, keyed by whole numbers."""

    def __init__(self, *key: int) -> None:
        self.state = 0
        for part in key:
            self.state = _scatter((self.state + part + _GAMMA) & _MASK)

    def below(self, count: int) -> int:
        """Uniform in 0 .. count - 1."""
        self.state = (self.state + _GAMMA) & _MASK
        return (_scatter(self.state) * count) >> 64

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def order(self, values: Sequence[T]) -> list[T]:
        """A random permutation."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]


def facts_of(seed: int, part: str, row: int) -> Facts:
    """The facts of a row. Number, kind, name, size, brightness and place are uniform and independent of each other."""
    dice = Dice(seed, PARTS[part], row)
    places = sorted(dice.order(range(len(PLACES)))[: 1 + dice.below(len(PLACES))])
    left = {FRACTAL: list(NAMES), DIGIT: list(DIGITS)}
    things = []
    for place in places:
        kind = dice.pick((FRACTAL, DIGIT))
        name = left[kind].pop(dice.below(len(left[kind])))
        things.append(Thing(kind, name, dice.pick(SIZES), dice.pick(BRIGHTNESSES), PLACES[place]))
    return Facts(tuple(things))


def _scatter(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
