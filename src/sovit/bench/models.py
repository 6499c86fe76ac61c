"""The model that is measured, and timm's own of the same shape, by arguments that `timm.create_model` takes."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from sovit.bench.settings import Subject
from sovit.memory import Model
from sovit.models.vit import build_vit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENTRY = "vit_small_patch16_224"  # any of timm's plain ones: every argument that tells them apart is given


def build(subject: Subject, image_size: int) -> nn.Module:
    """The model of a subject for images of this size, on the CPU: random weights, or those of the checkpoint.

    Learned positions of another size are interpolated (timm's bicubic), fixed ones computed anew.
    """
    model = subject.at(image_size)
    if subject.source is None:
        torch.manual_seed(0)
        return build_vit(**vars(model))
    from sovit.lit.trained import load  # Lightning loads here, which random weights do not need

    trained = load(subject.source).model
    if image_size == subject.model.image_size:
        return trained
    resized, state = build_vit(**vars(model)), trained.state_dict()
    patch, before = model.shape.patch_size, subject.model.image_size
    state["pos_embed"] = (
        resample_abs_pos_embed(
            state["pos_embed"], [image_size // patch] * 2, [before // patch] * 2, num_prefix_tokens=0
        )
        if model.pos_embed == "learned"
        else resized.state_dict()["pos_embed"]
    )
    resized.load_state_dict(state)
    return resized


def timm_arguments(model: Model) -> dict[str, Any] | None:
    """Arguments of ``timm.create_model`` for the same network; None where it has no name for a part of it."""
    shape = model.shape
    if model.block != "serial" or model.norm not in ("layernorm", "rmsnorm"):
        return None
    return {
        "model_name": ENTRY,
        "img_size": model.image_size,
        "patch_size": shape.patch_size,
        "in_chans": model.channels,
        "num_classes": model.num_classes,
        "global_pool": model.pool,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": (shape.mlp_dim + 0.5) / shape.width,  # timm rounds down, and comes out one short without
        "class_token": model.pool == "token",
        "no_embed_class": True,
        "fc_norm": False,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "norm_layer": model.norm,
        "act_layer": "gelu_tanh",
    }


def build_timm(arguments: dict[str, Any]) -> nn.Module:
    """timm's model of these arguments, with random weights."""
    torch.manual_seed(0)
    built: nn.Module = timm.create_model(**arguments)
    return built
