"""The text tower that a configuration asks for: drawn anew, or read from another library's local files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sovit.config import ConfigError, RunConfig
from sovit.derived import shape_of
from sovit.language.tower import build_tower
from sovit.language.vocabulary import Vocabulary

OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")  # of a folder that open_clip's push wrote


def tower_of(cfg: RunConfig, vocabulary: Vocabulary, embed_dim: int) -> nn.Module:
    """A tower with embeddings of ``embed_dim``; what is drawn comes from torch's global generator. Raises ConfigError."""
    text = cfg.text
    loss: dict[str, Any] = {
        "log_scale": math.log(text.init_temperature),
        "bias": text.init_bias if cfg.optim.loss == "sigmoid" else None,
    }
    if text.tower is None:
        shape: Any = shape_of(cfg)
        return build_tower(
            shape,
            vocabulary_size=vocabulary.size,
            length=text.length,
            embed_dim=embed_dim,
            eos=vocabulary.eos,
            pool=text.pool,
            init=cfg.model.init,
            **loss,
        )
    with torch.device("cpu"):  # its weights are read, wherever ours would be drawn
        try:
            tower = _external(text.tower, vocabulary, embed_dim=embed_dim, locked=text.locked, **loss)
        except ValueError as error:
            raise ConfigError(f"text.tower: {error}") from None
    _check_shape(cfg, tower)
    return tower


def vocabulary_path(cfg: RunConfig) -> str | None:
    """Where the vocabulary lies: that of another library's tower in its folder, None for the shipped one."""
    if cfg.text.vocabulary is not None or cfg.text.tower is None:
        return cfg.text.vocabulary
    folder = Path(cfg.text.tower.rpartition(":")[2]).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / "tokenizer.json").exists():
        raise ConfigError(f"text.tower={cfg.text.tower} has no tokenizer.json beside it; give text.vocabulary=FILE.")
    return str(folder)


def _external(place: str, vocabulary: Vocabulary, **options: Any) -> Any:
    from sovit.language.open_clip_files import open_clip_tower
    from sovit.language.transformers_files import transformers_tower

    name, colon, path = place.rpartition(":")
    if colon:  # NAME:CHECKPOINT of open_clip
        return open_clip_tower(name, path, vocabulary=vocabulary, **options)
    folder = Path(place).expanduser()
    if all((folder / name).exists() for name in OPEN_CLIP):
        return open_clip_tower(folder / OPEN_CLIP[0], folder / OPEN_CLIP[1], vocabulary=vocabulary, **options)
    return transformers_tower(folder, vocabulary=vocabulary, **options)


def _check_shape(cfg: RunConfig, tower: Any) -> None:
    """The compute of a run is that of its shape, so another library's tower must have it."""
    shape = shape_of(cfg)
    found = tower.embed_dim if isinstance(tower.projection, nn.Identity) else tower.projection.in_features
    if len(tower.blocks) != shape.depth:
        raise ConfigError(
            f"text.tower={cfg.text.tower} has {len(tower.blocks)} blocks, and shape={cfg.shape} a depth of {shape.depth}; "
            f"write its own width (its text has {found} numbers), depth and MLP dimension."
        )
    if cfg.text.length > tower.length:
        raise ConfigError(
            f"text.length={cfg.text.length} is above the {tower.length} tokens that text.tower={cfg.text.tower} reads; "
            f"write text.length={tower.length}."
        )
