"""Many texts in few arrays: millions of captions, questions and answers without a Python object each.

A list of strings would take three times the memory, and be copied into every worker process by its reference counts.
Knows no vocabulary: a text is what a file says, its white space made plain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sovit.language.examples import TASKS, Question

LONGEST = 10_000  # characters of a text that are kept; no tower or decoder here sees as many tokens
_SHORT = 24  # characters that most answers have at most


class Texts:
    """Texts in two arrays, as UTF-8."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [_bytes(text) for text in texts]
        self._blob = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        begin, end = self._ends[index : index + 2]
        return self._blob[begin:end].tobytes().decode()

    def digest(self) -> bytes:
        """SHA-256 of all of them and of where each ends."""
        return hashlib.sha256(
            hashlib.sha256(self._blob.data).digest() + hashlib.sha256(self._ends.data).digest()
        ).digest()


class TextLists:
    """Short lists of texts, such as the captions of each image."""

    def __init__(self, lists: Iterable[Sequence[str]]) -> None:
        lengths: list[int] = []

        def flat() -> Iterable[str]:
            for texts in lists:
                lengths.append(len(texts))
                yield from texts

        self._texts = Texts(flat())
        self._ends = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[str, ...]:
        begin, end = self._ends[index : index + 2].tolist()
        return tuple(self._texts[k] for k in range(begin, end))

    def lengths(self) -> NDArray[np.int64]:
        """How many texts each list holds."""
        return np.diff(self._ends)

    def digest(self) -> bytes:
        return hashlib.sha256(self._texts.digest() + hashlib.sha256(self._ends.data).digest()).digest()


class Questions(Sequence[Question]):
    """Questions that become objects when one is asked for."""

    def __init__(
        self,
        rows: ArrayLike,
        tasks: Sequence[str],
        texts: Iterable[str],
        answers: Iterable[Sequence[str]],
        ids: Iterable[str],
    ) -> None:
        self._rows = np.asarray(rows, np.int64)
        self._tasks = np.array([TASKS.index(task) for task in tasks], np.uint8)
        self._texts, self._answers, self._ids = Texts(texts), TextLists(answers), Texts(ids)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k = range(len(self))[index]  # raises IndexError, which ends an iteration
        task = TASKS[self._tasks[k]]
        return Question(int(self._rows[k]), task, self._texts[k], self._answers[k], self._ids[k])

    def digest(self) -> bytes:
        """SHA-256 of texts, answers, tasks and the rows they belong to."""
        parts = (self._rows.tobytes(), self._tasks.tobytes(), self._texts.digest(), self._answers.digest())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in (*parts, self._ids.digest()))).digest()


def cleaned(value: Any) -> tuple[str, str]:
    """(text, reason): one line without doubled white space, and what is wrong with it; the text is "" if there is none.

    A text longer than LONGEST is cut there, which is a reason too. Other scripts and emoji pass untouched.
    """
    if not isinstance(value, str):
        return "", f"it is {'missing' if value is None else 'no text'}"
    return _tidy(value) if len(value) > _SHORT else _tidied(value)


def _tidy(value: str) -> tuple[str, str]:
    text = " ".join(value.split())
    if not text:
        return "", "it is empty"
    if len(text) > LONGEST:
        return text[:LONGEST], f"only its first {LONGEST:,} characters are used"
    return text, ""


_tidied = lru_cache(maxsize=2**15)(_tidy)  # few answers are given millions of times


def _bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot: U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
