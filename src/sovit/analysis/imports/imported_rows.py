"""What the rows of an import mean: one evaluation of one run each, in the package's units, or why a row is none.

Nothing is guessed: percent, multiply-adds and units of compute are converted only when asked for, and what looks as if a
unit were wrong is said. Compute is forward FLOPs per image times images seen, at 2 FLOP per multiply-add.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sovit.analysis.imports.importers import RECIPE, Row, Table, nearest
from sovit.duration import Duration
from sovit.flops import forward_gflops
from sovit.shape import Shape

UNITS = {"flops": 1e-9, "gflops": 1.0, "tflops": 1e3, "pflops": 1e6, "eflops": 1e9}
_ALIGNED = 1.1  # compute within 10% is one duration
_MOST = 10_000_000  # the largest width, depth, MLP dimension or seed that is taken for one


@dataclass(frozen=True)
class Options:
    """``unit``: of the column t. ``macs``: the compute given counts multiply-adds, half the FLOPs. ``percent``: error,
    accuracy and stderr are percent. The geometry is needed for images without forward_gflops, and recorded if given.
    """

    dataset: str
    shots: int
    unit: str = "gflops"
    macs: bool = False
    percent: bool = False
    num_heads: int | None = None
    patch_size: int | None = None
    image_size: int | None = None
    channels: int = 3
    pool: str = "map"
    num_classes: int = 0
    skip_bad: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A row that became no evaluation, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Identity:
    """What tells a run apart (its name, or its shape and seed), its shape, seed, and the recipe that was mapped."""

    run: tuple[Any, ...]
    sizes: tuple[int, int, int]
    seed: int
    recipe: tuple[tuple[str, Any], ...]


class _Bad(Exception):
    """Why a row cannot be used."""


_ABSENT = object()


def _get(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column, which may be a dotted path into mappings; `_ABSENT` if there is none."""
    if column in values:
        return values[column]
    head, dot, rest = column.partition(".")
    while dot:
        inner = values.get(head)
        if isinstance(inner, Mapping) and (found := _get(inner, rest)) is not _ABSENT:
            return found
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return _ABSENT


def _number(row: Row, columns: Mapping[str, str], key: str) -> float:
    value = _get(row.values, columns[key])
    if value is _ABSENT:
        raise _Bad(f"has no {columns[key]}")
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _Bad(f"has {key} {_shown(value)}, which is no number")
    return number


def _whole(row: Row, columns: Mapping[str, str], key: str, least: int) -> int:
    number = _number(row, columns, key)
    if number != int(number) or not least <= number <= _MOST:
        raise _Bad(f"has {key} {number:g}, which is no whole number from {least} to {_MOST:,}")
    return int(number)


def _share(row: Row, columns: Mapping[str, str], key: str, percent: bool) -> float:
    number = _number(row, columns, key)
    share = number / 100 if percent else number
    if not 0 <= share <= 1:
        hint = "; if the column is in percent, say --percent" if not percent and 1 < number <= 100 else ""
        raise _Bad(f"has {key} {number:g}, which is not in [0, {100 if percent else 1}]{hint}")
    return share


def _amount(row: Row, columns: Mapping[str, str], key: str) -> float:
    """A number of at least 0, which for t and images is the random initialisation."""
    number = _number(row, columns, key)
    if not 0 <= number < 1e30 or (number == 0 and key == "forward_gflops"):
        raise _Bad(f"has {key} {number:g}, which is no amount of training")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class Evaluation:
    """A usable row. ``images``, ``forward_gflops`` per image: if known; ``t_gflops`` is 0 before the first step."""

    where: str
    of: Identity
    forward_gflops: float | None
    images: float | None
    t_gflops: float
    duration: str | None
    draw: int
    error: float
    stderr: float | None


def _evaluation(row: Row, columns: Mapping[str, str], options: Options) -> Evaluation:
    """One row, checked and in the package's units. Raises _Bad."""
    if row.problem:
        raise _Bad(row.problem)
    of = _identity(row, columns)
    forward = images = None
    if "t" in columns:
        t = _amount(row, columns, "t") * UNITS[options.unit] * (2 if options.macs else 1)
    else:
        images = _amount(row, columns, "images")
        if "forward_gflops" in columns:
            forward = _amount(row, columns, "forward_gflops") * (2 if options.macs else 1)
        else:
            forward = computed_gflops(of.sizes, options)
        t = forward * images
    if "error" in columns:
        error = _share(row, columns, "error", options.percent)
    else:
        error = round(1 - _share(row, columns, "accuracy", options.percent), 12)  # 1 - 0.7 is 0.30000000000000004
    given = _get(row.values, columns["stderr"]) if "stderr" in columns else None
    stderr = _share(row, columns, "stderr", options.percent) if given not in (None, "") else None
    duration = None
    if "duration" in columns:
        value = _get(row.values, columns["duration"])
        if value is _ABSENT or not str(value).strip():
            raise _Bad(f"has no {columns['duration']}")
        duration = str(value).strip()
    draw = _whole(row, columns, "draw", 0) if "draw" in columns else 0
    return Evaluation(row.where, of, forward, images, t, duration, draw, error, stderr)


