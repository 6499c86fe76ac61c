"""The shape of an MLP-Mixer (arXiv 2105.01601), and what it costs in closed form.

Each block mixes the tokens of every channel by one MLP, then the channels of every token by another. So there are four
dimensions: width, depth, the hidden size of the token MLP (published as D_S) and that of the channel MLP (D_C), here
token_dim and mlp_dim. Text form: WIDTHxDEPTHxTOKENxMLP. Conventions of counting as in `sovit.flops`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sovit.shape import NamedShape, check_positive, num_patches

POOLS = ("avg",)


@dataclass(frozen=True, order=True)
class MixerShape:
    """Width, depth (blocks), hidden sizes of token MLP and channel MLP, and patch size in pixels.

    Raises ValueError if a field is not a positive integer.
    """

    width: int
    depth: int
    token_dim: int
    mlp_dim: int
    patch_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_positive(field.name, getattr(self, field.name))

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}x{self.token_dim}x{self.mlp_dim}"

    def as_dict(self) -> dict[str, Any]:
        return {"family": "mixer", **vars(self)}

    @property
    def num_blocks(self) -> int:
        return self.depth

    def activations(self, image_size: int) -> int:
        """Activations that an image passes through, as `sovit.families.activations` counts them."""
        tokens = num_patches(image_size, self.patch_size)
        return self.depth * (tokens * (self.mlp_dim + 4 * self.width) + self.width * self.token_dim)

    def forward_flops(self, image_size: int, *, channels: int, pool: str, num_classes: int) -> dict[str, int]:
        """Forward FLOPs per image, by group. Raises ValueError if the image does not divide into patches."""
        check_pool(pool)
        tokens = num_patches(image_size, self.patch_size)
        return {
            "patch_embedding": 2 * tokens * channels * self.patch_size**2 * self.width,
            "token_mlp": self.depth * 4 * tokens * self.token_dim * self.width,
            "mlp": self.depth * 4 * tokens * self.width * self.mlp_dim,
            "classifier": 2 * self.width * num_classes,
        }

    def num_params(self, image_size: int, *, channels: int, num_classes: int) -> dict[str, int]:
        """Trained parameters, by group. The token MLP's depend on the image size, through the number of tokens."""
        tokens, width = num_patches(image_size, self.patch_size), self.width
        return {
            "patch_embedding": channels * self.patch_size**2 * width + width,
            "token_mlp": self.depth * (2 * tokens * self.token_dim + self.token_dim + tokens),
            "mlp": self.depth * (2 * width * self.mlp_dim + self.mlp_dim + width),
            "norms": 4 * self.depth * width + 2 * width,
            "classifier": (width + 1) * num_classes,
        }


def check_pool(pool: str) -> None:
    """Raise ValueError unless the pooling is the one these families have."""
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is for ViTs; MLP-Mixer and Swin average their tokens, pool=avg.")


_MIXER = "MLP-Mixer, arXiv 2105.01601, Table 1"
NAMED_MIXERS: dict[str, NamedShape[MixerShape]] = {
    "S": NamedShape(MixerShape(512, 8, 256, 2048, 16), _MIXER),
    "B": NamedShape(MixerShape(768, 12, 384, 3072, 16), _MIXER),
    "L": NamedShape(MixerShape(1024, 24, 512, 4096, 16), _MIXER),
    "H": NamedShape(MixerShape(1280, 32, 640, 5120, 14), _MIXER),
}
