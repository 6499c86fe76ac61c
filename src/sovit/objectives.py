"""Objectives that do not read the labels: masked-image modelling and distillation.

An objective is a function of (model, images, first) that gives the mean loss of images (B, channels, size, size), of which
the first is number ``first`` of the run's stream. Compute t stays the encoder's forward FLOPs per image times images seen,
as for a loss of labels: all tokens go through the encoder here too, and what masked adds is one linear layer on the hidden
tokens. A teacher's forward pass is not in t; what it costs is said where it is loaded (`sovit.lit.teacher`).
Losses of labels stand in `sovit.lit.module`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit.data.order import mix

Objective = Callable[[nn.Module, Tensor, int], Tensor]
_FLAT = 1e-6  # added to the variance of a patch, as in arXiv 2111.06377: a patch of one grey has none


def hidden_patches(seed: int, first: int, num_images: int, num_patches: int, num_hidden: int) -> Tensor:
    """(B, num_hidden) which patches of each image are hidden: a function of (seed, the image's number) alone.

    So a mask does not depend on where a run resumed, on its processes or on its micro-batches.
    """
    number = np.arange(first, first + num_images, dtype=np.int64)[:, None]
    order = np.argsort(mix(seed, number, np.arange(num_patches)[None]), axis=1)
    return torch.from_numpy(order[:, :num_hidden].copy())


def patches(images: Tensor, size: int) -> Tensor:
    """(B, N, channels * size^2) pixels of the patches of images (B, channels, H, W), row by row."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


@dataclass(frozen=True)
class Masked:
    """Masked-image modelling: predict the normed pixels of hidden patches from those that are seen.

    As SimMIM (arXiv 2111.09886): all tokens go through the encoder and one linear layer, here the model's head, predicts.
    A hidden patch is all 0, mid-grey, so its token is the bias of the patch embedding and its position: a learned mask
    token without parameters of its own. The loss is the squared error of pixels normed within their patch
    (arXiv 2111.06377), mean over hidden patches. For ViTs whose features are the mean of their tokens, with
    ``channels * patch_size^2`` outputs.
    """

    seed: int
    num_hidden: int  # of the patches of each image
    patch_size: int

    def __call__(self, model: nn.Module, images: Tensor, first: int) -> Tensor:
        pixels = patches(images, self.patch_size)
        num_images, num_patches, size = pixels.shape
        hidden = hidden_patches(self.seed, first, num_images, num_patches, self.num_hidden).to(images.device)[..., None]
        seen = pixels.scatter(1, hidden.expand(-1, -1, size), 0).transpose(1, 2)
        tokens = model.forward_features(  # type: ignore[operator]
            F.fold(seen, images.shape[-2:], self.patch_size, stride=self.patch_size)
        )
        # Each token is pooled by itself: the head's weights are gathered for this method where they are sharded.
        predicted = model.forward_head(_taken(tokens, hidden).unsqueeze(1))  # type: ignore[operator]
        wanted = _taken(pixels, hidden)
        variance, mean = torch.var_mean(wanted, dim=1, keepdim=True)
        return F.mse_loss(predicted.to(wanted.dtype), (wanted - mean) / (variance + _FLAT).sqrt())


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """(B * hidden, D) of values (B, N, D) at places (B, hidden, 1)."""
    return values.gather(1, places.expand(-1, -1, values.shape[2])).flatten(0, 1)


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(logits / T)), mean over the batch; both (B, K) (arXiv 1503.02531).

    The factor T^2 keeps the size of gradients while the temperature changes. Without a temperature (1) it is the softmax
    cross-entropy against the teacher's probabilities, less their entropy.
    """
    mine = F.log_softmax(logits / temperature, dim=-1)
    theirs = F.log_softmax(wanted / temperature, dim=-1)
    return temperature**2 * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


class Distilled:
    """Distillation: the targets are the softmax of a teacher's logits on the same images; labels are not read.

    The teacher is no part of the module that trains: neither its weights nor its state are saved, averaged or sharded, and
    every process holds all of it. It computes in the precision of the images. ``identity`` says which weights it has: a
    run does not go on with others.
    """

    def __init__(self, teacher: nn.Module, temperature: float, identity: str = "") -> None:
        self.teacher, self.temperature = teacher.eval().requires_grad_(False), temperature
        self.identity = identity

    def __call__(self, model: nn.Module, images: Tensor, first: int) -> Tensor:
        held = next(self.teacher.parameters())
        if (held.device, held.dtype) != (images.device, images.dtype):
            self.teacher.to(images.device, images.dtype)
        with torch.no_grad():
            wanted = self.teacher(images)
        return distillation_loss(model(images), wanted, self.temperature)
