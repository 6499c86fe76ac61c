"""What is to be measured: a model, and one way of using it. Plain values, so that a process of its own can take them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sovit.flops import forward_gflops, num_params
from sovit.inference import PRECISIONS, inference_memory
from sovit.memory import Model
from sovit.shape import num_patches

MODES = ("eager", "compiled")
DEVICES = ("cpu", "cuda")
CLOCKS = ("wall", "processor")


@dataclass(frozen=True)
class Subject:
    """A model by its geometry. ``text``: as it was asked for; ``source``: the checkpoint, None for random weights."""

    text: str
    model: Model
    source: Path | None = None

    def at(self, image_size: int) -> Model:
        """The model for images of another size. Raises ValueError if they do not divide into patches."""
        num_patches(image_size, self.model.shape.patch_size)
        return replace(self.model, image_size=image_size)


@dataclass(frozen=True)
class Setting:
    """One row of the table. ``threads`` count on a CPU only. Raises ValueError for what there is not.

    ``clock`` ``processor`` counts the time that this process had a core, so that other programs do not lengthen it; it is
    for one thread of a CPU.
    """

    image_size: int
    batch_size: int
    precision: str
    mode: str
    device: str
    threads: int
    clock: str = "wall"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, tuple(PRECISIONS)),
            ("mode", self.mode, MODES),
            ("device", self.device, DEVICES),
            ("clock", self.clock, CLOCKS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
        for name, count in (("batch_size", self.batch_size), ("threads", self.threads)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        if self.clock == "processor" and (self.device != "cpu" or self.threads > 1):
            raise ValueError("clock='processor' is for one thread of a CPU; write --threads 1, or leave it out.")

    def __str__(self) -> str:
        return f"{self.image_size} px, batch {self.batch_size}, {self.precision}, {self.mode}"


def settings(
    subject: Subject,
    *,
    image_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    precisions: Sequence[str],
    modes: Sequence[str],
    device: str,
    threads: int,
    clock: str = "wall",
) -> list[Setting]:
    """Every combination, batches last; no ``image_sizes``: the model's own. Raises ValueError before any is measured."""
    sizes = image_sizes or (subject.model.image_size,)
    for size in sizes:
        subject.at(size)
    chosen = itertools.product(sizes, modes, precisions, batch_sizes)
    return [Setting(size, batch, precision, mode, device, threads, clock) for size, mode, precision, batch in chosen]


def described(subject: Subject, setting: Setting) -> dict[str, Any]:
    """What a row is of, JSON-ready, whether or not it can be measured."""
    model = subject.at(setting.image_size)
    geometry = {name: getattr(model, name) for name in ("channels", "pool", "num_classes")}
    interpolated = subject.source is not None and setting.image_size != subject.model.image_size
    return {
        "subject": subject.text,
        "weights": "random" if subject.source is None else str(subject.source),
        "positions": f"interpolated from {subject.model.image_size} px" if interpolated else "for this size",
        "shape": model.shape.as_dict(),
        **geometry,
        **{name: getattr(model, name) for name in ("pos_embed", "block", "qk_norm", "qkv_bias", "norm")},
        "num_params": sum(num_params(**vars(model)).values()),
        "forward_gflops": forward_gflops(model.shape, model.image_size, **geometry),
        "memory_estimate": asdict(inference_memory(model, setting.batch_size, setting.precision)),
        **asdict(setting),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
