"""The LightningModule of a text tower: a contrastive loss of its embeddings and the features of a locked image tower.

The loss is that of the whole global batch whatever the number of processes (`sovit.language.contrastive`) and of
micro-batches. With several of these the texts are embedded twice: first all that a process has, without keeping
activations, for the loss and its gradient by the embeddings; then micro-batch by micro-batch, to carry that gradient on to
the weights (as in GradCache, arXiv 2101.06983). That is the same gradient but for the order of sums, for one more forward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit.language.contrastive import sigmoid_loss, softmax_loss
from sovit.lit.locked import Locked
from sovit.lit.module import LitClassifier

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _softmax(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor | None) -> Tensor:
    return softmax_loss(images, texts, log_scale)


PAIR_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid_loss, "softmax": _softmax}  # type: ignore[dict-item]


class LitTower(LitClassifier):
    """Trains a text tower; "labels" of the other methods are tokens [B, length] here.

    ``locked`` lies outside of the module's state. ``micro_batch``: texts in one forward pass, None for all.
    """

    needs = Locked.kind

    def __init__(self, model: nn.Module, *, locked: Locked, loss: PairLoss, **options: Any) -> None:
        super().__init__(model, loss=None, **options)
        self._locked, self.pair_loss = (locked,), loss  # in a tuple: no part of the module

    @property
    def locked(self) -> Locked:
        return self._locked[0]

    def gradients(self, images: Tensor, tokens: Tensor, step: int, backward: Callable[[Tensor], None] | None) -> Tensor:
        size = self.micro_batch or len(tokens)
        features = torch.cat([self.locked.images(part) for part in images.split(size)])
        if size >= len(tokens):
            self._sum(True)
            loss = self._loss(features, *self.model.forward_contrast(tokens))  # type: ignore[operator]
            loss.backward() if backward is None else backward(loss)
            return loss.detach()
        parts = tokens.split(size)
        with torch.no_grad():
            embedded = [self.model.forward_contrast(part) for part in parts]  # type: ignore[operator]
        texts = torch.cat([one[0] for one in embedded])
        numbers = [one for one in embedded[0][1:] if one is not None]  # scale and bias
        inputs = [one.detach().requires_grad_() for one in (texts, *numbers)]
        loss = self._loss(features, *inputs)
        slopes = torch.autograd.grad(loss, inputs)
        for number, (part, slope) in enumerate(zip(parts, slopes[0].split(size), strict=True), start=1):
            last = number == len(parts)
            self._sum(last)  # over the processes, after the last backward pass only
            again = self.model.forward_contrast(part)  # type: ignore[operator]
            linear = (again[0] * slope).sum()
            for value, by in zip([one for one in again[1:] if one is not None], slopes[1:], strict=True):
                linear = linear + (value * by).sum() * last  # once; a gradient of 0 else, that no process waits for one
            linear.backward() if backward is None else backward(linear)
        return loss.detach()

    def _loss(self, features: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.pair_loss(features, F.normalize(texts, dim=-1), log_scale, bias)

    def _teacher(self) -> str:
        return self.locked.sha256
