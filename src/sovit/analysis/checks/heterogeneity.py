"""One dimension's exponent by several metrics of the same runs: do shots and data sets agree?

Cochran's Q of the log exponents, I^2 and a forest plot. All metrics score the same runs, so the estimates are
correlated; their covariance is the joint delete-one jackknife over runs. A disagreement is one of the exponents: the
metrics may have errors as different as they like. Metrics of one data set share its images, and agree more easily than
two data sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution

from sovit.analysis import diagnostics as check
from sovit.analysis.checks.stability import EXPONENT, Function, response, subset_noise
from sovit.analysis.fit import law_logs
from sovit.analysis.intervals import Interval, RunFit, exponent_interval, fit_with_runs, jackknife_runs
from sovit.analysis.law import Law
from sovit.analysis.points import Point
from sovit.analysis.varpro import refit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
DRAWS, REFIT_DRAWS = 1000, 400
_LINEAR = 0.2  # standard error of log s up to which the law may be linearised
_ROUGH = math.log(2)  # standard error of log s beyond which a metric says too little to be compared


@dataclass(frozen=True)
class Forest:
    """One dimension's exponent by several metrics of the same runs.

    ``q``: Cochran's, weights 1 / variance; ``expected``: its mean if all exponents are equal, given their correlation;
    ``i2``: the share of Q beyond that; ``p`` of Q / expected in sweeps whose exponents are as fitted and compared as if
    they were equal. ``pooled``: the weighted mean with its interval. ``correlation``: the mean one of the log exponents.
    ``detectable``: the factor by which one exponent must be off to be seen about four times in five, whichever it is.
    ``rows``: label, estimate, lo, hi, weight of each metric, for the plot; ``left_out``: (label, why).
    """

    rows: tuple[dict[str, Any], ...]
    pooled: Interval
    q: float
    expected: float
    p: float
    i2: float
    correlation: float
    detectable: float
    num_runs: int
    num_points: int
    left_out: tuple[tuple[str, str], ...]


def across_metrics(
    name: str, by_metric: Mapping[str, Sequence[Point]], *, draws: int = DRAWS, seed: int = 0
) -> Forest | str:
    """Compare one dimension's exponent across metrics (label -> points of the arm), or say why it cannot be done.

    Only (run, duration) pairs that every metric has are used. The estimates share those runs, so their covariance comes
    from leaving out each run of all metrics at once (delete-one jackknife of the log exponents). With few runs that
    covariance is rough, hence the p-value by simulation: noise of each metric's own sigma and tau, correlated between
    metrics as their residuals are, fitted and jackknifed as the data were (by the law linearised at its fit where all
    standard errors are small).
    """
    common = fits_in_common(name, by_metric)
    if isinstance(common, str):
        return common
    whole = [one.fit for one in common.fits.values()]
    theta = np.log([fit.fit.law.exponent for fit in whole])
    without = np.log([[law.exponent for law in one.without] for one in common.fits.values()])
    cov, share, q, expected = (value[..., 0] for value in _cochran(theta[:, None], without[:, :, None]))
    drawn = moves_by_chance(common, draws, seed)
    if drawn is None:
        return "without one of the runs the data do not determine the exponent"
    null = _excess(*_cochran(drawn[0][0], drawn[1][0])[2:])
    p = float((1 + np.sum(null >= _excess(q, expected))) / (1 + len(null)))
    mean = float(share @ theta)
    half = float(t_distribution.ppf(0.975, whole[0].num_runs - 1)) * math.sqrt(max(float(share @ cov @ share), 0.0))
    scale = np.sqrt(np.diag(cov))
    off_mean = np.eye(len(theta)) - share
    limit = float(np.quantile(null, 0.95, method="higher")) * float(expected)
    spread = np.sqrt(np.maximum(np.diag(off_mean @ cov @ off_mean.T), 0.0))
    least = scale * np.sqrt(limit / np.maximum(1 - share, 1e-9)) + 0.84 * spread
    rows = tuple(
        {"label": label, "estimate": one.s.estimate, "lo": one.s.lo, "hi": one.s.hi, "weight": float(weight)}
        for (label, one), weight in zip(common.fits.items(), share, strict=True)
    )
    return Forest(
        rows=rows,
        pooled=Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), "joint jackknife over runs"),
        q=float(q),
        expected=float(expected),
        p=p,
        i2=max(0.0, 1 - float(expected) / float(q)) if q > 0 else 0.0,
        correlation=float((cov / np.outer(scale, scale))[np.triu_indices(len(theta), 1)].mean()),
        detectable=math.exp(min(float(least.max()), 99.0)),
        num_runs=whole[0].num_runs,
        num_points=len(common.x),
        left_out=common.left_out,
    )


@dataclass(frozen=True)
class MetricFit:
    """One metric's fit, its exponent, and the laws without each run in turn."""

    fit: RunFit
    s: Interval
    without: tuple[Law, ...]


