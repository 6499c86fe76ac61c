"""An MLP-Mixer of any shape, on timm's ``MlpMixer``: exact hidden sizes of both MLPs and a stated initialisation.

Blocks with LayerNorms of eps 1e-6, tanh GELU and biases everywhere, a final norm and the mean of the tokens, as in the
paper (arXiv 2105.01601). It has no positions: the token MLP knows its inputs apart.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from sovit.families.mixer import MixerShape, check_pool
from sovit.models.initial import check_init, init_all
from sovit.shape import num_patches


def build_mixer(
    shape: MixerShape,
    *,
    image_size: int,
    channels: int = 3,
    num_classes: int = 0,
    pool: str = "avg",
    init: str = "fan_in",
    head_bias: float = 0.0,
    drop_path_rate: float = 0.0,
) -> MlpMixer:
    """Build and initialise the model for images (B, channels, image_size, image_size), on the current default device.

    Arguments as those of `sovit.models.vit.build_vit`; ``pool`` is ``avg``. Under ``torch.device("meta")`` nothing is
    drawn. Raises ValueError if the image is not divisible into patches or an argument is unknown.
    """
    check_pool(pool)
    check_init(init)
    tokens, device = num_patches(image_size, shape.patch_size), torch.get_default_device()
    model = MlpMixer(
        img_size=image_size,
        patch_size=shape.patch_size,
        in_chans=channels,
        num_classes=num_classes,
        num_blocks=shape.depth,
        embed_dim=shape.width,
        # timm takes int(ratio * width); without the half a hidden size can come out one short
        mlp_ratio=((shape.token_dim + 0.5) / shape.width, (shape.mlp_dim + 0.5) / shape.width),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),  # type: ignore[arg-type]
        device="meta",
    )
    blocks: list[Any] = list(model.blocks)
    for k, block in enumerate(blocks):  # timm gives all blocks one rate
        rate = drop_path_rate * k / max(1, shape.depth - 1)
        block.drop_path = DropPath(rate) if rate else nn.Identity()
        assert block.mlp_tokens.fc1.weight.shape == (shape.token_dim, tokens)
        assert block.mlp_tokens.fc2.weight.shape == (tokens, shape.token_dim)
        assert block.mlp_channels.fc1.weight.shape == (shape.mlp_dim, shape.width)
        assert block.mlp_channels.fc2.weight.shape == (shape.width, shape.mlp_dim)
    assert len(blocks) == shape.depth
    if device.type != "meta":
        model.to_empty(device=device)
        init_all(model, blocks, init=init, head_bias=head_bias)
    return model
