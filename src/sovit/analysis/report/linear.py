"""Two things that follow from an arm's law linearised at its fit: the band of the optimum, and the pull of single runs.

Both take the entry of an arm in a fit's dict and the rows of its points, and the noise as fitted (an offset per run,
see `intervals`). The band is the delta method's on log x*(t) (Eq. 4 of SoViT, arXiv 2305.13035) with t(G - 3); xi and
eps count as free even at 0. Neither knows of a law that does not hold, or of errors shared by all runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as t_distribution

from sovit.analysis.fit import Noise
from sovit.analysis.intervals import index_runs
from sovit.analysis.law import Law
from sovit.analysis.planning.information import exponent_gradient, log_jacobian, optimum_gradient, variance

Array = NDArray[np.float64]
_WIDEST = math.log(100)  # a band wider than this either way is not quadratic, and says nothing


class _Points:
    """The used points of an arm: law, whitened Jacobian (n, 7) in the points' own units, and the noise."""

    def __init__(self, arm: str, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        used = [row for row in rows if row["arm"] == arm and row["used"]]
        x, t = (np.array([row[key] for row in used], float) for key in (arm, "t_gflops"))
        self.law = Law(**entry["law"])
        self.names = sorted({row["run_id"] for row in used})
        self.run = index_runs([row["run_id"] for row in used])
        self.size = {row["run_id"]: row[arm] for row in used}
        self.units = math.exp(float(np.log(x).mean())), math.exp(float(np.log(t).mean()))
        sigma = max(entry["sigma"], 1e-9)
        self.noise = Noise(self.run, (entry["tau"] or 0.0) / sigma, np.ones(len(x)))
        self.whitened = self.noise.whiten(log_jacobian(self.law, x, t, *self.units)) / sigma
        self.sigma = sigma


def optimum_band(
    arm: str, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], t: ArrayLike, level: float = 0.95
) -> tuple[Array, Array] | None:
    """(lo, hi) of the law's optimum at compute ``t`` (n,) in GFLOPs; None where the data do not determine it.

    ``entry``: an arm of a star's dict; ``rows``: the dict's points.
    """
    law = entry.get("law")
    if not law or not law["alpha"] or not law["beta"] or entry.get("sigma") is None:
        return None
    points = _Points(arm, entry, rows)
    degrees = len(points.names) - 3
    if degrees < 1:
        return None
    times = np.atleast_1d(np.asarray(t, float))
    matrix = points.whitened.T @ points.whitened
    gradients = [optimum_gradient(points.law, float(time), points.units) for time in times]
    half = np.sqrt([variance(matrix, gradient) for gradient in gradients])
    half *= float(t_distribution.ppf((1 + level) / 2, degrees))
    if not np.all(half < _WIDEST):
        return None
    best = points.law.optimum(times)
    return best * np.exp(-half), best * np.exp(half)


def pull(arm: str, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Size -> how far the exponent would move if all runs of that size had 1% more error; {} without a law.

    To first order; a coefficient that the fit holds at 0 stays there.
    """
    law = entry.get("law")
    if not law or not law["alpha"] or not law["beta"] or entry.get("sigma") is None:
        return {}
    points = _Points(arm, entry, rows)
    free = np.array([law[name] > 0 for name in ("alpha", "a", "beta", "b", "xi", "c", "eps")])
    jacobian = points.whitened[:, free]
    norms = np.linalg.norm(jacobian, axis=0)
    if np.any(norms == 0):
        return {}
    gradient = exponent_gradient(points.law)[free] / norms
    sizes = np.array([points.size[points.names[index]] for index in points.run])
    moves = {}
    for size in sorted(set(sizes.tolist())):
        bump = points.noise.whiten(np.where(sizes == size, math.log(1.01), 0.0)) / points.sigma
        shift = np.linalg.lstsq(jacobian / norms, bump, rcond=1e-12)[0]
        moves[int(size)] = points.law.exponent * float(gradient @ shift)
    return moves
