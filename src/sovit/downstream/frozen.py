"""Features of a frozen model, kept in the work folder piece by piece, so that a killed evaluation does not begin anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sovit import records
from sovit.config import ConfigError
from sovit.data.stream import Slices
from sovit.downstream.sets import Labelled, Window
from sovit.lit.evaluation import extract
from sovit.lit.trained import Trained

PIECE = 16_384  # images


def features_of(trained: Trained, images: torch.Tensor | Slices, work: Path, name: str) -> torch.Tensor:
    """Pooled features (N, width) float32 on the CPU. Raises ConfigError where they are not finite.

    ``name``: of the images, different for each set within one ``work``.
    """
    pieces = [_piece(trained, images, begin, work, name) for begin in range(0, len(images), PIECE)]
    features = torch.cat(pieces)
    if not features.isfinite().all():
        raise ConfigError(f"The features of {trained.weights.source} are not finite: the model has diverged.")
    return features


def features_and_labels(
    trained: Trained, labelled: Labelled, work: Path, part: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features (N, width) in float64, and labels (N,)."""
    found = features_of(trained, labelled.images, work, f"{labelled.name}-{part}")
    return found.double().numpy(), labelled.labels


def _piece(trained: Trained, images: torch.Tensor | Slices, begin: int, work: Path, name: str) -> torch.Tensor:
    path = work / f"{name}-{begin:09d}.safetensors"
    try:
        return load_file(path)["features"]
    except (FileNotFoundError, SafetensorError):
        pass
    features = extract(trained.model, Window(images, begin, min(begin + PIECE, len(images))))
    if len(images) > PIECE:  # less is quicker made than kept
        scratch = records.scratch_of(path)
        save_file({"features": features}, scratch)
        scratch.replace(path)
    return features
