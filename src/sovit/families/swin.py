"""The shape of a Swin transformer (arXiv 2103.14030), and what it costs in closed form.

Stages follow each other; between two of them 2 x 2 tokens are merged, and width, MLP dimension and heads double. So one
width (of the first stage), one MLP dimension (of the first stage: the ratio is that of all) and one head dimension
describe them all. **Depth** is the number of blocks of the main stage, the third, or the last of fewer; each other stage
has two. That is how the published variants differ (2-2-6-2, 2-2-18-2), and a total would leave open where a block goes.
Attention is within windows of ``window`` x ``window`` tokens, shifted by half a window in every second block; a stage no
larger than a window is one window. Text form: WIDTHxDEPTHxMLP. Conventions of counting as in `sovit.flops`; what shifts,
masks and relative positions cost is no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from sovit.families.mixer import check_pool
from sovit.shape import NamedShape, check_heads, check_positive, num_patches

OTHER_STAGES = 2  # blocks in each stage but the main one: a window and a shifted window


class Stage(NamedTuple):
    """``grid``: tokens a side; ``window``: of attention, tokens a side."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    grid: int
    window: int


@dataclass(frozen=True, order=True)
class SwinShape:
    """Width, MLP dimension and heads of the first stage, blocks of the main stage, stages, window and patch size.

    Raises ValueError if a field is not a positive integer or the width is not divisible by the number of heads.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    stages: int
    window: int
    patch_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_positive(field.name, getattr(self, field.name))
        check_heads(self.width, self.num_heads)

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}x{self.mlp_dim}"

    def as_dict(self) -> dict[str, Any]:
        return {"family": "swin", **vars(self)}

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        main = min(3, self.stages) - 1
        return tuple(self.depth if stage == main else OTHER_STAGES for stage in range(self.stages))

    @property
    def num_blocks(self) -> int:
        return sum(self.depths)

    def each(self, image_size: int) -> Iterator[Stage]:
        """The stages of an image of so many pixels a side. Raises ValueError if patches, merging or windows do not fit."""
        grid = int(num_patches(image_size, self.patch_size) ** 0.5 + 0.5)
        if grid % 2 ** (self.stages - 1):
            raise ValueError(
                f"{grid} x {grid} tokens cannot be merged {self.stages - 1} times; give fewer stages than {self.stages}, or "
                f"an image_size divisible by {self.patch_size * 2 ** (self.stages - 1)}."
            )
        for stage, depth in enumerate(self.depths):
            scale = 2**stage
            side = grid // scale
            window = min(self.window, side)
            if side % window:
                raise ValueError(
                    f"window={window} does not divide the {side} x {side} tokens of stage {stage + 1}; "
                    "give a window that divides them."
                )
            yield Stage(self.width * scale, depth, self.mlp_dim * scale, self.num_heads * scale, side, window)

    def activations(self, image_size: int) -> int:
        """Activations that an image passes through, as `sovit.families.activations` counts them."""
        return sum(one.depth * one.grid**2 * (one.mlp_dim + 4 * one.width) for one in self.each(image_size))

    def forward_flops(self, image_size: int, *, channels: int, pool: str, num_classes: int) -> dict[str, int]:
        """Forward FLOPs per image, by group. Raises ValueError as `each` does."""
        check_pool(pool)
        stages = list(self.each(image_size))
        each = [(one, one.depth * one.grid**2) for one in stages]  # tokens times blocks
        return {
            "patch_embedding": 2 * stages[0].grid ** 2 * channels * self.patch_size**2 * self.width,
            "attention_projections": sum(8 * tokens * one.width**2 for one, tokens in each),
            "attention_products": sum(4 * tokens * one.window**2 * one.width for one, tokens in each),
            "mlp": sum(4 * tokens * one.width * one.mlp_dim for one, tokens in each),
            "patch_merging": sum(4 * one.grid**2 * one.width**2 for one in stages[1:]),  # 2 width in, width out
            "classifier": 2 * stages[-1].width * num_classes,
        }

    def num_params(self, image_size: int, *, channels: int, num_classes: int) -> dict[str, int]:
        """Trained parameters, by group; ``positions`` are the tables of relative ones, one for each head."""
        stages = list(self.each(image_size))
        return {
            "patch_embedding": channels * self.patch_size**2 * self.width + self.width,
            "positions": sum(one.depth * (2 * one.window - 1) ** 2 * one.num_heads for one in stages),
            "attention_projections": sum(one.depth * (4 * one.width**2 + 4 * one.width) for one in stages),
            "mlp": sum(one.depth * (2 * one.width * one.mlp_dim + one.mlp_dim + one.width) for one in stages),
            "patch_merging": sum(2 * one.width**2 + 4 * one.width for one in stages[1:]),  # with a norm of 2 width
            "norms": 2 * self.width + sum(4 * one.depth * one.width for one in stages) + 2 * stages[-1].width,
            "classifier": (stages[-1].width + 1) * num_classes,
        }


_SWIN = "Swin Transformer, arXiv 2103.14030, section 3.3"
NAMED_SWINS: dict[str, NamedShape[SwinShape]] = {
    "T": NamedShape(SwinShape(96, 6, 384, 3, 4, 7, 4), _SWIN),
    "S": NamedShape(SwinShape(96, 18, 384, 3, 4, 7, 4), _SWIN),
    "B": NamedShape(SwinShape(128, 18, 512, 4, 4, 7, 4), _SWIN),
    "L": NamedShape(SwinShape(192, 18, 768, 6, 4, 7, 4), _SWIN),
}
