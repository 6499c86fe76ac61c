"""The tokens of a frozen encoder for a decoder to look at: kept where they fit into memory, made when asked for if not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sovit import records
from sovit.config import ConfigError
from sovit.data.images import IN_MEMORY
from sovit.data.sources import NAMED
from sovit.language.examples import TextImages
from sovit.lit.multitask import tokens

AT_ONCE = 128  # images in one forward pass
PIECE = 4096  # images whose tokens lie in one file


class FrozenTokens:
    """The tokens [B, T, width] of some rows of a source, on the model's device.

    They are made once and kept if they take at most IN_MEMORY bytes: in memory, and piece by piece in ``work``, where a
    killed process finds them again, with the images that could not be read. Raises ConfigError where they are not finite.
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

    @torch.no_grad()
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
        left_out = self.source.left_out
        try:
            with safe_open(path, framework="pt") as file:
                found, lacking = file.get_tensor("tokens"), json.loads((file.metadata() or {})["left_out"])
            left_out.count += lacking["count"]
            left_out.named += [(name, reason) for name, reason in lacking["named"]][: NAMED - len(left_out.named)]
            return found
        except (FileNotFoundError, SafetensorError, KeyError):
            pass
        count, named = left_out.count, len(left_out.named)
        found = self._made(rows).cpu()
        if len(self.source) > PIECE:  # less is quicker made than kept
            work.mkdir(parents=True, exist_ok=True)
            scratch = records.scratch_of(path)
            lacking = {"count": left_out.count - count, "named": left_out.named[named:]}
            save_file({"tokens": found}, scratch, {"left_out": json.dumps(lacking)})
            scratch.replace(path)
        return found
