"""The words of a caption, as COCO's evaluation counts them, without its Java tokenizer.

COCO's captions go through Stanford's PTB tokenizer, lower-cased, and lose a list of punctuation marks. `split` follows the
rules of that tokenizer which captions call on: clitics are words of their own (`is n't`, `man 's`, `can not`), hyphened and
slashed words stay whole, marks stand alone, a period belongs to an abbreviation and to nothing else. What it keeps stays,
too: brackets as `-lrb-` and the like, which COCO's list has in capitals only and so never drops.

It differs from the tokenizer in abbreviations outside a short list, a single letter before the last period (where the
tokenizer looks at the next caption), quotes around a clitic, version numbers and addresses, angle brackets, currencies (the
tokenizer writes a pound as `#`) and emoji beyond the first plane, which it drops. Neither parts scripts written without
spaces. Text tokenized elsewhere is scored with ``split=str.split``.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

Split = Callable[[str], Sequence[str]]
Ngram = tuple[str, ...]
MOST = 4  # words of an n-gram, in CIDEr and BLEU

# COCO's list. Opening and closing double quotes are not told apart here, as both are dropped.
DROPPED = frozenset(("'", "`", '"', ".", "?", "!", ",", ":", "-", ";"))
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = """
    mr mrs ms dr prof gen sgt capt lt col sen rep gov rev st ste mt ft ave blvd rd jr sr vs etc inc co corp ltd bros dept est
    sq bldg jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
"""
# Words that the tokenizer takes apart though no apostrophe says so.
TWO = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--"})
# Vowel signs and accents that combine with a letter are part of a word, though Python's \w leaves them out.
_COMBINING = r"\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0e4e\u0e50-\u109f\u200c\u200d"
_LETTER = rf"(?:[^\W_]|[{_COMBINING}])"
_CLITIC = r"'(?:s|m|d|re|ve|ll)\b"
_TOKEN = re.compile(
    rf"""
    (?:[a-z]\.){{2,}}(?!\w) | [a-z]\.(?=\s+\S)
    | (?:{"|".join(ABBREVIATIONS.split())})\.(?!\w)
    | no\.(?=\s*\d) | '\d0s\b | o'clock\b | y'(?=all\b)
    | n't\b | {_CLITIC}
    | \.?\d+(?:[.,:/-]\d+)*(?:-?{_LETTER}+)*
    | {_LETTER}+?(?=n't\b)
    | {_LETTER}+(?:[-/&._]{_LETTER}+)*
    | -{{5,}} | [?!]+
    | \S
    """,
    re.VERBOSE,
)


def split(text: str) -> tuple[str, ...]:
    """The words of a caption in lower case, its punctuation dropped; () of an empty one."""
    plain = unicodedata.normalize("NFC", text).translate(_PLAIN).lower()
    words: list[str] = []
    for found in _TOKEN.findall(plain):
        if found not in DROPPED:
            words += TWO.get(found, (BRACKETS.get(found, found),))
    return tuple(words)


def ngrams(words: Sequence[str]) -> Counter[Ngram]:
    """How often each run of 1 to 4 words occurs."""
    return Counter(chain.from_iterable(zip(*(words[at:] for at in range(n)), strict=False) for n in range(1, MOST + 1)))
