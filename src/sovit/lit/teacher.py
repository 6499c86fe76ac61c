"""The teacher of a distilled run: from what ``optim.teacher`` names to a frozen model and the hash of its weights.

A teacher's forward pass is not in the run's compute t, which is the student's alone, so that exponents compare with those
of other objectives. What it adds, once an image, is recorded beside it as `Teacher.forward_gflops`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sovit.config import ConfigError, RunConfig
from sovit.families import TEXT


@dataclass(frozen=True)
class Teacher:
    """``sha256`` is that of the weights, wherever they lie; ``forward_gflops`` per image."""

    model: nn.Module
    source: str
    run_id: str
    weights: str
    step: int
    sha256: str
    forward_gflops: float

    kind = "optim.teacher"

    def record(self) -> dict[str, Any]:
        """What a run's record says of it."""
        return {key: value for key, value in vars(self).items() if key != "model"}

    def check(self, found: dict[str, Any], run: str) -> None:
        """Raise ConfigError unless a run's record tells of the same weights."""
        known = found.get("teacher") or {}
        if known and known["sha256"] != self.sha256:
            raise ConfigError(
                f"optim.teacher has other weights than when {run} began; put them back, or choose another name."
            )


def teacher_of(cfg: RunConfig) -> Teacher | None:
    """The teacher of a run, or None if it has none. Raises ConfigError if it is not there or does not fit."""
    if cfg.optim.loss != "distilled":
        return None
    assert cfg.optim.teacher is not None
    found = loaded(Path(cfg.optim.teacher).expanduser())
    theirs, what = found[1], f"optim.teacher={cfg.optim.teacher}"
    if theirs.model.family == TEXT:
        raise ConfigError(f"{what} is a text tower and tells no classes of images apart; give a classifier.")
    if theirs.optim.loss == "masked":
        raise ConfigError(f"{what} was trained with optim.loss=masked and tells no classes apart; give a classifier.")
    for key, mine, other in (
        ("model.image_size", cfg.model.image_size, theirs.model.image_size),
        ("model.channels", cfg.model.channels, theirs.model.channels),
        ("data.num_classes", cfg.data.num_classes, theirs.data.num_classes),
    ):
        if mine != other:
            raise ConfigError(f"{what} has {key}={other}, this run {mine}; give a teacher of the same {key}.")
    return found[0]


def loaded(source: Path) -> tuple[Teacher, RunConfig]:
    """A trained model to be used as it is, with its configuration. Raises ConfigError."""
    from sovit.derived import model_geometry, shape_of
    from sovit.flops import forward_gflops
    from sovit.lit import trained  # which builds models as sovit.lit.fit does, where teachers are asked for

    found = trained.load(source)
    weights, cfg = found.weights, found.cfg
    gflops = float(forward_gflops(shape_of(cfg), **model_geometry(cfg)))
    sha256 = weights_hash(found.model.state_dict())
    teacher = Teacher(found.model, str(source), weights.run_id, weights.kind, weights.step, sha256, gflops)
    return teacher, cfg


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
