"""The first weights of matrices and biases, one meaning of ``init`` for every family.

``fan_in``: matrices normal with std 1 / sqrt(fan in), those that write to the residual stream divided by sqrt(2 blocks)
too; biases zero. ``big_vision``: matrices Xavier uniform, with q, k and v three matrices; MLP biases normal with std
1e-6, other biases zero; patch convolution normal with std 1 / sqrt(fan in), truncated at two of its scales (flax's default).
What else a ViT has is drawn in `sovit.models.vit`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import lecun_normal_
from torch import Tensor, nn

INITS = ("fan_in", "big_vision")
STACKED = {"qkv": 3, "kv": 2}  # timm stacks these square matrices in one; Xavier on the stack would be too small
TO_RESIDUAL = ("proj", "fc2")  # the layers of a serial block that write to the residual stream
TABLE_STD = 0.02  # of Swin's relative positions, truncated, as published


def check_init(init: str) -> None:
    """Raise ValueError unless ``init`` is one of INITS."""
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; use one of {', '.join(INITS)}.")


def fan_in_normal(weight: Tensor) -> None:
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def init_bias(bias: Tensor, *, mlp: bool, big_vision: bool) -> None:
    if mlp and big_vision:
        nn.init.normal_(bias, std=1e-6)
    else:
        nn.init.zeros_(bias)


@torch.no_grad()
def init_all(model: Any, blocks: list[nn.Module], *, init: str, head_bias: float) -> None:
    """Draw every weight of a timm model made of patches, linear maps, LayerNorms and tables of relative positions.

    ``blocks``: those that add to the residual stream. Norms are the identity, the classifier's kernel is zero and its bias
    ``head_bias``, as for ViTs. Raises ValueError for an unknown ``init``.
    """
    check_init(init)
    big_vision, head = init == "big_vision", model.get_classifier()
    inside = {id(module) for block in blocks for module in block.modules()}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif module is head and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, head_bias)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if not big_vision:
                fan_in_normal(module.weight)
                if id(module) in inside and leaf in TO_RESIDUAL:
                    module.weight.div_(math.sqrt(2 * len(blocks)))
            elif isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
            else:
                for matrix in module.weight.chunk(STACKED.get(leaf, 1)):
                    nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                init_bias(module.bias, mlp=leaf in ("fc1", "fc2"), big_vision=big_vision)
        table = getattr(module, "relative_position_bias_table", None)
        if table is not None:
            nn.init.trunc_normal_(table, std=TABLE_STD)
