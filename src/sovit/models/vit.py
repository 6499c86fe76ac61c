"""A vision transformer of any shape, on timm's ``VisionTransformer``: exact MLP dimensions and a stated initialisation.

Pre-norm blocks, biases everywhere, tanh GELU, LayerNorm with eps 1e-6, one position table for the patch tokens, and a
final norm of the tokens before pooling, as in big_vision (google-research/big_vision, models/vit.py), where SoViT
(arXiv 2305.13035) was trained. The changes of ViT-22B (arXiv 2302.05442, section 2) are options of ``build_vit``.
Not here: loss, optimiser, other resolutions than the one built for.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, LayerNorm, RmsNorm, lecun_normal_
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from sovit.flops import check_block, check_pool, check_pos_embed
from sovit.models.initial import STACKED, TO_RESIDUAL, check_init, fan_in_normal, init_bias
from sovit.shape import Shape, num_patches


class _RmsNorm(RmsNorm):
    """timm's, in the wider of two precisions, as CUDA's autocast has it; on a CPU torch has no kernel for two, and warns."""

    def forward(self, x: Tensor) -> Tensor:
        wider = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wider), self.normalized_shape, self.weight.to(wider), self.eps)


_BLOCKS: dict[str, Any] = {"serial": Block, "parallel": functools.partial(ParallelScalingBlock, fuse_out_proj=True)}
_NORMS: dict[str, Any] = {
    "layernorm": None,  # timm's default
    "layernorm_nobias": functools.partial(LayerNorm, bias=False),
    "rmsnorm": _RmsNorm,
}


def build_vit(
    shape: Shape,
    *,
    image_size: int,
    channels: int = 3,
    num_classes: int = 0,
    pool: str = "map",
    pos_embed: str = "learned",
    pos_embed_std: float | None = None,
    block: str = "serial",
    qk_norm: bool = False,
    qkv_bias: bool = True,
    norm: str = "layernorm",
    init: str = "fan_in",
    head_bias: float = 0.0,
    drop_path_rate: float = 0.0,
    fused_attention: bool = True,
) -> VisionTransformer:
    """Build and initialise the model for images (B, channels, image_size, image_size), on the current default device.

    ``pool``: ``map`` (attention pooling head with the MLP dimension of the body), ``avg`` (mean of the normed tokens)
    or ``token`` (class token). ``pos_embed``: ``learned``, or ``sincos2d``, a fixed buffer. ``num_classes`` 0 leaves
    the classifier out. ``drop_path_rate`` is that of the last block, rising linearly from 0. ``init`` and the other
    arguments of the initialisation: see ``init_weights``. ``fused_attention`` False writes attention out as matrix
    products, which a FLOP counter can see.

    ViT-22B's: ``block`` ``parallel`` computes x + attention(norm(x)) + mlp(norm(x)), in one product for q, k, v and the
    first MLP layer and another for both outputs, which then share a bias and stochastic depth. ``qk_norm`` norms queries
    and keys within each head before their product. ``qkv_bias`` False leaves out those three biases of the blocks; the
    MLP's stay. ``norm`` is that of every norm: ``layernorm``, ``layernorm_nobias``, or ``rmsnorm``, which does not centre
    either. The paper does not say whether its attention pooling differs from "Scaling Vision Transformers" (arXiv
    2106.04560): here it keeps its biases, and has no norms of queries and keys.

    Weights depend on torch's generator and the arguments alone. Under ``torch.device("meta")`` nothing is drawn.
    Raises ValueError, before anything is built, if the image is not divisible into patches or an argument is unknown.
    """
    patches = num_patches(image_size, shape.patch_size)
    check_pool(pool)
    check_pos_embed(pos_embed, shape.width)
    check_block(block, norm)
    _check_init(init, pos_embed, pos_embed_std)
    for name, value, least in (("channels", channels, 1), ("num_classes", num_classes, 0)):
        if value < least:
            raise ValueError(f"{name}={value} is below {least}.")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate} is not in [0, 1).")

    device = torch.get_default_device()
    model = VisionTransformer(
        img_size=image_size,
        patch_size=shape.patch_size,
        in_chans=channels,
        num_classes=num_classes,
        global_pool=cast(Literal["map", "avg", "token"], pool),
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        # timm takes int(width * ratio): mlp_dim / width comes out one short for 5 % of pairs, such as (448, 976).
        mlp_ratio=(shape.mlp_dim + 0.5) / shape.width,
        class_token=pool == "token",
        no_embed_class=True,  # the class token has no position, as in big_vision
        fc_norm=False,
        block_fn=_BLOCKS[block],
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        norm_layer=_NORMS[norm],
        drop_path_rate=drop_path_rate,
        weight_init="skip",
        act_layer="gelu_tanh",
        device="meta",  # the draws of the constructors would be thrown away
    )
    if pos_embed == "sincos2d":
        del model.pos_embed
        model.register_buffer("pos_embed", torch.empty(1, patches, shape.width, device="meta"))
    for module in model.modules():
        if isinstance(module, Attention | AttentionPoolLatent | ParallelScalingBlock):
            module.fused_attn = fused_attention  # type: ignore[misc]  # final for TorchScript only
    _assert_built(model, shape, patches)
    if device.type != "meta":
        model.to_empty(device=device)
        init_weights(model, init=init, pos_embed_std=pos_embed_std, head_bias=head_bias)
    return model


def features(model: VisionTransformer, images: Tensor) -> Tensor:
    """Pooled features (B, width) before the classifier, of images (B, channels, image_size, image_size)."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


