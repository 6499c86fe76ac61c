"""The weights of a model as one .safetensors file that says what it holds, for `sovit` and for others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sovit.lit.trained import Trained

WEIGHTS = "model.safetensors"


def write(trained: Trained, card: Mapping[str, Any], path: Path) -> None:
    """By timm's names, with what `sovit.lit.trained.load` reads, and the shape card, in the metadata."""
    weights = trained.weights
    metadata = {
        "step": str(weights.step),
        "weights": weights.kind,
        "run_id": weights.run_id,
        "shape": json.dumps(trained.shape.as_dict()),
        "config": json.dumps(without_paths(weights.config)),
        "torch": torch.__version__,
        "card": json.dumps(card),
    }
    write_tensors(weights.tensors, path, metadata)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A .safetensors file; readers that ask for a framework are told that these are torch's."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # of any new file; safetensors makes its own for the owner alone
    save_file(whole, path, {"format": "pt", **(metadata or {})})
    path.chmod(mode)


def without_paths(tree: Any) -> Any:
    """A JSON tree with every absolute path cut to ./ and its last part: the rest tells where somebody's files lie."""
    if isinstance(tree, Mapping):
        return {key: without_paths(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_paths(value) for value in tree]
    return cut(tree) if isinstance(tree, str) else tree


def cut(text: str) -> str:
    """./ and the last part of an absolute path, or of one below a home; other text as it is."""
    if not (os.path.isabs(text) or text.startswith("~")) or "\n" in text:
        return text
    return f"./{os.path.basename(text.rstrip('/')) or '.'}"


def paths(tree: Any) -> set[str]:
    """The strings of a JSON tree that `without_paths` would cut."""
    if isinstance(tree, Mapping):
        return set().union(*map(paths, tree.values()))
    if isinstance(tree, list | tuple):
        return set().union(*map(paths, tree))
    return {tree} if isinstance(tree, str) and cut(tree) != tree else set()
