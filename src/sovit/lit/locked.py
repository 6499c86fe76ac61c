"""What a text tower is trained against and reads with: a locked image tower and a vocabulary.

The image tower is what `sovit.lit.trained` loads, in evaluation mode and without gradients; it lies whole in every process,
outside of what is averaged, sharded or saved. Its forward pass is not in the run's compute t, which is the text tower's
alone; what it adds, once an image, is recorded beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sovit.config import ConfigError, RunConfig
from sovit.families import TEXT
from sovit.language import vocabulary as vocabularies
from sovit.language.vocabulary import Vocabulary
from sovit.lit.teacher import Teacher, loaded
from sovit.lit.towers import vocabulary_path
from sovit.models.vit import features


@dataclass(frozen=True)
class Locked:
    """``embed_dim``: width of the image tower's features, and of the embeddings."""

    encoder: Teacher
    vocabulary: Vocabulary
    embed_dim: int

    kind = "text.encoder or text.vocabulary"

    @property
    def sha256(self) -> str:
        """Of both: a run does not go on with another."""
        return f"{self.encoder.sha256} {self.vocabulary.identity}"

    def record(self) -> dict[str, Any]:
        """What a run's record says of them."""
        vocabulary = {"size": self.vocabulary.size, "sha256": self.vocabulary.identity}
        return {"encoder": self.encoder.record() | {"embed_dim": self.embed_dim}, "vocabulary": vocabulary}

    def check(self, found: dict[str, Any], run: str) -> None:
        """Raise ConfigError unless a run's record tells of the same weights and the same vocabulary."""
        encoder, vocabulary = found.get("encoder") or {}, found.get("vocabulary") or {}
        if encoder and encoder["sha256"] != self.encoder.sha256:
            raise ConfigError(
                f"text.encoder={self.encoder.source} has other weights than when {run} began; put them back, or choose "
                "another name."
            )
        if vocabulary and vocabulary["sha256"] != self.vocabulary.identity:
            raise ConfigError(
                f"text.vocabulary is another than when {run} began, of {self.vocabulary.size:,} tokens and not "
                f"{vocabulary['size']:,}; put it back, or choose another name."
                if vocabulary["size"] != self.vocabulary.size
                else f"text.vocabulary is another than when {run} began, of as many tokens; put it back, or choose another "
                "name."
            )

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """L2-normalised features [B, embed_dim] of images, on their device and in their precision."""
        held = next(self.encoder.model.parameters())
        if (held.device, held.dtype) != (images.device, images.dtype):
            self.encoder.model.to(images.device, images.dtype)
        return F.normalize(features(self.encoder.model, images), dim=-1)  # type: ignore[arg-type]


def locked_of(cfg: RunConfig) -> Locked | None:
    """The image tower and vocabulary of a run, or None if it trains none of texts.

    Raises ConfigError if one is not there or does not fit.
    """
    if cfg.model.family != TEXT:
        return None
    assert cfg.text.encoder is not None
    what = f"text.encoder={cfg.text.encoder}"
    encoder, theirs = loaded(Path(cfg.text.encoder).expanduser())
    if theirs.model.family == TEXT:
        raise ConfigError(f"{what} is a text tower itself; give a run that trained on images.")
    for key, mine, other in (
        ("model.image_size", cfg.model.image_size, theirs.model.image_size),
        ("model.channels", cfg.model.channels, theirs.model.channels),
    ):
        if mine != other:
            raise ConfigError(f"{what} has {key}={other}, this run {mine}; write {key}={other}.")
    try:
        vocabulary = vocabularies.load(vocabulary_path(cfg))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"text.vocabulary: {error}") from None
    return Locked(encoder, vocabulary, int(encoder.model.num_features))  # type: ignore[arg-type]
