"""Where runs that were trained elsewhere are read from: a CSV or JSON-lines file, or W&B.

A source gives a `Table` of rows, each with its place for a reader, and a mapping (`parse_map`) says which column holds
what. What the values mean, and the records made of them, is the business of `sovit.analysis.imports.imported`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {
    "width": "embedding size",
    "depth": "number of blocks",
    "mlp_dim": "hidden size of the MLP",
    "t": "compute: forward FLOPs per image x images seen",
    "images": "images seen, instead of t",
    "forward_gflops": "with images: forward GFLOPs per image (computed from the shape if not given)",
    "error": "error",
    "accuracy": "accuracy, instead of the error",
    "seed": "0 if not given",
    "run": "what tells runs apart (shape and seed if not given)",
    "duration": "name of the duration, equal for the runs of one isocompute slice",
    "stderr": "standard error of the metric",
    "draw": "support draw of the few-shot evaluation; draws are averaged",
}
RECIPE = "recipe."  # recipe.lr=COL: kept in the run's configuration, where a fit refuses to mix values


@dataclass(frozen=True)
class Row:
    """``where`` names the row for a reader ("results.csv, line 3"); ``problem`` says why it cannot be read at all."""

    where: str
    values: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """What was read. ``source`` names it, ``sha256`` is that of the file, or of the rows where there is none.

    ``unfinished``: rows with the shape of runs that did not finish, and why.
    """

    kind: str
    source: str
    sha256: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    unfinished: tuple[tuple[Row, str], ...] = ()


def parse_map(texts: Sequence[str]) -> dict[str, str]:
    """{key: column} from texts such as "width=config.model.width,depth=d"; quote a pair whose column has a comma.

    Raises ValueError for an unknown or repeated key, and for keys that are missing or exclude each other.
    """
    found: dict[str, str] = {}
    for pair in (pair for text in texts for pair in next(csv.reader([text], skipinitialspace=True), [])):
        key, equals, column = pair.partition("=")
        if not equals or not key or not column:
            raise ValueError(f"--map {pair!r} is not KEY=COLUMN; write for example width=embed_dim.")
        if key not in KEYS and not (key.startswith(RECIPE) and len(key) > len(RECIPE)):
            raise ValueError(f"--map {key!r} is not a key{nearest(key, KEYS)}; keys: {', '.join(KEYS)}, recipe.NAME.")
        if key in found:
            raise ValueError(f"--map gives {key} twice, as {found[key]!r} and {column!r}; keep one.")
        found[key] = column
    missing = [key for key in ("width", "depth", "mlp_dim") if key not in found]
    if missing:
        raise ValueError(f"--map does not say where {' and '.join(missing)} stand; add {missing[0]}=COLUMN.")
    for one, other in (("t", "images"), ("error", "accuracy")):
        if (one in found) == (other in found):
            raise ValueError(f"--map needs {one}=COLUMN or {other}=COLUMN, and not both.")
    if "forward_gflops" in found and "t" in found:
        raise ValueError("--map gives t and forward_gflops; forward_gflops goes with images.")
    return found


def read_csv(path: Path) -> Table:
    """Rows of a comma-separated file with a header. Raises ValueError if there is no such file, text or header."""
    text, digest = _read(path)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        names = [name.strip() for name in header]
        if not any(names):
            raise ValueError(f"{path} is empty; its first line must name the columns.")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path} has two columns {twice!r}; rename one.")
        rows = []
        for fields in reader:
            if any(value.strip() for value in fields):
                odd = f"has {len(fields)} fields, the header {len(names)}" if len(fields) != len(names) else None
                where = f"{path.name}, line {reader.line_num}"
                rows.append(Row(where, dict(zip(names, map(str.strip, fields), strict=False)), odd))
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from None
    return Table("csv", path.name, digest, tuple(names), tuple(rows))


def read_jsonl(path: Path) -> Table:
    """Rows of a file with one JSON object a line; a column may reach into objects, as config.model.width does."""
    text, digest = _read(path)
    rows, columns = [], dict[str, None]()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        is_object = isinstance(value, dict)
        rows.append(
            Row(f"{path.name}, line {number}", value if is_object else {}, None if is_object else "is no JSON object")
        )
        columns |= dict.fromkeys(value if is_object else ())
    if not columns:
        raise ValueError(f"{path} holds no JSON object; write one a line.")
    return Table("jsonl", path.name, digest, tuple(columns), tuple(rows))


def _read(path: Path) -> tuple[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; export it as such.") from None
    if "\0" in text:
        raise ValueError(f"{path} is not a text file.")
    return text, hashlib.sha256(content).hexdigest()


def read_wandb(connect: Callable[[], Any], path: str, columns: Mapping[str, str]) -> Table:
    """Rows of the runs of ENTITY/PROJECT or ENTITY/PROJECT/SWEEP. ``connect`` gives a ``wandb.Api``.

    A column config.NAME is in the run's configuration, summary.NAME in its summary, run.id and run.name are the run's
    own; every other one is logged over time, and a row is an entry of the history that holds all of those. Runs are told
    apart by their ids unless "run" is mapped. Raises ValueError, in one sentence, for whatever W&B raises.
    """
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{path!r} is not ENTITY/PROJECT or ENTITY/PROJECT/SWEEP.")
    logged = [name for name in columns.values() if not name.startswith(("config.", "summary.", "run."))]
    rows: list[Row] = []
    unfinished: list[tuple[Row, str]] = []
    try:
        api = connect()
        for run in api.sweep(path).runs if len(parts) == 3 else api.runs(path):
            known = {
                "config": dict(run.config),
                "summary": dict(run.summary) if any(name.startswith("summary.") for name in columns.values()) else {},
                "run": {"id": run.id, "name": run.name},
            }
            if run.state != "finished":
                unfinished.append((Row(f"W&B run {run.id}", known), f"W&B says {run.state}"))
                continue
            entries = list(run.scan_history(keys=logged)) if logged else [{}]
            rows += [Row(f"W&B run {run.id}, entry {k}", known | dict(entry)) for k, entry in enumerate(entries, 1)]
            if not entries:
                rows.append(Row(f"W&B run {run.id}", known, f"has no entry with all of {', '.join(logged)}"))
    except Exception as error:  # its client raises errors of many libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"W&B did not give the runs of {path}: {reason}; check the path, and wandb login.") from None
    if not rows and not unfinished:
        raise ValueError(f"W&B has no runs at {path}; check the path.")
    content = json.dumps([row.values for row in rows], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Table("wandb", path, digest, (), tuple(rows), tuple(unfinished))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'width'?", or nothing if no known name is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
