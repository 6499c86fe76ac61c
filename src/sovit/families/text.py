"""The shape of a text tower that is trained against a locked image tower (LiT, arXiv 2111.07991), and what it costs.

A transformer over ``length`` tokens: width, depth, MLP dimension and heads, as of a ViT. Text form: WIDTHxDEPTHxMLP.
Conventions of counting as in `sovit.flops`, "image" read as "text": compute t = forward FLOPs of the tower per text x texts
seen. Not in t, so that towers compare whatever they are trained against: the locked image tower (its features of an image
never change; a run records its cost beside), the projection of one vector to that tower's width (below 1 % of a block), and
the similarities of a batch, which belong to the loss. Looking a token up in the table of words is no matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sovit.shape import NamedShape, check_heads, check_positive
from sovit.text_flops import tower_flops, tower_params


@dataclass(frozen=True, order=True)
class TextShape:
    """Width, depth (blocks), MLP dimension, heads, and tokens of a text, to which every text is cut or padded.

    Raises ValueError if a field is not a positive integer or the width is not divisible by the number of heads.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    length: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_positive(field.name, getattr(self, field.name))
        check_heads(self.width, self.num_heads)

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}x{self.mlp_dim}"

    def as_dict(self) -> dict[str, Any]:
        return {"family": "text", **vars(self)}

    @property
    def patch_size(self) -> int:
        """Tokens that are read as one, which all shapes must say: 1."""
        return 1

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_blocks(self) -> int:
        return self.depth

    def activations(self, image_size: int) -> int:
        """Activations that a text passes through, as `sovit.families.activations` counts them."""
        return self.depth * self.length * (self.mlp_dim + 4 * self.width)

    def forward_flops(self, image_size: int, *, channels: int, pool: str, num_classes: int) -> dict[str, int]:
        """Forward FLOPs per text, by group. What is said of images is there for the other families, and not read."""
        found = tower_flops(self, length=self.length, embed_dim=1, pool=pool)
        return {group: flops for group, flops in found.items() if group != "projection"}

    def num_params(self, image_size: int, *, channels: int, num_classes: int) -> dict[str, int]:
        """Trained parameters, by group, as far as the shape tells: without the table of words, pooling and projection.

        Those hang on the vocabulary, the pooling and the image tower; a run's record counts all.
        """
        found = tower_params(self, vocabulary_size=1, length=self.length, embed_dim=1)
        beyond = ("token_embedding", "map_head", "projection", "loss")
        return {group: num for group, num in found.items() if group not in beyond}


_VIT = "the ViT of this name; length of SigLIP's texts, arXiv 2303.15343"
NAMED_TOWERS: dict[str, NamedShape[TextShape]] = {
    "S": NamedShape(TextShape(384, 12, 1536, 6, 64), _VIT),
    "B": NamedShape(TextShape(768, 12, 3072, 12, 64), _VIT),
    "L": NamedShape(TextShape(1024, 24, 4096, 16, 64), _VIT),
    "So400m": NamedShape(TextShape(1152, 27, 4304, 16, 64), _VIT),
}
