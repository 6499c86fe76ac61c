"""A model as an ONNX graph for any number of images, by torch's own exporter, run with onnxruntime to see that it is right.

Needs onnx and onnxscript, and onnxruntime for the check: ``pip install "sovit[onnx]"``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sovit.config import ConfigError

GRAPH = "model.onnx"
INSTALL = 'pip install "sovit[onnx]"'
LARGEST = 2**31 - 2**20  # bytes of a graph with its weights inside: a limit of protobuf, less room for the graph


class _WithFeatures(nn.Module):
    """From pixels to logits and pooled features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        tokens = model.forward_features(pixels)
        features = model.forward_head(tokens, pre_logits=True)
        plain = isinstance(model.head, nn.Linear | nn.Identity)  # a Swin's pools as well
        return (model.head(features) if plain else model.forward_head(tokens)), features


def check() -> None:
    """Raise ConfigError if what the exporter needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}, which are not installed: {INSTALL}.")


def write(model: nn.Module, example: Tensor, path: Path, card: Mapping[str, Any], *, beside: bool) -> None:
    """The graph of a float32 model in evaluation mode; the card goes into its metadata.

    ``beside``: weights too large for one file go to ``PATH.data``. Raises ConfigError if they are and may not.
    """
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if size > LARGEST and not beside:
        raise ConfigError(
            f"{path.name} would hold {size / 2**30:.1f} GiB, and one ONNX file holds 2; give a folder with --format onnx."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # torch's exporter on torch
        program = torch.onnx.export(
            _WithFeatures(model).eval(),
            (example,),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits", "features"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["card"] = json.dumps(card)
    program.save(os.fspath(path), external_data=size > LARGEST)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from pixels to logits by onnxruntime. Raises ImportError without it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


def lines(file: str | None = None) -> list[str]:
    """Python that runs the graph on ``pixels``."""
    path = f'f"{{folder}}/{GRAPH}"' if file is None else repr(file)
    return [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession({path}, providers=["CPUExecutionProvider"])',
        'logits, features = session.run(["logits", "features"], {"pixels": pixels.numpy()})',
    ]