@dataclass(frozen=True)
class Common:
    """Fits of several metrics to the same evaluations, at sizes x (n,) and compute t (n,); ``left_out``: (label, why)."""

    x: Array
    t: Array
    fits: dict[str, MetricFit]
    left_out: tuple[tuple[str, str], ...]


def fits_in_common(name: str, by_metric: Mapping[str, Sequence[Point]]) -> Common | str:
    """Fit one dimension by every metric (label -> points of the arm) to the (run, duration) pairs that all of them have.

    Metrics that do not determine the exponent are left out; fewer than two are the reason why there is nothing.
    """
    chosen = {label: list(points) for label, points in by_metric.items()}
    left_out: list[tuple[str, str]] = []
    while len(chosen) > 1:
        keys = set.intersection(*({(p.run_id, p.duration) for p in points} for points in chosen.values()))
        same = {
            label: sorted((p for p in points if (p.run_id, p.duration) in keys), key=lambda p: (p.run_id, p.t_gflops))
            for label, points in chosen.items()
        }
        found = {label: _one_metric(name, points) for label, points in same.items()}
        failed = {label: why for label, why in found.items() if isinstance(why, str)}
        if not failed:
            x, t, *_ = check.vectors(name, next(iter(same.values())))
            fits = {label: fit for label, fit in found.items() if not isinstance(fit, str)}
            return Common(x, t, fits, tuple(left_out))
        left_out += failed.items()
        chosen = {label: points for label, points in chosen.items() if label not in failed}
    why = "; ".join(f"{label}: {reason}" for label, reason in left_out)
    return f"fewer than two metrics determine the exponent{f' ({why})' if why else ''}"


def _one_metric(name: str, points: Sequence[Point]) -> MetricFit | str:
    """The fit with an interval and a jackknife, or why this metric has none."""
    if why := check.too_few(name, points):
        return why
    x, t, error, run = check.vectors(name, points)
    whole = fit_with_runs(x, t, error, run)
    if check.optimal_exponent(whole.fit) is None:
        return f"the best law has no optimum ({', '.join(whole.fit.flags)})"
    if whole.log_se > _ROUGH:
        open_end = whole.log_se > math.log(10)
        return (
            "the data leave the exponent open" if open_end else f"one standard error is x{math.exp(whole.log_se):.2g}"
        )
    interval = exponent_interval(x, t, error, whole)
    if isinstance(interval, str):
        return interval
    if interval.is_open:
        return "the data leave the exponent open on both sides"
    found = jackknife_runs(x, t, error, run, whole)
    if found is None:
        return "a fit without one of the runs has too few points or sizes"
    return MetricFit(whole, interval, found.laws)


def _cochran(theta: Array, without: Array) -> tuple[Array, Array, Array, Array]:
    """Jackknife covariance (K, K, B), weights (K, B), Q (B,) and its mean if all are equal (B,), of log exponents
    (K, B) and the same without each run (K, G, B)."""
    num_runs = without.shape[1]
    deviations = without - without.mean(1, keepdims=True)
    cov = (num_runs - 1) / num_runs * np.einsum("kgb,lgb->klb", deviations, deviations)
    variances = np.einsum("kkb->kb", cov)
    precisions = 1 / variances
    share = precisions / precisions.sum(0)
    q = np.sum(precisions * (theta - np.sum(share * theta, 0)) ** 2, 0)
    expected = len(theta) - np.einsum("kb,klb,lb->b", share, cov, precisions)
    return cov, share, q, expected


