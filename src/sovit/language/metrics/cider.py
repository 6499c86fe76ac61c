"""CIDEr-D: agreement of a caption with the references in n-grams that few images share (arXiv 1411.5726, equations 2 to 5).

As COCO's evaluation computes it: n = 1 to 4, sigma 6, times 10. So the corpus of a single image scores 0 unless a table of
frequencies is given, since every n-gram is then in every image. Words are those of `sovit.language.metrics.words` unless
``split`` says otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sovit.language.metrics.scores import Scores, averaged, check
from sovit.language.metrics.words import MOST, Ngram, Split, ngrams, split

SIGMA = 6.0  # words
SCALE = 10.0


@dataclass(frozen=True)
class Frequencies:
    """In how many of ``num_images`` images an n-gram occurs in some reference."""

    counts: Mapping[Ngram, int]
    num_images: int

    def __post_init__(self) -> None:
        most = max(self.counts.values(), default=0)
        if not 0 <= most <= self.num_images or not self.num_images:
            raise ValueError(f"An n-gram is in {most} of {self.num_images} images; a table counts each image once.")


def frequencies(references: Sequence[Sequence[str]], *, split: Split = split) -> Frequencies:
    """The table of a corpus: ``references`` of each image."""
    return _frequencies([[ngrams(split(text)) for text in given] for given in references])


def score(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    table: Frequencies | None = None,
    split: Split = split,
) -> Scores:
    """CIDEr-D in 0 .. 10 of a candidate for each image; of the corpus, their mean.

    Document frequencies are those of ``references`` unless a ``table`` is given, as for captions scored one by one.
    """
    check(candidates, references)
    counted = [[ngrams(split(text)) for text in given] for given in references]
    table = table or _frequencies(counted)
    whole = math.log(table.num_images)
    # Those in no reference count as if they were in one image.
    rare = {gram: whole - math.log(max(1, num)) for gram, num in table.counts.items()}
    found = []
    for text, given in zip(candidates, counted, strict=True):
        candidate = _vector(ngrams(split(text)), rare, whole)
        total = sum(_similarity(candidate, _vector(counts, rare, whole)) for counts in given)
        found.append(SCALE * total / (MOST * len(given)))
    return averaged(found)


class _Vector(NamedTuple):
    """A caption as weights of n-grams, with the norm for each n and the number of words."""

    weights: dict[Ngram, float]
    norms: list[float]
    length: int


def _frequencies(counted: Sequence[Sequence[Counter[Ngram]]]) -> Frequencies:
    counts: Counter[Ngram] = Counter()
    for given in counted:
        counts.update(set().union(*given))
    return Frequencies(counts, len(counted))


def _vector(counts: Counter[Ngram], rare: Mapping[Ngram, float], otherwise: float) -> _Vector:
    weights = {gram: num * rare.get(gram, otherwise) for gram, num in counts.items()}
    squares = [0.0] * MOST
    length = 0
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight * weight
        length += counts[gram] if len(gram) == 1 else 0
    return _Vector(weights, [math.sqrt(square) for square in squares], length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """The clipped cosines of all n, summed, times the penalty for another length."""
    found = [0.0] * MOST
    for gram, weight in candidate.weights.items():
        other = reference.weights.get(gram)
        if other is not None:
            found[len(gram) - 1] += min(weight, other) * other
    norms = zip(found, candidate.norms, reference.norms, strict=True)
    cosines = sum(value / (one * two) for value, one, two in norms if value)
    return cosines * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
