"""Where the cells of a sweep stand, for ``sovit status``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sovit.launch.display import STYLES
from sovit.launch.state import last_error, progress, state_on_disk
from sovit.launch.tables import table


def status_table(directories: Sequence[Path], metric: tuple[str, int]) -> tuple[Table, list[str]]:
    """A row for each run directory, and the states. ``metric``: the dataset and the shots of the error shown."""
    dataset, shots = metric
    rows = table(
        ("cell", "left"),
        ("state", "left"),
        ("step", "right"),
        ("images/s", "right"),
        (f"{dataset} {shots}-shot error", "right"),
        ("reason", "left"),
    )
    states = []
    for directory in directories:
        state, reason = state_on_disk(directory)
        step, total_steps, images_per_s = progress(directory)
        error = last_error(directory, dataset, shots)
        rows.add_row(
            directory.name,
            Text(state, style=STYLES.get(state, "")),
            f"{step:,} / {total_steps:,}" if total_steps else "",
            f"{images_per_s:,.0f}" if images_per_s else "",
            "" if error is None else f"{error:.3f}",
            reason,
        )
        states.append(state)
    return rows, states
