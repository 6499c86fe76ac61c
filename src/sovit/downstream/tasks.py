"""The frame of ``sovit eval``: which tasks there are, their configuration, and where their results lie.

A task is a module ``sovit.downstream.NAME`` with a dataclass ``Config`` and ``check``, ``run`` and ``text``; a recipe is a
file ``conf/task/RECIPE.yaml`` that gives every key of the ``Config`` of the task in its ``name`` a value. What a task
measures is its own business. A module may also have ``depends(trained, cfg)``: whatever beside the configuration and the
weights the result hangs on, such as the fingerprint of a folder; when it changes, the result is made anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from sovit import claims, records
from sovit.analysis.report.words import visible
from sovit.config import CONF_DIR, ConfigError
from sovit.lit.trained import Trained, load
from sovit.overrides import check_override, groups_of
from sovit.strict import build, keys_of, nearest, read_yaml, shown

SCHEMA = 1
_NOT_IDENTITY = ("num_workers", "checkpoint_every_s")  # of a task: how comfortably it is done, not what
GROUP = "task"
TASKS = (
    "fewshot",
    "probe",
    "variants",
    "corruptions",
    "calibration",
    "ood",
    "fairness",
    "finetune",
    "segment",
    "cue_conflict",
    "multitask",
    "zeroshot",
    "retrieval",
)


OF_TEXTS = ("zeroshot", "retrieval")  # for a text tower with its image tower; the others are for models of images


class Task(Protocol):
    """What the module of a task has."""

    Config: type[Any]

    def check(self, cfg: Any, trained: Trained) -> None:
        """Raise ConfigError for what cannot be, before anything is computed."""

    def run(self, trained: Trained, cfg: Any, work: Path) -> dict[str, Any]:
        """The result, ready for JSON. ``work``: a folder for what a killed process goes on from."""

    def text(self, result: dict[str, Any]) -> list[str]:
        """Lines for the terminal."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A result: the file, its content, whether it was made just now, and lines for the terminal."""

    path: Path
    content: dict[str, Any]
    fresh: bool
    lines: list[str]


def recipes() -> list[str]:
    """The names that ``task=`` takes."""
    return sorted(path.stem for path in (CONF_DIR / GROUP).glob("*.yaml"))


