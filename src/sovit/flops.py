"""FLOPs and parameters of a vision transformer in closed form, by group.

Conventions. One multiply-add is 2 FLOP (as XLA counts; many tools report multiply-adds, half as much). Only matrix
products and the patch convolution count; norms, activations, softmax and additions do not: they are under 1 % at the
sizes of the literature. **Compute t = forward FLOPs per image x images seen, in GFLOPs**, as in SoViT (arXiv
2305.13035, where a "9T GFLOPs" run is 9e21 FLOPs forward). Training costs 3 x forward: the backward pass has two
products for every one of the forward pass (a hair less, because the image needs no gradient).

Patches are the whole ones only, floor(image_size / patch_size)^2, as a VALID convolution cuts them: So400m/14 at 384
pixels has 27 x 27 tokens, and the last 6 pixels of each side go unseen. Building a model is stricter
(``models.vit``): there the image must divide into patches.

A shape of another family (`sovit.families`) says its own groups, by the same conventions; its options are fewer.
"""

from __future__ import annotations

from sovit.shape import AnyShape, Shape

POOLS = ("map", "avg", "token")
POS_EMBEDS = ("learned", "sincos2d")
BLOCKS = ("serial", "parallel")
NORMS = {"layernorm": 2, "layernorm_nobias": 1, "rmsnorm": 1}  # vectors: a scale, and a bias

# What ViT-22B changes (arXiv 2302.05442, section 2), as arguments of num_params; conf/model/vit22b.yaml.
VIT22B: dict[str, str | bool] = {"block": "parallel", "qk_norm": True, "qkv_bias": False, "norm": "rmsnorm"}


def forward_flops(
    shape: AnyShape, image_size: int, *, channels: int = 3, pool: str = "map", num_classes: int = 0
) -> dict[str, int]:
    """Forward FLOPs per image, by group; the sum of the values is the total.

    ``image_size`` is in pixels a side. ``pool``: ``map`` (multi-head attention pooling head, Scaling Vision
    Transformers, arXiv 2106.04560), ``avg`` (mean of the tokens) or ``token`` (a class token, one more token in
    every block). ``num_classes`` 0 means no classifier. Fusing the projections of parallel blocks, norms of queries and
    keys, and leaving out biases change nothing here. Raises ValueError for an image smaller than a patch, or an
    unknown pool.
    """
    if not isinstance(shape, Shape):
        _check_sizes(image_size, channels, num_classes)
        return shape.forward_flops(image_size, channels=channels, pool=pool, num_classes=num_classes)
    patches = _whole_patches(shape, image_size, channels, pool, num_classes)
    width, depth, mlp_dim = shape.width, shape.depth, shape.mlp_dim
    tokens = patches + (pool == "token")
    # MAP: keys and values of all tokens; query, output and MLP of the single probe.
    map_head = 4 * tokens * width**2 + 4 * width**2 + 4 * tokens * width + 4 * width * mlp_dim
    return {
        "patch_embedding": 2 * patches * channels * shape.patch_size**2 * width,
        "attention_projections": depth * 8 * tokens * width**2,
        "attention_products": depth * 4 * tokens**2 * width,
        "mlp": depth * 4 * tokens * width * mlp_dim,
        "map_head": map_head if pool == "map" else 0,
        "classifier": 2 * width * num_classes,
    }


def forward_gflops(
    shape: AnyShape, image_size: int, *, channels: int = 3, pool: str = "map", num_classes: int = 0
) -> float:
    """Total forward GFLOPs per image; arguments and errors as for ``forward_flops``."""
    groups = forward_flops(shape, image_size, channels=channels, pool=pool, num_classes=num_classes)
    return sum(groups.values()) / 1e9


def train_gflops(
    shape: AnyShape, image_size: int, *, channels: int = 3, pool: str = "map", num_classes: int = 0
) -> float:
    """GFLOPs of one image's forward and backward pass, 3 x forward; arguments and errors as for ``forward_flops``."""
    return 3 * forward_gflops(shape, image_size, channels=channels, pool=pool, num_classes=num_classes)


