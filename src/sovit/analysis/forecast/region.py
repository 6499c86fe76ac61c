"""The joint confidence region of a predicted shape, from the draws of `sovit.analysis.forecast.predict`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit.analysis.forecast.exponents import Sizes
from sovit.analysis.forecast.predict import Forecast
from sovit.analysis.points import DIMENSIONS


@dataclass(frozen=True)
class Region:
    """Where the shape lies, all three sizes at once, with probability ``level``.

    ``lo``, ``hi``: a box of sizes by dimension, 0 or inf where the data leave an end open. ``correlation`` (3, 3) of the
    log sizes. ``ellipsoid``: ``dimensions`` and all log sizes u with (u - center)' matrix^-1 (u - center) <= radius2.
    Both are None if a side is open or fewer than two dimensions are uncertain, the ellipsoid also if it would be flat.
    """

    level: float
    lo: Sizes
    hi: Sizes
    correlation: tuple[tuple[float, ...], ...] | None
    ellipsoid: dict[str, Any] | None

    @property
    def open_ends(self) -> tuple[str, ...]:
        """Such as "width above"."""
        above = [f"{name} above" for name, hi in zip(DIMENSIONS, self.hi, strict=True) if math.isinf(hi)]
        return (*above, *(f"{name} below" for name, lo in zip(DIMENSIONS, self.lo, strict=True) if lo == 0))


def region(forecast: Forecast, level: float = 0.95) -> Region | None:
    """The joint region of a forecast, or None if nothing about it is uncertain.

    The box takes the same share of the draws off both ends of every dimension, so large that ``level`` of them lie inside
    in all dimensions at once (simultaneous by ranks: Besag, Green, Higdon and Mengersen 1995).
    """
    log_draws = forecast.log_draws
    if log_draws is None:
        return None
    num = len(log_draws)
    order = np.sort(log_draws, axis=0)
    uncertain = [k for k in range(3) if order[0, k] < order[-1, k]]
    rank = log_draws[:, uncertain].argsort(axis=0, kind="stable").argsort(axis=0)
    farthest = np.maximum(rank, num - 1 - rank).max(axis=1)
    cut = int(np.sort(farthest)[math.ceil(level * num) - 1])
    centre, scale = np.log(forecast.x), forecast.scale
    correlation = ellipsoid = None
    if np.all(np.isfinite(scale)) and len(uncertain) > 1:
        inside = np.ix_(uncertain, uncertain)
        spread = np.sqrt(np.diag(scale)[uncertain])
        unit = scale[inside] / np.outer(spread, spread)
        whole = np.eye(3)
        whole[inside] = unit
        correlation = tuple(tuple(row) for row in whole.tolist())
        if np.linalg.eigvalsh(unit)[0] > 1e-10:
            off = (log_draws - centre)[:, uncertain] / spread
            squares = np.einsum("ni,ij,nj->n", off, np.linalg.inv(unit), off)
            ellipsoid = {
                "dimensions": [DIMENSIONS[k] for k in uncertain],
                "center": centre[uncertain].tolist(),
                "matrix": scale[inside].tolist(),
                "radius2": float(np.quantile(squares, level, method="higher")),
            }
    with np.errstate(over="ignore"):
        lo, hi = np.exp(order[num - 1 - cut]), np.exp(order[cut])
    return Region(level, tuple(lo.tolist()), tuple(hi.tolist()), correlation, ellipsoid)
