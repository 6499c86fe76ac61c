"""Fifteen corruptions of an image at five severities, in the families of noise, blur, weather and digital.

The families are those of Hendrycks & Dietterich (arXiv 1903.12261). Drawing and constants are this module's own, lengths
are shares of the image's side, and so errors compare between models on the same images, not with published ones. The
result is a function of (seed, number of the image, kind, severity), rounded to 8 bits a channel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sovit.data.order import mix

Draws = Sequence[np.random.Generator]  # one an image
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, kind: str, severity: int, *, first: int = 0, seed: int = 0) -> Tensor:
    """Images (B, channels, size, size) in [-1, 1], of numbers ``first`` .. first + B - 1, corrupted. Raises ValueError."""
    if kind not in KINDS or severity not in SEVERITIES:
        raise ValueError(f"{kind!r} at severity {severity} is no corruption; there are {', '.join(KINDS)} at 1 to 5.")
    keys = mix(seed, list(KINDS).index(kind), severity, first + np.arange(len(images))).tolist()
    draws = [np.random.Generator(np.random.Philox(key)) for key in keys]
    found = KINDS[kind](images.float().add(1).div(2), severity - 1, draws)
    return found.clamp(0, 1).mul(255).round().div(127.5).sub(1)


def _gaussian_noise(x: Tensor, level: int, draws: Draws) -> Tensor:
    return x + (0.05, 0.09, 0.14, 0.2, 0.3)[level] * _normal(draws, x.shape[1:])


def _shot_noise(x: Tensor, level: int, draws: Draws) -> Tensor:
    photons = (60.0, 25.0, 12.0, 6.0, 3.0)[level]
    counts = [draw.poisson(photons * image.double().numpy()) for draw, image in zip(draws, x, strict=True)]
    return torch.from_numpy(np.stack(counts)).float() / photons


def _impulse_noise(x: Tensor, level: int, draws: Draws) -> Tensor:
    share = (0.03, 0.06, 0.1, 0.17, 0.27)[level]
    uniform = torch.from_numpy(np.stack([draw.random(x.shape[1:]) for draw in draws]))
    return torch.where(uniform < share / 2, 0.0, torch.where(uniform > 1 - share / 2, 1.0, x))


def _defocus_blur(x: Tensor, level: int, draws: Draws) -> Tensor:
    radius = (0.015, 0.025, 0.04, 0.055, 0.075)[level] * x.shape[-1]
    reach = math.ceil(radius)
    away = torch.arange(-reach, reach + 1).float()
    distance = (away[:, None] ** 2 + away**2).sqrt()
    return _filtered(x, (radius + 0.5 - distance).clamp(0, 1)[None].expand(len(x), -1, -1))  # its rim softened


def _motion_blur(x: Tensor, level: int, draws: Draws) -> Tensor:
    length = (0.06, 0.09, 0.13, 0.18, 0.25)[level] * x.shape[-1]
    return _smeared(x, length, [draw.uniform(0, math.pi) for draw in draws])


def _zoom_blur(x: Tensor, level: int, draws: Draws) -> Tensor:
    most = (1.08, 1.14, 1.2, 1.28, 1.4)[level]
    zooms = torch.linspace(1, most, 9)
    return torch.stack([_moved(x, _grid(x) / zoom) for zoom in zooms]).mean(0)


def _gaussian_blur(x: Tensor, level: int, draws: Draws) -> Tensor:
    sigma = (0.015, 0.025, 0.035, 0.05, 0.07)[level] * x.shape[-1]
    reach = math.ceil(3 * sigma)
    line = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    return _filtered(x, (line[:, None] * line)[None].expand(len(x), -1, -1))


def _fog(x: Tensor, level: int, draws: Draws) -> Tensor:
    share = (0.25, 0.35, 0.45, 0.55, 0.65)[level]
    return x * (1 - share) + share * (0.75 + 0.25 * _clouds(x, draws))


def _snow(x: Tensor, level: int, draws: Draws) -> Tensor:
    share, veil = ((0.01, 0.1), (0.02, 0.15), (0.03, 0.2), (0.045, 0.25), (0.065, 0.3))[level]
    coarse = (
        torch.from_numpy(np.stack([draw.random((1, 40, 40)) for draw in draws])) < share
    )  # flakes of 1/40 of the side
    flakes = F.interpolate(coarse.float(), size=x.shape[2:], mode="bilinear", antialias=True)
    fall = [draw.uniform(math.pi / 4, 3 * math.pi / 4) for draw in draws]
    return torch.maximum(x * (1 - veil) + veil, (2.5 * _smeared(flakes, 0.06 * x.shape[-1], fall)).clamp(0, 1))


def _frost(x: Tensor, level: int, draws: Draws) -> Tensor:
    cover = (0.3, 0.4, 0.5, 0.6, 0.7)[level]
    ridges = (1 - _clouds(x, draws).abs()) ** 6  # thin bright lines where the clouds cross zero
    return x * (1 - cover / 2) + cover * ridges


def _brightness(x: Tensor, level: int, draws: Draws) -> Tensor:
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[level]


def _contrast(x: Tensor, level: int, draws: Draws) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (0.6, 0.45, 0.3, 0.2, 0.1)[level] * (x - mean)


def _elastic(x: Tensor, level: int, draws: Draws) -> Tensor:
    reach = (0.02, 0.035, 0.05, 0.07, 0.1)[level]
    coarse = torch.from_numpy(np.stack([draw.standard_normal((2, 6, 6)) for draw in draws])).float()
    field = F.interpolate(coarse, size=x.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return _moved(x, _grid(x) + 2 * reach * field)


def _pixelate(x: Tensor, level: int, draws: Draws) -> Tensor:
    size = max(2, round((0.7, 0.55, 0.45, 0.35, 0.25)[level] * x.shape[-1]))
    return F.interpolate(F.interpolate(x, size=(size, size), mode="area"), size=x.shape[2:], mode="nearest")


def _jpeg(x: Tensor, level: int, draws: Draws) -> Tensor:
    quality = (30, 20, 14, 9, 5)[level]
    return torch.stack([_compressed(image, quality) for image in x])


KINDS: dict[str, Callable[[Tensor, int, Draws], Tensor]] = {  # appended to only: the place is part of the draws
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "gaussian_blur": _gaussian_blur,
    "fog": _fog,
    "snow": _snow,
    "frost": _frost,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}


def _normal(draws: Draws, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([draw.standard_normal(tuple(shape)) for draw in draws])).float()


def _filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Each image (B, C, H, W) by its own kernel (B, K, K), normalised; the rim is repeated outwards."""
    batch, channels, height, width = x.shape
    reach = kernels.shape[-1] // 2
    padded = F.pad(x, (reach,) * 4, mode="replicate").reshape(
        1, batch * channels, height + 2 * reach, width + 2 * reach
    )
    weights = (kernels / kernels.sum((1, 2), keepdim=True)).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded, weights.to(x.dtype), groups=batch * channels).reshape(x.shape)


