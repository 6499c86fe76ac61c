"""What a decoder says of the test images, and how well: captions and answers beside those of people, and of chance.

Chance of an answer is the most common one that training questions of the same wording and task have, or of the task where
the wording is new. Chance of a caption is what the blind decoder says, the same of every image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sovit.language.decoder import Decoder
from sovit.language.examples import CAPTION, TextImages
from sovit.language.generate import beam, greedy
from sovit.language.metrics import bleu, cider, exact, rouge, vqa
from sovit.language.metrics.interval import bootstrap, share
from sovit.language.metrics.scores import Scores
from sovit.language.mixture import most_common, prompt, shortened
from sovit.language.training import MemoryOf
from sovit.language.vocabulary import Vocabulary

AT_ONCE = 128  # texts decoded together


@dataclass(frozen=True)
class Asked:
    """What is asked of an image, and what people said. ``question``: empty for a caption."""

    row: int
    task: str
    question: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """How texts are decoded: greedily with one beam, else by beam search."""

    max_tokens: int
    beams: int = 1
    length_penalty: float = 0.0


def asked(source: TextImages, tasks: Sequence[str]) -> list[Asked]:
    """Every question, and one caption of every image that has any; task by task."""
    found = []
    if CAPTION in tasks:
        captions = ((row, source.captions(row)) for row in range(len(source)))
        found += [Asked(row, CAPTION, "", tuple(texts)) for row, texts in captions if texts]
    for task in tasks:
        found += [Asked(q.row, task, q.text, tuple(q.answers)) for q in source.questions if q.task == task]
    return found


def say(
    decoder: Decoder,
    memory_of: MemoryOf,
    wanted: Sequence[Asked],
    vocabulary: Vocabulary,
    search: Search,
    *,
    said: Sequence[str] = (),
    after: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """A text for everything that is asked. ``said``: the first of them, of a process that was killed; ``after`` is called
    with all so far, and what it was given goes on from there."""
    found = list(said)
    for begin in range(len(found), len(wanted), AT_ONCE):
        batch = wanted[begin : begin + AT_ONCE]
        found += _texts(decoder, memory_of([one.row for one in batch]), batch, vocabulary, search)
        if after is not None:
            after(found)
    return found


def by_chance(train: TextImages, wanted: Sequence[Asked], caption: str) -> list[str]:
    """The answers that need no image; ``caption`` for every caption."""
    of_text: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    of_task: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train.questions:
        answer = most_common(question.answers)
        of_text[question.task, question.text][answer] += 1
        of_task[question.task][answer] += 1

    def commonest(one: Asked) -> str:
        known = of_text.get((one.task, one.question)) or of_task.get(one.task)
        return known.most_common(1)[0][0] if known else ""

    return [caption if one.task == CAPTION else commonest(one) for one in wanted]


def scored(wanted: Sequence[Asked], said: Sequence[str], chance: Sequence[str]) -> list[dict[str, Any]]:
    """Every metric of every task: {"task", "metric", "value", "lo", "hi", "num", "chance"}, ready for JSON."""
    found = []
    for task in dict.fromkeys(one.task for one in wanted):
        places = [k for k, one in enumerate(wanted) if one.task == task]
        for name, score, used in _metrics(task, [wanted[k] for k in places]):
            at = [places[k] for k in used]
            references = [_references(name, wanted[k]) for k in at]
            scores, rows = score([said[k] for k in at], references), [wanted[k].row for k in at]
            interval = share(scores.examples, rows) if name == "exact match" else bootstrap(scores, rows)
            found.append(
                {
                    "task": task,
                    "metric": name,
                    "value": interval.value,
                    "lo": interval.lo,
                    "hi": interval.hi,
                    "num": interval.num,
                    "chance": score([chance[k] for k in at], references).value,
                }
            )
    return found


def _metrics(task: str, of: Sequence[Asked]) -> list[tuple[str, Callable[..., Scores], list[int]]]:
    """Name and function of each metric of a task, and which of what is asked it can score."""
    every = list(range(len(of)))
    if task == CAPTION:
        return [("CIDEr-D", cider.score, every), ("BLEU-4", bleu.score, every), ("ROUGE-L", rouge.score, every)]
    several = [k for k, one in enumerate(of) if len(one.references) > 1]
    voted = [("VQA accuracy", vqa.score, several)] if several else []
    return [*voted, ("exact match", exact.score, every)]


def _references(metric: str, one: Asked) -> tuple[str, ...]:
    """An exact match is with the most common answer, not with any that somebody gave."""
    return (most_common(one.references),) if metric == "exact match" else one.references


def _texts(
    decoder: Decoder, memory: Tensor, batch: Sequence[Asked], vocabulary: Vocabulary, search: Search
) -> list[str]:
    room = decoder.length - search.max_tokens + 1
    prompts = [shortened(prompt(vocabulary, one.task, one.question), room) for one in batch]
    memory = memory.to(decoder.head.weight.dtype)
    frame = {"eos": vocabulary.eos, "pad": vocabulary.pad, "max_tokens": search.max_tokens}
    if search.beams == 1:
        found = greedy(decoder, prompts, memory, **frame)
    else:
        found = beam(decoder, prompts, memory, **frame, beams=search.beams, length_penalty=search.length_penalty)
    return [vocabulary.text(ids) for ids in _until(found.tokens, vocabulary.eos)]


def _until(tokens: Tensor, eos: int) -> list[list[int]]:
    """What stands before the first eos of each text."""
    rows = torch.as_tensor(tokens).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]
