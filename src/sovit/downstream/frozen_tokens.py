"""The tokens of a frozen encoder for a decoder to look at: kept where they fit into memory, made when asked for if not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sovit import records
from sovit.config import ConfigError
from sovit.data.images import IN_MEMORY
from sovit.language.examples import TextImages

AT_ONCE = 128  # images in one forward pass
PIECE = 4096  # images whose tokens lie in one file


@torch.no_grad()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Tokens [B, T, width] after the last norm, a class token among them, of images [B, channels, size, size]."""
    found: Tensor = model.forward_features(images)  # type: ignore[operator]
    return found.flatten(1, 2) if found.ndim == 4 else found


class FrozenTokens:
    """The tokens [B, T, width] of some rows of a source, on the model's device.

    They are made once and kept if they take at most IN_MEMORY bytes: in memory, and piece by piece in ``work``, where a
    killed process finds them again. Raises ConfigError where they are not finite.
    """

    def __init__(self, model: nn.Module, source: TextImages, work: Path, name: str) -> None:
        self.model, self.source = model, source
        self.device = next(model.parameters()).device
        one = self._made([0])
        self.shape = tuple(one.shape[1:])
        self._kept: Tensor | None = None
        if 4 * len(source) * one.numel() <= IN_MEMORY:
            self._kept = torch.cat([self._piece(begin, work, name) for begin in range(0, len(source), PIECE)])

    def __call__(self, rows: Sequence[int]) -> Tensor:
        if self._kept is None:
            return self._made(rows)
        return self._kept[list(rows)].to(self.device)

    def _made(self, rows: Sequence[int]) -> Tensor:
        """Every image once, however many texts of it are asked for."""
        once = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        parts = [
            tokens(self.model, self.source.images(list(once)[begin : begin + AT_ONCE]).to(self.device)).float()
            for begin in range(0, len(once), AT_ONCE)
        ]
        found = torch.cat(parts)
        if not found.isfinite().all():
            raise ConfigError("The tokens of the encoder are not finite: it has diverged; evaluate another one.")
        return found[[once[row] for row in rows]]

    def _piece(self, begin: int, work: Path, name: str) -> Tensor:
        rows = range(begin, min(begin + PIECE, len(self.source)))
        path = work / f"{name}-{begin:09d}.safetensors"
        try:
            return load_file(path)["tokens"]
        except (FileNotFoundError, SafetensorError):
            pass
        found = self._made(rows).cpu()
        if len(self.source) > PIECE:  # less is quicker made than kept
            work.mkdir(parents=True, exist_ok=True)
            scratch = records.scratch_of(path)
            save_file({"tokens": found}, scratch)
            scratch.replace(path)
        return found
