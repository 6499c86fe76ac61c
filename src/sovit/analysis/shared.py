"""The arms of a star fitted together, with parameters in common.

By theory the data exponent c is the same for every dimension (SoViT, arXiv 2305.13035, Section 3.2). Sharing c alone
buys nothing: its error hardly touches s. Sharing xi and eps too narrows the intervals of depth and MLP dimension by
half, but it is a claim about the model: the floor of an arm holds what the other dimensions cost at the center, and for
one star all arms have the same center. Where the claim is wrong the fit gets worse, and ``p`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from sovit.analysis.fit import NUM_PARAMETERS, law_logs
from sovit.analysis.intervals import RATIOS, Interval, RunFit
from sovit.analysis.varpro import Array, Noise, Solution, restricted, solve

SHAREABLE = ("c", "xi", "eps")
_NOWHERE = -1e6  # log of a term outside its arm: exp of this times any exponent in the box is 0
_TERMS = ("size", "cost", "xi", "eps")


@dataclass(frozen=True)
class SharedFit:
    """``s``: the exponent of each arm. ``p``: of the shared parameters being one, against the arms fitted apart (F test
    on the whitened residuals). sigma is 1 if the arms' own sigmas hold; ``ratio``: tau / sigma of all arms.
    """

    shared: tuple[str, ...]
    s: dict[str, Interval]
    sigma: float
    ratio: float
    p: float


def fit_shared(
    arms: Mapping[str, tuple[Array, Array, Array, RunFit]], shared: Sequence[str], *, level: float = 0.95
) -> SharedFit:
    """Fit arms, each (x, t in GFLOPs, error, its own fit), with ``shared`` among c, xi and eps in common.

    Raises ValueError for an unknown name or fewer than two arms.
    """
    unknown = [name for name in shared if name not in SHAREABLE]
    if unknown or not shared:
        raise ValueError(f"cannot share {', '.join(unknown) or 'nothing'}; choose among {', '.join(SHAREABLE)}.")
    if len(arms) < 2:
        raise ValueError(f"{len(arms)} arm has nobody to share with; give at least two.")
    logs, log_error, index, scale = _stack(arms, shared)
    start = [np.concatenate([_start(fit, "c" in shared) for *_, fit in arms.values()])]
    if "c" in shared:
        start = [np.append(start[0], np.exp(np.mean([math.log(fit.fit.law.c) for *_, fit in arms.values()])))]
    num_parameters = logs.shape[0] + logs.shape[1]
    free = len(log_error) - num_parameters
    best: tuple[float, float, Solution, Noise] | None = None
    for ratio in RATIOS:
        noise = Noise(index, float(ratio), scale)
        solution = solve(logs, log_error, noise, starts=start)
        start = [solution.exponents]
        criterion = restricted(solution.objective, solution.jacobian, noise, free)
        if best is None or criterion < best[0]:
            best = criterion, float(ratio), solution, noise
    assert best is not None
    _, ratio, solution, noise = best
    sigma = math.sqrt(solution.objective / free)
    covariance = _covariance(solution, noise, sigma)
    num_runs = int(index.max()) + 1
    wide = float(t_distribution.ppf((1 + level) / 2, num_runs - 3 * len(arms)))
    intervals = {}
    for number, name in enumerate(arms):
        s, log_se = _exponent(solution, covariance, number, len(arms), "c" in shared)
        half = wide * log_se
        open_ended = not half < math.log(1e3)
        lo, hi = (0.0, math.inf) if open_ended else (s * math.exp(-half), s * math.exp(half))
        intervals[name] = Interval(s, lo, hi, f"REML, shared {', '.join(shared)}, Wald on log s, t(G-{3 * len(arms)})")
    apart = 0.0
    for x, t, error, fit in arms.values():
        own = Noise(fit.noise.run, ratio, fit.noise.scale * fit.sigma)
        arm_logs = law_logs(np.log(x) - np.log(x).mean(), np.log(t) - np.log(t).mean())
        apart += solve(arm_logs, np.log(error), own, starts=[fit.fit.exponents]).objective
    extra = NUM_PARAMETERS * len(arms) - num_parameters
    between = num_runs - 3 * len(arms)
    gain = max(solution.objective - apart, 0.0) / extra / (solution.objective / free)
    return SharedFit(tuple(shared), intervals, sigma, ratio, float(f_distribution.sf(gain, extra, between)))


def _start(fit: RunFit, share_c: bool) -> Array:
    a, b, c = fit.fit.exponents
    return np.array([a, b] if share_c else [a, b, c])


def _stack(
    arms: Mapping[str, tuple[Array, Array, Array, RunFit]], shared: Sequence[str]
) -> tuple[Array, Array, NDArray[np.intp], Array]:
    """All arms as one sum of monomials: a term outside its arm is 0 by way of an enormous negative logarithm.

    t is centred over all arms, x in each, so that shared coefficients mean the same. Each arm's errors are weighed by
    its own sigma.
    """
    share_c = "c" in shared
    per_arm = 2 if share_c else 3
    num_exponents = per_arm * len(arms) + share_c
    mean_t = float(np.mean(np.concatenate([np.log(t) for _, t, _, _ in arms.values()])))
    lengths = [len(x) for x, *_ in arms.values()]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    terms: dict[tuple[str, int], Array] = {}
    runs, scales, num_runs = [], [], 0
    for number, (x, t, _, fit) in enumerate(arms.values()):
        here = slice(starts[number], starts[number + 1])
        own = law_logs(np.log(x) - np.log(x).mean(), np.log(t) - mean_t)
        columns = [per_arm * number, per_arm * number + 1, num_exponents - 1 if share_c else per_arm * number + 2]
        for j, term in enumerate(_TERMS):
            key = (term, 0 if term in shared else number)
            if key not in terms:
                terms[key] = np.zeros((num_exponents, starts[-1]))
                if term not in shared:
                    terms[key][columns[0]] = _NOWHERE
            terms[key][:, here] = 0.0
            for k, column in enumerate(columns):
                terms[key][column, here] = own[j, k]
        runs.append(fit.noise.run + num_runs)
        num_runs += int(fit.noise.run.max()) + 1
        scales.append(fit.noise.scale * fit.sigma)
    log_error = np.concatenate([np.log(error) for _, _, error, _ in arms.values()])
    return np.array(list(terms.values())), log_error, np.concatenate(runs), np.concatenate(scales)


def _covariance(solution: Solution, noise: Noise, sigma: float) -> Array:
    """Of the exponents, coefficients profiled out; infinite where the data say nothing."""
    jacobian = noise.whiten(solution.jacobian)
    norms = np.linalg.norm(jacobian, axis=0)
    norms[norms == 0] = 1.0
    inverse = np.linalg.pinv(jacobian / norms, rcond=1e-12)
    whole = sigma**2 * (inverse / norms[:, None]) @ (inverse / norms[:, None]).T
    num_terms = len(solution.coefficients)
    return whole[num_terms:, num_terms:]


def _exponent(solution: Solution, covariance: Array, number: int, num_arms: int, share_c: bool) -> tuple[float, float]:
    """s of one arm and the standard error of its logarithm, by the delta method."""
    per_arm = 2 if share_c else 3
    at = [per_arm * number, per_arm * number + 1, per_arm * num_arms if share_c else per_arm * number + 2]
    a, b, c = solution.exponents[at]
    gradient = np.zeros(len(solution.exponents))
    gradient[at] = [-1 / (a + b), -1 / (a + b), 1 / c]
    return float(c / (a + b)), math.sqrt(float(gradient @ covariance @ gradient))
