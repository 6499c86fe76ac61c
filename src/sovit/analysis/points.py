"""Records in, points out: what a sweep measured, and what of it was left out and why.

A point is one run at one duration, its error averaged over the draws of the support set. Nothing is dropped in silence:
runs that are not done, diverged ones and those that repeat them at a lower learning rate among them, and runs named in
``exclusions.csv`` (run_id,reason) of the sweep's directory, come back as exclusions.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from sovit import records
from sovit.families import EXAMPLES, FAMILIES, VIT, Family
from sovit.metric import ERROR, LOG_PERPLEXITY, kind_of, place

EXCLUSIONS = "exclusions.csv"
IMPORTS = "import.json"  # what `sovit import` noted: its sources, and the rows it left out
DIMENSIONS = ("width", "depth", "mlp_dim")  # of a ViT; what knows only these says so


class HasShape(Protocol):
    """A `Point`, a shape of any family, or anything else with the three dimensions, and token_dim if it is a Mixer's."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...


class Dimensions(NamedTuple):
    width: int
    depth: int
    mlp_dim: int

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}x{self.mlp_dim}"

    def differs(self, other: AnyDimensions) -> list[str]:
        """Names of the dimensions in which two shapes differ."""
        return _differ(self, other)


class MixerDimensions(NamedTuple):
    width: int
    depth: int
    token_dim: int
    mlp_dim: int

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}x{self.token_dim}x{self.mlp_dim}"

    def differs(self, other: AnyDimensions) -> list[str]:
        """Names of the dimensions in which two shapes differ."""
        return _differ(self, other)


AnyDimensions = Dimensions | MixerDimensions
_BY_NAMES: dict[tuple[str, ...], type[Any]] = {cls._fields: cls for cls in (Dimensions, MixerDimensions)}


def _differ(one: AnyDimensions, other: AnyDimensions) -> list[str]:
    return [name for name, here, there in zip(one._fields, one, other, strict=True) if here != there]


def dimensions(shape: HasShape) -> AnyDimensions:
    """The dimensions that a star of such shapes varies; ``_fields`` are their names."""
    if hasattr(shape, "token_dim"):
        return MixerDimensions(shape.width, shape.depth, shape.token_dim, shape.mlp_dim)
    return Dimensions(shape.width, shape.depth, shape.mlp_dim)


def vit_dimensions(shape: HasShape) -> Dimensions:
    """The dimensions of a ViT. Raises ValueError for those of an MLP-Mixer."""
    found = dimensions(shape)
    if not isinstance(found, Dimensions):
        raise ValueError(f"{found} has four dimensions, an MLP-Mixer's; this is for ViTs.")
    return found


def dimensions_of(family: Family, text: str) -> AnyDimensions:
    """The dimensions of a shape's text, such as the center of a star. Raises ValueError."""
    return _BY_NAMES[family.dimensions](*family.sizes(text))


def parse_dimensions(option: str, text: str, like: AnyDimensions | None = None) -> AnyDimensions:
    """The dimensions that a text gives, as many as ``like`` has. Raises ValueError that names the option."""
    names = DIMENSIONS if like is None else like._fields
    if not re.fullmatch("x".join(["[1-9][0-9]{0,6}"] * len(names)), text):
        family = next(family for family in FAMILIES.values() if family.dimensions == names)
        such = "x".join(map(str, EXAMPLES[family.name]))
        raise ValueError(f"{option} {text!r} is no shape; write {family.form} such as {such}.")
    return _BY_NAMES[names](*map(int, text.split("x")))


@dataclass(frozen=True)
class Point:
    """``t_gflops``: forward GFLOPs per image times images seen. ``duration``: its nominal name, equal along a slice.

    ``error`` in [0, 1] is the mean over ``num_draws`` support draws, or the log-perplexity in nats per token over as many
    decoders. ``stderr`` adds the spread of the draws to that of the test set, as the rows give it (binomial, of an error):
    an upper bound, as all runs share the same draws and the same test images.
    """

    family: ClassVar[str] = VIT
    run_id: str
    width: int
    depth: int
    mlp_dim: int
    seed: int
    t_gflops: float
    duration: str
    error: float
    stderr: float
    num_draws: int


@dataclass(frozen=True)
class MixerPoint(Point):
    """A point of an MLP-Mixer (`sovit.families.mixer`)."""

    family: ClassVar[str] = "mixer"
    token_dim: int


@dataclass(frozen=True)
class SwinPoint(Point):
    """A point of a Swin transformer (`sovit.families.swin`)."""

    family: ClassVar[str] = "swin"


@dataclass(frozen=True)
class TextPoint(Point):
    """A point of a text tower (`sovit.families.text`); ``t_gflops`` are its own, per text."""

    family: ClassVar[str] = "text"