def num_params(
    shape: AnyShape,
    image_size: int,
    *,
    channels: int = 3,
    pool: str = "map",
    num_classes: int = 0,
    pos_embed: str = "learned",
    block: str = "serial",
    qk_norm: bool = False,
    qkv_bias: bool = True,
    norm: str = "layernorm",
) -> dict[str, int]:
    """Trained parameters, by group; the sum of the values is the total of the real module.

    ``positions`` is the position table plus the class token, if there is one; a ``sincos2d`` table is fixed, so it
    counts nothing. ``norms`` are those of the blocks and the final one; ``map_head`` has its own norm inside.
    ``block`` ``parallel`` has one norm for attention and MLP, and one bias for what both add to the residual stream,
    counted with the MLP. ``qk_norm`` adds two norms of a head's size to each block. ``qkv_bias`` False leaves out those of
    the blocks; all other linear maps have biases. ``norm``: see ``NORMS``. Arguments and errors as for ``forward_flops``;
    also raises ValueError for an unknown ``pos_embed``, ``block`` or ``norm``, or ``sincos2d`` with a width not divisible
    by 4. All but channels and classes is for ViTs and not read for other families.
    """
    if not isinstance(shape, Shape):
        _check_sizes(image_size, channels, num_classes)
        return shape.num_params(image_size, channels=channels, num_classes=num_classes)
    patches = _whole_patches(shape, image_size, channels, pool, num_classes)
    check_pos_embed(pos_embed, shape.width)
    check_block(block, norm)
    width, depth, mlp_dim = shape.width, shape.depth, shape.mlp_dim
    vectors, parallel = NORMS[norm], block == "parallel"
    attention = 4 * width**2 + (3 * width if qkv_bias else 0) + (0 if parallel else width)
    mlp = 2 * width * mlp_dim + mlp_dim + width
    norms = vectors * ((1 if parallel else 2) * width + (2 * shape.head_dim if qk_norm else 0))
    return {
        "patch_embedding": channels * shape.patch_size**2 * width + width,
        "positions": (patches * width if pos_embed == "learned" else 0) + (width if pool == "token" else 0),
        "attention_projections": depth * attention,
        "mlp": depth * mlp,
        "norms": depth * norms + vectors * width,
        "map_head": width + 4 * (width**2 + width) + vectors * width + mlp if pool == "map" else 0,
        "classifier": (width + 1) * num_classes,
    }


def check_pool(pool: str) -> None:
    """Raise ValueError unless ``pool`` is one of ``POOLS``."""
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is unknown; use one of {', '.join(POOLS)}.")


def check_pos_embed(pos_embed: str, width: int) -> None:
    """Raise ValueError unless ``pos_embed`` is one of ``POS_EMBEDS`` and fits the width."""
    if pos_embed not in POS_EMBEDS:
        raise ValueError(f"pos_embed={pos_embed!r} is unknown; use one of {', '.join(POS_EMBEDS)}.")
    if pos_embed == "sincos2d" and width % 4:
        raise ValueError(f"pos_embed='sincos2d' needs a width divisible by 4, not {width}; use pos_embed='learned'.")


def check_block(block: str, norm: str) -> None:
    """Raise ValueError unless ``block`` is one of ``BLOCKS`` and ``norm`` one of ``NORMS``."""
    if block not in BLOCKS:
        raise ValueError(f"block={block!r} is unknown; use one of {', '.join(BLOCKS)}.")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}.")


def _whole_patches(shape: Shape, image_size: int, channels: int, pool: str, num_classes: int) -> int:
    check_pool(pool)
    _check_sizes(image_size, channels, num_classes)
    if image_size < shape.patch_size:
        raise ValueError(
            f"image_size={image_size} is smaller than patch_size={shape.patch_size}; "
            "use a larger image or a smaller patch."
        )
    return (image_size // shape.patch_size) ** 2


def _check_sizes(image_size: int, channels: int, num_classes: int) -> None:
    sizes = (("image_size", image_size, 1), ("channels", channels, 1), ("num_classes", num_classes, 0))
    for name, value, least in sizes:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} is not a whole number of at least {least}.")
