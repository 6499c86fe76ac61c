"""What every metric returns: a score of each example, and of the corpus from sums, so that images can be drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """``corpus`` makes the score of any choice of examples from the sums [K] of their ``parts`` [N, K]."""

    examples: Floats  # [N]
    parts: Floats
    corpus: Callable[[Floats], float]

    @property
    def value(self) -> float:
        """The score of the whole corpus."""
        return self.corpus(self.parts.sum(0))


def averaged(examples: ArrayLike) -> Scores:
    """Of a metric whose corpus value is the mean over examples."""
    values = np.asarray(examples, np.float64)
    return Scores(values, np.stack([values, np.ones_like(values)], 1), _mean)


def check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless there are candidates and each has references."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates but references of {len(references)}; give every one its own.")
    if not candidates:
        raise ValueError("There is nothing to score: no candidate.")
    for row, given in enumerate(references):
        if isinstance(given, str) or not len(given):
            raise ValueError(f"Example {row} has references {given!a}; give a list of at least one text.")


def _mean(sums: Floats) -> float:
    return float(sums[0] / sums[1])
