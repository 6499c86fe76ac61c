"""How much memory answering takes, in closed form: weights, one batch of images, and the activations alive at once.

Counted are the tensors of a forward pass without gradients as torch makes them without compilation, in one precision
throughout. Nothing is kept for a backward pass, so only the fullest moment of one block counts, and depth costs weights
alone. Not counted: the CUDA context, workspaces of libraries, fragmentation, Python. torch.compile holds less. What
training takes is in `sovit.memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sovit.flops import num_params
from sovit.memory import Model

PRECISIONS = {"fp32": 4, "bf16": 2}  # bytes of a number: weights, images and activations alike


@dataclass(frozen=True)
class Inference:
    """Bytes: ``weights`` (with fixed positions), ``images`` of the batch, and ``activations`` at the fullest moment."""

    weights: int
    images: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.images + self.activations


def inference_memory(model: Model, batch_size: int, precision: str = "fp32") -> Inference:
    """What a forward pass of ``batch_size`` images holds at its fullest moment; ``precision``: one of `PRECISIONS`.

    Raises ValueError for an unknown precision or a batch without images.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    size, shape = PRECISIONS[precision], model.shape
    patches = model.tokens - (model.pool == "token")
    fixed = patches * shape.width if model.pos_embed == "sincos2d" else 0
    return Inference(
        weights=size * (sum(num_params(**vars(model)).values()) + fixed),
        images=size * batch_size * model.channels * model.image_size**2,
        activations=size * batch_size * max(_embedding(model), model.tokens * _block(model), _head(model)),
    )


def _block(model: Model) -> int:
    """Numbers a token at the fullest moment of a block.

    The input of the first block lives until the last is done. A call holds its arguments until it returns, and a function
    its local tensors: so q, k and v are there while attention's output is projected, and the input of GELU beside its
    result.
    """
    width, mlp_dim = model.shape.width, model.shape.mlp_dim
    residual = (2 if model.shape.depth > 1 else 1) * width  # input of the first block, input of this one
    normed = 2 * width if model.qk_norm else 0
    if model.block == "parallel":  # the fused product, what attention and GELU make of it, these abreast, the sum
        return residual + (3 * width + mlp_dim) + normed + (width + mlp_dim) + (width + mlp_dim) + width
    attention = residual + width + 3 * width + normed + width + width  # norm, qkv, attention, its projection
    mlp = residual + width + width + max(2 * mlp_dim, mlp_dim + width)  # sum, norm, GELU or the second product
    return max(attention, mlp)


def _embedding(model: Model) -> int:
    """Numbers an image: the patches as they come, with their positions, and behind a class token."""
    token = model.pool == "token"
    return model.shape.width * (2 * (model.tokens - token) + (model.tokens if token else 0))


def _head(model: Model) -> int:
    """Numbers an image after the blocks: the last norm, and what pools its result."""
    width, mlp_dim, tokens = model.shape.width, model.shape.mlp_dim, model.tokens
    pooled = tokens * 3 * width + 4 * width + max(2 * mlp_dim, mlp_dim + width) if model.pool == "map" else 0
    return max(2 * tokens * width, pooled)


def gb(count: float) -> str:
    """Bytes in GB of 1e9 bytes, or MB below one."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def largest_batch(model: Model, room: float, precision: str = "fp32") -> int:
    """The largest batch that fits into ``room`` bytes, 0 if not even one image does."""
    one, two = (inference_memory(model, count, precision).total for count in (1, 2))
    return max(0, math.floor((room - (2 * one - two)) / (two - one)))
