"""A vision transformer as a model of Hugging Face's transformers: tensors by its names, its config and its preprocessing.

What can be said there, exactly:

- pool ``token``: `ViTForImageClassification`. The class token gets a position of zeros, since sovit's has none.
- pool ``map``: `SiglipVisionModel`, whose ``pooler_output`` is the pooled features. No class of the library puts a
  classifier on these, so it lies in a file of its own, ``classifier.safetensors``.
- pool ``avg``: `SiglipForImageClassification` without the pooling head, which takes the mean of the normed tokens.

A bias that sovit leaves out is zero where the library always has one. Parallel blocks, normed queries and keys, and RMSNorm
cannot be said. Names are those of releases 4 and before, which release 5 translates as it loads; both were tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sovit.config import ConfigError, RunConfig
from sovit.data.views import CENTRAL
from sovit.derived import vit_shape_of
from sovit.ship import timm_model

CLASSIFIER = "classifier.safetensors"
CLASSES = {"token": "ViTForImageClassification", "map": "SiglipVisionModel", "avg": "SiglipForImageClassification"}
EPS = 1e-6  # of every LayerNorm; ViT's default there is 1e-12
_BLOCK = {  # sovit's name in a block: the library's, in a ViT and in a SigLIP
    "norm1": ("layernorm_before", "layer_norm1"),
    "attn.q": ("attention.attention.query", "self_attn.q_proj"),
    "attn.k": ("attention.attention.key", "self_attn.k_proj"),
    "attn.v": ("attention.attention.value", "self_attn.v_proj"),
    "attn.proj": ("attention.output.dense", "self_attn.out_proj"),
    "norm2": ("layernorm_after", "layer_norm2"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}


def check(cfg: RunConfig) -> None:
    """Raise ConfigError with the option that the library cannot express, and the format that can."""
    model = cfg.model
    why = {
        f"model.family={model.family}": model.family != "vit",
        f"model.block={model.block}": model.block != "serial",
        f"model.qk_norm={str(model.qk_norm).lower()}": model.qk_norm,
        f"model.norm={model.norm}": model.norm == "rmsnorm",
    }
    for option, refused in why.items():
        if refused:
            raise ConfigError(f"{option} cannot be said in Hugging Face's ViT or SigLIP; use {_instead(cfg)}.")


def _instead(cfg: RunConfig) -> str:
    try:
        plain = timm_model.is_plain(cfg)
    except ConfigError:
        return "--format onnx, which can"
    return f"--format timm{', which transformers loads too,' if plain else ''} or --format onnx"


def config(cfg: RunConfig, class_names: list[str] | None, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json``."""
    shape, pool = vit_shape_of(cfg, "export to Hugging Face"), cfg.model.pool
    sizes = {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "num_channels": cfg.model.channels,
        "image_size": cfg.model.image_size,
        "patch_size": shape.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": EPS,
    }
    kind = {"token": "vit", "map": "siglip_vision_model", "avg": "siglip"}[pool]
    names = class_names or [f"LABEL_{label}" for label in range(cfg.data.num_classes)]
    labels = {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }
    said: dict[str, dict[str, Any]] = {
        "token": sizes | {"qkv_bias": cfg.model.qkv_bias},
        "map": sizes,
        "avg": {
            "vision_config": {"model_type": "siglip_vision_model", **sizes, "vision_use_head": False},
        },
    }
    return {
        "architectures": [CLASSES[pool]],
        "model_type": kind,
        **said[pool],
        **labels,
        "dtype": str(dtype).removeprefix("torch."),
    }


def preprocessor(cfg: RunConfig) -> dict[str, Any]:
    """``preprocessor_config.json``: the central view of an evaluation, by CLIP's processor, which resizes and crops."""
    size, channels = cfg.model.image_size, cfg.model.channels
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(size / CENTRAL)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }


