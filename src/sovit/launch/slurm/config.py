"""What to ask Slurm for: a file of ``conf/launcher`` and ``launcher.KEY=VALUE`` on the command line, both strict.

Says nothing of cells; how a cell is trained does not hang on where it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from sovit.config import CONF_DIR
from sovit.strict import ConfigError, build, nearest, read_yaml

PREFIX = "launcher."
_OPTION = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(=(?P<value>.+))?")
# Options of sbatch that the keys below stand for, and those that sovit needs for itself.
_KEY_OF = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "time": "hours",
    "array": "cells_at_once",
    "gpus-per-node": "gpus_per_cell",
    "nodes": "nodes",
    "cpus-per-task": "cpus_per_cell",
    "mem": "memory_gb",
    "signal": "signal_delay_s",
}
_OWN = ("error", "job-name", "no-requeue", "open-mode", "output", "requeue", "ntasks", "ntasks-per-node", "wrap")
_GPU_OPTIONS = ("gres", "gpus", "gpus-per-task")


@dataclass(frozen=True)
class Launcher:
    """The keys of ``conf/launcher/slurm.yaml``, which says what they mean."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    hours: float
    cells_at_once: int | None
    gpus_per_cell: int | None
    nodes: int | None
    cpus_per_cell: int | None
    memory_gb: float | None
    signal_delay_s: int
    max_requeues: int
    setup: list[str]
    sbatch: list[str]

    @property
    def minutes(self) -> int:
        return math.ceil(60 * self.hours)

    @property
    def options(self) -> dict[str, str | bool]:
        """``sbatch`` as names and values; True for an option without a value."""
        found = (_OPTION.fullmatch(option) for option in self.sbatch)
        return {match["name"]: match["value"] or True for match in found if match}

    @property
    def asks_for_gpus(self) -> bool:
        """Whether ``sbatch`` does, in the words of the cluster."""
        return any(name in self.options for name in _GPU_OPTIONS)


def launchers(conf_dir: Path = CONF_DIR) -> list[str]:
    """The files of ``conf/launcher``."""
    return sorted(file.stem for file in (conf_dir / "launcher").glob("*.yaml"))


def load_launcher(name: str, overrides: Sequence[str] = (), conf_dir: Path = CONF_DIR) -> Launcher:
    """Read ``conf/launcher/<name>.yaml`` and put ``launcher.KEY=VALUE`` in. Raises ConfigError."""
    if name not in launchers(conf_dir):
        raise ConfigError(
            f"--launcher {name} is no file of conf/launcher{nearest(name, ['local', *launchers(conf_dir)])}"
        )
    path = conf_dir / "launcher" / f"{name}.yaml"
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no keys; copy conf/launcher/slurm.yaml.")
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!a} gives {key} no value; write {key}=VALUE.")
        if given.setdefault(key, text) != text:
            raise ConfigError(f"{key} is given twice, as {given[key]} and as {text}; drop one.")
        content = {**content, key.removeprefix(PREFIX): _value(key, text)}
    launcher = build(Launcher, content, PREFIX)
    _check(launcher)
    return launcher


def _value(key: str, text: str) -> Any:
    """A value as it would be read in the file."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text} is not a value that YAML can read; put it in quotes.") from None
    if isinstance(value, int) and not isinstance(value, bool) and str(value) != text.strip():
        raise ConfigError(f"{key}={text} is read as the number {value}; write {value}.")  # 24:00:00 is 86400
    return value


def _check(launcher: Launcher) -> None:
    for key in ("cells_at_once", "nodes", "cpus_per_cell", "signal_delay_s"):
        if (value := getattr(launcher, key)) is not None and value < 1:
            raise ConfigError(f"{PREFIX}{key}={value} must be at least 1.")
    for key in ("gpus_per_cell", "max_requeues"):
        if (value := getattr(launcher, key)) is not None and value < 0:
            raise ConfigError(f"{PREFIX}{key}={value} must not be negative.")
    if launcher.memory_gb is not None and not launcher.memory_gb > 0:
        raise ConfigError(f"{PREFIX}memory_gb={launcher.memory_gb:g} must be positive.")
    if not 60 * launcher.minutes > launcher.signal_delay_s:
        raise ConfigError(
            f"{PREFIX}hours={launcher.hours:g} is over before {PREFIX}signal_delay_s={launcher.signal_delay_s} seconds are: "
            "every start would be stopped at once; give more hours or a shorter delay."
        )
    for item in fields(launcher):  # a line break in a value would begin a line of the job's script
        value = getattr(launcher, item.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text or not text.isprintable()):
                raise ConfigError(f"{PREFIX}{item.name} holds {text!r}; write text of one line, or null for none.")
    names = set()
    for option in launcher.sbatch:
        match = _OPTION.fullmatch(option)
        if not match:
            raise ConfigError(f"{PREFIX}sbatch holds {option!r}; write options as --name=value or --name.")
        name = match["name"]
        if name in _KEY_OF:
            raise ConfigError(f"{PREFIX}sbatch holds {option!r}, which has a key of its own: {PREFIX}{_KEY_OF[name]}.")
        if name in _OWN:
            raise ConfigError(f"{PREFIX}sbatch holds {option!r}, which sovit sets itself; leave it out.")
        if name in names:
            raise ConfigError(f"{PREFIX}sbatch holds --{name} twice; drop one.")
        names.add(name)
