"""What run.json says of a run from its beginning: its configuration, the code, the data and the machine."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from sovit import records
from sovit.config import RunConfig
from sovit.derived import model_geometry, model_options, num_outputs, shape_of
from sovit.families import TEXT
from sovit.flops import forward_gflops, num_params
from sovit.launch.pay.hardware import hardware
from sovit.lit.data import data_fingerprint
from sovit.lit.fit import build_model
from sovit.lit.layout import on_gpu
from sovit.lit.locked import Locked
from sovit.lit.teacher import Teacher


def new_record(
    cfg: RunConfig, directory: Path, found: dict[str, Any], beside: Teacher | Locked | None = None
) -> dict[str, Any]:
    """``found``: what earlier processes recorded; ``beside``: the trained model that this run needs, if it does."""
    shape = shape_of(cfg)
    noted = (found.get("wall_s"), (records.read_progress(directory) or {}).get("wall_s"))
    return {
        "schema": records.SCHEMA,
        "run_id": directory.name,
        "sweep": cfg.name,
        "status": records.RUNNING,
        "reason": None,
        **shape.as_dict(),
        "seed": cfg.seed,
        "num_params": _num_params(cfg, beside),
        "forward_gflops": forward_gflops(shape, **model_geometry(cfg)),
        "config_hash": records.config_hash(cfg),
        "code_version": records.code_version(),
        "lock_sha256": records.lock_hash(),
        "data_fingerprint": data_fingerprint(cfg),
        **({"teacher": beside.record()} if isinstance(beside, Teacher) else beside.record() if beside else {}),
        "torch_version": torch.__version__,
        "machine": _machine(cfg),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "wall_s": max([0.0, *(seconds for seconds in noted if isinstance(seconds, int | float))]),
        "config": dataclasses.asdict(cfg),
    }


def _num_params(cfg: RunConfig, beside: Teacher | Locked | None) -> int:
    if cfg.model.family == TEXT:  # its table of words is the vocabulary's, its projection the image tower's
        assert isinstance(beside, Locked)
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_model(cfg, beside).parameters())
    built = model_geometry(cfg) | {"num_classes": num_outputs(cfg)}
    return sum(num_params(shape_of(cfg), **built, **model_options(cfg)).values())


# What decides, beside the configuration, in which order or precision a machine adds: kept to explain two runs that differ.
ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "KMP_AFFINITY",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def _machine(cfg: RunConfig) -> dict[str, Any]:
    """The processor and the versions that a number can depend on in its last digits."""
    gpu = on_gpu(cfg)
    return {
        **hardware("gpu" if gpu else "cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "lightning": pl.__version__,
    }
