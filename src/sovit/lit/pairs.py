"""Images with texts that a configuration names, and the LightningDataModule of a text tower's training stream."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from sovit.config import ConfigError, RunConfig
from sovit.data.order import mix
from sovit.language.examples import TextImages
from sovit.language.files import FileTexts, open_pairs
from sovit.language.pairs import Pairs, PairStream, finish_pairs
from sovit.language.scenes import scenes
from sovit.language.vocabulary import Vocabulary
from sovit.lit.data import TrainData, bad_files, checked, world_of


def pairs_of(cfg: RunConfig) -> TextImages:
    """What a text tower is trained on. Raises ConfigError if it cannot be, or is another number of pairs than was said."""
    data, model = cfg.data, cfg.model
    if data.name == "scenes":
        assert data.num_examples is not None
        about = {"num": data.num_examples, "size": model.image_size, "channels": model.channels}
        return checked(scenes, "train", **about, world=world_of(cfg))
    found = checked(
        open_pairs,
        data.name,
        data.root,
        captions=data.captions,
        split=data.split,
        image_key=data.image_key,
        text_key=data.text_key,
        size=model.image_size,
        channels=model.channels,
        threads=max(1, min(data.num_workers, os.cpu_count() or 1)),
    )
    num = len(found.captioned())
    if data.num_examples not in (None, num):
        raise ConfigError(
            f"data.num_examples={data.num_examples}, but {found.where} holds {num} images with captions; write "
            f"data.num_examples={num}, or null."
        )
    return found


class PairData(TrainData):
    """Batch k of the run's pairs: images and tokens. Else as `TrainData`. Raises ConfigError if no image has a caption."""

    def __init__(
        self, cfg: RunConfig, total_steps: int, *, vocabulary: Vocabulary, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(cfg, total_steps, rank=rank, world=world)
        self.vocabulary = vocabulary
        self._seen = self._cut = 0  # captions

    def stream(self) -> PairStream:
        cfg = self.cfg
        seed = int(mix(cfg.data.seed, cfg.seed))
        group = cfg.data.shuffle_shards if cfg.data.name == "pairs" else 1
        return checked(PairStream, pairs_of(cfg), self.vocabulary, cfg.text.length, seed, group=group)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """(images, tokens) of a batch that has arrived on its device."""
        if not isinstance(batch, Pairs):
            return batch
        for name, reason in batch.bad:
            bad_files(self.cfg, self.rank).note(name, reason)
        self._seen += len(batch.tokens)
        self._cut += batch.cut
        return finish_pairs(batch)

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self._cut and self.rank == 0:
            print(
                f"{self._cut:,} of {self._seen:,} captions had more than text.length={self.cfg.text.length} tokens and were "
                "cut.",
                flush=True,
            )
        self._seen = self._cut = 0


def sources_of(cfg: RunConfig) -> list[Any]:
    """Lists of files of a text tower's run, for what could not be used of them."""
    from sovit.lit.text_targets import folders_of  # which builds on this module

    source = pairs_of(cfg)
    return [*([source] if isinstance(source, FileTexts) else []), *folders_of(cfg)]