def tensors(state: Mapping[str, Tensor], cfg: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a model by the library's names, and those of the classifier that its class has no place for."""
    pool, rest = cfg.model.pool, dict(state)
    siglip = pool != "token"
    prefix = "vision_model." if siglip else "vit."
    found: dict[str, Tensor] = {}

    def move(ours: str, theirs: str) -> None:
        """A layer or a norm; a bias that there must be, but is not, is zeros."""
        weight = rest.pop(f"{ours}.weight")
        found[f"{theirs}.weight"] = weight
        found[f"{theirs}.bias"] = rest.pop(f"{ours}.bias", weight.new_zeros(len(weight)))

    positions = rest.pop("pos_embed")
    if siglip:
        found[f"{prefix}embeddings.position_embedding.weight"] = positions[0]
        move("patch_embed.proj", f"{prefix}embeddings.patch_embedding")
    else:
        nowhere = torch.zeros_like(positions[:, :1])
        found[f"{prefix}embeddings.position_embeddings"] = torch.cat([nowhere, positions], dim=1)
        found[f"{prefix}embeddings.cls_token"] = rest.pop("cls_token")
        move("patch_embed.proj", f"{prefix}embeddings.patch_embeddings.projection")
    for block in range(vit_shape_of(cfg, "export to Hugging Face").depth):
        ours, theirs = f"blocks.{block}", f"{prefix}encoder.{'layers' if siglip else 'layer'}.{block}"
        for part in ("weight", "bias"):
            stacked = rest.pop(f"{ours}.attn.qkv.{part}", None)
            for name, matrix in zip("qkv", stacked.chunk(3) if stacked is not None else (), strict=stacked is not None):
                rest[f"{ours}.attn.{name}.{part}"] = matrix
        for inner, names in _BLOCK.items():
            move(f"{ours}.{inner}", f"{theirs}.{names[siglip]}")
    move("norm", f"{prefix}post_layernorm" if siglip else f"{prefix}layernorm")
    if pool == "map":
        _pooling_head(rest, found, move)
    if not siglip and not cfg.model.qkv_bias:
        found = {name: one for name, one in found.items() if ".attention.attention." not in name or ".bias" not in name}
    classifier = {name: rest.pop(f"head.{name}") for name in ("weight", "bias") if f"head.{name}" in rest}
    assert not rest, f"no place for {', '.join(rest)}"
    if pool == "map":
        return found, classifier
    return found | {f"classifier.{name}": tensor for name, tensor in classifier.items()}, {}


def _pooling_head(rest: dict[str, Tensor], found: dict[str, Tensor], move: Any) -> None:
    """SigLIP's attention pooling is torch's: queries, keys and values in one matrix."""
    head = "vision_model.head"
    found[f"{head}.probe"] = rest.pop("attn_pool.latent")
    for part in ("weight", "bias"):
        stacked = [rest.pop(f"attn_pool.{name}.{part}") for name in ("q", "kv")]
        found[f"{head}.attention.in_proj_{part}"] = torch.cat(stacked)
    move("attn_pool.proj", f"{head}.attention.out_proj")
    move("attn_pool.norm", f"{head}.layernorm")
    move("attn_pool.mlp.fc1", f"{head}.mlp.fc1")
    move("attn_pool.mlp.fc2", f"{head}.mlp.fc2")


def lines(cfg: RunConfig) -> list[str]:
    """Python that makes ``model`` and, of ``pixels`` (B, channels, size, size), ``logits``."""
    name = CLASSES[cfg.model.pool]
    made = [f"model = {name}.from_pretrained(folder).eval()"]
    made += ["processor = AutoImageProcessor.from_pretrained(folder)  # of PIL images"]
    imported = f"from transformers import AutoImageProcessor, {name}"
    if cfg.model.pool != "map":
        return [imported, "", *made, "logits = model(pixel_values=pixels).logits"]
    return [
        "from safetensors.torch import load_file",
        "from torch.nn.functional import linear",
        imported,
        "",
        *made,
        "features = model(pixel_values=pixels).pooler_output",
        f'logits = linear(features, **load_file(f"{{folder}}/{CLASSIFIER}"))',
    ]


def load(cfg: RunConfig, folder: Any) -> Any:
    """A function from pixels to logits by the installed transformers. Raises ImportError without it."""
    import transformers
    from safetensors.torch import load_file
    from transformers.utils import logging

    loader = getattr(transformers, CLASSES[cfg.model.pool])
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # SigLIP's text model, which is not there, warns of its tokens
    try:
        model = loader.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    if cfg.model.pool != "map":
        return lambda pixels: model(pixel_values=pixels).logits
    classifier = {name: tensor.float() for name, tensor in load_file(f"{folder}/{CLASSIFIER}").items()}
    return lambda pixels: torch.nn.functional.linear(model(pixel_values=pixels).pooler_output, **classifier)
