"""Who trains side by side in benchmarks/throughput.py: timm's own loop, and this package's update without a trainer."""

from __future__ import annotations

import argparse
import functools
import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from sovit.config import RunConfig
from sovit.data.stream import StepSampler, make_loader
from sovit.derived import shape_of
from sovit.lit import fit
from sovit.lit.layout import Layout
from sovit.lit.ranks import Ranks
from sovit.schedule import Segment
from sovit.schema import DataConfig, EvalConfig, ModelConfig, OptimConfig, ParallelConfig, ScheduleConfig, TrainerConfig

TINY = (
    "32x4x128",
    "16x4x128",
    "256x4x128",
    "32x1x128",
    "32x16x128",
    "32x4x16",
    "32x4x512",
)  # star_tiny's center and ends
LARGE = {"So400m/14": 1, "g/14": 1, "B/16": 2, "L/16": 1, "S/16": 4}  # and the batch that a CPU takes
MICRO_BATCH = {"S/16": 512, "B/16": 256, "L/16": 128, "So400m/14": 128, "g/14": 64}  # on a GPU
LOG_EVERY = 50


def configuration(shape: str, options: argparse.Namespace) -> RunConfig:
    """The cell of a shape: the tiny star's recipe, or the same on 224 pixels with an attention pooling head."""
    tiny, gpu = shape in TINY, options.device == "cuda"
    batch = options.batch or (128 if tiny else MICRO_BATCH[shape] if gpu else LARGE[shape])
    return RunConfig(
        name="throughput",
        shape=shape,
        model=ModelConfig(
            num_heads=4 if tiny else None,
            patch_size=8 if tiny else None,
            image_size=16 if tiny else 224,
            channels=1 if tiny else 3,
            pool="avg" if tiny else "map",
            init="fan_in",
        ),
        data=DataConfig(num_classes=256 if tiny else 1000),
        optim=OptimConfig(lr=1e-4, lr_rule="by_shape" if tiny else "constant", beta2=0.98, weight_decay=0.05),
        schedule=ScheduleConfig(kind="constant"),
        eval=EvalConfig(weights="ema"),
        trainer=TrainerConfig(
            accelerator="gpu" if gpu else "cpu",
            precision=options.precision or ("bf16-mixed" if gpu else "32-true"),
            num_threads=options.threads,
            global_batch_size=batch,
            log_every_n_steps=LOG_EVERY,
            checkpoint_every_s=1e9,  # a resume point is written after minutes, not within a turn
        ),
        parallel=ParallelConfig(micro_batch=options.micro_batch or batch),
    )


class Timm:
    """The loop of timm's training script on a model of the same shape."""

    def __init__(
        self, cfg: RunConfig, compiled: bool, device: torch.device, *, fused: bool, averaged: bool = False
    ) -> None:
        shape = shape_of(cfg)
        self.model: nn.Module = VisionTransformer(
            img_size=cfg.model.image_size,
            patch_size=shape.patch_size,
            in_chans=cfg.model.channels,
            num_classes=cfg.data.num_classes,
            global_pool=cfg.model.pool,  # type: ignore[arg-type]
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.num_heads,
            mlp_ratio=(shape.mlp_dim + 0.5) / shape.width,
            class_token=False,
            fc_norm=False,
            act_layer="gelu_tanh",
        ).to(device)
        optim = cfg.optim
        extra: dict[str, Any] = {"fused": True} if fused else {}
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=optim.lr, weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2), **extra
        )
        self.plain = self.model
        self.ema = ModelEmaV3(self.model, decay=0.999) if averaged else None
        self.clip_norm, self.micro = optim.clip_norm or math.inf, cfg.parallel.micro_batch
        if compiled:
            self.model = torch.compile(self.model)  # type: ignore[assignment]
        self.loss = nn.CrossEntropyLoss()
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        parts = list(zip(images.split(self.micro or len(images)), labels.split(self.micro or len(images)), strict=True))
        for x, y in parts:
            with self.autocast():
                loss = self.loss(self.model(x), y)
                if len(parts) > 1:
                    loss = loss / len(parts)
            loss.backward()
        dispatch_clip_grad(self.model.parameters(), value=self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def average(self, step: int) -> None:
        """What the script does after a step with --model-ema."""
        assert self.ema is not None
        self.ema.update(self.plain, step=step)


class Update:
    """LitClassifier.update without a trainer."""

    def __init__(self, cfg: RunConfig, layout: Layout, device: torch.device) -> None:
        self.module = fit.build_module(cfg, Segment("trunk", 0, 10**9, 10**9, 0, ()), layout, Ranks())
        self.module.to(device)
        if self.module._prepare is not None:  # configure_model without its trainer
            self.module._prepare(self.module.model, device)
        self.optimizer = self.module.configure_optimizers()
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast(cache_enabled=False):  # as Lightning has it
            return self.module.update(images, labels, 1, self.optimizer)


class SameBatch(fit.TrainData):
    """One batch for ever, on the GPU already: fractals would not come fast enough from one process."""

    def train_dataloader(self) -> Any:
        batch = tuple(tensor.cuda() for tensor in batch_of(self.cfg))
        return make_loader(_Same(batch), StepSampler(len(batch[0]), 0, self.total_steps), 0)


class _Same(torch.utils.data.Dataset[Any]):
    def __init__(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = batch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self.batch


def batch_of(cfg: RunConfig) -> tuple[Tensor, Tensor]:
    num, model = cfg.trainer.global_batch_size, cfg.model
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(num, model.channels, model.image_size, model.image_size, generator=draw)
    return images, torch.randint(cfg.data.num_classes, (num,), generator=draw)
