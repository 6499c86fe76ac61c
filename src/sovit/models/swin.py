"""A Swin transformer of any shape, on timm's ``SwinTransformer``: exact MLP dimensions and a stated initialisation.

As published (arXiv 2103.14030): pre-norm blocks with LayerNorms of eps 1e-5, GELU, biases everywhere but in the merging of
patches, a norm of the embedded patches and a final one, the mean of the tokens. Which stages there are: `SwinShape`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    get_relative_position_index,
)

from sovit.families.mixer import check_pool
from sovit.families.swin import SwinShape
from sovit.models.initial import check_init, init_all


def build_swin(
    shape: SwinShape,
    *,
    image_size: int,
    channels: int = 3,
    num_classes: int = 0,
    pool: str = "avg",
    init: str = "fan_in",
    head_bias: float = 0.0,
    drop_path_rate: float = 0.0,
    fused_attention: bool = True,
) -> SwinTransformer:
    """Build and initialise the model for images (B, channels, image_size, image_size), on the current default device.

    Arguments as those of `sovit.models.vit.build_vit`; ``pool`` is ``avg``. The features of an image have the width of the
    last stage. Under ``torch.device("meta")`` nothing is drawn, and what follows from the shape is computed all the same,
    on the CPU. Raises ValueError if patches, merging or windows do not divide the image, or an argument is unknown.
    """
    check_pool(pool)
    check_init(init)
    stages, device = list(shape.each(image_size)), torch.get_default_device()
    model = SwinTransformer(
        img_size=image_size,
        patch_size=shape.patch_size,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=shape.width,
        depths=shape.depths,
        num_heads=tuple(one.num_heads for one in stages),
        window_size=[(one.window, one.window) for one in stages],  # type: ignore[arg-type]
        # timm takes int(ratio * width of the stage): one ratio for all with the half of the ViT would grow the later ones
        mlp_ratio=tuple((one.mlp_dim + 0.5) / one.width for one in stages),  # type: ignore[arg-type]
        drop_path_rate=drop_path_rate,
        weight_init="skip",
        device="meta",
    )
    layers: list[Any] = list(model.layers)
    for layer, one in zip(layers, stages, strict=True):
        assert len(layer.blocks) == one.depth
        for block in layer.blocks:
            assert block.mlp.fc1.weight.shape == (one.mlp_dim, one.width)
            assert block.mlp.fc2.weight.shape == (one.width, one.mlp_dim)
            assert block.attn.qkv.weight.shape == (3 * one.width, one.width)
            assert block.attn.window_size == (one.window, one.window)
            assert block.attn.num_heads == one.num_heads
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = fused_attention  # type: ignore[misc]  # final for TorchScript only
    if device.type != "meta":
        model.to_empty(device=device)
    _fill_fixed(model)
    if device.type != "meta":
        model.to(device)
        init_all(model, [block for layer in layers for block in layer.blocks], init=init, head_bias=head_bias)
    return model


def _fill_fixed(model: SwinTransformer) -> None:
    """Compute index and mask of every window; timm leaves them out of the state, and those of a meta device are empty."""
    module: Any
    cpu = torch.device("cpu")
    with cpu:
        for module in model.modules():
            if isinstance(module, WindowAttention):
                index = get_relative_position_index(*module.window_size)
                module.register_buffer("relative_position_index", index, persistent=False)
            elif isinstance(module, SwinTransformerBlock):
                mask = module.get_attn_mask(device=cpu, dtype=torch.float32)
                module.register_buffer("attn_mask", mask, persistent=False)
