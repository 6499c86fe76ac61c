"""A diverged cell again at a lower learning rate: another cell with a run id of its own, which names what it repeats.

The diverged run stays, as the result it is. The same cell and factor always make the same retry, so that one from an
earlier invocation is found instead of made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from sovit import records
from sovit.launch.plan import Cell
from sovit.launch.sweep import SweepError

MAX_RETRIES = 2  # of one cell; what diverges at a quarter of its rate is not mended by an eighth


def check_factor(factor: float | None) -> None:
    """Raise SweepError if a retry would not lower the learning rate."""
    if factor is not None and not 0 < factor < 1:
        raise SweepError(
            f"--retry-diverged {factor:g} would not lower the learning rate; give a number below 1 such as 0.5."
        )


def retry_cell(cell: Cell, factor: float, number: int) -> Cell:
    """The ``number``-th retry (from 1) of a diverged cell: its ``optim.lr`` times ``factor ** number``, tagged so."""
    text = _plain(cell.config.optim.lr * factor**number)
    tag = f"{cell.config.tag}+lr{text}" if cell.config.tag else f"lr{text}"
    repeated = cell.run_id if number == 1 else retry_cell(cell, factor, number - 1).run_id
    config = replace(cell.config, tag=tag, retry_of=repeated, optim=replace(cell.config.optim, lr=float(text)))
    overrides = cell.overrides
    for override in (f"optim.lr={text}", f"tag={tag}", f"retry_of={repeated}"):
        overrides = _with(overrides, override)
    return replace(
        cell,
        overrides=overrides,
        config=config,
        run_id=records.run_id(config),
        run_dir=records.run_dir(config),
        config_hash=records.config_hash(config),
    )


def _plain(rate: float) -> str:
    """Six digits without an exponent, whose minus sign a run id cannot hold."""
    return f"{Decimal(f'{rate:.6g}'):f}"


def _with(overrides: Sequence[str], override: str) -> list[str]:
    key = override.partition("=")[0]
    return [*(other for other in overrides if other.partition("=")[0] != key), override]
