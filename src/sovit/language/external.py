"""A text tower of another library in the place of one of ours.

It reads what every tower of ours reads: a text's ids, its end, and padding of any kind; what its library puts before a text
and behind it is added here. Its words are those of its own tokenizer.json (`sovit.language.vocabulary`). ``locked``
freezes all of it but the projection.

Not here: its files (`sovit.language.transformers_files`, `sovit.language.open_clip_files`), image towers, training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import lecun_normal_
from torch import Tensor, nn

from sovit.language.tower import in_text
from sovit.language.vocabulary import Vocabulary
from sovit.shape import check_positive

INSTALL = "install it with pip install 'sovit[text]'"


@dataclass(frozen=True)
class Reads:
    """How a library's model wants its tokens, and what of its output is the text."""

    model: nn.Module
    width: int  # of what pooled gives
    words: int  # ids that it knows
    most: int  # tokens that it reads at once
    pooled: Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, tokens, bool in text -> [B, width]
    begins: bool = False  # with a token of its own, where the tokenizer's file does not say it
    padding: int = 0
    whole: bool = False  # always ``most`` tokens, padding seen


class ExternalTower(nn.Module):
    """Texts to embeddings by a model of another library; built by :func:`external_tower`.

    As `sovit.language.tower.TextTower`, ``blocks`` are the model's, ``embed_dim`` its width, ``output_dim`` the embedding's
    and ``length`` the most tokens of a text with its end. ``projection`` is the identity where there is none.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        reads: Reads,
        vocabulary: Vocabulary,
        *,
        embed_dim: int,
        locked: bool,
        log_scale: float,
        bias: float | None,
    ) -> None:
        super().__init__()
        check_positive("embed_dim", embed_dim)
        self.model, self.vocabulary, self.locked = reads.model, vocabulary, locked
        self.embed_dim, self.output_dim = reads.width, embed_dim
        self.begin = begin_of(vocabulary, reads.begins)
        self.length = reads.most - (self.begin is not None)
        self._reads = reads
        for module in self.model.modules():
            module._non_persistent_buffers_set.clear()  # masks and positions: else a sharded tower begins without them
        self.model.requires_grad_(not locked)
        # A locked tower without a projection would learn nothing, whatever its width.
        needed = locked or reads.width != embed_dim
        self.projection = nn.Linear(reads.width, embed_dim) if needed else nn.Identity()
        if isinstance(self.projection, nn.Linear):
            lecun_normal_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.tensor([bias])))
        self.train()

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks, one after another: its first list of modules."""
        return next(module for module in self.model.modules() if isinstance(module, nn.ModuleList))

    def train(self, mode: bool = True) -> ExternalTower:
        """A locked model stays in evaluation."""
        super().train(mode)
        if self.locked:
            self.model.eval()
        return self

    def get_classifier(self) -> nn.Module:
        """None: the projection is decayed as the body is."""
        return nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, output_dim], not normalised, of tokens [B, L], each text with its end and then padding; L <= ``length``."""
        return self._embedded(tokens)

    def forward_contrast(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `sovit.language.tower.TextTower.forward_contrast`."""
        return self._embedded(tokens), self.log_scale.clone(), None if self.bias is None else self.bias.clone()

    def _embedded(self, tokens: Tensor) -> Tensor:
        reads = self._reads
        if tokens.shape[1] > self.length:
            raise ValueError(
                f"Texts of {tokens.shape[1]} tokens are longer than the {self.length} that this tower reads."
            )
        inside = in_text(tokens, self.vocabulary.eos)
        tokens = tokens.masked_fill(~inside, reads.padding)
        if self.begin is not None:
            tokens = F.pad(tokens, (1, 0), value=self.begin)
            inside = F.pad(inside, (1, 0), value=True)
        if reads.whole:
            more = (0, reads.most - tokens.shape[1])
            tokens, inside = F.pad(tokens, more, value=reads.padding), F.pad(inside, more, value=False)
        return self.projection(reads.pooled(self.model, tokens, inside))


def begin_of(vocabulary: Vocabulary, begins: bool) -> int | None:
    """The id that a tokenizer's file puts before a text. ``begins``: whether one is wanted where the file says nothing."""
    around = vocabulary.tokenizer.encode("", add_special_tokens=True).ids
    if around:
        return around[0] if len(around) > 1 else None  # of one, it is the end
    return vocabulary.bos if begins else None


def external_tower(
    reads: Reads,
    where: Path,
    vocabulary: Vocabulary,
    *,
    embed_dim: int,
    locked: bool,
    log_scale: float,
    bias: float | None,
) -> ExternalTower:
    """The tower of a model that was read from ``where``.

    ``locked`` freezes the model. ``log_scale`` and ``bias`` begin the loss, as in `sovit.language.tower.build_tower`. The
    projection, where widths differ or the tower is locked, is drawn from torch's generator. Raises ValueError for a
    vocabulary with more tokens than the model knows.
    """
    most = max(*vocabulary.tokenizer.get_vocab().values(), begin_of(vocabulary, reads.begins) or 0)
    if most >= reads.words:
        raise ValueError(
            f"{where} knows {reads.words} tokens and its vocabulary has id {most}; "
            "give the tokenizer.json that belongs to it."
        )
    return ExternalTower(reads, vocabulary, embed_dim=embed_dim, locked=locked, log_scale=log_scale, bias=bias)