def _smeared(x: Tensor, length: float, angles: Sequence[float]) -> Tensor:
    """Along a line of so many pixels at each image's own angle."""
    reach = math.ceil(length / 2)
    away = torch.arange(-reach, reach + 1).float()
    y, x_away = torch.meshgrid(away, away, indexing="ij")
    cosine = torch.tensor(angles).cos().float()[:, None, None]
    sine = torch.tensor(angles).sin().float()[:, None, None]
    along, beside = cosine * x_away + sine * y, cosine * y - sine * x_away
    return _filtered(x, (length / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - beside.abs()).clamp(0, 1))


def _clouds(x: Tensor, draws: Draws) -> Tensor:
    """Smooth noise (B, 1, H, W) of four octaves, each half as strong as the one before, scaled to -1 .. 1 an image."""
    total = torch.zeros(len(x), 1, *x.shape[2:])
    for octave in range(4):
        side = 3 * 2**octave
        grid = torch.from_numpy(np.stack([draw.standard_normal((1, side, side)) for draw in draws])).float()
        total += 2.0**-octave * F.interpolate(grid, size=x.shape[2:], mode="bicubic", align_corners=True)
    return total / total.abs().amax((1, 2, 3), keepdim=True)


def _grid(x: Tensor) -> Tensor:
    """Where each pixel looks (1, H, W, 2), in units of half the image."""
    identity = torch.eye(2, 3)[None]
    return F.affine_grid(identity, [1, 1, *x.shape[2:]], align_corners=False)


def _moved(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="reflection", align_corners=False)


def _compressed(image: Tensor, quality: int) -> Tensor:
    levels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(out, "JPEG", quality=quality)
    back = np.array(Image.open(out))
    return torch.from_numpy(back.reshape(levels.shape)).permute(2, 0, 1).float() / 255
