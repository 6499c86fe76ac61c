"""Embedded images with texts: scenes of one to four things, with captions, questions and answers that are true of them.

A thing is a fractal of one of 16 named categories, which no encoder was trained on, or a handwritten digit. Scene i of a
part is a pure function of (world, seed, part, i) and the size. `sovit.language.facts` says what is in it, `drawing` draws
it, `sentences` and `questions` speak of it; here they become a `TextImages`.

``python -m sovit.language.scenes OUT.png`` draws a sheet of scenes with their texts.
"""

from __future__ import annotations

import hashlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from sovit.data import fractals
from sovit.data.fractals import FractalWorld
from sovit.data.sources import LeftOut
from sovit.language import drawing
from sovit.language.drawing import draw
from sovit.language.examples import CAPTION, Question
from sovit.language.facts import DIGIT, DIGITS, FRACTAL, NAMES, PARTS, Dice, Facts, facts_of
from sovit.language.questions import questions
from sovit.language.sentences import captions

SMALLEST, LARGEST = 8, 256  # pixels of an image
_TEXTS, _ASKED = 1, 2  # streams of choices of a row, beside that of its facts
_ALONE = 2**40  # first row of `named`, which no scenes reach


@dataclass(frozen=True)
class Scenes:
    """Scenes of a part; a `TextImages` that also tells the facts."""

    part: str
    num: int
    size: int
    channels: int
    seed: int
    world: FractalWorld
    name: str = "scenes"
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)  # stays empty

    def __len__(self) -> int:
        return self.num

    def facts(self, row: int) -> Facts:
        """Raises IndexError for a row that is not there."""
        if not 0 <= row < self.num:
            raise IndexError(f"Row {row} is not in 0 .. {self.num - 1}, the scenes of part {self.part}.")
        return facts_of(self.seed, self.part, int(row))

    def captions(self, row: int) -> tuple[str, ...]:
        """Five."""
        return captions(self.facts(row), Dice(self.seed, PARTS[self.part], int(row), _TEXTS))

    def questions_of(self, row: int) -> list[Question]:
        """Up to two of each task."""
        asked = questions(self.facts(row), Dice(self.seed, PARTS[self.part], int(row), _ASKED))
        return [
            Question(int(row), task, text, answers, f"{self.part}-{row}-{k}")
            for k, (task, text, answers) in enumerate(asked)
        ]

    @cached_property
    def questions(self) -> Sequence[Question]:
        """All of them, in order of the rows."""
        return [question for row in range(self.num) for question in self.questions_of(row)]

    def images(self, rows: Sequence[int]) -> Tensor:
        """float32 [B, channels, size, size] in [-1, 1]."""
        shown = [self.facts(row) for row in rows]
        keys = [(self.seed, self.part, int(row)) for row in rows]
        return _coloured(draw(self.world, self.part, self.size, shown, keys), self.channels)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the arguments, with how things are drawn and with what is said."""
        arguments = (self.part, self.num, self.size, self.channels, self.seed, self.world)
        how = {name: value for name, value in vars(drawing).items() if name.isupper()}
        drawn = (fractals.fingerprint(self.world), drawing.categories(self.world), sorted(how.items()))
        said = [(self.captions(row), self.questions_of(row)) for row in range(min(self.num, 64))]
        return f"scenes-{hashlib.sha256(repr((arguments, drawn, said)).encode()).hexdigest()[:12]}"


def scenes(
    part: str, *, num: int, size: int = 16, channels: int = 1, seed: int = 0, world: FractalWorld | None = None
) -> Scenes:
    """``num`` scenes of a part, ``train`` or ``test``; images and texts are made when they are asked for.

    Of ``world`` only the seed and the jitter of the variants matter: they make the held-out categories. Raises ValueError
    for a part, number, size or number of channels that is not there.
    """
    _check(part, num, size, channels)
    return Scenes(part, num, size, channels, seed, world or FractalWorld())


def named(
    part: str,
    *,
    num_per_class: int,
    size: int = 16,
    channels: int = 1,
    seed: int = 0,
    world: FractalWorld | None = None,
    classes: Sequence[str] = NAMES,
) -> tuple[Tensor, Tensor]:
    """Images of one thing each, for zero-shot classification: float32 [N, channels, size, size] and labels int64 [N].

    Label k is ``classes[k]``, of NAMES or DIGITS; the labels count through the classes. Size, brightness and place are
    uniform, as in the scenes. Raises ValueError as `scenes` does, and for a class that is not known.
    """
    _check(part, num_per_class, size, channels)
    unknown = next((name for name in classes if name not in (*NAMES, *DIGITS)), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is nothing a scene holds; choose of {', '.join((*NAMES, *DIGITS))}.")
    labels = torch.arange(len(classes)).repeat(num_per_class)
    keys = [(seed, part, _ALONE + k) for k in range(len(labels))]
    shown = []
    for key, label in zip(keys, labels.tolist(), strict=True):
        name = classes[label]
        thing = replace(facts_of(*key).things[0], name=name, kind=DIGIT if name in DIGITS else FRACTAL)
        shown.append(Facts((thing,)))
    return _coloured(draw(world or FractalWorld(), part, size, shown, keys), channels), labels


def texts(num: int = 5000) -> Iterator[str]:
    """What is said of the first training scenes, questions as prompts: what the shipped vocabulary is trained on."""
    said = scenes("train", num=num)
    for row in range(num):
        yield from said.captions(row)
        yield f"{CAPTION}: \n"
        for question in said.questions_of(row):
            yield f"{question.task}: {question.text}\n"
            yield from dict.fromkeys(question.answers)


def _check(part: str, num: int, size: int, channels: int) -> None:
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the scenes; choose {' or '.join(PARTS)}.")
    if num < 1:
        raise ValueError(f"{num} images are none; ask for at least one.")
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size={size} is not in {SMALLEST} .. {LARGEST}; choose the image size in pixels.")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels} is not 1 or 3; choose one of them.")


def _coloured(images: Tensor, channels: int) -> Tensor:
    return images.unsqueeze(1).repeat(1, channels, 1, 1)


# ---------------------------------------------------------------------------------------------------------- sheet


def write_sheet(path: str, shown: Scenes, rows: Sequence[int] = range(8)) -> None:
    """Draw scenes beside their captions and questions, so that each can be checked by eye."""
    from matplotlib.figure import Figure  # the object interface: no pyplot, no global state

    images = shown.images(rows)[:, 0]
    figure = Figure(figsize=(17, 2.3 * len(rows)), facecolor="white")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(1, 3.3, 3.3))
    figure.subplots_adjust(left=0.005, right=0.998, top=0.995, bottom=0.005, wspace=0.03, hspace=0.08)
    for (picture, left, right), image, row in zip(axes, images, rows, strict=True):
        picture.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        captions = [textwrap.fill(text, 78, subsequent_indent="  ") for text in shown.captions(row)]
        asked = [f"{question.task}: {question.text}  {question.answers[0]}" for question in shown.questions_of(row)]
        for axis, lines in ((left, captions), (right, asked)):
            axis.text(0, 1, "\n".join(lines), va="top", fontsize=9, transform=axis.transAxes)
        for axis in (picture, left, right):
            axis.set_axis_off()
    figure.savefig(path, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sovit.language.scenes OUT.png")
    write_sheet(sys.argv[1], scenes("train", num=8))
