"""Sweep files for the shapes of a proof: the star's recipe, other shapes, one budget.

A proof's cells differ from the star's in shape, seed, name and durations only. The files are ordinary sweep files, so
everything that runs a sweep runs them: on this machine, through Slurm, by W&B's agents.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sovit import records
from sovit.analysis.grid import sweep_kind
from sovit.config import compose
from sovit.derived import shape_of
from sovit.families import VIT
from sovit.launch.local.kept import KEPT
from sovit.launch.sweep import COMMAND, PROGRAM, Sweep, SweepError
from sovit.strict import read_yaml

_SETTLED = ("shape", "seed", "name", "tag", "model.width", "model.depth", "model.mlp_dim", "center")
_OWN = (*_SETTLED, "model.num_heads", "model.head_dim")  # what is given on the command line would take the place of
PARTS = ("local", "proof", "habit")  # end the names of its sweeps
EVALUATIONS = 4  # of a run of the proof, the last three an octave apart in compute


def refuse(star: Sweep, grid: Sweep, overrides: Sequence[str], name: str) -> None:
    """Raise SweepError for what would end a proof called ``name`` only after the star and the grid were trained."""
    for text in overrides:
        key = text.partition("=")[0]
        if key in _OWN or key.startswith("durations."):
            raise SweepError(f"{text}: a proof sets {key} for each of its sweeps; write it into {star.path} instead.")
    first = [compose(sweep.cells[0]) for sweep in (star, grid)]
    for sweep, cfg in zip((star, grid), first, strict=True):
        if cfg.model.family != VIT:
            raise SweepError(
                f"{sweep.path} holds models of family {cfg.model.family}; a shape is predicted for ViTs only so far."
            )
    here, there = first
    if here.runs_dir != there.runs_dir:
        raise SweepError(
            f"{star.path} and {grid.path} have two runs_dir, {here.runs_dir} and {there.runs_dir}; give one."
        )
    if here.name == there.name:
        raise SweepError(f"{star.path} and {grid.path} are both called {here.name}; give one of them another name.")
    if star.metric != grid.metric:
        raise SweepError(f"{star.path} and {grid.path} have two metrics; the proof needs one.")
    if not re.fullmatch("[A-Za-z0-9_]*[A-Za-z0-9][A-Za-z0-9_]*", name):
        raise SweepError(f"--name {name!r}: letters, digits and _ only.")
    for taken in {here.name, there.name} & {name, *(f"{name}_{part}" for part in PARTS)}:
        raise SweepError(f"--name {name}: a sweep is called {taken} already; choose another.")
    if (Path(here.runs_dir) / name / KEPT).exists():
        raise SweepError(f"--name {name}: {Path(here.runs_dir) / name} holds the runs of a sweep; choose another.")
    _check(star)
    for sweep, kind in ((star, "star"), (grid, "grid")):
        found = sweep_kind(shape_of(compose(cell)) for cell in sweep.cells)
        if found != kind:
            raise SweepError(f"{sweep.path} is a {found}; --{kind} needs a {kind}.")


def _check(star: Sweep) -> None:
    parameters = read_yaml(star.path)["parameters"]
    varied = [key for key, spec in parameters.items() if "values" in spec and key not in _SETTLED]
    if varied:
        raise SweepError(
            f"{star.path} varies {varied[0]} too; a proof needs a star of one recipe, so give it one value."
        )
    if compose(star.cells[0]).durations.values is not None:
        raise SweepError(
            f"{star.path}: the cells list durations.values, but a proof sets durations of its own; give durations.first, "
            "last and num instead."
        )


def write(
    path: Path,
    star: Sweep,
    *,
    name: str,
    shapes: Sequence[str],
    seeds: Sequence[int],
    compute: float,
    about: str,
    num_heads: int | None = None,
    keep: bool = False,
) -> None:
    """Write the sweep file of ``shapes`` x ``seeds``, each trained for ``compute`` GFLOPs, unless it is there already.

    ``num_heads``: instead of the star's; ``keep``: the last resume point of every run, for what is done with
    the model later. Raises SweepError for a star that varies more than shapes and seeds, or that lists its durations.
    """
    _check(star)
    parameters = dict(read_yaml(star.path)["parameters"])
    fixed = {key: spec for key, spec in parameters.items() if key not in _SETTLED and "durations." not in key}
    cfg = compose(star.cells[0])
    if num_heads is not None:
        fixed = {key: spec for key, spec in fixed.items() if key not in ("model.num_heads", "model.head_dim")}
        by_dim = cfg.model.head_dim is not None
        heads = int(shapes[0].split("x")[0]) // num_heads if by_dim else num_heads
        fixed |= {"model.head_dim" if by_dim else "model.num_heads": {"value": heads}}
    content: dict[str, Any] = {
        "program": PROGRAM,
        "command": COMMAND,
        "method": "grid",
        "metric": dict(star.metric),
        "parameters": {
            **fixed,
            "name": {"value": name},
            "durations.first": {"value": f"{compute / 2 ** (EVALUATIONS - 1):g} gflops"},
            "durations.last": {"value": f"{compute:g} gflops"},
            "durations.num": {"value": EVALUATIONS},
            **({"trainer.keep_checkpoint": {"value": True}} if keep else {}),
            "shape": {"values": list(shapes)},
            "seed": {"values": list(seeds)},
        },
    }
    text = f"# {about}\n" + yaml.safe_dump(content, sort_keys=False, width=120)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = records.scratch_of(path)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