@torch.no_grad()
def init_weights(
    model: VisionTransformer, *, init: str = "fan_in", pos_embed_std: float | None = None, head_bias: float = 0.0
) -> None:
    """Draw every weight of a model built by ``build_vit``, in place; what was there before does not matter.

    A product that fuses several matrices is drawn matrix by matrix, each as if it stood alone.
    ``fan_in``: matrices normal with std 1 / sqrt(fan in), those that write to the residual stream (attention output
    and second MLP layer of the blocks) divided by sqrt(2 depth) too; the probe of the MAP head normal with std 1, so
    that its attention is not uniform; positions normal with std 0.5; biases zero.
    ``big_vision``: as google-research/big_vision, models/vit.py: matrices Xavier uniform, with q, k and v three
    matrices; MLP biases normal with std 1e-6, other biases zero; patch convolution normal with std 1 / sqrt(fan in),
    truncated at two of its scales (flax's default); probe Xavier uniform; positions normal with std 1 / sqrt(width).
    Both: norms are the identity, the class token and the classifier's kernel are zero, its bias is ``head_bias``
    (big_vision: -10 for a sigmoid loss over 30,000 classes). ``pos_embed_std`` replaces the std of learned positions.
    """
    table = dict(model.named_buffers()).get("pos_embed")  # sincos2d; None if the positions are learned
    _check_init(init, "learned" if table is None else "sincos2d", pos_embed_std)
    big_vision = init == "big_vision"
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.LayerNorm | RmsNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ParallelScalingBlock):
            _init_fused(module, depth=len(model.blocks), big_vision=big_vision)
        elif leaf in ("in_proj", "out_proj"):
            pass  # drawn with their block
        elif name == "head" and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, head_bias)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if not big_vision:
                fan_in_normal(module.weight)
            elif isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
            else:
                for matrix in module.weight.chunk(STACKED.get(leaf, 1)):
                    nn.init.xavier_uniform_(matrix)
            if not big_vision and name.startswith("blocks.") and leaf in TO_RESIDUAL:
                module.weight.div_(math.sqrt(2 * len(model.blocks)))
            if module.bias is not None:
                init_bias(module.bias, mlp=leaf in ("fc1", "fc2"), big_vision=big_vision)
    if model.attn_pool is not None:
        probe = model.attn_pool.latent
        if big_vision:
            nn.init.xavier_uniform_(probe[0])  # (1, width): fan in 1, as flax counts it for (1, 1, width)
        else:
            nn.init.normal_(probe)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    if table is not None:
        table.copy_(sincos2d(*model.patch_embed.grid_size, dim=model.embed_dim))
    else:
        default = model.embed_dim**-0.5 if big_vision else 0.5
        assert model.pos_embed is not None
        nn.init.normal_(model.pos_embed, std=default if pos_embed_std is None else pos_embed_std)


