"""Who wins at equal compute: errors of several shapes over the same seeds, compared with one of them.

    log e_ij = mu_i + b_j + r_ij

i is the shape, j the seed (which settles initialisation and stream of images, so a seed is easy or hard for all shapes
alike), r the spread between runs, of one size for all. The differences mu_i - mu_0 from the control get simultaneous
intervals: the critical value is that of the largest of all |t| together (Dunnett 1955, generalised to runs that are missing
by the contrasts' own correlations). A shape that no chain of common seeds ties to the control has no difference from it.
What is in no interval: the test images and the draws of the support, which are the same for every shape, and in those of
the means the luck b_j of the seeds that were run, which all shapes share.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import multivariate_t
from scipy.stats import t as t_distribution

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Against:
    """A shape's error over the control's: ``ratio`` with a simultaneous interval ``lo``, ``hi``; ``better``
    is True if the control has less error, False if more, None if the runs do not tell. An end is None where no spread can be
    estimated."""

    ratio: float
    lo: float | None
    hi: float | None

    @property
    def better(self) -> bool | None:
        if self.lo is None or self.hi is None:
            return None
        return True if self.lo > 1 else False if self.hi < 1 else None


@dataclass(frozen=True)
class Standings:
    """``spread``: standard deviation between runs of log error, on ``degrees`` of freedom; ``critical``: the common t.

    ``mean``: geometric mean error by shape, as if every shape had run on every seed; ``interval``: 95% of its own, not
    simultaneous. ``against``: every shape but the control. A shape without a tie to the control has the mean of its own
    seeds, no interval, and is in no ``against``.
    """

    level: float
    spread: float | None
    degrees: int
    critical: float | None
    mean: dict[Hashable, float]
    interval: dict[Hashable, tuple[float | None, float | None]]
    against: dict[Hashable, Against]


def standings(errors: Mapping[Name, Mapping[int, float]], control: Name, level: float = 0.95) -> Standings:
    """Compare shapes by their errors by seed. Raises ValueError without the control, or an error that has no logarithm."""
    names = list(errors)
    if control not in errors or not errors[control]:
        raise ValueError(f"{control} has no finished run, so there is nothing to compare with.")
    rows = [(name, seed, error) for name in names for seed, error in sorted(errors[name].items())]
    for name, seed, error in rows:
        if not 0 < error < math.inf:
            raise ValueError(
                f"{name}, seed {seed}: error {error} has no logarithm to compare; use fewer shots or a harder task."
            )
    tied = _tied(errors, control)
    alone = [name for name in names if errors[name] and name not in tied]
    names = [name for name in names if name in tied]
    rows = [row for row in rows if row[0] in tied]
    seeds = sorted({seed for _, seed, _ in rows})
    design = np.zeros((len(rows), len(names) + len(seeds)))
    for row, (name, seed, _) in enumerate(rows):
        design[row, names.index(name)] = 1.0
        design[row, len(names) + seeds.index(seed)] = 1.0
    y = np.log([error for _, _, error in rows])
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    degrees = len(rows) - int(rank)
    spread = math.sqrt(float(np.sum((y - design @ solution) ** 2)) / degrees) if degrees > 0 else None
    cov = np.linalg.pinv(design.T @ design)

    def weights(name: Name, minus: Name | None = None) -> NDArray[np.float64]:
        """A contrast: a shape's level averaged over the seeds, or its difference from another shape's."""
        one = np.zeros(design.shape[1])
        one[names.index(name)] += 1.0
        if minus is None:
            one[len(names) :] = 1.0 / len(seeds)
        else:
            one[names.index(minus)] -= 1.0
        return one

    rivals = [name for name in names if name != control]
    contrasts = np.array([weights(name, control) for name in rivals]).reshape(len(rivals), design.shape[1])
    scale = contrasts @ cov @ contrasts.T
    critical = critical_value(scale, degrees, level) if degrees > 0 and rivals else None
    mean: dict[Hashable, float] = {name: math.exp(_mean_log(errors[name].values())) for name in alone}
    interval: dict[Hashable, tuple[float | None, float | None]] = {name: (None, None) for name in alone}
    against: dict[Hashable, Against] = {}
    for name in names:
        one = weights(name)
        log_mean = float(one @ solution)
        mean[name] = math.exp(log_mean)
        half = None
        if spread is not None:
            half = float(t_distribution.ppf((1 + level) / 2, degrees)) * spread * math.sqrt(float(one @ cov @ one))
        interval[name] = (None, None) if half is None else (math.exp(log_mean - half), math.exp(log_mean + half))
    for place, name in enumerate(rivals):
        ratio = float(contrasts[place] @ solution)
        half = critical * spread * math.sqrt(scale[place, place]) if critical and spread is not None else None
        ends = (None, None) if half is None else (math.exp(ratio - half), math.exp(ratio + half))
        against[name] = Against(math.exp(ratio), *ends)
    return Standings(level, spread, degrees, critical, mean, interval, against)


def _tied(errors: Mapping[Name, Mapping[int, float]], control: Name) -> set[Name]:
    """The shapes that share a seed with the control, or with a shape that does, and so on: the others' mu_i - mu_0 could
    be anything."""
    tied, seeds = {control}, set(errors[control])
    while more := {name for name, runs in errors.items() if name not in tied and seeds & set(runs)}:
        tied |= more
        seeds |= {seed for name in more for seed in errors[name]}
    return tied


def _mean_log(errors: Iterable[float]) -> float:
    return float(np.mean([math.log(error) for error in errors]))


def critical_value(scale: NDArray[np.float64] | Sequence[Sequence[float]], degrees: int, level: float = 0.95) -> float:
    """c with P(max_i |T_i| <= c) = level, for t variables of covariance ``scale`` up to a factor and common ``degrees``.

    For equal numbers of runs and one control this is Dunnett's two-sided critical value.
    """
    cov = np.asarray(scale, float)
    sd = np.sqrt(np.diag(cov))
    shape = cov / np.outer(sd, sd)
    size = len(shape)
    least = float(t_distribution.ppf((1 + level) / 2, degrees))
    if size == 1:
        return least
    joint = multivariate_t(np.zeros(size), shape, df=degrees, allow_singular=True)

    def excess(c: float) -> float:
        inside = joint.cdf(np.full(size, c), lower_limit=np.full(size, -c), random_state=0)
        return float(inside) - level

    most = float(t_distribution.ppf(1 - (1 - level) / 2 / size, degrees)) * 1.02  # Bonferroni's, which is wider
    return float(brentq(excess, least * 0.98, most, xtol=1e-4))
