"""The shape of a vision transformer: one frozen value, its text forms, and the named shapes of the literature.

Two text forms are read everywhere (command line, configs, sweep files): ``1152x27x4304`` (width x depth x MLP dimension)
and a name with an optional patch size, ``So400m/14``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Shape:
    """Width (embedding size), depth (encoder blocks), MLP dimension (hidden size), attention heads, patch size (pixels).

    Raises ValueError if a field is not a positive integer or the width is not divisible by the number of heads.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number.")
        if self.width % self.num_heads:
            below = self.width - self.width % self.num_heads
            near = f"{below} or {below + self.num_heads}" if below else f"{self.num_heads}"
            raise ValueError(
                f"width={self.width} is not divisible by num_heads={self.num_heads}; "
                f"use width {near}, or another number of heads."
            )

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}x{self.mlp_dim}"

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def as_dict(self) -> dict[str, int]:
        return {
            "width": self.width,
            "depth": self.depth,
            "mlp_dim": self.mlp_dim,
            "num_heads": self.num_heads,
            "patch_size": self.patch_size,
        }


@dataclass(frozen=True)
class NamedShape:
    shape: Shape
    source: str


_BIG_VISION = "google-research/big_vision, models/vit.py"
_ZHAI = "Scaling Vision Transformers, arXiv 2106.04560"
_SOVIT = "Getting ViT in Shape, arXiv 2305.13035"
_VIT22B = "Scaling Vision Transformers to 22 Billion Parameters, arXiv 2302.05442"

NAMED: dict[str, NamedShape] = {
    "mu": NamedShape(Shape(32, 1, 128, 2, 16), _BIG_VISION),
    "Ti": NamedShape(Shape(192, 12, 768, 3, 16), _BIG_VISION),
    "s": NamedShape(Shape(256, 6, 1024, 8, 16), _ZHAI),
    "S": NamedShape(Shape(384, 12, 1536, 6, 16), _BIG_VISION),
    "M": NamedShape(Shape(512, 12, 2048, 8, 16), _BIG_VISION),
    "B": NamedShape(Shape(768, 12, 3072, 12, 16), _BIG_VISION),
    "L": NamedShape(Shape(1024, 24, 4096, 16, 16), _BIG_VISION),
    "H": NamedShape(Shape(1280, 32, 5120, 16, 14), _BIG_VISION),
    "g": NamedShape(Shape(1408, 40, 6144, 16, 14), _BIG_VISION),
    "g-opt": NamedShape(Shape(1536, 40, 6144, 16, 14), _BIG_VISION),
    "G": NamedShape(Shape(1664, 48, 8192, 16, 14), _BIG_VISION),
    "G-opt": NamedShape(Shape(1536, 48, 8192, 16, 14), _BIG_VISION),
    "e": NamedShape(Shape(1792, 56, 15360, 16, 14), _BIG_VISION),
    "22B": NamedShape(Shape(6144, 48, 24576, 48, 14), _VIT22B),
    "So150m": NamedShape(Shape(880, 18, 2320, 16, 14), _SOVIT),
    "So400m": NamedShape(Shape(1152, 27, 4304, 16, 14), _SOVIT),
    "star-center": NamedShape(Shape(1968, 40, 6144, 16, 14), _SOVIT + ", center of the star sweep"),
    "grid-origin": NamedShape(Shape(608, 10, 928, 16, 14), _SOVIT + ", winner of the grid sweep"),
}

_DIMENSIONS = re.compile(r"(\d+)x(\d+)x(\d+)")


def parse_shape(
    text: str, *, num_heads: int | None = None, head_dim: int | None = None, patch_size: int | None = None
) -> Shape:
    """Read ``WIDTHxDEPTHxMLP`` or ``NAME[/PATCH]``; explicit arguments win over what a name implies.

    ``WxDxM`` needs ``num_heads`` or ``head_dim`` (num_heads = width / head_dim), and ``patch_size``.
    Raises ValueError naming the text, with the nearest known name.
    """
    text = str(text).strip()
    if match := _DIMENSIONS.fullmatch(text):
        width, depth, mlp_dim = (int(group) for group in match.groups())
        heads, patch = num_heads, patch_size
    else:
        name, slash, patch_text = text.partition("/")
        if name not in NAMED or (slash and not patch_text.isdecimal()):
            near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"{text!r} is not a shape: write WIDTHxDEPTHxMLP such as 1152x27x4304, or NAME/PATCH such as So400m/14{hint}"
            )
        known = NAMED[name].shape
        width, depth, mlp_dim = known.width, known.depth, known.mlp_dim
        heads = num_heads or (None if head_dim else known.num_heads)
        patch = patch_size or (int(patch_text) if patch_text else known.patch_size)
    if heads is None:
        if head_dim is None:
            raise ValueError(f"{text!r} does not say how many attention heads; give num_heads or head_dim.")
        if head_dim < 1 or width % head_dim:
            raise ValueError(f"width={width} is not divisible by head_dim={head_dim}; give num_heads instead.")
        heads = width // head_dim
    if patch is None:
        raise ValueError(f"{text!r} does not say the patch size; give patch_size.")
    return Shape(width, depth, mlp_dim, heads, patch)


def num_patches(image_size: int, patch_size: int) -> int:
    """Number of patch tokens of a square image. Raises ValueError if the image is not divisible into patches."""
    if image_size < 1 or image_size % patch_size:
        below = image_size - image_size % patch_size
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise ValueError(
            f"image_size={image_size} is not divisible by patch_size={patch_size}; use image_size {near}."
        )
    return (image_size // patch_size) ** 2
