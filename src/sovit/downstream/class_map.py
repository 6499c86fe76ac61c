"""The file that says which classes of a classifier are right for an image of another data set.

JSON, with one or both of two entries::

    {"classes": {"n01443537": "goldfish",             the variant's class (folder): the classifier's class,
                 "hare":      ["hare", "wood rabbit"]},   or several, any of which is right
     "labels":  {"val/0001.png": ["1", "7"],          right classes of single images by file name below the data set's
                 "val/0002.png": []}}                 folder, as in ReaL; an image without any is left out

Text, for classes alone: a line a class, ``VARIANT_CLASS CLASSIFIER_CLASS [CLASSIFIER_CLASS ...]`` divided by tabs, or by
blanks where no name holds one; ``#`` begins a comment. A classifier's class is named, or given by its number from 0 where
no class has that name. Several classes of the variant may lead to one of the classifier's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sovit.config import ConfigError
from sovit.strict import nearest


@dataclass(frozen=True)
class ClassMap:
    """Right classes of the classifier by class of the variant, and by file name (None: the file says nothing of them)."""

    classes: Mapping[str, Sequence[str]] | None
    labels: Mapping[str, Sequence[str]] | None


def read(path: Path) -> ClassMap:
    """Raises ConfigError for a file that is neither of the two forms."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"task.class_map={path} cannot be read ({reason}); give a JSON or text file.") from None
    if not text.lstrip().startswith("{"):
        return ClassMap(_lines(path, text), None)
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
    for key in content:
        if key not in ("classes", "labels"):
            raise ConfigError(f"{path}: {key!a} is no entry of a class map{nearest(key, ('classes', 'labels'))}")
    found = ClassMap(*(_lists(path, key, content.get(key)) for key in ("classes", "labels")))
    if not found.classes and not found.labels:
        raise ConfigError(f"{path} maps nothing; give it classes or labels.")
    return found


def right_classes(
    found: ClassMap | None,
    path: str,
    variant: Sequence[str],
    labels: NDArray[np.int64],
    names: Sequence[str] | None,
    own: Sequence[str],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right classes (N, C) of each image, and the classes (C,) that the map knows of.

    ``variant`` are the names of the variant's classes, ``labels`` (N,) their places, ``names`` the images' file names;
    ``own`` are the classifier's C classes. Rows without a right class are images to leave out. Raises ConfigError where the
    two do not match.
    """
    place = {str(k): k for k in range(len(own))} | {name: k for k, name in enumerate(own)}

    def row(of: Sequence[str], what: str) -> NDArray[np.bool_]:
        flags = np.zeros(len(own), bool)
        for name in of:
            if name not in place:
                raise ConfigError(
                    f"{path}: {what} leads to {name!a}, which is no class of the classifier{nearest(name, own)}"
                )
            flags[place[name]] = True
        return flags

    if found is None:
        unknown = next((name for name in variant if name not in set(own)), None)
        if unknown is not None:
            raise ConfigError(
                f"The class {unknown!a} is none of the classifier's {len(own)}, such as {own[0]!a}; give a task.class_map."
            )
        of_class = np.stack([row([name], name) for name in variant])
        return of_class[labels], np.asarray(of_class.any(0))
    right, known = np.zeros((len(labels), len(own)), bool), np.zeros(len(own), bool)
    if found.classes is not None:
        odd = next((name for name in found.classes if name not in variant), None)
        if odd is not None:
            raise ConfigError(f"{path}: {odd!a} is no class of the data set{nearest(odd, variant)}")
        of_class = np.stack([row(found.classes.get(name, ()), repr(name)) for name in variant])
        right, known = of_class[labels], np.asarray(of_class.any(0))
    if found.labels is not None:
        if names is None:
            raise ConfigError(
                f"{path} gives labels by file name, and embedded images have none; give a folder as task.data."
            )
        rows = {name: k for k, name in enumerate(names)}
        odd = next((name for name in found.labels if name not in rows), None)
        if odd is not None:
            raise ConfigError(f"{path}: {odd!a} is no image of the data set{nearest(odd, names[:1000])}")
        right = np.zeros_like(right) if found.classes is None else right
        for name, of in found.labels.items():
            right[rows[name]] = row(of, repr(name))
        known = np.asarray(known | right.any(0)) if found.classes is not None else np.ones(len(own), bool)
    return right, known


def _lines(path: Path, text: str) -> dict[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].rstrip()
        parts = [part.strip() for part in (words.split("\t") if "\t" in words else words.split())]
        if not words.strip():
            continue
        if len(parts) < 2 or "" in parts:
            raise ConfigError(f"{path}, line {number}: write VARIANT_CLASS CLASSIFIER_CLASS, divided by a tab.")
        if parts[0] in found:
            raise ConfigError(f"{path}, line {number}: {parts[0]!a} is given twice; drop one.")
        found[parts[0]] = parts[1:]
    if not found:
        raise ConfigError(f"{path} maps nothing; give it a line for each class.")
    return found


def _lists(path: Path, key: str, content: Any) -> dict[str, Sequence[str]] | None:
    if content is None:
        return None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {key} must be an object of names.")
    found: dict[str, Sequence[str]] = {}
    for name, value in content.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in values):
            raise ConfigError(f"{path}: {name!a} leads to {value!r}; give the name of a class, or a list of names.")
        found[name] = [str(one) for one in values]
    return found


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    doubled = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if doubled is not None:
        raise ConfigError(f"{path}: {doubled!a} is given twice; drop one.")
    return dict(pairs)
