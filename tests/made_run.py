"""A finished run made by hand, for tests of what is done with one: a model whose every weight is random, and its records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from sovit import records
from sovit.config import RunConfig, compose
from sovit.derived import model_geometry, shape_of
from sovit.flops import forward_gflops
from sovit.lit import checkpoints
from sovit.lit.fit import build_model

STEP = 120
RESULT = {"error": 0.25, "stderr": 0.0125}


def model_of(cfg: RunConfig, seed: int = 0) -> torch.nn.Module:
    """A model of which no two tensors are alike: fresh norms, biases and classifiers would hide a mix-up."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name != "pos_embed" or cfg.model.pos_embed == "learned":
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def make_run(
    runs: Path, *overrides: str, average: bool = True, step: int = STEP, evaluated: int = STEP, **record: Any
) -> tuple[Path, torch.nn.Module]:
    """The folder of a run and the model in it: the averaged one, if there are two."""
    cfg = compose([*overrides, f"runs_dir={runs}"])
    directory = records.run_dir(cfg)
    directory.mkdir(parents=True)
    model, other = model_of(cfg), model_of(cfg, seed=1)
    about = {
        "schema": 1, "run_id": directory.name, "status": "done", "code_version": "0.1.0+0123456789ab+", "seed": cfg.seed,
        "data_fingerprint": "fractals-1", "lock_sha256": "f" * 64, "torch_version": "2.12.1", "config_hash": "c" * 16,
        "baselines": {"digits": {"chance": 0.9, "pixels": {"5": 0.5, "10": 0.4}}}, "config": dataclasses.asdict(cfg),
    }  # fmt: skip
    records.write_json(directory / records.RUN, about | record)
    gflops = forward_gflops(shape_of(cfg), **model_geometry(cfg))
    records.append_lines(
        directory / records.EVALS,
        [
            {
                "step": at, "t_gflops": at * cfg.trainer.global_batch_size * gflops, "dataset": "digits",
                "weights": "ema" if average else "trunk", "shots": shots, "draw": draw, "l2_reg": 1.0,
                "error": 1 / shots + 0.01 * draw + (at == 0), "stderr": 0.01,
            }
            for at in (0, evaluated)
            for shots in (5, 10)
            for draw in range(3)
        ],
    )  # fmt: skip
    state = (other if average else model).state_dict()
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "callbacks": {"Ema": dict(model.state_dict())} if average else {},
        "global_step": step,
        checkpoints.KEY: {"config_hash": records.config_hash(cfg), "marks": {}},
    }
    torch.save(content, directory / checkpoints.ResumePoint(0, step).name)
    return directory, model


def add_result(run: Path, name: str = "calibration-00000000", **content: Any) -> Path:
    """A result as `sovit eval` leaves it."""
    path = run / "downstream" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    found = {
        "schema": 1,
        "task": "other",
        "config": {"name": "other", "data": "digits"},
        "step": STEP,
        "weights": "average",
    }
    path.write_text(json.dumps(found | {"result": RESULT} | content))
    return path
