"""The command line and the files of ``conf/``, checked against the schema before Hydra composes them.

Hydra would take a key given twice, a group set to a list, a setting of its own, or a file of another package without a
word, and says what it does not take in several lines. Takes the folder and the schema as arguments; composes nothing.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sovit.strict import ConfigError, keys_of, nearest, read_yaml, shown

EXPERIMENT = "experiment"
OF_ANOTHER = {"metric": "eval"}  # groups that set some keys of another node than the one they are named after
NOT_OF_A_RUN = ("launcher", "task")  # folders of conf/ that say how cells are started or judged, not what they are
_OVERRIDE = re.compile(r"(?P<sign>~|\+{0,2})(?P<key>[^=]*)(?P<equals>=?)(?P<value>.*)", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_./@-]*")
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")
_MAY_DIFFER = ("runs_dir", "logger.")  # keys that may hang on the machine's environment: they change no number


def groups_of(conf_dir: Path) -> dict[str, list[str]]:
    """Config groups of a conf folder and their options, for example {"experiment": ["star_tiny", ...]}."""
    if not conf_dir.is_dir():
        raise ConfigError("The conf/ directory was not found; install sovit from a clone with `make`, not as a wheel.")
    folders = (path for path in sorted(conf_dir.iterdir()) if path.is_dir() and not path.name.startswith((".", "_")))
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in folders
        if folder.name not in NOT_OF_A_RUN
    }


def check_input(overrides: Sequence[str], conf_dir: Path, schema: type, *, once: bool) -> None:
    """Raise ConfigError for an override that Hydra would refuse or misread, or for a fault in the files it leads to.

    ``once``: refuse a key that is given two values, of which Hydra takes the last.
    """
    groups = groups_of(conf_dir)
    given: dict[str, str] = {}
    for text in overrides:
        key, value = check_override(text, groups, schema)
        if once and given.get(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {given[key]} and as {value}; drop one.")
        given[key] = value
    _check_files({key: value for key, value in given.items() if key in groups}, groups, conf_dir, schema)


def check_override(text: str, groups: Mapping[str, Sequence[str]], schema: type) -> tuple[str, str]:
    """(key, value) of an override as it is written."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not text.isprintable():
        raise ConfigError(f"{text[:80]!r} holds a character that cannot be printed; leave it out.")
    match = _OVERRIDE.fullmatch(text)
    assert match is not None  # it fits every text
    sign, key, equals, value = match.groups()
    keys = keys_of(schema)
    if not _KEY.fullmatch(key) or key not in {**keys, **dict.fromkeys(groups)}:
        if key.split(".")[0].split("/")[0] == "hydra":
            raise ConfigError(f"{key} is a setting of Hydra, which every run shares; leave it out.")
        parent = next((node for node in keys if key.startswith(f"{node}.") and node not in _nodes(schema)), None)
        mend = f"; {parent} holds a value and no keys." if parent else nearest(key, [*keys, *groups])
        raise ConfigError(f"{key!a} is not a key of the configuration{mend}")
    if sign == "~":
        raise ConfigError(f"~{key} would remove a key that every run needs; set it to a value instead.")
    if sign == "+" and key != EXPERIMENT and key in keys:
        raise ConfigError(f"+{key} would add a key that is there already; write {key}={value}.")
    if not equals:
        raise ConfigError(f"{text} gives {key} no value; write {key}=VALUE.")
    if key in groups and (sign or value not in groups[key]):
        if value in groups[key]:
            raise ConfigError(f"{sign}{key} would add a second {key}; write {key}={value}.")
        if value.startswith("[") and "," in value:
            raise ConfigError(f"{key}={shown(value)} is a list; choose one option of conf/{key}.")
        raise ConfigError(f"{key}={shown(value)} is not an option of conf/{key}{nearest(value, groups[key])}")
    if key in groups:
        return key, value
    if key in _nodes(schema):
        first = next(name for name in keys if name.startswith(f"{key}."))
        raise ConfigError(f"{key}={value} would replace several keys at once; give each its value, such as {first}=...")
    try:
        parsed = OverridesParser.create().parse_override(text)
        read = parsed.value()
    except (HydraException, ValueError, RecursionError):
        raise ConfigError(
            f"{text[:80]!a} cannot be read; write {key}=VALUE, a list as {key}=[A,B], and anything but plain letters, "
            f"digits and ._-/ in quotes of its own, as \"{key}='VALUE'\"."
        ) from None
    if _RESOLVER.search(value) and not key.startswith(_MAY_DIFFER):
        raise ConfigError(f"{text} depends on the machine it is read on; write the value.")
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{text} lists several values; a run takes one, so list them in a sweep file (values: [...])."
        )
    if isinstance(read, dict):
        raise ConfigError(f"{text} gives {key} keys; it takes a value.")
    if isinstance(read, int) and not isinstance(read, bool) and str(read) != value:
        raise ConfigError(f"{text} is read as the number {read}; write {key}={read}.")
    return key, value


