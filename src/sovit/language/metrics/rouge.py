"""ROUGE-L of captions: the longest words in common, in order (Lin, 2004), as COCO's evaluation computes it.

The best precision and the best recall may be of different references. A caption without words counts as one empty word.
"""

from __future__ import annotations

from collections.abc import Sequence

from sovit.language.metrics.scores import Scores, averaged, check
from sovit.language.metrics.words import Split, split

BETA = 1.2  # weight of recall


def score(candidates: Sequence[str], references: Sequence[Sequence[str]], *, split: Split = split) -> Scores:
    """ROUGE-L in 0 .. 1 of each candidate; of the corpus, their mean."""
    check(candidates, references)
    found = []
    for text, given in zip(candidates, references, strict=True):
        candidate = split(text) or ("",)
        wanted = [split(reference) or ("",) for reference in given]
        common = [in_common(candidate, words) for words in wanted]
        precision = max(common) / len(candidate)
        recall = max(num / len(words) for num, words in zip(common, wanted, strict=True))
        found.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0)
    return averaged(found)


def in_common(one: Sequence[str], two: Sequence[str]) -> int:
    """The length of the longest common subsequence, a bit for every word of ``one`` (Hyyro, 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    everything = (1 << len(one)) - 1
    unused = everything
    for word in two:
        hit = unused & places.get(word, 0)
        unused = (unused + hit | unused - hit) & everything
    return len(one) - unused.bit_count()
