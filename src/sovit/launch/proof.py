"""Sweep files for the shapes of a proof: the star's recipe, other shapes, one budget.

A proof's cells differ from the star's in shape, seed, name and durations only. The files are ordinary sweep files, so
everything that runs a sweep runs them: on this machine, through Slurm, by W&B's agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sovit import records
from sovit.config import compose
from sovit.launch.sweep import COMMAND, PROGRAM, Sweep, SweepError
from sovit.strict import read_yaml

_SETTLED = ("shape", "seed", "name", "tag", "model.width", "model.depth", "model.mlp_dim", "center", "runs_dir")
EVALUATIONS = 4  # of a run of the proof, the last three an octave apart in compute


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
    parameters = dict(read_yaml(star.path)["parameters"])
    varied = [key for key, spec in parameters.items() if "values" in spec and key not in _SETTLED]
    if varied:
        raise SweepError(
            f"{star.path} varies {varied[0]} too; a proof needs a star of one recipe, so give it one value."
        )
    fixed = {key: spec for key, spec in parameters.items() if key not in _SETTLED and "durations." not in key}
    cfg = compose(star.cells[0])
    if cfg.durations.values is not None:
        raise SweepError(
            f"{star.path}: the cells list durations.values, but a proof sets durations of its own; give durations.first, "
            "last and num instead."
        )
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