def _nodes(schema: type) -> set[str]:
    """Keys that hold keys."""
    return {key for key, hint in keys_of(schema).items() if dataclasses.is_dataclass(hint)}


def _check_files(chosen: Mapping[str, str], groups: Mapping[str, Sequence[str]], conf_dir: Path, schema: type) -> None:
    """Check config.yaml and the files of all options that it, the experiment and the command line name."""
    from hydra.conf import HydraConf

    top = conf_dir / "config.yaml"
    document = _read(top)
    _check_keys(document, schema, top, extra={"defaults": None, "hydra": HydraConf})
    named = set(chosen.items())
    named |= _defaults(
        top, document, {**groups, **{f"override hydra/{key}": names for key, names in _of_hydra().items()}}
    )
    nodes = {f"override /{group}": options for group, options in groups.items() if group != EXPERIMENT}
    experiments = [option for group, option in sorted(named) if group == EXPERIMENT]
    for experiment in experiments:  # grows by those that one is based on
        path = conf_dir / EXPERIMENT / f"{experiment}.yaml"
        document = _read(path, package="_global_")
        _check_keys(document, schema, path, extra={"defaults": None})
        found = _defaults(path, document, nodes, siblings=groups[EXPERIMENT])
        experiments += [option for group, option in found if group == EXPERIMENT and option not in experiments]
        named |= found
    hints = typing.get_type_hints(schema)
    for group, option in sorted(named):
        if group in hints:
            path = conf_dir / group / f"{option}.yaml"
            _check_keys(_read(path, package=group), hints[group], path, whole=True)
        elif group in OF_ANOTHER:
            path, node = conf_dir / group / f"{option}.yaml", OF_ANOTHER[group]
            _check_keys(_read(path, package=node, said_so=True), hints[node], path)


def _read(path: Path, package: str | None = None, said_so: bool = False) -> dict[Any, Any]:
    """The mapping in a file of conf/, which must be for the given package; ``said_so``: and say it, not by its folder."""
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no keys; write KEY: VALUE lines.")
    said = _PACKAGE.findall(path.read_text(encoding="utf-8"))
    said_so = said_so or package == "_global_"
    if said_so and said != [package]:
        raise ConfigError(f"{path} must say '# @package {package}' in its first line; otherwise its keys go nowhere.")
    if not said_so and said and said != [package]:
        raise ConfigError(
            f"{path} says '# @package {said[0]}'; leave that line out, its folder says where its keys go."
        )
    return document


def _check_keys(
    document: Mapping[Any, Any],
    schema: type,
    path: Path,
    prefix: str = "",
    extra: Mapping[str, type | None] | None = None,
    whole: bool = False,
) -> None:
    """Raise ConfigError for a key of a file that is none of the schema's, or with ``whole`` for one it does not state."""
    hints = {**typing.get_type_hints(schema), **(extra or {})}
    for key, value in document.items():
        if key not in hints:
            known = [prefix + name for name in hints]
            wrong = prefix + str(key)
            raise ConfigError(f"{path}: {wrong!a} is not a key of the configuration{nearest(wrong, known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}: {prefix}{key} must hold keys of its own, not {value!r}.")
            _check_keys(value, typing.cast(type, hints[key]), path, f"{prefix}{key}.")
        elif isinstance(value, str) and _RESOLVER.search(value) and not f"{prefix}{key}".startswith(_MAY_DIFFER):
            raise ConfigError(f"{path}: {prefix}{key}={value} depends on the machine it is read on; write the value.")
    for key in hints if whole else ():
        if key not in document:
            raise ConfigError(f"{path} does not state {prefix}{key}; a file of a group gives every key a value.")


def _defaults(
    path: Path, document: Mapping[Any, Any], groups: Mapping[str, Sequence[str]], siblings: Sequence[str] = ()
) -> set[tuple[str, str]]:
    """(group, option) of every entry of a file's defaults list. ``siblings``: experiments that it may be based on."""
    found = set()
    entries = document.get("defaults") or []
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: defaults must be a list.")
    for entry in entries:
        if entry == "_self_":
            continue
        if isinstance(entry, str) and entry in siblings:
            found.add((EXPERIMENT, entry))
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(f"{path}: defaults has {entry!r}{nearest(str(entry), ['_self_', *siblings, *groups])}")
        (key, option), *_ = entry.items()
        if key not in groups:
            raise ConfigError(f"{path}: defaults has {key!r}, which is no group{nearest(str(key), groups)}")
        group = str(key).split()[-1].strip("/")
        if option is None and group == EXPERIMENT:
            continue
        if option not in groups[key]:
            raise ConfigError(
                f"{path}: {group}={option} is not an option of {group}{nearest(str(option), groups[key])}"
            )
        found.add((group, option))
    return found


def _of_hydra() -> dict[str, list[str]]:
    """Hydra's own groups that config.yaml sets, and their options."""
    import hydra.conf

    folder = Path(next(iter(hydra.conf.__path__))) / "hydra"
    return {
        key: sorted(file.stem for file in (folder / key).glob("*.yaml")) for key in ("job_logging", "hydra_logging")
    }
