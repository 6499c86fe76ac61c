"""Other people's results as the runs of a sweep, in the files that a training run leaves (`sovit.records`).

`build` makes runs of the rows of a `sovit.analysis.imports.importers.Table`, and `write` lays them down, as imported. A
row that cannot be used is an error with its place, or, with ``skip_bad``, listed in ``import.json`` beside the runs. A
run that is there already is never changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import records
from sovit.analysis.imports.imported_rows import (
    Evaluation,
    Identity,
    LeftOut,
    Options,
    computed_gflops,
    doubts,
    durations,
    evaluations,
)
from sovit.analysis.imports.importers import RECIPE, Table
from sovit.analysis.points import IMPORTS

WEIGHTS = "imported"


@dataclass(frozen=True)
class Imported:
    """``runs``: run id -> (record of run.json, rows of evals.jsonl). ``about``: source, hash, mapping and options."""

    name: str
    runs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    about: dict[str, Any]


def build(table: Table, columns: Mapping[str, str], name: str, options: Options) -> Imported:
    """The runs in a table. ``columns``: key -> column (`importers.parse_map`); ``name``: of the sweep.

    Raises ValueError for a column that is not there, options that do not fit the columns, rows that cannot be used
    (unless ``skip_bad``), and a table without a usable row.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.+]+", name):
        raise ValueError(f"--name {name!r} becomes part of file names; use letters, digits, '_', '.', '+'.")
    columns = dict(columns)
    if table.kind == "wandb":
        columns.setdefault("run", "run.id")
    good, unfinished, left_out = evaluations(table, columns, options)
    if left_out and not options.skip_bad:
        more = f" (and {len(left_out) - 1} more rows cannot be used)" if len(left_out) > 1 else ""
        first = left_out[0]
        raise ValueError(f"{first.where} {first.why}{more}; mend it, or leave such rows out, listed, with --skip-bad.")
    if not any(one.t_gflops > 0 for one in good):
        raise ValueError(f"{table.source} holds no usable row after the start of training.")
    named, notes = durations(good)
    about = {
        "kind": table.kind,
        "source": table.source,
        "sha256": table.sha256,
        "map": columns,
        "options": dataclasses.asdict(options),
        "num_rows": len(table.rows),
        "num_unfinished": len(table.unfinished),
    }
    groups: dict[Identity, list[Evaluation]] = {identity: [] for identity in unfinished}
    for one in sorted(good, key=lambda one: one.t_gflops):
        groups.setdefault(one.of, []).append(one)
    runs = {}
    for of, group in groups.items():
        run_id = _run_id(name, of, "run" in columns, options)
        rows = [_row(run_id, name, one, named, options, group) for one in group]
        record = _record(run_id, name, of, rows, options, about)
        if of in unfinished:
            record |= {"status": records.FAILED, "reason": unfinished[of]}
        runs[run_id] = record, rows
    return Imported(name, runs, tuple(left_out), (*notes, *doubts(good, columns, options)), about)


def _run_id(name: str, of: Identity, run_is_named: bool, options: Options) -> str:
    """As of a trained run, with the run's own name, where it has one, as the tag."""
    width, depth, mlp_dim = of.sizes
    heads = f"-h{options.num_heads:02d}" if options.num_heads else ""
    patch = f"-p{options.patch_size:02d}" if options.patch_size else ""
    tag = ""
    if run_is_named:
        text = str(of.run[0])
        clean = re.sub(r"[^A-Za-z0-9_.+]", "_", text)[:40]
        tag = f"-{clean}" if clean == text else f"-{clean}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return f"{name}-w{width:04d}-d{depth:02d}-m{mlp_dim:04d}{heads}{patch}{tag}-s{of.seed}"


