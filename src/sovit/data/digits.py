"""Handwritten digits: the 1797 grey 8 x 8 images that ship with scikit-learn (UCI optdigits), as a transfer target."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

NUM_SUPPORT = 600  # images in the support pool: at least 57 of every digit, enough for 25 shots


def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support images, support labels, test images, test labels, split at a fixed place in scikit-learn's order.

    Images are float32 [N, 1, size, size] in [-1, 1], bilinearly resized from 8 x 8; labels int64 [N] in 0..9.
    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} is below 1; choose the image size in pixels.")
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1  # grey values are 0..16
    images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).long()
    return images[:NUM_SUPPORT], labels[:NUM_SUPPORT], images[NUM_SUPPORT:], labels[NUM_SUPPORT:]
