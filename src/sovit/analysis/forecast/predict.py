"""The shape for a budget: where it lies before rounding, and how sure that is (SoViT, arXiv 2305.13035, Section 3.4).

    x_k(T) = x0_k (T / t0)^(s_k w_k)

x0 is the origin of the grid, best at compute t0; s_k the exponents of the star; w_k how the growth of compute is split
between the dimensions, 1/D each in the paper. A diagonal sweep replaces w_k by a fitted step (`fitted_rule`), and a law
that knows its FLOPs has an optimum of its own (`joint_rule`). Compute is in GFLOPs, forward, as everywhere.

Uncertainty is drawn: log s_k follows the t distribution of its interval (a half for each side where the two differ),
arms are independent as they share no run, and the origin comes by its bootstrap shares. An end that the data leave open
stays open. What is in no draw: the choice of the rule, the spacing of the grid, and whether the law still holds so far
out, which is why the extrapolation factor stands beside every forecast. The region made of the draws is in
`sovit.analysis.forecast.region`, whole shapes in `sovit.analysis.forecast.candidates`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as t_distribution

from sovit.analysis.forecast.exponents import Array, Exponent, Sizes, Start, exponent_of, given, sizes_of
from sovit.analysis.points import DIMENSIONS

NUM_DRAWS = 20_000
_WIDEST = math.log(10)  # a half-width of log x beyond this factor says nothing: both ends are open


@dataclass(frozen=True)
class Forecast:
    """The shape for one budget, and draws of it.

    ``target``: T in GFLOPs, None if only its ratio to t0 is known. ``x``: unrounded sizes. ``split``: what of each
    exponent counts, so that x_k grows as T^(s_k split_k): w_k, or the fitted ``step``. ``log_draws`` (draws, 3): -inf or
    inf where open, None if nothing is uncertain. ``scale`` (3, 3): covariance of log x to first order, inf where open.
    ``notes``: what the region leaves out.
    """

    target: float | None
    x: Sizes
    exponents: Mapping[str, Exponent]
    split: Sizes
    step: Exponent | None
    log_draws: Array | None
    scale: Array
    notes: tuple[str, ...]


def paper_rule(
    exponents: Mapping[str, Exponent],
    start: Start,
    factor: float,
    *,
    weights: Mapping[str, float] | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Forecast:
    """x_k = x0_k factor^(s_k w_k), factor = T / t0; w_k = 1/D unless given. ``start.t0`` may be None if not known."""
    split = np.array([1 / 3 if weights is None else weights[name] for name in DIMENSIONS])
    reach, s = math.log(factor) * split, _estimates(exponents)
    log_x0, reaches, extra = np.log([start.x]), reach[None], np.zeros((3, 3))
    notes = ["the origin is taken as it is: its uncertainty is not in the region"]
    assumed = "the region takes the step w for granted: a diagonal sweep measures it (--step fitted)"
    rng = np.random.default_rng(seed)
    if start.draws and start.t0:
        share = np.array([row[2] for row in start.draws])
        chosen = rng.choice(len(share), num_draws, p=share / share.sum())
        log_x0 = np.log([row[0] for row in start.draws])[chosen]
        log_t0 = np.log([row[1] for row in start.draws])[chosen]
        reaches = (math.log(start.t0 * factor) - log_t0)[:, None] * split
        extra = np.cov((log_x0 + reaches * s).T)
        notes = ["the optimum may lie between the sizes of the grid: its spacing is not in the region"]
        if share.sum() < 0.995:
            notes.append(
                f"in {1 - share.sum():.0%} of its draws the grid has no origin; the region rests on the others"
            )
    log_draws = log_x0 + _times(_draw(exponents, num_draws, rng), reaches)
    return Forecast(
        target=start.t0 * factor if start.t0 else None,
        x=_sizes(np.exp(np.log(start.x) + s * reach)),
        exponents=exponents,
        split=_sizes(split),
        step=None,
        log_draws=_if_uncertain(log_draws),
        scale=np.diag(_times(s * _spreads(exponents), np.abs(reach)) ** 2) + extra,
        notes=(assumed, *notes, *_open_below(exponents)),
    )


def fitted_rule(
    diagonal: Mapping[str, Any],
    target: float,
    *,
    exponents: Mapping[str, Exponent] | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Forecast:
    """x_k = x0_k G^d_k with G = g (T / t)^step, of a diagonal sweep's fit.json: how far to go is fitted.

    ``exponents``: of the star, whose uncertainty is then that of the direction d about its fitted length. Raises
    ValueError if the sweep does not determine the step.
    """
    if diagonal["step"] is None or diagonal["anchor"] is None:
        raise ValueError(
            f"{diagonal['sweep']} does not determine the step ({diagonal['why']}); use --step paper, or widen the sweep."
        )
    degrees, anchor = max(1, diagonal["num_runs"] - 3), diagonal["anchor"]
    step = exponent_of(diagonal["step"], diagonal["level"], degrees, diagonal["sweep"])
    far = math.log(target / anchor["t_gflops"])
    along = np.array([diagonal["direction"][name] for name in DIMENSIONS])
    here = np.log(sizes_of(diagonal["origin"])) + along * math.log(anchor["g"])  # log shape at the anchor
    rng = np.random.default_rng(seed)
    rho = min(max(anchor["correlation"] or 0.0, -1.0), 1.0)
    common = np.sqrt(degrees / rng.chisquare(degrees, num_draws))
    normal = rng.standard_normal((2, num_draws))
    of_anchor = anchor["log_se"] * common * normal[0]
    steps = step.at(common * (rho * normal[0] + math.sqrt(1 - rho**2) * normal[1]))
    direction = {name: given(value) for name, value in zip(DIMENSIONS, along.tolist(), strict=True)}
    turned, turn = along[None], np.zeros((3, 3))
    notes = ["the direction is taken as it is: --fit puts its uncertainty into the region"]
    if exponents is not None:
        # The diagonal measures how far the growth goes along d; the star's doubt is about what lies across.
        direction = {name: exponents[name].scaled_to(direction[name].estimate) for name in DIMENSIONS}
        turned = np.minimum(_draw(direction, num_draws, rng), 1e12)
        turned = turned * (along @ along) / (turned @ along)[:, None]
        across = along[:, None] * (np.eye(3) - along**2 / (along @ along))
        turn = (across * _times(_spreads(direction), np.array(step.estimate * abs(far))) ** 2) @ across.T
        notes = ["how far the optimum lies off the diagonal's line where it was measured is not in the region"]
    spread = np.array([anchor["log_se"], float(_times(np.array(_spread(step)), np.array(step.estimate * far)))])
    return Forecast(
        target=target,
        x=_sizes(np.exp(here + along * step.estimate * far)),
        exponents=direction,
        split=(step.estimate,) * 3,
        step=step,
        log_draws=_if_uncertain(here + along * of_anchor[:, None] + turned * _times(steps, np.array(far))[:, None]),
        scale=np.outer(along, along) * float(spread @ np.array([[1, rho], [rho, 1]]) @ spread) + turn,
        notes=(*notes, *_open_below({"the step": step})),
    )


def joint_rule(joint: Mapping[str, Any], target: float, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Forecast:
    """The best shape at T by the law that knows its FLOPs, of its fit.json; region by the delta method.

    Raises ValueError if the law has no best shape.
    """
    from sovit.analysis.forecast import joint as flops_law  # compiles its kernel, which no other rule needs

    if not joint["exponents"]:
        raise ValueError(f"the joint law gives no shape ({joint['why']}); leave out --law flops, or fit more runs.")
    estimate, level = flops_law.estimate_from(joint), joint["level"]
    by_parameter = estimate.law.sensitivity(target)
    scale = by_parameter @ estimate.covariance @ by_parameter.T
    centre, spread = np.log(estimate.law.optimum(target)), np.sqrt(np.diag(scale))
    quantile = float(t_distribution.ppf((1 + level) / 2, estimate.degrees))
    rng = np.random.default_rng(seed)
    common = np.sqrt(estimate.degrees / rng.chisquare(estimate.degrees, (num_draws, 1)))
    unit = scale / np.outer(spread, spread)
    off = common * rng.multivariate_normal(np.zeros(3), unit, num_draws, method="eigh")
    is_open = quantile * spread > _WIDEST
    with np.errstate(over="ignore"):
        off = np.where(is_open, np.sign(off) * np.inf, off * spread)
    notes = [f"the joint law is flagged: {flag}" for flag in joint["flags"]]
    return Forecast(
        target=target,
        x=_sizes(np.exp(centre)),
        exponents={
            name: exponent_of(joint["exponents"][name], level, estimate.degrees, "the joint law") for name in DIMENSIONS
        },
        split=(1.0, 1.0, 1.0),
        step=None,
        log_draws=centre + off,
        scale=np.where(is_open | is_open[:, None], np.inf, scale),
        notes=tuple(notes),
    )


def _if_uncertain(log_draws: Array) -> Array | None:
    return None if bool(np.all(log_draws == log_draws[0])) else log_draws


def _open_below(exponents: Mapping[str, Exponent]) -> list[str]:
    return [
        f"{name}: the data leave the exponent open towards 0, so one end is that of no growth"
        for name, exponent in exponents.items()
        if exponent.lo == 0
    ]


def _times(draws: Array, reach: Array) -> Array:
    """Products in which 0 x inf is 0: no growth, no doubt."""
    with np.errstate(invalid="ignore"):
        return np.where((reach == 0) | (draws == 0), 0.0, draws * reach)


def _draw(exponents: Mapping[str, Exponent], num: int, rng: np.random.Generator) -> Array:
    return np.array([exponents[name].draw(num, rng) for name in DIMENSIONS]).T


def _estimates(exponents: Mapping[str, Exponent]) -> Array:
    return np.array([exponents[name].estimate for name in DIMENSIONS])


def _spread(exponent: Exponent) -> float:
    """Standard error of log s."""
    return float(np.mean(exponent.scales()))


def _spreads(exponents: Mapping[str, Exponent]) -> Array:
    return np.array([_spread(exponents[name]) for name in DIMENSIONS])


def _sizes(values: Array) -> Sizes:
    width, depth, mlp_dim = values.tolist()
    return width, depth, mlp_dim
