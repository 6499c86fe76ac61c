"""The shape of a vision transformer: one frozen value, its text forms, and the named shapes of the literature.

What every shape must tell, of other families too (`sovit.families`), is `CountedShape`.

Two text forms are read everywhere (command line, configs, sweep files): ``1152x27x4304`` (width x depth x MLP
dimension) and a name, ``So400m``; a patch size in pixels may follow either, ``So400m/14``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive whole number.")


def check_heads(width: int, num_heads: int) -> None:
    """Raise ValueError, with the nearest widths, unless the heads divide the width."""
    if width % num_heads:
        below = width - width % num_heads
        near = f"{below} or {below + num_heads}" if below else f"{num_heads}"
        raise ValueError(
            f"width={width} is not divisible by num_heads={num_heads}; use width {near}, or another number of heads."
        )


@dataclass(frozen=True, order=True)
class Shape:
    """Width (embedding size), depth (encoder blocks), MLP dimension (hidden size), heads, and patch size in pixels.

    Raises ValueError if a field is not a positive integer or the width is not divisible by the number of heads.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            check_positive(name, value)
        check_heads(self.width, self.num_heads)

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


class CountedShape(Protocol):
    """A shape of another family: it says its own parameters and forward FLOPs, by group, as `sovit.flops` does a ViT's."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    def as_dict(self) -> dict[str, Any]: ...
    def activations(self, image_size: int) -> int: ...
    def forward_flops(self, image_size: int, *, channels: int, pool: str, num_classes: int) -> dict[str, int]: ...
    def num_params(self, image_size: int, *, channels: int, num_classes: int) -> dict[str, int]: ...


AnyShape = Shape | CountedShape
S = TypeVar("S", bound=AnyShape)


@dataclass(frozen=True)
class NamedShape(Generic[S]):
    shape: S
    source: str


_BIG_VISION = "google-research/big_vision, models/vit.py"
_ZHAI = "Scaling Vision Transformers, arXiv 2106.04560"
_SOVIT = "Getting ViT in Shape, arXiv 2305.13035"
_VIT22B = "Scaling Vision Transformers to 22 Billion Parameters, arXiv 2302.05442"

NAMED: dict[str, NamedShape[Shape]] = {
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

_DIMENSIONS = re.compile(r"([0-9]+)x([0-9]+)x([0-9]+)")


def parse_shape(
    text: str, *, num_heads: int | None = None, head_dim: int | None = None, patch_size: int | None = None
) -> Shape:
    """Read ``WIDTHxDEPTHxMLP[/PATCH]`` or ``NAME[/PATCH]``; explicit arguments win over what the text implies.

    ``WxDxM`` needs ``num_heads`` or ``head_dim`` (num_heads = width / head_dim), and a patch size.
    Raises ValueError naming the text, with the nearest known name.
    """
    text = str(text).strip()
    name, slash, patch_text = text.partition("/")
    match = _DIMENSIONS.fullmatch(name)
    if (match is None and name not in NAMED) or (slash and not re.fullmatch("[0-9]+", patch_text)):
        raise ValueError(
            f"{text!r} is not a shape: write WIDTHxDEPTHxMLP such as 1152x27x4304, "
            f"or NAME/PATCH such as So400m/14{_nearest(name)}"
        )
    if patch_size is None and patch_text:
        patch_size = int(patch_text)
    if match is None:
        known = NAMED[name].shape
        width, depth, mlp_dim = known.width, known.depth, known.mlp_dim
        patch_size = known.patch_size if patch_size is None else patch_size
        num_heads = known.num_heads if num_heads is None and head_dim is None else num_heads
    else:
        width, depth, mlp_dim = (int(group) for group in match.groups())
    if patch_size is None:
        raise ValueError(f"{text!r} does not say the patch size; give patch_size.")
    if head_dim is not None:
        if head_dim < 1 or width % head_dim:
            raise ValueError(f"width={width} is not divisible by head_dim={head_dim}; give num_heads instead.")
        if num_heads is not None and num_heads * head_dim != width:
            raise ValueError(
                f"num_heads={num_heads} times head_dim={head_dim} is not width={width}; give only one of the two."
            )
        num_heads = width // head_dim
    if num_heads is None:
        raise ValueError(f"{text!r} does not say how many attention heads; give num_heads or head_dim.")
    return Shape(width, depth, mlp_dim, num_heads, patch_size)


def _nearest(name: str) -> str:
    folded = {known.lower(): known for known in NAMED}
    near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.4)  # case first: s and S, g and G are two shapes
    near = near or [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.4)]
    if near and name not in NAMED:
        return f"; did you mean {near[0]!r}?"
    return f"; names: {', '.join(NAMED)}."


def num_patches(image_size: int, patch_size: int) -> int:
    """Number of patch tokens of a square image of image_size pixels a side.

    Raises ValueError if the image is not divisible into patches.
    """
    for name, value in (("image_size", image_size), ("patch_size", patch_size)):
        check_positive(name, value)
    if image_size % patch_size:
        below = image_size - image_size % patch_size
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise ValueError(f"image_size={image_size} is not divisible by patch_size={patch_size}; use image_size {near}.")
    return (image_size // patch_size) ** 2
