"""A model for the tests of downstream tasks: random weights in place of trained ones, in milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from sovit.config import compose
from sovit.lit.fit import build_model
from sovit.lit.trained import Trained, Weights


def untrained(*given: str, seed: int = 0) -> Trained:
    """What `sovit.lit.trained.load` would give, of a 16x2x16 model of 16 pixels in patches of 8 unless told otherwise."""
    cfg = compose(["shape=16x2x16", "data.num_classes=8", "data.num_heldout=4", "logger=none", *given])
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        model.head.weight.normal_()  # type: ignore[union-attr, operator]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = Weights(Path("none.ckpt"), tensors, "trained", 0, dataclasses.asdict(cfg), f"untrained-s{seed}")
    return Trained(model.eval().requires_grad_(False), cfg, weights)  # type: ignore[arg-type]