def _identity(row: Row, columns: Mapping[str, str]) -> Identity:
    width, depth, mlp_dim = (_whole(row, columns, key, 1) for key in ("width", "depth", "mlp_dim"))
    seed = _whole(row, columns, "seed", 0) if "seed" in columns else 0
    recipe = []
    for key in sorted(columns):
        if key.startswith(RECIPE):
            value = _get(row.values, columns[key])
            if value is _ABSENT:
                raise _Bad(f"has no {columns[key]}")
            recipe.append((key, json.dumps(value, default=str) if isinstance(value, list | Mapping) else value))
    run: tuple[Any, ...] = (width, depth, mlp_dim, seed)
    if "run" in columns:
        name = _get(row.values, columns["run"])
        if name is _ABSENT or name is None or not str(name).strip():
            raise _Bad(f"has no {columns['run']}")
        run = (str(name).strip(),)
    return Identity(run, (width, depth, mlp_dim), seed, tuple(recipe))


def computed_gflops(sizes: tuple[int, int, int], options: Options) -> float:
    """Forward GFLOPs per image; the number of heads does not enter."""
    assert options.patch_size is not None and options.image_size is not None
    shape = Shape(*sizes, 1, options.patch_size)
    return forward_gflops(
        shape, options.image_size, channels=options.channels, pool=options.pool, num_classes=options.num_classes
    )


def evaluations(
    table: Table, columns: Mapping[str, str], options: Options
) -> tuple[list[Evaluation], dict[Identity, str], list[LeftOut]]:
    """(usable rows, runs that did not finish and why, rows that cannot be used and why) of a table.

    Raises ValueError for a column that is not there and for options that do not fit the columns.
    """
    _check_options(columns, options)
    _check_columns(table, columns)
    good: list[Evaluation] = []
    left_out: list[LeftOut] = []
    first: dict[tuple[Any, ...], Evaluation] = {}
    seen: dict[tuple[Any, ...], Any] = {}
    for row in table.rows:
        try:
            one = _evaluation(row, columns, options)
            _check_against(one, first.setdefault(one.of.run, one), seen, "run" in columns)
        except _Bad as bad:
            left_out.append(LeftOut(row.where, str(bad)))
        else:
            good.append(one)
    unfinished = {}
    for row, why in table.unfinished:
        try:
            unfinished[_identity(row, columns)] = why
        except _Bad as bad:
            left_out.append(LeftOut(row.where, f"{why}, and {bad}"))
    return good, unfinished, left_out


def _check_options(columns: Mapping[str, str], options: Options) -> None:
    if "images" in columns and "forward_gflops" not in columns:
        missing = [
            flag for flag, value in (("--patch", options.patch_size), ("--image-size", options.image_size)) if not value
        ]
        if missing:
            raise ValueError(
                f"images alone say no compute: give {' and '.join(missing)} to compute the forward FLOPs from the shape, "
                "or map forward_gflops or t."
            )
        if options.macs:
            raise ValueError("--macs says how t or forward_gflops was counted, but neither is mapped; leave it away.")
    if options.unit != "gflops" and "t" not in columns:
        raise ValueError(f"--t-unit {options.unit} is the unit of t, which is not mapped; leave it away.")
    if options.unit not in UNITS:
        raise ValueError(f"--t-unit {options.unit!r} is unknown; use one of {', '.join(UNITS)}.")
    if options.shots < 1:
        raise ValueError(f"--shots {options.shots} is not at least 1.")


def _check_columns(table: Table, columns: Mapping[str, str]) -> None:
    """Every mapped column is in at least one row: otherwise its name is wrong, not the rows."""
    rows = [*table.rows, *(row for row, _ in table.unfinished)]
    readable = [row for row in rows if row.problem is None]
    for key, column in columns.items():
        absent = all(_get(row.values, column) is _ABSENT for row in readable)
        if absent and (readable or column not in table.columns):
            known = f"; it has {', '.join(table.columns[:20])}" if table.columns else ""
            raise ValueError(
                f"{table.source} has no column {column!r} for {key}{nearest(column, table.columns)}{known}."
            )


