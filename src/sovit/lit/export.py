"""A resume point as one file for others: a Lightning checkpoint, or the model's weights as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sovit import records
from sovit.config import ConfigError, from_mapping, shape_of
from sovit.lit import checkpoints, trained

SUFFIXES = (".safetensors", ".ckpt")


def export(source: Path, out: Path, *, average: bool | None = None, overwrite: bool = False) -> str:
    """Write a run's newest sound resume point, or a given one, to ``out``; returns a line that says what was written.

    ``.ckpt``: all of it, as one process would have written it: a run of one process goes on from it. ``.safetensors``: the
    model's weights by timm's names, with shape, configuration and step in its metadata; ``average`` True for the averaged
    ones, False for the trained ones, None for the averaged ones if there are any. Raises ConfigError.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out} ends neither in .safetensors nor in .ckpt; give the file one of these endings.")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; choose another name, or add --overwrite.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is no folder; make it first.")
    point, content = trained.found(source)
    step = content["global_step"]
    if out.suffix == ".ckpt":
        checkpoints.write(out, content, lambda: None)
        return f"{out}: the whole state of {point} after {step:,} steps."
    tensors, kind = trained.tensors_of(content, point, average)
    scratch = records.scratch_of(out)
    metadata = {"step": str(step), "weights": kind}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata | _about(point))
    scratch.replace(out)
    total = sum(tensor.numel() for tensor in tensors.values())
    return f"{out}: the {kind} weights of {point} after {step:,} steps, {total:,} numbers."


def _about(point: Path) -> dict[str, str]:
    """Shape and configuration from the record beside a resume point, if there is one."""
    record = records.read_run(point.parent)
    if not record:
        return {}
    cfg = from_mapping(record["config"])
    return {
        "run_id": record["run_id"],
        "shape": json.dumps(shape_of(cfg).as_dict()),
        "config": json.dumps(record["config"]),
        "torch": torch.__version__,
    }
