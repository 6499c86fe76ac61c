"""Image to text as a metric of a run: the log-perplexity of a small decoder on the model's frozen tokens.

At every evaluation decoders are trained from scratch on the tokens of the same embedded scenes, to caption them and to
answer questions, and judged on others; SoViT's metric for image to text (arXiv 2305.13035, section 4) is the unweighted
mean of the tasks' log-perplexities. The decoder and its recipe are the same for every cell, so that cells differ in their
tokens only. What a decoder is, and what it learns from, stands in `sovit.language`. Not here: decoding, other
metrics than the log-perplexity, images of the user's own (`sovit eval RUN task=multitask` has both).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sovit.config import RunConfig
from sovit.language.examples import TextImages
from sovit.language.mixture import Examples, examples_of, in_common
from sovit.language.scenes import scenes
from sovit.language.training import MEAN, Recipe, multitask
from sovit.language.vocabulary import load
from sovit.metric import LOG_PERPLEXITY, MULTITASK
from sovit.schema import DECODER_HEADS

KEPT_BYTES = 2**28  # of scenes; more are drawn again at every evaluation


class Scenes:
    """The images of scenes, made when a slice of them is asked for and kept if they are few."""

    def __init__(self, source: TextImages) -> None:
        self.source = source
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> Tensor:
        begin, stop, _ = rows.indices(len(self))
        key = (begin, stop)
        if key in self._kept:
            return self._kept[key]
        images = self.source.images(range(begin, max(begin, stop)))
        if images.numel() * 4 + sum(kept.numel() * 4 for kept in self._kept.values()) <= KEPT_BYTES:
            self._kept[key] = images
        return images


class Multitask:
    """The scenes of a run with their texts, and what a decoder makes of a model's tokens for them."""

    def __init__(self, cfg: RunConfig) -> None:
        size, channels = cfg.model.image_size, cfg.model.channels
        self.train = Scenes(scenes("train", num=cfg.eval.train_scenes, size=size, channels=channels))
        self.test = Scenes(scenes("test", num=cfg.eval.test_scenes, size=size, channels=channels))
        self.vocabulary = load(None)
        asked = cfg.eval
        self.recipes = [
            Recipe(
                width=asked.decoder_width,
                depth=asked.decoder_depth,
                mlp_dim=2 * asked.decoder_width,
                num_heads=DECODER_HEADS,
                lr=asked.decoder_lr,
                steps=asked.decoder_steps,
                batch_size=asked.decoder_batch_size,
                seed=draw,
            )
            for draw in range(asked.decoder_draws)
        ]

    @cached_property
    def examples(self) -> list[Examples]:
        """The texts of both parts as token ids."""
        length = self.recipes[0].length
        return in_common(*(examples_of(part.source, self.vocabulary, length) for part in (self.train, self.test)))

    def scores(self, train: Tensor, test: Tensor, *, blind: bool = False) -> list[dict[str, Any]]:
        """What rows of evals.jsonl say beside their step: a row for the mean and each task, for each draw.

        ``train`` and ``test``: tokens [N, T, D] and [M, T, D] of the scenes, on the device to train on. ``blind``: the
        decoder is shown zeros in their place. Torch's generators are left as they were.
        """
        rows: list[dict[str, Any]] = []
        ours, theirs = self.examples
        # An evaluation runs inside the trainer's autocast, and may run without gradients.
        with torch.enable_grad(), torch.autocast(train.device.type, enabled=False):
            for recipe in self.recipes:
                for score in multitask(train, test, ours, theirs, self.vocabulary, recipe, blind=blind):
                    name = MULTITASK if score.name == MEAN else f"{MULTITASK}.{score.name}"
                    rows.append(
                        {"dataset": name, "shots": 0, "draw": recipe.seed, "l2_reg": None, "metric": LOG_PERPLEXITY,
                         "error": score.value, "stderr": score.stderr}
                    )  # fmt: skip
        return rows

    def baselines(self, patch_size: int) -> dict[str, Any]:
        """Per data set, "chance": the log-perplexity of decoders that see nothing, and "pixels": of those that see the
        pixels of each patch. Neither knows the model, so they are the same for all cells of a sweep."""
        train, test = (patches(part[:], patch_size) for part in (self.train, self.test))
        seen, unseen = (_means(self.scores(train, test, blind=blind)) for blind in (False, True))
        return {name: {"chance": unseen[name], "pixels": {"0": seen[name]}} for name in seen}

    def depends(self, patch_size: int) -> dict[str, Any]:
        """What the baselines depend on beside the keys of ``eval`` and the size of the images."""
        found: dict[str, Any] = {"patch_size": patch_size, "vocabulary": self.vocabulary.identity}
        return found | {"scenes": [part.source.fingerprint for part in (self.train, self.test)]}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["dataset"], []).append(row["error"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """What the last block leaves of images, normed but not pooled [B, T, D]; of a Swin the grid's places in turn."""
    found = model.forward_features(images)  # type: ignore[operator]
    return found.flatten(1, -2) if found.ndim > 3 else found


def patches(images: Tensor, size: int) -> Tensor:
    """The pixels of each patch [B, T, channels x size x size] of images [B, channels, H, W]."""
    return nn.functional.unfold(images, size, stride=size).transpose(1, 2)