POINTS: dict[str, type[Point]] = {cls.family: cls for cls in (Point, MixerPoint, SwinPoint, TextPoint)}


def only_vits(points: Sequence[Point], what: str) -> None:
    """Raise ValueError if the points are of another family, for which there is no ``what``."""
    other = next((point for point in points if point.family != VIT), None)
    if other is not None:
        raise ValueError(f"{other.run_id} is of family {other.family}: there is no {what} for it yet, only for ViTs.")


@dataclass(frozen=True)
class Exclusion:
    run_id: str
    reason: str


def load_points(
    sweep_dir: str | Path, dataset: str, shots: int, *, retried: bool = False
) -> tuple[list[Point], list[Exclusion]]:
    """Points of every finished run of ``runs/<name>`` on one data set at one number of shots, by run id and compute.

    ``retried`` lets in the runs that repeat a diverged one at a lower learning rate. They are left out otherwise, because
    an exponent fitted to shapes that were trained at several rates is one of the rates as well.

    Raises ValueError if there is no such directory, a finished run's records cannot be read, ``exclusions.csv`` is
    malformed or names an unknown run, the runs were trained by different recipes or evaluated with different weights,
    or no finished run holds the data set at that number of shots.
    """
    sweep_dir = Path(sweep_dir)
    if not sweep_dir.is_dir():
        raise ValueError(f"{sweep_dir} is not a directory; give the directory that holds a sweep's runs.")
    run_dirs = sorted(path for path in sweep_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    left_out = _read_exclusions(sweep_dir / EXCLUSIONS, {path.name for path in run_dirs})
    points: list[Point] = []
    exclusions: list[Exclusion] = []
    available: set[tuple[str, int]] = set()
    weights: dict[str, str] = {}
    owners: dict[str, str] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for run_dir in run_dirs:
        reason = left_out.get(run_dir.name) or _does_not_count(run_dir, retried)
        if reason is None:
            rows = read_rows(run_dir / records.EVALS)
            _check_copy(run_dir, rows, owners)
            if rows:
                record = records.read_run(run_dir) or {}
                origin = {"sweep": rows[0].get("sweep"), "simulated": "simulated" in record}
                recipes[run_dir.name] = recipe(record.get("config") or {}) | _wanted_rate(run_dirs, record) | origin
            rows = [row for row in rows if row["step"] > 0]
            available |= {(row["dataset"], row["shots"]) for row in rows}
            rows = [row for row in rows if row["dataset"] == dataset and row["shots"] == shots]
            weights |= {row["weights"]: run_dir.name for row in rows}
            points += _average(rows, run_dir)
            reason = None if rows else f"no evaluation of {place(dataset, shots)}"
        if reason is not None:
            exclusions.append(Exclusion(run_dir.name, reason))
    exclusions += _not_imported(sweep_dir / IMPORTS)
    if len(weights) > 1:
        found = ", ".join(f"{kind} ({run})" for kind, run in sorted(weights.items()))
        raise ValueError(f"{sweep_dir} mixes evaluated weights: {found}; exclude the runs of one kind in {EXCLUSIONS}.")
    _check_recipes(sweep_dir, recipes)
    if available and not points:
        known = ", ".join(place(*one).removesuffix(" shots") for one in sorted(available))
        raise ValueError(f"{sweep_dir} holds no evaluation of {place(dataset, shots)}; it has {known}.")
    return points, exclusions


def metrics(sweep_dir: str | Path, *, retried: bool = False) -> list[tuple[str, int]]:
    """(data set, shots) on which every run of a sweep that counts was evaluated. Raises what `load_points` raises."""
    sweep_dir = Path(sweep_dir)
    run_dirs = sorted(path for path in sweep_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    left_out = _read_exclusions(sweep_dir / EXCLUSIONS, {path.name for path in run_dirs})
    held = [
        {(row["dataset"], row["shots"]) for row in read_rows(run_dir / records.EVALS) if row["step"] > 0}
        for run_dir in run_dirs
        if run_dir.name not in left_out and _does_not_count(run_dir, retried) is None
    ]
    return sorted(set.intersection(*held)) if held else []


# What the runs of one sweep may differ in: the shape, the seed, and what changes no number.
_FREE = (
    "shape",
    "seed",
    "runs_dir",
    "center",
    "retry_of",
    "optim.diverged_above",
    "logger.",
    "model.width",
    "model.depth",
    "model.mlp_dim",
    "model.token_dim",
    "model.num_heads",
    "model.head_dim",
    "data.num_workers",
    "trainer.log_",
    "trainer.checkpoint_",
    "trainer.keep_",
)


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a run's configuration that all runs of a fit must share; those younger than it, as it meant them."""
    flat = _recipe(config, "")
    younger = {key: value for key, value in records.younger_defaults().items() if not key.startswith(_FREE)}
    return younger | flat if flat else flat


def _recipe(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = prefix + key
        if isinstance(value, Mapping):
            flat |= _recipe(value, f"{dotted}.")
        elif not dotted.startswith(_FREE):
            flat[dotted] = value
    return flat


def _wanted_rate(run_dirs: Sequence[Path], record: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": the rate of the run that was repeated in the end} for a retry, which differs in nothing else; else {}."""
    known = {path.name: path for path in run_dirs}
    wanted: dict[str, Any] = {}
    while (repeated := known.pop((record.get("config") or {}).get("retry_of") or "", None)) is not None:
        record = records.read_run(repeated) or {}
        wanted = {"optim.lr": recipe(record.get("config") or {}).get("optim.lr")}
    return wanted


def _check_recipes(sweep_dir: Path, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """An exponent from runs of several recipes would mix the effect of the shape with that of the recipe."""
    for run, recipe in recipes.items():
        first_run, first = next(iter(recipes.items()))
        different = [key for key in {**first, **recipe} if first.get(key) != recipe.get(key) and key != "tag"]
        if different:
            raise ValueError(
                f"{sweep_dir} mixes runs that differ in {', '.join(different)} ({first_run} and {run}); "
                f"keep one kind and exclude the others in {EXCLUSIONS}."
            )


def _read_exclusions(path: Path, run_ids: set[str]) -> dict[str, str]:
    try:
        lines = [row for row in csv.reader(io.StringIO(path.read_text(), newline="")) if row]
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is no text with commas; write run_id,reason and a line for each run.") from None
    if not lines or lines[0] != ["run_id", "reason"]:
        raise ValueError(f"{path} starts with {lines[0] if lines else None}; its first line must be run_id,reason.")
    reasons: dict[str, str] = {}
    for run_id, *words in lines[1:]:
        if run_id not in run_ids:
            raise ValueError(f"{path} excludes {run_id!r}, which is no run of this sweep; correct the name.")
        if run_id in reasons:
            raise ValueError(f"{path} excludes {run_id} twice; keep one line.")
        if len(words) > 1:
            raise ValueError(f"{path} has {len(words) + 1} fields for {run_id}; quote a reason that holds a comma.")
        if not words or not words[0].strip():
            raise ValueError(f"{path} gives no reason for excluding {run_id}; write one.")
        reasons[run_id] = f"{EXCLUSIONS}: {words[0].strip()}"
    return reasons


def _not_imported(path: Path) -> list[Exclusion]:
    """The rows that an import left out, by where they stood."""
    try:
        imports = json.loads(path.read_text())["imports"]
        return [Exclusion(row["where"], f"not imported: {row['why']}") for one in imports for row in one["left_out"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what an import wrote; move it away, or import again.") from None


def _does_not_count(run_dir: Path, retried: bool) -> str | None:
    """Why the run does not count, or None if it is done, whole, and was trained like the others."""
    record = records.read_run(run_dir)
    if record is None:
        return f"no {records.RUN}"
    if record.get("schema", records.SCHEMA) != records.SCHEMA:
        raise ValueError(
            f"{run_dir / records.RUN} has schema {record['schema']!r}, this version reads {records.SCHEMA}; "
            f"exclude the run in {EXCLUSIONS}."
        )
    if not isinstance(record.get("config") or {}, Mapping):
        raise ValueError(f"{run_dir / records.RUN} has a config that is no mapping; exclude the run in {EXCLUSIONS}.")
    status = record.get("status")
    if status == records.DONE:
        broken = records.broken_seal(run_dir, record)
        if broken is not None:
            return f"{broken}; the sweep's command trains the run again"
        repeated = (record.get("config") or {}).get("retry_of")
        return f"trained at a lower learning rate after {repeated} diverged" if repeated and not retried else None
    if status is None:
        return f"{records.RUN} says no status"
    reason = f"{status}: {record['reason']}" if record.get("reason") else f"{status}"
    evals = run_dir / records.EVALS
    if evals.exists() and evals.stat().st_size and not evals.read_bytes().endswith(b"\n"):
        reason += f" (the last line of {records.EVALS} is cut off)"
    return reason


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run. Raises ValueError for a row that is none, and for rows of more than one shape."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text; delete the run's directory and run the cell again.") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} is not valid JSON; delete the run's directory and run the cell again.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object; delete the run's directory and run the cell again.")
        if row.get("schema") != records.SCHEMA:
            raise ValueError(f"{where} has schema {row.get('schema')!r}, this version reads {records.SCHEMA}.")
        kind = row.get("metric", ERROR)
        if kind not in (ERROR, LOG_PERPLEXITY):
            raise ValueError(f"{where} has metric {kind!r:.40}, which is not known; exclude the run in {EXCLUSIONS}.")
        unbounded = kind == LOG_PERPLEXITY
        fields = _FIELDS | _UNBOUNDED if unbounded else _FIELDS
        wrong = next((key for key, fits in fields.items() if not fits(row.get(key))), None)
        if wrong is not None:
            meant = "a log-perplexity" if unbounded and wrong in _UNBOUNDED else _MEANT[wrong]
            known = f"{wrong} {row[wrong]!r:.40}, which is not {meant}" if wrong in row else f"no {wrong}"
            raise ValueError(f"{where} has {known}; exclude the run in {EXCLUSIONS}.")
        if kind != kind_of(row["dataset"], row["shots"]):
            raise ValueError(
                f"{where} has metric {kind} of {place(row['dataset'], row['shots'])}, which cannot be; exclude the run in "
                f"{EXCLUSIONS}."
            )
        if row["step"] > 0 and row["t_gflops"] == 0:
            raise ValueError(f"{where} has t_gflops 0 after step 0; exclude the run in {EXCLUSIONS}.")
        family = row.get("family", VIT)
        if family not in FAMILIES:
            raise ValueError(f"{where} has family {family!r:.40}, which is not known; exclude the run in {EXCLUSIONS}.")
        names = FAMILIES[family].dimensions
        lacking = next((name for name in names if not _whole(1)(row.get(name))), None)
        if lacking is not None:
            raise ValueError(f"{where} has no {lacking}, as a {family} must; exclude the run in {EXCLUSIONS}.")
        if rows and any(row.get(key) != rows[0].get(key) for key in ("family", *names, "seed")):
            raise ValueError(f"{where} has another shape or seed than line 1; exclude the run in {EXCLUSIONS}.")
        rows.append(row)
    return rows


def _whole(least: int, most: int = 10_000_000) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _amount(most: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


_COUNT, _WORD = _whole(0, 2**63), lambda value: isinstance(value, str)
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(DIMENSIONS, _whole(1)),
    **dict.fromkeys(("seed", "step", "shots", "draw"), _COUNT),
    **dict.fromkeys(("duration", "weights", "dataset"), _WORD),
    "t_gflops": _amount(1e30),
    "error": _amount(1.0),
    "stderr": lambda value: value is None or _amount(1.0)(value),
}
_UNBOUNDED: dict[str, Callable[[Any], bool]] = {  # of log-perplexities
    "error": _amount(1e4),
    "stderr": lambda value: value is None or _amount(1e4)(value),
}
_MEANT = {
    **dict.fromkeys(DIMENSIONS, "a whole number from 1 to 10,000,000"),
    **dict.fromkeys(("seed", "step", "shots", "draw"), "a whole number of at least 0"),
    **dict.fromkeys(("duration", "weights", "dataset"), "text"),
    "t_gflops": "an amount of compute",
    "error": "in [0, 1]",
    "stderr": "in [0, 1]",
}


def _check_copy(run_dir: Path, rows: list[dict[str, Any]], owners: dict[str, str]) -> None:
    """A copied directory would count one run twice, as if it were two."""
    for run_id in {row["run_id"] for row in rows if row.get("run_id")}:
        owner = owners.setdefault(str(run_id), run_dir.name)
        if owner != run_dir.name:
            raise ValueError(f"{owner} and {run_dir.name} both hold run {run_id}; delete or exclude the copy.")


def _average(rows: list[dict[str, Any]], run_dir: Path) -> list[Point]:
    """One point for each duration of a run, over its draws."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["duration"], row["step"]), []).append(row)
    durations = [duration for duration, _ in groups]
    points = []
    for (duration, _), group in groups.items():
        if durations.count(duration) > 1 or len({row["draw"] for row in group}) < len(group):
            raise ValueError(f"{run_dir / records.EVALS} evaluates {duration!r} twice; delete the run and repeat it.")
        errors = np.array([row["error"] for row in group])
        of_test = float(np.mean([row["stderr"] or 0.0 for row in group]))
        draws = float(errors.std(ddof=1)) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
        row = group[0]
        family = FAMILIES[row.get("family", VIT)]
        points.append(
            POINTS[family.name](
                run_id=run_dir.name, seed=row["seed"], **{name: row[name] for name in family.dimensions},
                t_gflops=float(row["t_gflops"]), duration=duration, error=float(errors.mean()),
                stderr=math.hypot(of_test, draws), num_draws=len(group),
            )
        )  # fmt: skip
    return sorted(points, key=lambda point: point.t_gflops)


def plain(value: Any) -> Any:
    """JSON-ready copy: dataclasses and mappings to dicts, sequences to lists, numpy to Python, inf and nan to None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
