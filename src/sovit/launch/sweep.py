"""Sweep files: ordinary W&B sweep files that also run without a W&B server.

A file says ``method: grid`` and lists parameters with ``value`` or ``values``; the cells are the full product. What W&B
would render as ``${args_no_hyphens}`` are exactly the Hydra overrides made here, so ``sovit run FILE`` and
``wandb agent`` train the same cells. A star is one key, ``shape``, with a list of WIDTHxDEPTHxMLP values; a grid has a
key for each dimension.

Strict where W&B is lenient: a key that Hydra would read as something else (null, a comma, a nested mapping) is refused
when the file is read, not hours later in a cell.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit.config import check_overrides
from sovit.metric import Metric, parse_key
from sovit.strict import ConfigError, nearest, read_yaml

TOP_LEVEL_KEYS = {"program", "command", "method", "metric", "name", "description", "project", "entity", "parameters"}
COMMAND = ["${env}", "${interpreter}", "-m", "${program}", "${args_no_hyphens}"]
PROGRAM = "sovit.train"

# A Hydra override without quotes: dotted keys (model.width), group keys (model, model/arch, group@package), + and ~ not.
_KEY = re.compile(r"[A-Za-z_][\w./@-]*")
# Words that Hydra takes literally: no quotes, brackets, commas, equal signs or interpolations; inner spaces are fine.
_WORDS = re.compile(r"[\w./+@%:-]+( [\w./+@%:-]+)*")


class SweepError(ValueError):
    """A sweep file that cannot be run; the message is one sentence naming the file, the value and the mend."""


@dataclass(frozen=True)
class Sweep:
    """``cells`` are Hydra override lists, seeds slowest; ``metric`` is W&B's ``{"name": ..., "goal": ...}``."""

    name: str
    path: Path
    metric: dict[str, str]
    cells: list[list[str]]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and expand it to cells.

    Each of ``overrides`` (``key=value``) is set in every cell; for a key of the file it takes the place of the file's
    values, so ``seed=0`` runs the part of a sweep that has seed 0. Raises SweepError.
    """
    path = Path(path)
    document = _read(path)
    for key in document:
        if key not in TOP_LEVEL_KEYS:
            raise SweepError(f"{path}: unknown key {key!a}{nearest(str(key), TOP_LEVEL_KEYS)}")
    if document.get("method") != "grid":
        raise SweepError(
            f"{path}: method is {document.get('method')!r}, but only 'grid' has a plan that is known beforehand; "
            "write method: grid."
        )
    if document.get("program") != PROGRAM or document.get("command") != COMMAND:
        raise SweepError(
            f"{path}: W&B would not start a cell the way sovit does; write program: {PROGRAM} and "
            f"command: {_flow(COMMAND)}."
        )
    axes = _axes(path, document.get("parameters"))
    given: dict[str, str] = {}
    for override in overrides:
        key, value = _split(override)
        if given.setdefault(key, value) != value:
            raise SweepError(f"{key} is given twice, as {given[key]} and as {value}; drop one.")
    axes |= {key: [value] for key, value in given.items()}
    cells = list(_product(axes))
    if len({tuple(cell) for cell in cells}) < len(cells):
        raise SweepError(f"{path}: some cells are listed twice.")
    name = next((_split(item)[1] for item in cells[0] if item.startswith("name=")), document.get("name") or path.stem)
    return Sweep(str(name), path, _metric(path, document.get("metric")), cells)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(path)
    except ConfigError as error:
        raise SweepError(str(error).replace("give the path of a file", "give the path of a sweep file")) from None
    if not isinstance(document, dict):
        raise SweepError(f"{path}: a sweep file is a mapping with method, metric and parameters.")
    return document


def _axes(path: Path, parameters: Any) -> dict[str, list[str]]:
    if not isinstance(parameters, dict) or not parameters:
        raise SweepError(f"{path}: parameters is empty; list the keys to vary, such as shape and seed.")
    axes: dict[str, list[str]] = {}
    for key, spec in parameters.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise SweepError(f"{path}: {key!r} is not a config key; write a dotted key such as model.width.")
        if not isinstance(spec, dict):
            raise SweepError(f"{path}: {key} must say value: or values:, not {spec!r}.")
        if "parameters" in spec:
            raise SweepError(
                f"{path}: {key} holds nested parameters, which reach Hydra as one mapping it refuses; "
                f"write dotted keys such as {key}.NAME."
            )
        if set(spec) == {"value"}:
            values = [spec["value"]]
        elif set(spec) == {"values"} and isinstance(spec["values"], list) and spec["values"]:
            values = spec["values"]
        else:
            raise SweepError(f"{path}: {key} must have either value: or a list values:, not {sorted(map(str, spec))}.")
        rendered = [_render(path, key, value) for value in values]
        for text in rendered:
            if rendered.count(text) > 1:
                raise SweepError(f"{path}: {key} lists {text} twice; every cell would be run twice, so drop one.")
        axes[key] = rendered
    return axes


def _render(path: Path, key: str, value: Any) -> str:
    """The text W&B puts behind ``key=``: Python's str() of the value."""
    if value is None:
        raise SweepError(
            f"{path}: {key} has a null, which W&B hands on as the word None; leave the key out, or set it in conf/."
        )
    if isinstance(value, dict | list):
        raise SweepError(
            f"{path}: {key} has the value {value!r}; only single values can be swept, set others in conf/."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SweepError(f"{path}: {key} has the value {value}; give a finite number.")
    text = str(value)
    if isinstance(value, str) and (value.lower() in {"null", ""} or value == "None"):
        raise SweepError(
            f"{path}: {key} has the value {value!r}, which Hydra does not read as that text; leave it out."
        )
    if not _WORDS.fullmatch(text):
        raise SweepError(
            f"{path}: {key} has the value {text!r}; Hydra reads commas, quotes, brackets and = in a value as more than "
            "text, so name such a value in conf/ and sweep over the name."
        )
    return text


def _product(axes: dict[str, list[str]]) -> Iterator[list[str]]:
    """All cells, the file's order of keys kept within a cell; the seed varies slowest."""
    slowest_first = sorted(axes, key=lambda key: key != "seed")
    for combination in itertools.product(*(axes[key] for key in slowest_first)):
        chosen = dict(zip(slowest_first, combination, strict=True))
        yield [f"{key}={chosen[key]}" for key in axes]


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if key[:1] in ("+", "~"):
        check_overrides([override])  # which names the key that was meant
        raise SweepError(f"{override!a}: in a sweep every key is set in every cell; leave out {key[0]!r}.")
    if not equals or not _KEY.fullmatch(key) or not _WORDS.fullmatch(value):
        raise SweepError(f"{override!r} is not an override of one value; write KEY=VALUE such as seed=0.")
    return key, value


def metric_of(name: str) -> Metric:
    """("fractals", 10) for ``eval/fractals_10shot/error``. Raises SweepError for a text that names no metric."""
    try:
        return parse_key(name)
    except ValueError as error:
        raise SweepError(f"{error}.") from None


def _metric(path: Path, metric: Any) -> dict[str, str]:
    if not isinstance(metric, dict) or set(metric) != {"name", "goal"} or metric["goal"] != "minimize":
        raise SweepError(
            f"{path}: metric is {metric!r}; write metric: {{name: eval/fractals_10shot/error, goal: minimize}}."
        )
    metric_of(str(metric["name"]))  # whether cells log it is known once they are composed (`plan.plan`)
    return {key: str(value) for key, value in metric.items()}


def _flow(items: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{item}"' for item in items) + "]"