def moves_by_chance(
    common: Common, draws: int, seed: int, of: Sequence[Function] = (EXPONENT,)
) -> tuple[Array, Array] | None:
    """How far functions of the law move by noise alone: (F, K, B) for F functions and K metrics, and (F, K, G, B) without
    each run, in draws of each metric's own sigma and tau, correlated between metrics as their residuals are.

    None if fits without one of the runs mostly do not determine them.
    """
    x, t, whole = common.x, common.t, [one.fit for one in common.fits.values()]
    rng = np.random.default_rng(seed)
    refits = max(fit.log_se for fit in whole) > _LINEAR
    draws = min(draws, REFIT_DRAWS) if refits else draws
    run, num_runs = whole[0].noise.run, whole[0].num_runs
    residuals = np.array([fit.fit.residuals for fit in whole])
    offsets = np.array([residuals[:, run == one].mean(1) for one in range(num_runs)]).T
    together, alone = np.corrcoef(offsets), np.corrcoef(residuals - offsets[:, run])
    shared = rng.multivariate_normal(np.zeros(len(whole)), together, (draws, num_runs), method="eigh")
    single = rng.multivariate_normal(np.zeros(len(whole)), alone, (draws, len(run)), method="eigh")
    every, without = np.empty((len(of), len(whole), draws)), np.empty((len(of), len(whole), num_runs, draws))
    moved = _refitted if refits else _linearised
    for k, fit in enumerate(whole):
        noise = fit.tau * shared[:, run, k] + fit.sigma * fit.noise.scale * single[:, :, k]
        every[:, k] = moved(x, t, fit, noise, np.ones(len(run), bool), of)
        for one in range(num_runs):
            without[:, k, one] = moved(x, t, fit, noise, run != one, of)
    good = np.isfinite(every).all((0, 1)) & np.isfinite(without).all((0, 1, 2))
    return None if good.sum() < draws / 2 else (every[..., good], without[..., good])


def _linearised(
    x: Array, t: Array, fit: RunFit, noise: Array, keep: NDArray[np.bool_], of: Sequence[Function]
) -> Array:
    """Change (F, B) of functions by noise (B, n) in the points kept, to first order; nan if they do not determine them."""
    gradients = np.array([one.gradient(fit.fit.law) for one in of])
    rows = response(fit.fit.jacobian[keep], subset_noise(fit.noise, keep), gradients)
    return np.full((len(of), len(noise)), np.nan) if rows is None else rows @ noise[:, keep].T


def _refitted(x: Array, t: Array, fit: RunFit, noise: Array, keep: NDArray[np.bool_], of: Sequence[Function]) -> Array:
    """Change (F, B) of functions by noise (B, n) in the points kept; nan for a law without an optimum."""
    log_x, log_t = np.log(x) - np.log(x).mean(), np.log(t) - np.log(t).mean()
    data = (np.log(fit.fit.law.error(x, t)) + noise)[:, keep].copy()
    found = refit(law_logs(log_x, log_t)[:, :, keep], data, subset_noise(fit.noise, keep), fit.fit.exponents)
    return np.array([one.of_fits(*found[1:]) - one.of_law(fit.fit.law) for one in of])


def _excess(q: Array, expected: Array) -> Array:
    """Q over its mean if all are equal; 0 where metrics agree so well that both are rounding."""
    return q / (expected + 1e-6)


def forest_figure(forests: Mapping[str, Forest]) -> Figure:
    """A forest plot, a panel for each dimension: every metric's exponent with its interval, and the pooled one."""
    from matplotlib.figure import Figure

    heights = [len(forest.rows) + 2 for forest in forests.values()]
    figure = Figure(figsize=(6.4, 0.7 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(forests), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, forest) in zip(axes, forests.items(), strict=True):
        ends = [end for row in forest.rows for end in (row["lo"], row["hi"], row["estimate"]) if 0 < end < math.inf]
        low, high = min(ends) / 1.15, max(ends) * 1.15
        for place, row in enumerate(forest.rows):
            lo, hi = max(row["lo"], low), min(row["hi"], high)
            axis.plot([lo, hi], [place, place], color="0.35", linewidth=1.2)
            axis.plot(row["estimate"], place, "s", color="C0", markersize=3 + 6 * math.sqrt(row["weight"]))
        pooled, place = forest.pooled, len(forest.rows)
        corners = ([pooled.lo, pooled.estimate, pooled.hi, pooled.estimate], [place, place - 0.25, place, place + 0.25])
        axis.fill(*corners, color="C1")
        axis.axvline(pooled.estimate, color="C1", linewidth=0.6, linestyle=":")
        axis.set_yticks(range(place + 1), [*(row["label"] for row in forest.rows), "pooled"])
        axis.set_ylim(place + 0.7, -0.7)
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2, 5) if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{name}: {_equal(forest)}", loc="left", fontsize=9)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[-1].set_xlabel("exponent s, with 95% interval")
    return figure


def _equal(forest: Forest) -> str:
    verdict = "the metrics disagree" if forest.p <= 0.05 else "no sign that the metrics disagree"
    return f"{verdict} (p = {forest.p:.2g}, I\u00b2 = {forest.i2:.0%})"
