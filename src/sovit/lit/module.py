"""The LightningModule: loss, update and schedule around a model that knows nothing of Lightning.

One batch of the loader is one update: the images this process has of a global batch. The module cuts it into
micro-batches itself (Lightning's manual optimisation), so the trainer counts updates whatever the devices hold at once,
and a run can go on under another number of processes or another micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sovit.config import ConfigError
from sovit.objectives import Objective

TEACHER = "teacher"  # in a resume point: which weights taught the run


def softmax_xent(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean softmax cross-entropy. logits (B, K); labels (B,) class indices, or (B, K) probabilities."""
    return F.cross_entropy(logits, labels)


def sigmoid_xent(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross-entropy, summed over the K classes, mean over the batch (arXiv 2106.04560, as in big_vision).

    logits (B, K); labels (B,) class indices, or (B, K) targets in [0, 1].
    """
    targets = F.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / len(logits)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"softmax": softmax_xent, "sigmoid": sigmoid_xent}


class LitClassifier(pl.LightningModule):
    """Pretraining by a loss of labels, or by an ``objective`` in its place, which is given the images' numbers instead.

    ``optimizer`` makes the optimiser once the model lies on its devices; ``lr_scale(step)`` multiplies its rates.
    ``prepare`` changes the model in place, for a device, once the processes are connected. ``micro_batch``: images in one
    forward pass, None for all that the process has. ``noise_seed``: of stochastic depth, drawn anew from (seed, step) at
    every step, so that a resume needs no state of a generator; None if the model draws nothing.
    """

    needs = "optim.teacher"  # the key that names the weights it needs beside its own

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        lr_scale: Callable[[int], float],
        clip_norm: float | None,
        objective: Objective | None = None,
        prepare: Callable[[nn.Module, torch.device], None] | None = None,
        micro_batch: int | None = None,
        noise_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.loss, self.objective = loss, objective
        self.lr_scale, self.clip_norm = lr_scale, clip_norm
        self.micro_batch, self.noise_seed = micro_batch, noise_seed
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.trained: list[nn.Parameter] = []  # walking the modules costs 0.2 ms a step
        self._optimizer, self._prepare = optimizer, prepare
        self._base_lr: list[float] = []
        self._alone = False  # no gradients to sum or to scale
        self._world = 1
        self._sum: Callable[[bool], Any] = bool  # told before each backward pass whether its gradients are summed

    def configure_model(self) -> None:
        if self._prepare is not None:
            self._prepare(self.model, self.trainer.strategy.root_device)
            self._prepare = None  # Lightning may call this again

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = self._optimizer(self.model)
        self._base_lr = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def loss_of(self, images: Tensor, labels: Tensor, first: int = 0) -> Tensor:
        """Mean loss of a micro-batch that begins at image number ``first`` of the run's stream."""
        if self.objective is not None:
            return self.objective(self.model, images, first)
        assert self.loss is not None
        return self.loss(self.model(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One update from this process's images (B, channels, size, size) and their labels."""
        optimizer: Any = self.optimizers()
        step = self.trainer.global_step
        if not self._alone:
            return {"loss": self.update(*batch, step, optimizer, self.manual_backward)}
        optimizer._on_before_step()  # which counts the steps, with what follows
        loss = self.update(*batch, step, optimizer.optimizer)
        optimizer._on_after_step()
        return {"loss": loss}

    def update(
        self,
        images: Tensor,
        labels: Tensor,
        step: int,
        optimizer: torch.optim.Optimizer,
        backward: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The loss of a batch, after the update of index ``step`` from it.

        An optimiser of Lightning's calls ``on_before_optimizer_step`` itself, once the gradients are unscaled.
        """
        if self.noise_seed is not None:
            torch.manual_seed((self.noise_seed << 40) + (step << 16) + self.global_rank)
        for parameter in self.trained:  # as zero_grad does, which at the tiniest shapes is 2 % of a step
            parameter.grad = None
        images = images.to(self.trained[0].dtype)  # float64, which the trainer leaves to us
        loss = self.gradients(images, labels, step, backward)
        scale = self.lr_scale(step)
        for group, base in zip(optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * scale
        if not isinstance(optimizer, LightningOptimizer):
            self.on_before_optimizer_step(optimizer)
        optimizer.step()
        return loss

    def gradients(self, images: Tensor, labels: Tensor, step: int, backward: Callable[[Tensor], None] | None) -> Tensor:
        """The loss of a batch, whose gradients the parameters have afterwards."""
        size = self.micro_batch or len(images)
        parts = list(zip(images.split(size), labels.split(size), strict=True)) if size < len(images) else []
        loss = torch.zeros((), device=images.device) if parts else None
        first = (step * self._world + self.global_rank) * len(images)  # of this process's part of the batch
        for number, (x, y) in enumerate(parts or [(images, labels)], start=1):
            self._sum(number >= len(parts))  # over the processes, after the last backward pass only
            part = self.loss_of(x, y, first)
            first += len(x)
            part = part / len(parts) if parts else part
            part.backward() if backward is None else backward(part)
            loss = part.detach() if loss is None else loss + part.detach()
        assert loss is not None
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.clip_norm is not None:
            self.grad_norm = _whole(nn.utils.clip_grad_norm_(self.trained, self.clip_norm))

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradients, before clipping; computed here if nothing is clipped."""
        if self.grad_norm is not None:
            return self.grad_norm
        return _whole(nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._teacher():
            checkpoint[TEACHER] = self._teacher()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get(TEACHER, "") != self._teacher():
            raise ConfigError(
                f"{self.needs} has other weights than when this run began; put them back, or choose another name or tag."
            )

    def _teacher(self) -> str:
        """Which weights the run needs beside its own."""
        return getattr(self.objective, "identity", "")

    def on_fit_start(self) -> None:
        strategy, wrapped = self.trainer.strategy, self.trainer.strategy.model
        self._world = self.trainer.world_size
        if (
            isinstance(strategy, SingleDeviceStrategy)
            and getattr(self.trainer.precision_plugin, "scaler", None) is None
        ):
            self._alone = True  # nothing but hooks would be left of Lightning's backward pass and optimiser step
        if isinstance(wrapped, DistributedDataParallel):
            self._sum = functools.partial(setattr, wrapped, "require_backward_grad_sync")
        elif isinstance(self.model, torch.distributed.fsdp.FSDPModule):
            self._sum = self.model.set_requires_gradient_sync


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
