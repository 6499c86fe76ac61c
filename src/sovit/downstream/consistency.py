"""Error consistency of two observers, trial by trial: Cohen's kappa of whether each was right (Geirhos et al., arXiv
2006.16736), observed consistency and accuracy difference, as in the model-vs-human toolbox.

Also the decisions of an observer in a CSV file. What is right stands elsewhere.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sovit.config import ConfigError

REPLICATES = 2000
_COLUMNS = {
    "image": ("image", "imagename"),
    "decision": ("decision", "object_response"),
    "observer": ("observer", "subj"),
}


def kappa(observed: float, first: float, second: float) -> float | None:
    """Cohen's kappa of the share of trials on which two observers are right or wrong together, given their accuracies.

    None where they must agree whatever they do, because both are always right or both always wrong.
    """
    expected = first * second + (1 - first) * (1 - second)
    return (observed - expected) / (1 - expected) if expected < 1 else None


def bounds(first: float, second: float) -> tuple[float | None, float | None]:
    """The least and the largest kappa that two observers of these accuracies can have."""
    return kappa(abs(first + second - 1), first, second), kappa(1 - abs(first - second), first, second)


def error_consistency(first: NDArray[np.bool_], second: NDArray[np.bool_], seed: int = 0) -> dict[str, Any]:
    """Kappa of two observers' correctness [trials] with its bounds and the 95 % percentile interval of drawing trials anew.

    ``observed``: share of trials both got right or both wrong; ``expected`` that share for independent observers;
    ``accuracy_difference``: of the first over the second, ``squared`` as the toolbox reports it.
    """
    num = len(first)
    cells = [(first & second).sum(), (first & ~second).sum(), (~first & second).sum(), (~first & ~second).sum()]
    # Trials of one kind are alike, so drawing trials anew is drawing the four counts.
    tables = np.random.default_rng(seed).multinomial(num, np.array(cells) / num, size=REPLICATES) / num
    values = [kappa(both + none, both + one, both + two) for both, one, two, none in tables.tolist()]
    drawn = [value for value in values if value is not None]
    right = float(first.mean()), float(second.mean())
    observed, expected = float((first == second).mean()), right[0] * right[1] + (1 - right[0]) * (1 - right[1])
    lo, hi = np.quantile(drawn, [0.025, 0.975]).tolist() if drawn else (None, None)
    least, largest = bounds(*right)
    return {
        "kappa": kappa(observed, *right),
        "lo": lo,
        "hi": hi,
        "least": least,
        "largest": largest,
        "observed": observed,
        "expected": expected,
        "accuracies": right,
        "accuracy_difference": right[0] - right[1],
        "squared": (right[0] - right[1]) ** 2,
        "num": num,
    }


def read_decisions(path: Path, images: Collection[str], categories: Collection[str]) -> dict[str, dict[str, str]]:
    """Observer -> image -> decision of a CSV file with columns image, decision and perhaps observer.

    The toolbox's names imagename, object_response and subj will do. A decision that is no category (na) is a wrong one.
    Raises ConfigError for a missing column, an image that is no trial, one judged twice, or a file without a category.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = {
                key: next((name for name in aliases if name in (reader.fieldnames or ())), None)
                for key, aliases in _COLUMNS.items()
            }
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a CSV file of decisions.") from None
    image, decision, observer = names["image"], names["decision"], names["observer"]
    if image is None or decision is None:
        raise ConfigError(
            f"{path} has no column called {'image' if image is None else 'decision'}; name the columns so."
        )
    known = set(images)
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        who, name = (row[observer] or "" if observer else path.stem), (row[image] or "").rpartition("/")[2]
        if name not in known:
            raise ConfigError(f"{path}: {name!a} is no trial of this evaluation; give the same task.per_pair and seed.")
        judged = found.setdefault(who, {})
        if name in judged:
            raise ConfigError(f"{path}: {who!a} judges {name} twice; name the observers in a column called observer.")
        judged[name] = (row[decision] or "").strip()
    if not any(value in categories for judged in found.values() for value in judged.values()):
        raise ConfigError(f"{path} holds no decision for {', '.join(categories)}.")
    return found