def sincos2d(height: int, width: int, *, dim: int) -> Tensor:
    """Fixed positions (1, height * width, dim) of a grid, rows first: [sin x, cos x, sin y, cos y] of frequencies
    10000^(-i / (dim/4 - 1)), i = 0 .. dim/4 - 1 (google-research/big_vision, models/vit.py, after MoCo v3).
    """
    quarter = dim // 4
    omega = 1e4 ** (-torch.arange(quarter, dtype=torch.float64) / max(1, quarter - 1))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x_phase, y_phase = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    table = torch.cat([x_phase.sin(), x_phase.cos(), y_phase.sin(), y_phase.cos()], dim=1)
    return table[None].to(torch.get_default_dtype())


def _init_fused(block: ParallelScalingBlock, *, depth: int, big_vision: bool) -> None:
    """A parallel block's matrices: [first MLP layer; q; k; v] stacked, and [attention output, second MLP layer] abreast."""
    into, out, mlp_dim = block.in_proj, block.out_proj, block.in_split[0]
    assert isinstance(out, nn.Linear)
    width = out.out_features
    draw = nn.init.xavier_uniform_ if big_vision else fan_in_normal
    for matrix in into.weight.split(block.in_split):
        draw(matrix)
    for matrix in out.weight.split([width, mlp_dim], dim=1):
        draw(matrix)
    if not big_vision:
        out.weight.div_(math.sqrt(2 * depth))  # a branch each, as in serial blocks
    if block.mlp_bias is not None:
        init_bias(block.mlp_bias, mlp=True, big_vision=big_vision)
    else:
        for i, bias in enumerate(into.bias.split(block.in_split)):
            init_bias(bias, mlp=i == 0, big_vision=big_vision)
    init_bias(out.bias, mlp=True, big_vision=big_vision)


def _check_init(init: str, pos_embed: str, pos_embed_std: float | None) -> None:
    check_init(init)
    if pos_embed_std is not None and pos_embed != "learned":
        raise ValueError(f"pos_embed_std={pos_embed_std} has no effect on pos_embed={pos_embed!r}; leave it out.")
    if pos_embed_std is not None and not pos_embed_std >= 0:
        raise ValueError(f"pos_embed_std={pos_embed_std} is negative.")


def _assert_built(model: VisionTransformer, shape: Shape, patches: int) -> None:
    """Every layer has the dimensions of the shape; the MAP head too."""
    heads = [] if model.attn_pool is None else [model.attn_pool]
    blocks: list[Any] = list(model.blocks)
    assert len(blocks) == shape.depth
    assert model.pos_embed is not None and model.pos_embed.shape == (1, patches, shape.width)
    serial: list[Any] = [block for block in blocks if isinstance(block, Block)]
    for block in [*serial, *heads]:
        assert block.mlp.fc1.weight.shape == (shape.mlp_dim, shape.width)
        assert block.mlp.fc2.weight.shape == (shape.width, shape.mlp_dim)
    for attention in [*(block.attn for block in serial), *heads]:
        assert (attention.num_heads, attention.head_dim) == (shape.num_heads, shape.head_dim)
        assert attention.proj.weight.shape == (shape.width, shape.width)
    for block in blocks:
        if isinstance(block, ParallelScalingBlock):
            assert (block.num_heads, block.head_dim) == (shape.num_heads, shape.head_dim)
            assert block.in_proj.weight.shape == (shape.mlp_dim + 3 * shape.width, shape.width)
            assert block.out_proj.weight.shape == (shape.width, shape.mlp_dim + shape.width)
