"""A trained model for other classes and another image size: a fresh classifier, and its positions interpolated.

Nothing is trained here. Only the table of positions depends on the image size of a vision transformer; a model that has
more than that to change is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sovit.config import ConfigError, RunConfig
from sovit.derived import shape_of
from sovit.lit.fit import build_model
from sovit.lit.trained import Trained

POSITIONS = ("bilinear", "bicubic")
_POSITIONS = "pos_embed"


def check_size(trained: Trained, size: int, *, key: str = "task.image_size") -> None:
    """Raise ConfigError unless the model can be had for images of ``size`` pixels. Allocates nothing."""
    patch, own = shape_of(trained.cfg).patch_size, trained.cfg.model.image_size
    if size < patch or size % patch:
        near = patch * max(1, round(size / patch))
        raise ConfigError(
            f"{key}={size} is not divisible into patches of {patch} pixels; the nearest size that is: {near}."
        )
    try:
        with torch.device("meta"):
            model = build_model(_asked(trained.cfg, size, trained.cfg.data.num_classes, 0.0))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    wanted, apart = model.state_dict(), {_POSITIONS, *_head(model)}
    if any(wanted[name].shape != tensor.shape for name, tensor in trained.weights.tensors.items() if name not in apart):
        raise ConfigError(
            f"{key}={size}: at another size than {own} pixels more of this model changes than its positions; give {own}."
        )


def resample(table: Tensor, size: int, rule: str) -> Tensor:
    """Positions (1, h h, width) for a square grid of ``size`` x ``size``; the same tensor if that is the grid it has.

    ``bilinear``: corners on corners, no smoothing: big_vision's rule, scipy's zoom of order 1. ``bicubic``: timm's default,
    edges on edges, smoothed where the grid shrinks. Prefix tokens have no positions here.
    """
    if rule == "bilinear":
        return resample_abs_pos_embed(
            table, [size, size], num_prefix_tokens=0, interpolation="bilinear", antialias=False, align_corners=True
        )
    return resample_abs_pos_embed(table, [size, size], num_prefix_tokens=0)


def adapted(
    trained: Trained,
    *,
    image_size: int,
    num_classes: int,
    head_bias: float = 0.0,
    positions: str = "bilinear",
    seed: int | None = None,
) -> nn.Module:
    """A copy of the model with its weights for images of ``image_size`` and a classifier of ``num_classes``.

    The classifier's kernel is zero and its bias ``head_bias``. Fixed positions are interpolated as well: at twice the
    size the same place of an image keeps its position. No stochastic depth. ``seed``: instead of the trained weights, a
    random initialisation. `check_size` says whether it can be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        model = build_model(_asked(trained.cfg, image_size, num_classes, head_bias))
    if seed is not None:
        return model
    head = _head(model)
    tensors = {name: tensor.clone() for name, tensor in trained.weights.tensors.items() if name not in head}
    table = tensors.get(_POSITIONS)
    if table is not None:
        wanted = model.state_dict()[_POSITIONS]
        tensors[_POSITIONS] = resample(table, math.isqrt(wanted.shape[1]), positions)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= head and not unexpected, f"not loaded: {missing}, {unexpected}"
    return model


def _head(model: nn.Module) -> set[str]:
    """The names of the classifier's parameters."""
    own = {id(parameter) for parameter in model.get_classifier().parameters()}  # type: ignore[operator]
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _asked(cfg: RunConfig, image_size: int, num_classes: int, head_bias: float) -> RunConfig:
    """The configuration of a classifier of labels, whatever the model was trained by."""
    return replace(
        cfg,
        model=replace(cfg.model, image_size=image_size, head_bias=head_bias, drop_path_rate=0.0),
        data=replace(cfg.data, num_classes=num_classes),
        optim=replace(cfg.optim, loss="softmax"),
    )
