"""Exact match of answers: the same letters, whatever the case and the spaces."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from sovit.language.metrics.scores import Scores, averaged, check


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """1 where the candidate is one of the references, else 0; of the corpus, the share."""
    check(candidates, references)
    return averaged([plain(one) in map(plain, given) for one, given in zip(candidates, references, strict=True)])


def plain(text: str) -> str:
    """Folded to one case, composed (NFC), single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
