"""Shape spaces: what a family of models is to the sweeps, the counts and the fits, and the families there are.

A family is its dimensions in the order of the text form, the value that holds them (which knows what it costs), and its
part of a run id. All have width, depth and mlp_dim; MLP-Mixer has a fourth. `sovit.models.families` builds the models.
One family reads texts: the tower that is trained against a locked image tower (`sovit.families.text`).
A shape of another family than ViT says so in its record; a ViT's says nothing, as all did when there was no other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sovit.families.mixer import NAMED_MIXERS, MixerShape
from sovit.families.swin import NAMED_SWINS, SwinShape
from sovit.families.text import NAMED_TOWERS, TextShape
from sovit.shape import NAMED, AnyShape, NamedShape, Shape

VIT = "vit"
TEXT = "text"  # the one family whose models read texts


@dataclass(frozen=True)
class Family:
    """``dimensions``: what a star varies, in the order of the text form. ``id_form``: the shape in a run id, read back
    too. ``arguments``: keys of ``model`` beside the dimensions that this family reads and another may not.
    """

    name: str
    title: str
    shape: type
    dimensions: tuple[str, ...]
    id_form: str
    named: Mapping[str, NamedShape[Any]]
    arguments: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """A regular expression that reads ``id_form`` back."""
        return re.sub(r"\{(\w+):\w+\}", r"(?P<\1>[0-9]+)", self.id_form)

    @property
    def form(self) -> str:
        """WIDTHxDEPTHxMLP, for messages."""
        return "x".join(name.removesuffix("_dim").upper() for name in self.dimensions)

    def sizes(self, text: str) -> tuple[int, ...]:
        """The dimensions of a shape's text, with a name and a patch size too. Raises ValueError."""
        name, _, _ = str(text).strip().partition("/")
        if name in self.named:
            return tuple(getattr(self.named[name].shape, key) for key in self.dimensions)
        if not re.fullmatch("x".join(["[1-9][0-9]{0,6}"] * len(self.dimensions)), name):
            example = "x".join(str(size) for size in EXAMPLES[self.name])
            raise ValueError(
                f"{text!r} is not a shape of family {self.name}: write {self.form} such as {example}"
                + (f", or one of {', '.join(self.named)}." if self.named else ".")
            )
        return tuple(map(int, name.split("x")))

    def make(self, text: str, *, head_dim: int | None = None, **given: int | None) -> AnyShape:
        """The shape of a text; ``given`` replaces single dimensions and says what the text does not.

        A named shape brings everything, and its own patch size unless the text or ``given`` says another. Raises
        ValueError for what is missing or cannot be.
        """
        name, slash, patch = str(text).strip().partition("/")
        if slash and not re.fullmatch("[1-9][0-9]*", patch):
            raise ValueError(f"{text!r}: after the slash stands the patch size in pixels, such as {name}/16.")
        known = self.named[name].shape.as_dict() if name in self.named else {}
        values: dict[str, Any] = {**known, **dict(zip(self.dimensions, self.sizes(text), strict=True))}
        values |= {key: value for key, value in given.items() if value is not None}
        values |= {"patch_size": int(patch)} if slash else {}
        if head_dim is not None:
            if head_dim < 1 or values["width"] % head_dim:
                raise ValueError(f"width={values['width']} is not divisible by head_dim={head_dim}.")
            values["num_heads"] = values["width"] // head_dim
        fields = [field.name for field in dataclasses.fields(self.shape)]
        for key in fields:
            if key not in values:
                raise ValueError(f"{text!r} does not say {key}; give {key}.")
        return self.shape(**{key: values[key] for key in fields})


EXAMPLES = {VIT: (32, 4, 128), "mixer": (32, 4, 16, 128), "swin": (16, 2, 64), TEXT: (32, 2, 128)}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            VIT, "ViT", Shape, ("width", "depth", "mlp_dim"),
            "w{width:04d}-d{depth:02d}-m{mlp_dim:04d}-h{num_heads:02d}-p{patch_size:02d}", NAMED,
            ("num_heads", "head_dim", "pos_embed", "block", "qk_norm", "qkv_bias", "norm"),
        ),
        Family(
            "mixer", "MLP-Mixer", MixerShape, ("width", "depth", "token_dim", "mlp_dim"),
            "w{width:04d}-d{depth:02d}-t{token_dim:04d}-m{mlp_dim:04d}-p{patch_size:02d}", NAMED_MIXERS,
            ("token_dim",),
        ),
        Family(
            "swin", "Swin", SwinShape, ("width", "depth", "mlp_dim"),
            "w{width:04d}-d{depth:02d}-m{mlp_dim:04d}-h{num_heads:02d}-n{stages:d}-k{window:02d}-p{patch_size:02d}",
            NAMED_SWINS, ("num_heads", "head_dim", "stages", "window"),
        ),
        Family(
            TEXT, "text tower", TextShape, ("width", "depth", "mlp_dim"),
            "w{width:04d}-d{depth:02d}-m{mlp_dim:04d}-h{num_heads:02d}-l{length:03d}", NAMED_TOWERS,
            ("num_heads", "head_dim"),
        ),
    )
}  # fmt: skip
ARGUMENTS = tuple(dict.fromkeys(key for family in FAMILIES.values() for key in family.arguments))


def family_of(shape: AnyShape) -> Family:
    """The family that a shape belongs to."""
    return next(family for family in FAMILIES.values() if isinstance(shape, family.shape))


def shape_of_record(record: Mapping[str, Any]) -> AnyShape:
    """The shape in a run's record or a row of its evaluations. Raises KeyError or ValueError if there is none."""
    family = named(record.get("family", VIT))
    return family.shape(**{field.name: record[field.name] for field in dataclasses.fields(family.shape)})


def named(name: str) -> Family:
    """The family of a name. Raises ValueError with those there are."""
    if name not in FAMILIES:
        raise ValueError(f"family={name!r} is unknown; use one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def blocks(shape: AnyShape) -> int:
    """Blocks that an image passes through one after another."""
    return shape.depth if isinstance(shape, Shape) else shape.num_blocks


def activations(shape: AnyShape, image_size: int) -> int:
    """Activations that an image passes through: in each block and token the MLP's and about four times the width.

    Four: with it the times of twelve tiny ViTs are within 12% of a fit to five of them; without the term, 24%. It was not
    fitted to other families.
    """
    if isinstance(shape, Shape):
        return shape.depth * (image_size // shape.patch_size) ** 2 * (shape.mlp_dim + 4 * shape.width)
    return shape.activations(image_size)
