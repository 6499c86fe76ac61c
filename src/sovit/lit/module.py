"""The LightningModule: loss, optimiser and schedule around a model that knows nothing of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def softmax_xent(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean softmax cross-entropy. logits (B, K), labels (B,) class indices."""
    return F.cross_entropy(logits, labels)


def sigmoid_xent(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross-entropy, summed over the K classes, mean over the batch (arXiv 2106.04560, as in big_vision)."""
    targets = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"softmax": softmax_xent, "sigmoid": sigmoid_xent}


class LitClassifier(pl.LightningModule):
    """Supervised pretraining. `optimizer` is built over the model's parameters; `lr_scale(step)` multiplies its rates."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        lr_scale: Callable[[int], float],
        clip_norm: float | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.lr_scale = lr_scale
        self.clip_norm = clip_norm
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.trained: list[Tensor] = [
            p for p in model.parameters() if p.requires_grad
        ]  # walking the modules costs 0.2 ms a step

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return self.loss(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_scale)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.trained, self.clip_norm)

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradients, before clipping; computed here if nothing is clipped."""
        if self.grad_norm is not None:
            return self.grad_norm
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
