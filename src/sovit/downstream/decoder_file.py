"""A trained decoder, and the blind one beside it, as one .safetensors file that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sovit import records
from sovit.config import ConfigError
from sovit.language.decoder import Decoder
from sovit.language.training import Recipe, decoder_of
from sovit.language.vocabulary import Vocabulary

SEEING, BLIND = "seeing", "blind"


def write(
    path: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    recipe: Recipe,
    vocabulary: Vocabulary,
    about: Mapping[str, Any],
) -> None:
    """Write the weights of SEEING and BLIND; ``about``: what the decoder was trained on, ready for JSON."""
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().contiguous()
        for kind, of in states.items()
        for name, tensor in of.items()
    }
    metadata = {
        "decoder": json.dumps(asdict(recipe)),
        "vocabulary": vocabulary.identity,
        "vocabulary_size": str(vocabulary.size),
        "about": json.dumps(dict(about)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = records.scratch_of(path)
    save_file(tensors, scratch, metadata)
    scratch.replace(path)


def read(path: Path, vocabulary: Vocabulary, encoder_width: int) -> tuple[dict[str, Decoder], Recipe, dict[str, Any]]:
    """The decoders SEEING and BLIND in evaluation mode on the CPU, their recipe, and what was written of them.

    Raises ConfigError for a file that is none, or one made for another vocabulary or encoder width.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"task.decoder={path} cannot be read ({reason}); give a file that task=multitask left."
        ) from None
    try:
        known = {field.name for field in fields(Recipe)}
        recipe = Recipe(**{key: value for key, value in json.loads(metadata["decoder"]).items() if key in known})
        identity, about = metadata["vocabulary"], json.loads(metadata["about"])
        width = tensors[f"{SEEING}.memory_proj.weight"].shape[1]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        raise ConfigError(f"task.decoder={path} holds no decoder; give a file that task=multitask left.") from None
    if identity != vocabulary.identity:
        raise ConfigError(
            f"task.decoder={path} was trained with another vocabulary ({metadata.get('vocabulary_size')} tokens, not these "
            f"{vocabulary.size}); give task.vocabulary the file it was trained with."
        )
    if width != encoder_width:
        raise ConfigError(
            f"task.decoder={path} looks at tokens of width {width}, and this encoder gives {encoder_width}; give a decoder "
            "that was trained on it."
        )
    decoders = {}
    for kind in (SEEING, BLIND):
        own = {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
        try:
            with torch.random.fork_rng(devices=[]):
                decoder = decoder_of(recipe, vocabulary, encoder_width)
            decoder.load_state_dict(own)
        except (RuntimeError, TypeError, ValueError):
            raise ConfigError(
                f"task.decoder={path} does not hold the decoder that it describes; train it anew."
            ) from None
        decoders[kind] = decoder.eval()
    return decoders, recipe, about
