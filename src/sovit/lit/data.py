"""The LightningDataModule of the embedded images, and the few-shot targets a configuration names."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from sovit.config import RunConfig
from sovit.data.fractals import FractalWorld
from sovit.data.stream import FewShotSet, FractalDataset, StepSampler, digits_fewshot, fractal_fewshot, make_loader


def world_of(cfg: RunConfig) -> FractalWorld:
    return FractalWorld(
        seed=cfg.data.seed,
        num_classes=cfg.data.num_classes,
        num_heldout=cfg.data.num_heldout,
        size=cfg.model.image_size,
        rotation=cfg.data.rotation,
    )


class FractalData(pl.LightningDataModule):
    """Batch k of the run's own stream, from the trainer's current step to ``total_steps``."""

    def __init__(self, cfg: RunConfig, total_steps: int) -> None:
        super().__init__()
        self.cfg, self.total_steps = cfg, total_steps

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        cfg = self.cfg
        dataset = FractalDataset(world_of(cfg), stream=cfg.seed, channels=cfg.model.channels)
        sampler = StepSampler(cfg.trainer.global_batch_size, self.trainer.global_step, self.total_steps)
        return make_loader(dataset, sampler, cfg.data.num_workers)


def fewshot_sets(cfg: RunConfig) -> list[FewShotSet]:
    """The targets of ``eval.datasets``, at the model's image size and number of channels."""
    build = {
        "fractals": lambda: fractal_fewshot(world_of(cfg), cfg.model.channels),
        "digits": lambda: digits_fewshot(cfg.model.image_size, cfg.model.channels),
    }
    return [build[name]() for name in cfg.eval.datasets]
