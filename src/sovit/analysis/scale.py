"""From where on a metric's values count: how large one may be to be fitted, for errors and for log-perplexities.

A 10-shot error has the same range in every sweep, so its limits are fixed here, before any data. A log-perplexity has none:
its limits are shares of what a decoder reaches that sees no image (`sovit.lit.multitask`), as recorded with the runs.
Values at or above that hold no signal of the encoder; those near it belong to the start of the learning curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sovit import metric, records

if TYPE_CHECKING:
    from sovit.analysis.points import Point


@dataclass(frozen=True)
class Scale:
    """``usable``: the largest value that can enter any fit; ``cutoffs``: largest values fitted, of which ``headline`` is
    the one that counts and the others show how far the choice moves the result. ``name``: of a value, in words."""

    name: str
    usable: float
    cutoffs: tuple[float, ...]
    headline: float


# Errors near chance belong to the start of the learning curve, which is concave in log t and which the law overshoots.
ERROR = Scale("error", 0.9, (1.0, 0.7, 0.6, 0.55, 0.5), 0.6)
_SHARES = (1.0, 0.97, 0.94, 0.91, 0.88)  # of the blind decoder's log-perplexity


def log_perplexity(blind: float) -> Scale:
    """The limits of log-perplexities, for what a blind decoder reaches in nats per token."""
    cutoffs = tuple(float(f"{share * blind:.4g}") for share in _SHARES)
    return Scale("log-perplexity", cutoffs[0], cutoffs, cutoffs[0])


def scale_of(sweep_dir: Path, dataset: str, shots: int, points: Sequence[Point]) -> Scale:
    """The limits for a sweep's points by one metric. Where no run has recorded a blind decoder, all points count."""
    if metric.kind_of(dataset, shots) == metric.ERROR:
        return ERROR
    found = [_blind(sweep_dir / run, dataset) for run in sorted({point.run_id for point in points})]
    known = [value for value in found if value is not None]
    # Rounded upwards, so that the largest point is among them.
    return log_perplexity(sum(known) / len(known) if known else 1.01 * max((p.error for p in points), default=1.0))


def _blind(run_dir: Path, dataset: str) -> float | None:
    record = records.read_run(run_dir) or {}
    baseline = (record.get("baselines") or {}).get(dataset) or {}
    return baseline["chance"] if isinstance(baseline.get("chance"), float | int) else None
