"""What each process computes at once: micro-batch, activation checkpointing, compilation.

Chosen from the configuration and a memory estimate (`sovit.memory`), and noted in the run's directory when a device had
less memory than was estimated. None of it changes a result but for the order of sums.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sovit import memory, records
from sovit.config import ConfigError, RunConfig
from sovit.derived import model_geometry, model_options, shape_of
from sovit.families import TEXT
from sovit.lit.ranks import Ranks
from sovit.lit.strategy import shard_size
from sovit.shape import Shape

NOTE = "layout.json"  # {"notes": [{"device", "world", "micro_batch": what is left to try, "too_large": a layout}]}


@dataclass(frozen=True)
class Layout:
    """``micro_batch`` images in one forward pass of a process; ``accumulation`` of them make its part of a step."""

    micro_batch: int
    accumulation: int
    checkpointing: str
    compiled: bool
    estimated_bytes: int = 0  # on the fullest device


def choose(cfg: RunConfig, directory: Path, ranks: Ranks) -> Layout:
    """The layout of a run on devices such as this process has. Raises ConfigError if the model does not fit on them.

    That the batch divides among the processes was settled before (`sovit.launch.processes.settled`).
    """
    parallel, batch = cfg.parallel, cfg.trainer.global_batch_size
    if on_gpu(cfg) and torch.cuda.device_count() < ranks.local_world:
        raise ConfigError(
            f"{ranks.local_world} processes on this node, but each of them sees {torch.cuda.device_count()} GPU: start srun "
            "with --gpus-per-node, not --gpus-per-task."
        )
    shape, most = shape_of(cfg), _noted(directory, ranks.world)
    compiled = on_gpu(cfg) if parallel.compile is None else parallel.compile
    if compiled and cfg.trainer.precision == "64-true" and not on_gpu(cfg):  # torch 2.12 expects Double, finds Float
        raise ConfigError(
            "parallel.compile=true with trainer.precision=64-true fails in torch's compiled attention on a CPU; "
            "write parallel.compile=false."
        )
    if cfg.model.family == TEXT:
        kind = parallel.checkpointing if parallel.checkpointing != "auto" else "none"
        return replace(_unplanned(cfg, batch // ranks.world, most), checkpointing=kind, compiled=compiled)
    if not isinstance(shape, Shape):
        return _unplanned(cfg, batch // ranks.world, most)
    fsdp = parallel.kind == "fsdp"
    model = memory.Model(shape, **model_geometry(cfg), **model_options(cfg))
    try:
        found = memory.choose_layout(
            model,
            device_bytes=free_bytes(cfg) / (1 if on_gpu(cfg) else ranks.local_world),
            global_batch_size=batch,
            world=ranks.world,
            micro_batch=parallel.micro_batch,
            at_most=most,
            checkpointing=parallel.checkpointing,
            precision=cfg.trainer.precision,
            optimizer=cfg.optim.name,
            ema=cfg.eval.weights == "ema",
            kind=parallel.kind,
            shards=shard_size(ranks, parallel.shard) if fsdp else 1,
            gpu=on_gpu(cfg),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Layout(found.micro_batch, found.accumulation, found.checkpointing, compiled, found.memory.total)


def _unplanned(cfg: RunConfig, share: int, most: int | None) -> Layout:
    """The layout of a family without a memory estimate: a process's whole share at once, until that proves too large."""
    wanted = cfg.parallel.micro_batch or share
    if share % wanted:
        raise ConfigError(f"micro_batch={wanted} does not divide the {share} images of each process.")
    micro = min(wanted, most or share)
    return Layout(micro, share // micro, "none", compiled=False)


def on_gpu(cfg: RunConfig) -> bool:
    return cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()


def next_smaller(micro: int, share: int) -> int:
    """The next smaller micro-batch that divides a process's share, about half. Raises ValueError if there is none."""
    smaller = [size for size in range(1, micro // 2 + 1) if share % size == 0]
    if not smaller:
        raise ValueError("one image at a time is too much")
    return smaller[-1]


def shrink(directory: Path, layout: Layout, world: int) -> int:
    """Note that a micro-batch did not fit, for whoever goes on with the run; returns the next. Raises ValueError."""
    smaller = next_smaller(layout.micro_batch, layout.micro_batch * layout.accumulation)
    notes = [note for note in _notes(directory) if not _of_these(note, world)]
    note = {"device": device(), "world": world, "micro_batch": smaller, "too_large": asdict(layout)}
    records.write_json(directory / NOTE, {"notes": [*notes, note]}, durable=True)
    return smaller


def device() -> str:
    """Name of the device that this process trains on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _noted(directory: Path, world: int) -> int | None:
    found = [note["micro_batch"] for note in _notes(directory) if _of_these(note, world)]
    return min(found) if found else None


def _of_these(note: dict[str, Any], world: int) -> bool:
    return note["device"] == device() and note["world"] == world


def _notes(directory: Path) -> list[dict[str, Any]]:
    content = records.read_object(directory / NOTE) or {}
    return list(content.get("notes", []))


def free_bytes(cfg: RunConfig) -> int:
    """Bytes that are free for this run: on its GPU, or in the machine."""
    if on_gpu(cfg):
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024 * int(found[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