def _check_against(one: Evaluation, first: Evaluation, seen: dict[tuple[Any, ...], Any], run_is_mapped: bool) -> None:
    """One run has one shape, seed and recipe, and is evaluated once at a duration. Raises _Bad."""
    for what in ("sizes", "seed", "recipe"):
        here, there = getattr(one.of, what), getattr(first.of, what)
        if here != there:
            words = {"sizes": "the shape", "seed": "seed", "recipe": "the recipe"}[what]
            raise _Bad(f"gives {words} {_plain(here)} to a run that has {_plain(there)} in {first.where}")
    at = one.t_gflops if one.duration is None else one.duration
    place = (one.of.run, at, one.draw)
    if place in seen:
        hint = "" if run_is_mapped else "; if these are two runs, map run= or seed="
        raise _Bad(f"repeats {seen[place]}, the same run at the same duration{hint}")
    for key, value in (((one.of.run, "t of", at), one.t_gflops), ((one.of.run, "name of", one.t_gflops), at)):
        if seen.setdefault(key, value) != value:
            raise _Bad(f"has duration {at} at {one.t_gflops:g} GFLOPs, which another row of its run has at {seen[key]}")
    seen[place] = one.where


def _plain(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if all(isinstance(item, int) for item in value):
        return "x".join(map(str, value))
    return ", ".join(f"{key.removeprefix(RECIPE)}={item}" for key, item in value)


def durations(found: Sequence[Evaluation]) -> tuple[dict[tuple[Any, ...], str], list[str]]:
    """(run, t) -> name of the duration, and what a reader should know about it.

    The given names; else the compute, then the images, where the runs were evaluated at the same (to 10%); otherwise the
    evaluations of each run are counted, and slices of equal compute will be interpolated.
    """
    trained = [one for one in found if one.t_gflops > 0]
    if all(one.duration is not None for one in trained):
        return {(one.of.run, one.t_gflops): str(one.duration) for one in trained}, []
    compute: dict[tuple[Any, ...], float] = {(one.of.run, one.t_gflops): one.t_gflops for one in trained}
    images = {(one.of.run, one.t_gflops): one.images for one in trained if one.images}
    for amounts, unit in ((compute, "gflops"), (images, "images")):
        names = _common(amounts, unit) if len(amounts) == len(compute) else None
        if names is not None:
            return names, []
    numbered: dict[tuple[Any, ...], str] = {}
    for run in {run for run, _ in compute}:
        own = sorted(t for other, t in compute if other == run)
        numbered |= {(run, t): f"evaluation {k}" for k, t in enumerate(own, 1)}
    return numbered, ["the runs are not evaluated at common computes: slices of equal compute will be interpolated"]


def _common(amounts: Mapping[tuple[Any, ...], float], unit: str) -> dict[tuple[Any, ...], str] | None:
    """A name for each amount that the runs share to 10%, or None if they share none: none has two of a
    name, and one has all."""
    clusters: list[list[float]] = []
    for amount in sorted(set(amounts.values())):
        if clusters and amount <= _ALIGNED * clusters[-1][0]:
            clusters[-1].append(amount)
        else:
            clusters.append([amount])
    middles = [math.exp(math.fsum(map(math.log, cluster)) / len(cluster)) for cluster in clusters]
    names = [str(Duration(float(f"{middle:.4g}"), unit)) for middle in middles]
    named = {amount: name for cluster, name in zip(clusters, names, strict=True) for amount in cluster}
    of_run: dict[Any, list[str]] = {}
    for (run, _), amount in amounts.items():
        of_run.setdefault(run, []).append(named[amount])
    twice = any(len(set(own)) < len(own) for own in of_run.values())
    if twice or len(set(names)) < len(names) or len(names) > max(map(len, of_run.values())):
        return None
    return {key: named[amount] for key, amount in amounts.items()}


def doubts(found: Sequence[Evaluation], columns: Mapping[str, str], options: Options) -> list[str]:
    """What looks as if a unit were wrong."""
    notes = []
    trained = [one for one in found if one.t_gflops > 0]
    if options.percent and all(min(one.error, 1 - one.error) < 0.01 for one in trained):
        notes.append("--percent: every value is within 1 of 0 or of 100; are they percent?")
    if "forward_gflops" in columns and options.patch_size and options.image_size:
        ratios = [(one.forward_gflops or 0.0) / computed_gflops(one.of.sizes, options) for one in trained]
        ratio = sorted(ratios)[len(ratios) // 2]
        if not 0.9 < ratio < 1.1:
            hint = " (multiply-adds? say --macs)" if 0.45 < ratio < 0.55 else ""
            notes.append(f"forward_gflops is {ratio:.2f} times what the shapes cost in closed form{hint}")
    return notes
