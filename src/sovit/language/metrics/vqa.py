"""VQA accuracy: an answer is right if three of the other people gave it too (arXiv 1505.00468, section 3).

Answers are made plain as visualqa.org's evaluation makes them, with the traits of that code, so that figures compare:

* marks are dropped if one of the same kind stands beside a space, else they become a space; a number such as 1,000 in the
  answer has all of them dropped;
* a period stays before a digit only, and the 33rd period and those after it stay as well;
* articles go, number words up to ten become digits ("none" becomes 0), apostrophes are put back into contractions;
* where all people gave the same answer, nothing is made plain: it may be text read from the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sovit.language.metrics.scores import Scores, averaged, check

ENOUGH = 3  # people who gave the answer

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUM_PERIODS = 32  # that code hands a flag of this value over as the number of replacements
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# Each is also recognised with any one of its apostrophes missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    form[: at.start()] + form[at.end() :]: form for form in _CONTRACTIONS.split() for at in re.finditer("'", form)
}
_REPAIRED["somebody'd"] = "somebodyd"  # the wrong way round, as in that code


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """VQA accuracy in 0 .. 1 of an answer to each question, ``references`` what people answered, ten of them in VQA's data.

    Mean over leaving out each person in turn of min(1, those of the others who gave the answer / 3). Fewer than four
    people therefore cannot make a whole point. Raises ValueError for a question that one person alone has answered.
    """
    check(candidates, references)
    return averaged([_accuracy(*row, at) for at, row in enumerate(zip(candidates, references, strict=True))])


def normalised(answer: str) -> str:
    """The answer in small letters without marks, articles and number words."""
    text = _stripped(answer)
    thousands = _THOUSANDS.search(text)
    plain = text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside or thousands else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain, count=_NUM_PERIODS).lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def _accuracy(candidate: str, given: Sequence[str], at: int) -> float:
    if len(given) < 2:
        raise ValueError(
            f"Question {at} has one answer; VQA accuracy compares with the other people's, so it needs two or more. "
            "Use the exact match."
        )
    candidate, answers = _stripped(candidate), [_stripped(answer) for answer in given]
    if len(set(answers)) > 1:
        candidate, answers = normalised(candidate), [normalised(answer) for answer in answers]
    same = answers.count(candidate)
    left_in, left_out = min(1.0, same / ENOUGH), min(1.0, (same - 1) / ENOUGH)
    return ((len(answers) - same) * left_in + same * left_out) / len(answers)


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
