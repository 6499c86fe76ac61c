"""BLEU-4 of captions (Papineni et al., 2002), of the corpus and of each example, as COCO's evaluation computes it.

The length compared with is the closest reference's, the shorter of two as close. Nothing is smoothed, but two constants of
that code keep from dividing by nothing: they show where a candidate has fewer than four words, or no four of a reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sovit.language.metrics.scores import Floats, Scores, check
from sovit.language.metrics.words import MOST, Split, ngrams, split

SMALL = 1e-9  # added to what is divided by
TINY = 1e-15  # added to what is divided


def score(candidates: Sequence[str], references: Sequence[Sequence[str]], *, split: Split = split) -> Scores:
    """BLEU-4 in 0 .. 1; of the corpus from its sums, not the mean over examples."""
    check(candidates, references)
    pairs = zip(candidates, references, strict=True)
    parts = np.array([_parts(split(one), [split(text) for text in given]) for one, given in pairs], np.float64)
    return Scores(of_sums(parts), parts, lambda sums: float(of_sums(sums)))


def of_sums(sums: Floats, most: int = MOST) -> Floats:
    """BLEU [...] of the two lengths, the n-grams proposed and those found in a reference, [..., 2 + 2 x 4]; for n up to
    ``most``."""
    length, wanted = sums[..., 0], sums[..., 1]
    proposed, found = sums[..., 2 : 2 + most], sums[..., 2 + MOST : 2 + MOST + most]
    precision = ((found + TINY) / (proposed + SMALL)).prod(-1) ** (1 / most)
    ratio = (length + TINY) / (wanted + SMALL)
    brevity: Floats = np.exp(np.minimum(0, 1 - 1 / ratio))
    return precision * brevity


def _parts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    length = len(candidate)
    wanted = min((abs(len(words) - length), len(words)) for words in references)[1]
    allowed = [ngrams(words) for words in references]
    found = [0] * MOST
    for gram, num in ngrams(candidate).items():
        found[len(gram) - 1] += min(num, max(counts[gram] for counts in allowed))
    return [length, wanted, *(max(0, length - n) for n in range(MOST)), *found]
