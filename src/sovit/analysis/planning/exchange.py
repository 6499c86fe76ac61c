"""Optimal design by exchange: how often to train each candidate size of each arm.

The information of a run is a matrix, and the matrices of the runs of an arm add up (`planning.information`); so
choosing runs is a search over counts. Runs are added greedily to five sizes an arm and then exchanged one at a time
(Fedorov's exchange), for the least sum over dimensions of the variance of log x*(T), Eq. 4 of SoViT (arXiv 2305.13035).
The best design for one assumed law would put everything on three sizes an arm; averaging over laws with their optimum
elsewhere, and keeping five sizes, leaves something to see it fail by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sovit.analysis.law import Law
from sovit.analysis.planning.information import Array, Spread, information, optimum_gradient
from sovit.analysis.star import HEADLINE

MIN_SIZES = 5
MAX_SEEDS = 3
_ELSEWHERE = (0.6, 1.0, 1.7)  # where the optimum might be, times where it is assumed


@dataclass(frozen=True)
class Run:
    """One run that could be made: ``t`` in GFLOPs of its evaluations, training GFLOPs, steps at the first evaluation."""

    t: tuple[float, ...]
    train_gflops: float
    first_steps: int


@dataclass(frozen=True)
class Pool:
    """The candidate sizes (C) of one arm: what a run costs and, for each place (P) of the optimum, tells.

    ``matrices`` (P, C, 7, 7); ``gradients`` (P, 7) of log x*(T).
    """

    name: str
    sizes: list[int]
    runs: list[Run]
    matrices: Array
    gradients: Array

    @property
    def costs(self) -> Array:
        return np.array([run.train_gflops for run in self.runs])

    def errors(self, totals: Array) -> Array:
        """Variance of log x*(T), mean over places, for information (P, ..., 7, 7)."""
        scale = np.sqrt(np.maximum(np.diagonal(totals, axis1=-2, axis2=-1), 1e-300))
        values, vectors = np.linalg.eigh(totals / (scale[..., :, None] * scale[..., None, :]))
        gradients = self.gradients.reshape(len(totals), *(1,) * (totals.ndim - 3), 7) / scale
        along = np.einsum("...ij,...i->...j", vectors, gradients)
        return np.mean(np.sum(along**2 / np.maximum(values, 1e-12), -1), 0)

    def total(self, counts: Array) -> Array:
        return np.einsum("c,pcij->pij", counts, self.matrices)


def make_pool(name: str, law: Law, spread: Spread, sizes: Sequence[int], runs: Sequence[Run], target: float) -> Pool:
    """The pool of an arm; a point whose assumed error is above the fit's cut-off tells nothing."""
    units = math.sqrt(sizes[0] * sizes[-1]), math.sqrt(runs[0].t[0] * runs[0].t[-1])
    places = [shifted(law, factor) for factor in _ELSEWHERE]
    matrices = np.zeros((len(places), len(sizes), 7, 7))
    for one, place in enumerate(places):
        for two, (size, run) in enumerate(zip(sizes, runs, strict=True)):
            t = np.array(run.t)
            t = t[place.error(float(size), t) <= HEADLINE]
            if len(t):
                x, same = np.full(len(t), float(size)), np.zeros(len(t), dtype=np.intp)
                matrices[one, two] = information(place, spread, x, t, same, units)
    gradients = np.array([optimum_gradient(place, target, units) for place in places])
    return Pool(name, list(sizes), list(runs), matrices, gradients)


def shifted(law: Law, factor: float) -> Law:
    """The law with its optimum ``factor`` times as large at every compute."""
    return dataclasses.replace(law, alpha=law.alpha * factor**law.a, beta=law.beta * factor**-law.b)


Counts = list[Array]  # for each pool, how often each size is trained


def search(pools: Sequence[Pool], budget: float, max_runs: int) -> Counts | None:
    """Runs of least error for training GFLOPs ``budget``; None if five sizes an arm cost more."""
    counts = [np.zeros(len(pool.sizes)) for pool in pools]
    for count in counts:
        count[np.unique(np.linspace(0, len(count) - 1, MIN_SIZES).round().astype(int))] = 1
    if min(count.sum() for count in counts) < MIN_SIZES or _cost(pools, counts) > budget:
        return None
    while sum(count.sum() for count in counts) < max_runs:
        best = (0.0, 0, 0)
        left = budget - _cost(pools, counts)
        for one, (pool, count) in enumerate(zip(pools, counts, strict=True)):
            total = pool.total(count)
            gains = (pool.errors(total) - pool.errors(total[:, None] + pool.matrices)) / pool.costs
            gains[(count >= MAX_SEEDS) | (pool.costs > left)] = 0
            best = max(best, (float(gains.max()), one, int(gains.argmax())))
        if best[0] <= 0:
            break
        counts[best[1]][best[2]] += 1
    return _exchanged(pools, counts, budget)


def _exchanged(pools: Sequence[Pool], counts: Counts, budget: float) -> Counts:
    """Move one run at a time to where it tells most, within an arm or to another, while that gains over 0.1%."""
    for _ in range(60):
        now = [float(pool.errors(pool.total(count))) for pool, count in zip(pools, counts, strict=True)]
        left = budget - _cost(pools, counts)
        adding = [
            pool.errors(pool.total(count)[:, None] + pool.matrices) - before
            for pool, count, before in zip(pools, counts, now, strict=True)
        ]
        best: tuple[float, int, int, int, int] = (-1e-3 * sum(now), 0, 0, 0, 0)
        for one, (pool, count) in enumerate(zip(pools, counts, strict=True)):
            for out in np.flatnonzero(count):
                total = pool.total(count) - pool.matrices[:, out]
                spare = count[out] > 1 or np.count_nonzero(count) > MIN_SIZES
                loss = float(pool.errors(total)) - now[one]
                for two, other in enumerate(pools):
                    inside = one == two
                    change = pool.errors(total[:, None] + pool.matrices) - now[one] if inside else loss + adding[two]
                    banned = (counts[two] >= MAX_SEEDS) | (other.costs > left + pool.costs[out])
                    if not spare:
                        banned |= (counts[two] > 0) | (not inside)
                    change = np.where(banned, np.inf, change)
                    best = min(best, (float(change.min()), one, int(out), two, int(change.argmin())))
        if best[1:3] == best[3:]:
            break
        counts[best[1]][best[2]] -= 1
        counts[best[3]][best[4]] += 1
    return counts


def _cost(pools: Sequence[Pool], counts: Counts) -> float:
    return sum(float(count @ pool.costs) for pool, count in zip(pools, counts, strict=True))
