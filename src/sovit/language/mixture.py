"""Captions and questions as prompts and answers of token ids, and the batches of a mixture of tasks.

An example is [bos] ids("TASK: QUESTION\\n") ids(answer) [eos]; a caption has an empty question. The task is named in words,
so any vocabulary will do. What is to be said is the answer's ids and eos; the loss counts nothing else.

Batch k of a mixture is a pure function of (seed, k). Tasks take turns in proportion to their weights, evenly spread, and
each goes through its examples in epochs of its own (`sovit.data.order`). Captions are several times as long as questions, so
a batch comes in two parts, of short and of long texts, each padded to its longest only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sovit.data.order import Order
from sovit.language.examples import CAPTION, TASKS, TextImages

TURNS = 1000  # weights are rounded to parts of it
NOTHING = -100  # the target of a place that is not scored: what torch's cross-entropy leaves out


class Ids(Protocol):
    """What is needed of a `sovit.language.vocabulary.Vocabulary`."""

    @property
    def size(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    def ids(self, text: str) -> list[int]:
        """Without the special ones."""


@dataclass(frozen=True)
class Example:
    row: int  # of the image
    prompt: tuple[int, ...]  # bos first
    answer: tuple[int, ...]  # eos last


@dataclass(frozen=True)
class Examples:
    """Of every task that has any, and how many were cut to the length."""

    of: Mapping[str, tuple[Example, ...]]
    cut: Mapping[str, int]


@dataclass(frozen=True)
class Batch:
    """``rows`` of the images; ``tokens`` int64 [B, L]; ``targets`` int64 [B, L], NOTHING where no answer is."""

    rows: tuple[int, ...]
    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.rows, self.tokens.to(device), self.targets.to(device))


def prompt(vocabulary: Ids, task: str, question: str) -> tuple[int, ...]:
    """[bos] ids("task: question\\n")."""
    return (vocabulary.bos, *vocabulary.ids(f"{task}: {question}\n"))


def shortened(prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """At most ``length`` ids of a prompt: its beginning, which names the task, and its last, where the answer begins."""
    return prompt if len(prompt) <= length else (*prompt[: length - 1], prompt[-1])


def most_common(answers: Iterable[str]) -> str:
    """The first of the most common ones."""
    return Counter(answers).most_common(1)[0][0]


def examples_of(source: TextImages, vocabulary: Ids, length: int, tasks: Sequence[str] = TASKS) -> Examples:
    """The examples of a source: every caption, and every question with the most common of its answers.

    An example is of at most ``length`` + 1 ids (the last is never an input). A longer one is cut, and counted: the prompt to
    what a short answer leaves of it, at least half, then the answer, which keeps its eos.
    """
    found: dict[str, list[Example]] = {task: [] for task in tasks}
    cut = dict.fromkeys(tasks, 0)

    def add(row: int, task: str, question: str, answer: str) -> None:
        ids = vocabulary.ids(answer)
        asked = prompt(vocabulary, task, question)
        if len(asked) + len(ids) > length:
            asked = shortened(asked, max(length - len(ids), length // 2))
            ids = ids[: length - len(asked)]
            cut[task] += 1
        found[task].append(Example(row, asked, (*ids, vocabulary.eos)))

    if CAPTION in tasks:
        for row in range(len(source)):
            for caption in source.captions(row):
                add(row, CAPTION, "", caption)
    for question in source.questions:
        if question.task in tasks:
            add(question.row, question.task, question.text, most_common(question.answers))
    return Examples({task: tuple(of) for task, of in found.items() if of}, {k: n for k, n in cut.items() if n})


def in_common(*parts: Examples) -> list[Examples]:
    """The parts with the tasks that all of them have. Raises ValueError if there is none."""
    tasks = [task for task in parts[0].of if all(task in part.of for part in parts)]
    if not tasks:
        said = " and ".join(", ".join(part.of) or "nothing" for part in parts)
        raise ValueError(f"There is no task to train and to test on: the parts have {said}; give both the same kind.")
    return [replace(part, of={task: part.of[task] for task in tasks}) for part in parts]


def collate(chosen: Sequence[Example], pad: int) -> Batch:
    """A batch of examples, padded to the longest."""
    whole = [(*example.prompt, *example.answer) for example in chosen]
    longest = max(map(len, whole)) - 1
    tokens = torch.full((len(whole), longest), pad)
    targets = torch.full((len(whole), longest), NOTHING)
    for place, (example, ids) in enumerate(zip(chosen, whole, strict=True)):
        tokens[place, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[place, len(example.prompt) - 1 : len(ids) - 1] = torch.tensor(example.answer)
    return Batch(tuple(example.row for example in chosen), tokens, targets)


def parted(chosen: Sequence[Example], pad: int) -> tuple[Batch, ...]:
    """The examples in one or two batches, cut by length where the least padding is left."""
    order = sorted(chosen, key=lambda example: len(example.prompt) + len(example.answer))
    lengths = [len(example.prompt) + len(example.answer) for example in order]
    num = len(order)
    best = min(range(1, num + 1), key=lambda k: (k * lengths[k - 1] + (num - k) * lengths[-1], -k))
    return tuple(collate(part, pad) for part in (order[:best], order[best:]) if part)


class Mixture:
    """Endless batches of the tasks of ``examples``, each as often as its weight says (None: all alike).

    Raises ValueError for no example at all, or weights that are of another task, negative or all zero.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        pad: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.examples, self.batch_size, self.pad = examples, batch_size, pad
        if not examples.of:
            raise ValueError("There is no caption and no question to train on.")
        shares = dict.fromkeys(examples.of, 1.0) if weights is None else dict(weights)
        for task, weight in shares.items():
            if task not in examples.of:
                raise ValueError(f"There is no example of {task!r}; there are {', '.join(examples.of)}.")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"The weight {weight} of {task} must not be negative.")
        self.tasks, turns = _turns(shares)
        self._turn, self._rank = turns, np.empty(TURNS, np.int64)
        for number in range(len(self.tasks)):
            self._rank[turns == number] = np.arange((turns == number).sum())
        self._per_cycle = np.bincount(turns, minlength=len(self.tasks))
        self._orders = [Order([len(examples.of[task])], seed * len(TASKS) + k) for k, task in enumerate(self.tasks)]

    def chosen(self, positions: Sequence[int]) -> list[tuple[str, int]]:
        """The task, and the number of its example, at each position of the endless stream."""
        cycles, places = np.divmod(np.asarray(positions, np.int64), TURNS)
        numbers = self._turn[places]
        ranks = cycles * self._per_cycle[numbers] + self._rank[places]
        found: list[tuple[str, int]] = [("", 0)] * len(places)
        for number in np.unique(numbers):
            inside = np.flatnonzero(numbers == number)
            for place, example in zip(inside, self._orders[number](ranks[inside]), strict=True):
                found[place] = (self.tasks[number], int(example))
        return found

    def batch(self, k: int) -> tuple[Batch, ...]:
        """Batch ``k`` in its parts."""
        chosen = self.chosen(range(k * self.batch_size, (k + 1) * self.batch_size))
        return parted([self.examples.of[task][number] for task, number in chosen], self.pad)


def _turns(shares: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """The tasks with a weight, and the number of the task at each of TURNS places, evenly spread."""
    total = sum(shares.values())
    tasks = [task for task, weight in shares.items() if weight > 0]
    if not tasks:
        raise ValueError("No task has a positive weight.")
    exact = np.array([shares[task] / total * TURNS for task in tasks])
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for number in np.argsort(counts - exact, kind="stable"):  # the largest remainders first
        if counts.sum() < TURNS:
            counts[number] += 1
    counts[np.argmax(counts)] -= counts.sum() - TURNS
    when = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    number = np.repeat(np.arange(len(tasks)), counts)
    return tasks, number[np.lexsort((number, when))]
