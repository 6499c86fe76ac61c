"""A model as timm's ``create_model`` builds it: arguments, ``config.json``, and the Python lines that load it.

timm takes an MLP dimension as a ratio and cuts its product with the width off, so the ratio is half a unit larger than it
looks (`sovit.models.vit`). Fixed positions become timm's position parameter: the same function, but trainable there.
"""

from __future__ import annotations

import functools
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from sovit.config import ConfigError, RunConfig
from sovit.data.views import CENTRAL
from sovit.derived import shape_of
from sovit.families.swin import SwinShape
from sovit.shape import Shape
from sovit.ship.weights import WEIGHTS

MEAN = STD = 0.5  # of each channel in [0, 1]: pixels in [-1, 1]


@dataclass(frozen=True)
class Code:
    """An argument that JSON cannot hold: its value, and the expression that makes it."""

    value: Any
    text: str


_BLOCKS = {
    "parallel": Code(
        functools.partial(ParallelScalingBlock, fuse_out_proj=True),
        "functools.partial(timm.models.vision_transformer.ParallelScalingBlock, fuse_out_proj=True)",
    )
}
_NORMS = {
    "layernorm_nobias": Code(
        functools.partial(LayerNorm, bias=False), "functools.partial(timm.layers.LayerNorm, bias=False)"
    ),
    "rmsnorm": "rmsnorm",
}


@dataclass(frozen=True)
class _Family:
    """What timm calls a family: any of its architectures (all that differs between them is given), and two layers."""

    architecture: str
    first: str
    classifier: str


_FAMILIES = {
    "vit": _Family("vit_base_patch16_224", "patch_embed.proj", "head"),
    "swin": _Family("swin_tiny_patch4_window7_224", "patch_embed.proj", "head.fc"),
}


def check(cfg: RunConfig) -> None:
    """Raise ConfigError for a family of which ``create_model`` takes no other sizes than its own."""
    if cfg.model.family not in _FAMILIES:
        raise ConfigError(
            f"model.family={cfg.model.family}: timm.create_model makes this family in its own sizes only; use --format onnx "
            "or NAME.safetensors, which sovit reads."
        )


def arguments(cfg: RunConfig) -> dict[str, Any]:
    """Every argument of ``timm.create_model`` by name; those that are `Code` are left to the caller, the rest is JSON.

    Raises ConfigError as `check`.
    """
    check(cfg)
    shape, model = shape_of(cfg), cfg.model
    common = {
        "img_size": model.image_size,
        "patch_size": shape.patch_size,
        "in_chans": model.channels,
        "num_classes": cfg.data.num_classes,
    }
    if isinstance(shape, SwinShape):
        stages = list(shape.each(model.image_size))
        return common | {
            "embed_dim": shape.width,
            "depths": list(shape.depths),
            "num_heads": [one.num_heads for one in stages],
            "window_size": [[one.window, one.window] for one in stages],
            "mlp_ratio": [(one.mlp_dim + 0.5) / one.width for one in stages],
        }
    assert isinstance(shape, Shape)
    found = common | {
        "global_pool": model.pool,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": (shape.mlp_dim + 0.5) / shape.width,
        "class_token": model.pool == "token",
        "no_embed_class": True,
        "fc_norm": False,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "act_layer": "gelu_tanh",
    }
    found |= {"norm_layer": _NORMS[model.norm]} if model.norm in _NORMS else {}
    return found | ({"block_fn": _BLOCKS[model.block]} if model.block in _BLOCKS else {})


def config(cfg: RunConfig, class_names: list[str] | None) -> dict[str, Any]:
    """The ``config.json`` of a folder that timm loads as ``local-dir:FOLDER`` or, once it is there, from the Hub."""
    size, channels, family = cfg.model.image_size, cfg.model.channels, _FAMILIES[cfg.model.family]
    plain = {name: value for name, value in arguments(cfg).items() if not isinstance(value, Code)}
    del plain["num_classes"]  # timm takes the one above; transformers, which loads the folder too, refuses a second
    return {
        "architecture": family.architecture,
        "num_classes": cfg.data.num_classes,
        "global_pool": cfg.model.pool,
        **({"label_names": class_names} if class_names else {}),
        "model_args": plain,
        "pretrained_cfg": {
            "input_size": [channels, size, size],
            "fixed_input_size": True,
            "num_classes": cfg.data.num_classes,
            "interpolation": "bilinear",
            "crop_pct": crop_share(size),
            "crop_mode": "center",
            "mean": [MEAN] * channels,
            "std": [STD] * channels,
            "first_conv": family.first,
            "classifier": family.classifier,
            "pool_size": None,
        },
    }


def crop_share(size: int) -> float:
    """timm's ``crop_pct``. It resizes to floor(size / crop_pct): here the side that `sovit.data.views.TestView` takes."""
    side = round(size / CENTRAL)
    return CENTRAL if math.floor(size / CENTRAL) == side else size / (side + 0.5)


def lines(cfg: RunConfig, file: str = WEIGHTS, *, folder: bool = True) -> list[str]:
    """Python that makes ``model`` and, of ``pixels`` (B, channels, size, size), ``logits``.

    Without ``folder`` there is no config.json, so every argument is said; ``file`` is what is loaded.
    """
    found = arguments(cfg)
    code = {name: value.text for name, value in found.items() if isinstance(value, Code)}
    imports = ["import functools", "import timm"] if code else ["import timm"]
    architecture = _FAMILIES[cfg.model.family].architecture
    said = [f"{name}={code.get(name) or repr(value)}" for name, value in found.items()]
    if folder:
        extra = "".join(f", {name}={text}" for name, text in code.items())
        made = [f'model = timm.create_model(f"local-dir:{{folder}}", pretrained=True{extra}).eval()']
        path = f'f"{{folder}}/{file}"'
    else:
        made, path = [], repr(file)
    every = textwrap.wrap(f"{architecture!r}, {', '.join(said)},", 100, break_long_words=False, break_on_hyphens=False)
    whole = [
        "model = timm.create_model(",
        *(f"    {line}" for line in every),
        f"    checkpoint_path={path},",
        ").eval()",
    ]
    prepared = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    return [
        *imports,
        "",
        *(made or whole),
        *([f"transform = {prepared}  # of a PIL image"] if folder else []),
        "logits = model(pixels)",
        *(["", "# the same without config.json:", *whole] if folder else []),
    ]


def is_plain(cfg: RunConfig) -> bool:
    """Whether config.json says all: what reads it alone, as transformers does, then makes this model."""
    return not any(isinstance(value, Code) for value in arguments(cfg).values())


def notes(cfg: RunConfig) -> list[str]:
    """What somebody who loads the folder must know."""
    code = [name for name, value in arguments(cfg).items() if isinstance(value, Code)]
    found = []
    if code:
        found = [
            f"config.json cannot hold {' and '.join(code)}: give it as above, for without it this is another model."
        ]
    else:
        found = ["transformers loads the folder too: AutoModelForImageClassification.from_pretrained(folder)."]
    if cfg.model.family == "vit" and cfg.model.pos_embed == "sincos2d":
        found += ["The fixed positions are a parameter in timm: freeze pos_embed before training it further."]
    return found


def load(cfg: RunConfig, path: Any) -> nn.Module:
    """The model that timm makes of the arguments and a .safetensors file, in evaluation mode."""
    values = {name: value.value if isinstance(value, Code) else value for name, value in arguments(cfg).items()}
    with torch.random.fork_rng(devices=[]):  # timm draws weights first
        return timm.create_model(_FAMILIES[cfg.model.family].architecture, checkpoint_path=str(path), **values).eval()
