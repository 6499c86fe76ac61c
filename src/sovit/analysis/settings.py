"""What differs between two sweeps beside the shapes: their resolved configurations, sorted into things a reader would name.

A difference of exponents is that of everything that differs, so it can be laid to one thing only where one thing does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import records
from sovit.analysis.points import recipe

# Thing -> keys, or beginnings of keys; the first that fits counts.
_THINGS: dict[str, tuple[str, ...]] = {
    # Changes nothing, or shows at the points: the compute that was fitted.
    "": ("simulated", "recorded", "name", "tag", "durations.", "parallel.", "eval.datasets", "eval.shots",
         "trainer.max_steps", "trainer.num_threads", "trainer.accelerator"),
    "resolution": ("model.image_size", "model.patch_size", "model.channels"),
    "objective": ("optim.loss", "optim.mask_ratio", "optim.teacher", "optim.temperature", "model.head_bias"),
    "data": ("data.",),
    "model": ("model.",),
    "optimiser": ("optim.",),
    "schedule": ("schedule.",),
    "evaluation": ("eval.",),
    "training": ("",),
}  # fmt: skip
_FEWSHOT = ("data.seed", "data.rotation", "data.num_heldout", "model.image_size", "model.channels")  # of the fractals


@dataclass(frozen=True)
class Setting:
    """A key that two sweeps have different values of, and the thing it belongs to."""

    thing: str
    key: str
    first: Any
    second: Any


def configuration(sweep_dir: Path, runs: Iterable[str]) -> dict[str, Any]:
    """Dotted keys of what the runs of a sweep have in common, with what keys meant that are younger than the record.

    Runs that were imported may have no configuration: then only what the keys ``simulated`` and ``recorded`` say is known.
    """
    record = records.read_run(sweep_dir / min(runs)) or {}
    found = recipe(record.get("config") or {})
    about = {"simulated": "simulated" in record, "recorded": bool(found)}
    return (records.younger_defaults() if found else {}) | found | about


def settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Setting]:
    """The keys in which two configurations differ, in the order of the things they belong to; none if one is unknown."""
    if not (first["recorded"] and second["recorded"]):
        return []
    keys = [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]
    found = [Setting(_thing_of(key), key, first.get(key), second.get(key)) for key in keys if _thing_of(key)]
    return sorted(found, key=lambda one: list(_THINGS).index(one.thing))


def _thing_of(key: str) -> str:
    return next(thing for thing, beginnings in _THINGS.items() if key.startswith(beginnings))


def other_task(dataset: str, differing: Iterable[Setting]) -> bool:
    """Whether the embedded few-shot task of this name is itself another one in the two sweeps."""
    keys = {one.key for one in differing}
    return bool(keys & set(_FEWSHOT if dataset == "fractals" else _FEWSHOT[3:]))
