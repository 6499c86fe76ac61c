"""What an image says in words: captions, questions and answers, wherever the images come from.

The embedded scenes (`sovit.language.scenes`) and files (`sovit.language.files`) give the same `TextImages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sovit.data.sources import LeftOut

CAPTION = "caption"
TASKS = (CAPTION, "vqa", "ocr_vqa", "gqa")  # the four of SoViT's multitask decoder (arXiv 2305.13035, table 4)


@dataclass(frozen=True)
class Question:
    """A question about image ``row`` of its source; ``answers``: at least one, ten of them in VQA's layout."""

    row: int
    task: str  # of TASKS, not a caption
    text: str
    answers: tuple[str, ...]
    id: str  # as in the file it comes from, or made of row and number


class TextImages(Protocol):
    """Images with captions and questions. What could not be used is counted in ``left_out``."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the images or texts do."""

    @property
    def left_out(self) -> LeftOut: ...

    def __len__(self) -> int:
        """How many images."""

    def images(self, rows: Sequence[int]) -> Tensor:
        """float32 [B, channels, size, size] in [-1, 1]."""

    def captions(self, row: int) -> tuple[str, ...]:
        """Those of an image; none if it has questions only."""

    @property
    def questions(self) -> Sequence[Question]:
        """All of them, in order of the rows."""
