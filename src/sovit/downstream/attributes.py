"""Groups and answers of single images: from a CSV file beside them, or of the embedded digits from their ink.

The digits' answer is yes for the even ones; the group is ``bold`` where the mean brightness of the image is above the
median of the support part, ``thin`` otherwise. Digits differ in ink, and so the groups in their share of even ones: 0.44 of
the thin, 0.56 of the bold.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sovit.config import ConfigError
from sovit.downstream.sets import Labelled
from sovit.strict import nearest


@dataclass(frozen=True)
class Grouped:
    """Images with a group (N,) and an answer (N,) each; ``rows`` are their places in the data set."""

    rows: NDArray[np.int64]
    group: NDArray[np.int64]
    answer: NDArray[np.bool_]


def of_digits(train: Labelled, test: Labelled) -> tuple[tuple[str, ...], str, Grouped, Grouped]:
    """(names of the groups, what yes means, train, test)."""
    ink = [np.asarray(part.images[: len(part)].mean((1, 2, 3))) for part in (train, test)]
    median = np.median(ink[0])
    parts = [
        Grouped(np.arange(len(part)), (own > median).astype(np.int64), part.labels % 2 == 0)
        for part, own in zip((train, test), ink, strict=True)
    ]
    return ("thin", "bold"), "an even digit", *parts  # type: ignore[return-value]


def from_csv(
    path: Path, attribute: str, label: str, positive: str | None, train: Labelled, test: Labelled
) -> tuple[tuple[str, ...], str, Grouped, Grouped]:
    """The same from a file whose first column names an image below the part it is in, such as class000/000001.jpg.

    Where the parts share file names, write train/... and test/... (the parts' own folders). Images that the file does not
    name are left out. Raises ConfigError for a missing column, another number of answers than two, or one group.
    """
    table = _table(path, attribute, label)
    answers = sorted({row[1] for row in table.values()})
    groups = tuple(sorted({row[0] for row in table.values()}))
    if len(answers) != 2:
        raise ConfigError(
            f"{path}: the column {label!a} holds {len(answers)} answers; it must hold two, such as 0 and 1."
        )
    if len(groups) < 2:
        raise ConfigError(
            f"{path}: the column {attribute!a} holds one group, {groups[0]!a}; there must be at least two."
        )
    yes = answers[1] if positive is None else positive
    if yes not in answers:
        raise ConfigError(f"task.positive={yes!a} is no answer of {path}{nearest(yes, answers)}")
    parts = []
    for part, prefixes in ((train, ("train", "training")), (test, ("test", "testing", "val", "valid", "validation"))):
        if part.file_names is None:
            raise ConfigError(f"task.attributes names files, and {part.name} has none; give a folder as task.data.")
        found = []
        for k in range(len(part)):
            name = part.file_names(k)
            keys = (*(f"{prefix}/{name}" for prefix in prefixes), name)
            row = next((table[key] for key in keys if key in table), None)
            if row is not None:
                found.append((k, groups.index(row[0]), row[1] == yes))
        if not found:
            raise ConfigError(
                f"{path} names no image of {part.name}; its first column holds names such as {part.file_names(0)}."
            )
        rows, group, answer = (np.array(column) for column in zip(*found, strict=True))
        parts.append(Grouped(rows, group, answer))
    return groups, f"{label}={yes}", *parts  # type: ignore[return-value]


def _table(path: Path, attribute: str, label: str) -> dict[str, tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for key in (attribute, label):
                if key not in columns[1:]:
                    raise ConfigError(f"{path} has no column {key!a}{nearest(key, columns[1:])}")
            found: dict[str, tuple[str, str]] = {}
            for row in reader:
                name = (row[columns[0]] or "").strip().removeprefix("./")
                if name in found:
                    raise ConfigError(f"{path}, line {reader.line_num}: {name!a} is there twice; drop one.")
                if row[attribute] and row[label]:
                    found[name] = row[attribute].strip(), row[label].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"task.attributes={path} cannot be read ({reason}); give a CSV file.") from None
    if not found:
        raise ConfigError(f"{path} holds no line with a group and an answer.")
    return found