def compose(overrides: Sequence[str]) -> tuple[Task, Any]:
    """The task and its configuration from ``task=RECIPE`` and ``task.KEY=VALUE``. Raises ConfigError with one sentence."""
    groups_of(CONF_DIR)  # says so where there is no conf/
    known = recipes()
    given: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key != GROUP and not key.startswith(f"{GROUP}."):
            raise ConfigError(f"{key!a} is not a key of an evaluation; write task=NAME and task.KEY=VALUE.")
        if given.get(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {given[key]} and as {value}; drop one.")
        if not equals:
            raise ConfigError(f"{text} gives {key} no value; write {key}=VALUE.")
        given[key] = value
    recipe = given.pop(GROUP, None)
    if recipe is None:
        raise ConfigError(f"No task is given; write task=NAME with one of {', '.join(known)}.")
    if recipe not in known:
        raise ConfigError(f"task={shown(recipe)} is not known{nearest(recipe, known)}")
    path = CONF_DIR / GROUP / f"{recipe}.yaml"
    content = read_yaml(path)
    name = content.get("name") if isinstance(content, dict) else None
    if name not in TASKS:
        raise ConfigError(f"{path}: name={name} is no task{nearest(str(name), TASKS)}")
    if f"{GROUP}.name" in given:
        raise ConfigError(f"task.name is {name} in {path.name}; write task=NAME for another task.")
    task = cast(Task, importlib.import_module(f"sovit.downstream.{name}"))
    schema = dataclasses.make_dataclass("Evaluation", [(GROUP, task.Config)])
    keys = keys_of(schema)
    for key in _dotted(content):
        if f"{GROUP}.{key}" not in keys:
            above, _, leaf = f"{GROUP}.{key}".rpartition(".")
            beside = [known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == above]
            raise ConfigError(f"{path}: {leaf!a} is not a key of {name}{nearest(leaf, beside)}")
    for key, value in given.items():
        if key not in keys:
            raise ConfigError(f"{key!a} is not a key of task={recipe}{nearest(key, keys)}")
        check_override(f"{key}={value}", {}, schema)
        node = content
        *parents, leaf = key.split(".")[1:]
        for parent in parents:
            node = node[parent]
        node[leaf] = _value(f"{key}={value}")
    try:
        return task, build(task.Config, content, f"{GROUP}.")
    except ConfigError:
        raise
    except ValueError as error:  # of a __post_init__
        raise ConfigError(str(error)) from None


def evaluate(source: Path, overrides: Sequence[str], *, average: bool | None = None, again: bool = False) -> Evaluated:
    """The result of a task on a trained model: read where it is there, and made otherwise or with ``again``.

    ``source`` and ``average`` as for `sovit.lit.trained.load`. The model is put on the GPU if there is one. Raises
    ConfigError, and ConfigError too if another process is at it.
    """
    task, cfg = compose(overrides)
    trained = load(source, average=average, images=cfg.name not in OF_TEXTS)
    task.check(cfg, trained)
    depends = getattr(task, "depends", lambda trained, cfg: None)(trained, cfg)
    path = place(trained.weights.source) / f"{cfg.name}-{_identity(trained, cfg, depends)}.json"
    known = None if again else _known(task, path)
    fresh = known is None
    if known is None:
        work = path.with_name(f".{path.stem}.work")
        try:
            with claims.hold(work):
                known = None if again else _known(task, path)  # another process may have been quicker
                fresh = known is None
                if known is None:
                    known = _made(task, cfg, trained, depends, work)
                    records.write_json(path, known, durable=True)
        except claims.Held as error:
            raise ConfigError(f"{error} Wait for it, or stop it.") from None
        except ConfigError:  # nothing worth going on from
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    lines = [visible(line) for line in task.text(known["result"])]  # names of classes, files and words are anyone's
    return Evaluated(path, known, fresh, lines)


def _made(task: Task, cfg: Any, trained: Trained, depends: Any, work: Path) -> dict[str, Any]:
    trained.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    content = {
        "schema": SCHEMA,
        "task": cfg.name,
        "config": dataclasses.asdict(cfg),
        "source": str(trained.weights.source),
        "run_id": trained.weights.run_id,
        "weights": trained.weights.kind,
        "step": trained.weights.step,
        "shape": trained.shape.as_dict(),
        "depends": depends,
        "code": records.code_version(),
        "result": task.run(trained, cfg, work),
    }
    try:
        return json.loads(json.dumps(content, allow_nan=False))
    except ValueError:
        raise ConfigError(f"{cfg.name} has a figure that is not finite; are there too few images for it?") from None


def place(source: Path) -> Path:
    """The folder of the results of a resume point (``downstream`` beside it) or of an exported file (``FILE.evals``)."""
    return source.with_name(f"{source.name}.evals") if source.suffix == ".safetensors" else source.parent / "downstream"


def _known(task: Task, path: Path) -> dict[str, Any] | None:
    """The content of a result file, or None if there is none, or one of an older form."""
    content = records.read_object(path)
    if content is None or content.get("schema") != SCHEMA:
        return None
    try:
        task.text(content["result"])
    except (KeyError, TypeError, ValueError):
        return None
    return content


def _identity(trained: Trained, cfg: Any, depends: Any) -> str:
    """Eight hex digits over everything the result hangs on."""
    weights = hashlib.sha256()
    for name, tensor in sorted(trained.weights.tensors.items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    tree = {
        "config": {key: value for key, value in dataclasses.asdict(cfg).items() if key not in _NOT_IDENTITY},
        "run": records.config_hash(trained.cfg),
        "weights": weights.hexdigest(),
        "depends": depends,
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def _dotted(content: dict[str, Any], above: str = "") -> Iterator[str]:
    """The dotted keys of a mapping, inner nodes included."""
    for key, value in content.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")


def _value(text: str) -> Any:
    """The value of an override that `check_override` has let through."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text).value()