def _row(
    run_id: str,
    name: str,
    one: Evaluation,
    named: Mapping[tuple[Any, ...], str],
    options: Options,
    group: Sequence[Evaluation],
) -> dict[str, Any]:
    """A line of evals.jsonl; the step is the number of the evaluation in its run, 0 for the random initialisation."""
    width, depth, mlp_dim = one.of.sizes
    computes = sorted({other.t_gflops for other in group if other.t_gflops > 0})
    forward = one.forward_gflops
    if forward is None and options.patch_size and options.image_size:
        forward = computed_gflops(one.of.sizes, options)
    return {
        "schema": records.SCHEMA,
        "run_id": run_id,
        "sweep": name,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": options.num_heads,
        "patch_size": options.patch_size,
        "image_size": options.image_size,
        "seed": one.of.seed,
        "step": computes.index(one.t_gflops) + 1 if one.t_gflops > 0 else 0,
        "examples_seen": None if one.images is None else round(one.images),
        "forward_gflops": forward,
        "t_gflops": one.t_gflops,
        "duration": named[one.of.run, one.t_gflops] if one.t_gflops > 0 else "init",
        "weights": WEIGHTS,
        "dataset": options.dataset,
        "shots": options.shots,
        "draw": one.draw,
        "l2_reg": None,
        "error": one.error,
        "stderr": one.stderr,
    }


def _record(
    run_id: str,
    name: str,
    of: Identity,
    rows: Sequence[Mapping[str, Any]],
    options: Options,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of run.json of a finished run; what an import does not know is null."""
    width, depth, mlp_dim = of.sizes
    config: dict[str, Any] = {"name": name, "shape": f"{width}x{depth}x{mlp_dim}", "seed": of.seed}
    if options.patch_size and options.image_size:
        config["model"] = {
            key: getattr(options, key) for key in ("num_heads", "patch_size", "image_size", "channels", "pool")
        }
        config["data"] = {"num_classes": options.num_classes}
    if of.recipe:
        config["recipe"] = {key.removeprefix(RECIPE): value for key, value in of.recipe}
    identity = json.dumps([config, list(rows)], sort_keys=True, default=str)
    return {
        "schema": records.SCHEMA,
        "run_id": run_id,
        "sweep": name,
        "status": records.DONE,
        "reason": None,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": options.num_heads,
        "patch_size": options.patch_size,
        "seed": of.seed,
        "num_params": None,
        "forward_gflops": rows[-1]["forward_gflops"] if rows else None,
        "config_hash": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "code_version": records.code_version(),
        "lock_sha256": None,
        "data_fingerprint": WEIGHTS,
        "torch_version": None,
        "wall_s": None,
        "images_per_s": None,
        "steps_trained": rows[-1]["step"] if rows else 0,
        "config": config,
        "imported": {key: about[key] for key in ("kind", "source", "sha256", "map")},
    }


def write(imported: Imported, runs_dir: Path) -> tuple[Path, int]:
    """Write the runs that are not there yet under ``runs_dir/<name>``: (that directory, how many were new).

    A run that is there with the same records stays as it is. Raises ValueError, before anything is written, if one is
    there with other records, or if something cannot be written.
    """
    directory = runs_dir / imported.name
    new = {}
    for run_id, (record, rows) in imported.runs.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if not (directory / run_id).exists():
            new[run_id] = record, lines
        elif not _is_same(directory / run_id, record, lines):
            raise ValueError(f"{directory / run_id} holds another run; import under another --name, or move it away.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for run_id, (record, lines) in new.items():
            scratch = directory / f".{run_id}.tmp"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            (scratch / records.EVALS).write_text(lines)
            records.write_json(scratch / records.RUN, record)
            os.replace(scratch, directory / run_id)  # whole, or not at all
        _note(directory / IMPORTS, imported)
    except OSError as error:
        raise ValueError(f"{directory} cannot be written: {error.strerror or error}.") from None
    return directory, len(new)


def _is_same(directory: Path, record: Mapping[str, Any], lines: str) -> bool:
    try:
        there = records.read_run(directory) or {}
        evals = (directory / records.EVALS).read_text()
    except (OSError, ValueError):
        return False
    keys = ("status", "reason", "config", "config_hash")
    return "imported" in there and evals == lines and all(there.get(key) == record[key] for key in keys)


def _note(path: Path, imported: Imported) -> None:
    """List this import, with the rows it left out, once."""
    entry = imported.about | {"left_out": [dataclasses.asdict(row) for row in imported.left_out]}
    try:
        known = json.loads(path.read_text())["imports"] if path.exists() else []
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what an import wrote; move it away.") from None
    entry = json.loads(json.dumps(entry, default=str))
    if entry not in known:
        records.write_json(path, {"schema": records.SCHEMA, "imports": [*known, entry]})
