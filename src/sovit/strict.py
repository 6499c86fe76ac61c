"""What people write, taken literally: YAML without doubled keys, values of exactly the declared types, the nearest word.

Where YAML or Hydra would guess (010 is 8, `yes` is true, 1e3 for a whole number, the last of two equal keys), this
refuses. Knows nothing of the configuration's content.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
LARGEST = 2**53  # whole numbers beyond are not exact as floats, and no count of ours comes near


class ConfigError(ValueError):
    """A configuration the user can mend; the message is one sentence that says how."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and a number in disguise, which the ordinary loader takes without a word."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            doubled = key in seen
        except TypeError:
            raise yaml.MarkedYAMLError(problem="a key is not a word", problem_mark=key_node.start_mark) from None
        if doubled:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = loader.construct_yaml_int(node)
    if str(value) != node.value:
        problem = f"{node.value} is read as the number {value}; write {value}, or '{node.value}' for the text"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return value


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises ConfigError with the path, and the line where one is known."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or 'cannot be read').lower()}; give the path of a file.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise ConfigError(f"{path}, {where}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, no date, nested too deeply
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}.") from None


def nearest(word: str, candidates: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest candidates, or the list of them when none is close."""
    candidates = sorted(set(candidates))
    node = word.rpartition(".")[0]
    inside = [candidate for candidate in candidates if candidate.startswith(f"{node}.")]
    close = [candidate for candidate in candidates if _one_letter_apart(word, candidate)]
    if not close and node in candidates and inside:  # a wrong leaf of a known node: the mend is among its siblings
        candidates = inside
    if not close:
        close = [candidate for candidate in candidates if candidate.lower() == word.lower()]
    if not close:
        close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not close:
        leaves = {candidate: candidate.rsplit(".", 1)[-1] for candidate in candidates}
        leaf = difflib.get_close_matches(word.rsplit(".", 1)[-1], leaves.values(), n=1, cutoff=0.75)
        close = [candidate for candidate in candidates if leaf and leaves[candidate] == leaf[0]][:1]
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; choose from {', '.join(candidates)}." if 0 < len(candidates) <= 20 else "; --help lists them."


def shown(text: str) -> str:
    """A text as it is, or escaped where it holds letters that only look like those of a known word."""
    return text if text.isascii() and text.isprintable() else ascii(text)


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether a letter too many, too few, another one or two that changed places turn one word into the other."""
    start = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a != b and (a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[1::-1] == b[:2] and a[2:] == b[2:]))


def keys_of(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a schema dataclass and its type, inner nodes included."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        keys[prefix + item.name] = hints[item.name]
        if dataclasses.is_dataclass(hints[item.name]):
            keys |= keys_of(hints[item.name], f"{prefix}{item.name}.")
    return keys


def build(schema: type[T], content: Mapping[str, Any], prefix: str = "") -> T:
    """A schema dataclass from a mapping with exactly its keys and types. Raises ConfigError naming the first misfit."""
    hints = typing.get_type_hints(schema)
    for key in content:
        if key not in hints:
            raise ConfigError(
                f"{prefix + str(key)!r} is not a key of the configuration{nearest(prefix + str(key), _all(prefix, hints))}"
            )
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in content:
            raise ConfigError(f"{prefix}{name} has no value; give {prefix}{name}=...")
        value = content[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name}={value} replaces keys by a value; give {prefix}{name}.KEY=...")
            values[name] = build(typing.cast(type, hint), value, f"{prefix}{name}.")
        else:
            values[name] = typed(prefix + name, value, hint)
    return schema(**values)


def _all(prefix: str, hints: Mapping[str, Any]) -> list[str]:
    found = []
    for name, hint in hints.items():
        inner = keys_of(typing.cast(type, hint), f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else ()
        found += [prefix + name, *inner]
    return found


def typed(key: str, value: Any, hint: Any) -> Any:
    """The value if it is of the declared type (an int also serves as a float, and as text). Raises ConfigError."""
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value} is not a list; write {key}=[{value}].")
        return [typed(f"{key}[{k}]", item, typing.get_args(hint)[0]) for k, item in enumerate(value)]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise ConfigError(f"{key} has no value; give {key}=...")
    if any(typing.get_origin(kind) is list for kind in kinds):
        return typed(key, value, next(kind for kind in kinds if typing.get_origin(kind) is list))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{key}={str(value)[:20]}... is too large a number for any key.")
    if number and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not a finite number.")
    if bool in kinds and isinstance(value, bool):
        return value
    if int in kinds and number and isinstance(value, int):
        return value
    if float in kinds and number:
        return float(value)
    if str in kinds and isinstance(value, str) and not value.isprintable():
        raise ConfigError(f"{key}={value!r} holds a character that cannot be printed; leave it out.")
    if str in kinds and (isinstance(value, str) or (number and isinstance(value, int))):
        return str(value)
    raise ConfigError(
        f"{key}={value} is {_MEANT[next(kind for kind in kinds if kind in _MEANT)]}{_mend(value, kinds)}."
    )


_MEANT = {
    bool: "neither true nor false",
    int: "not a whole number",
    float: "not a number",
    str: "not text",
}


def _mend(value: Any, kinds: tuple[Any, ...]) -> str:
    if isinstance(value, float) and int in kinds and value == int(value):
        return f"; write {int(value)}"
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,17}(\.\d*)?(e[+-]?\d{1,2})?", value):
        plain = int(value) if value.lstrip("+-").isdecimal() else float(value)
        return f" but text; write {plain}, without quotes or leading zeros"
    if isinstance(value, bool | float) and kinds[0] is str:
        return f" but the {'word' if isinstance(value, bool) else 'number'} {value}; put another letter before it"
    return ""
