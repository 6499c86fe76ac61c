"""Few-shot errors that others published, as a worked example of the law's t axis.

``CURVES`` holds 10-shot ImageNet accuracies of single models at several durations (Scaling Vision
Transformers, arXiv 2106.04560). Each is fitted with the law at fixed shape, f(t) = A t^-c + B (Eq. 2 of SoViT, arXiv
2305.13035, with A = beta x^b + xi and B = alpha x^-a + eps), and the frontier of all with the law of that paper,
E = a (C + d)^-b + c. There is one run a model, so noise between runs cannot be told from a difference between models:
an offset of the run's own is absorbed by A and B and leaves c alone, the scatter about the curve gives each model's
interval, and the models are the units of the interval of their mean. The points of a curve share a trunk, the test
images and the support set; if that makes neighbours alike, the intervals of single models are too narrow.

The models differ in more than width, depth and MLP dimension (patch size above all), so nothing here is an arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import linregress
from scipy.stats import t as t_distribution

from sovit.analysis.intervals import Interval
from sovit.analysis.report.drawing import ACCENT, GREY, LINE, color, ramp, style
from sovit.analysis.varpro import BOX, Array, Solution, equal_noise, solve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 4096  # images a step of the table
MIN_POINTS = 5  # of a curve whose c is compared: three parameters and two to see the scatter
LATE = 60_000  # steps: the cut that leaves out the runs of which half or more was warm-up and cooldown
STAR_GFLOPS = 400.0  # forward, of an image: about the middle of SoViT's star sweep, whose models have 171 to 838
SOVIT_C = Interval(0.65, 0.59, 0.71, "SoViT, 0.65 ± 0.06 for all dimensions; what the ± is stands nowhere")
FRONTIER = {"a": 0.63, "b": 0.32, "c": 0.12, "d": 0.52}  # arXiv 2106.04560, Figure 2; C in TPUv3 core-days
GFLOPS_PER_CORE_DAY = 533.1 * 16e9 / (210e3 / 24)  # ViT-g/14 on 16B images: 210K TPUv3 core-hours (arXiv 2305.13035)
_DRAWS = 20_000


@dataclass(frozen=True)
class Curve:
    """10-shot ImageNet accuracies (percent) of one model after so many steps of 4,096 images."""

    model: str
    forward_gflops: float  # at 224 pixels, as published
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]

    @property
    def t_gflops(self) -> Array:
        return self.forward_gflops * BATCH * np.array(self.steps, float)

    @property
    def error(self) -> Array:
        return 1 - np.array(self.accuracy) / 100

    def since(self, min_steps: int) -> Curve:
        """The curve without durations below ``min_steps``."""
        kept = [(step, value) for step, value in zip(self.steps, self.accuracy, strict=True) if step >= min_steps]
        steps, accuracy = zip(*kept, strict=True) if kept else ((), ())
        return Curve(self.model, self.forward_gflops, steps, accuracy)


def _curve(model: str, gflops: float, *accuracy: float | None, **more: float) -> Curve:
    known = zip((20, 30, 60, 120, 400, 1200, 2000, 4000), accuracy, strict=False)
    points = [(1000 * thousands, value) for thousands, value in known if value is not None]
    points += [(int(key.removeprefix("k")) * 1000, value) for key, value in more.items()]
    return Curve(model, gflops, *zip(*points, strict=True))


# Scaling Vision Transformers, arXiv 2106.04560, appendix: pretraining on JFT-3B (B/28 and s/28, s/16 on 1B images of
# it), GFLOPs as published. Which row is which model was inferred from the order of the rows.
CURVES = (
    _curve("s/28", 0.7, 19.0, 23.3, 28.2, 31.8, 36.3, 38.9),
    _curve("s/16", 2.2, 24.0, 29.9, 36.3, 40.1, 45.2, 47.2),
    _curve("S/32", 2.3, 26.3, 32.0, 39.6, 44.5, 52.8, 56.6, 57.5, 59.1),
    _curve("Ti/16", 2.5, 23.6, 28.5, 35.7, 41.0, 46.7, 50.1, 50.8, 52.1),
    _curve("B/32", 8.7, 35.2, 41.8, 50.1, 56.4, 64.3, 68.7, 69.1, 70.6),
    _curve("S/16", 9.2, 36.5, 43.1, None, 56.3, 62.7, 65.7, 66.5, 67.6),
    _curve("B/28", 11.3, 37.9, 44.6, 53.1, 58.5, 66.6, 69.8),
    _curve("B/16", 35.1, 45.7, 53.1, 61.0, 66.0, 72.4, 74.9, 76.3, 76.8),
    _curve("L/16", 122.9, 49.7, 57.7, 66.9, 71.5, 76.8, 79.7, 80.5, 81.5),
    _curve("g/14", 533.1, None, None, None, 76.4, 81.3, 83.3, 83.9, 84.3, k6300=84.5),
    _curve("G/14", 965.3, k5000=84.9),  # one duration: on the frontier, but no curve
)


@dataclass(frozen=True)
class CurveFit:
    """f(t) = amplitude t^-c + floor, t in GFLOPs (t + ``shift`` in the law of arXiv 2106.04560).

    ``sigma``: relative scatter about the curve on ``num_points`` - 3 degrees of freedom. ``held_out``: predicted over
    measured error, less 1, of the longest duration when it is not fitted. ``log_se``: standard error of log c.
    """

    model: str
    forward_gflops: float
    c: Interval
    amplitude: float
    floor: float
    shift: float
    sigma: float
    log_se: float
    num_points: int
    held_out: float
    residuals: tuple[float, ...]

    def error(self, t: Array | float) -> Array:
        """The fitted error at compute t in GFLOPs."""
        return self.amplitude * (np.asarray(t, float) + self.shift) ** -self.c.estimate + self.floor


def _solve(t: Array, error: Array, c: float | None = None) -> tuple[Solution, float]:
    """Least squares of log errors (c held if given), and the geometric mean that t was divided by."""
    mean = math.exp(float(np.log(t).mean()))
    logs = np.zeros((2, 1, len(t)))
    logs[0, 0] = -np.log(t / mean)
    if c is None:
        return solve(logs, np.log(error), equal_noise(len(t))), mean
    return solve(logs, np.log(error), equal_noise(len(t)), starts=[[c]], low=c, high=c), mean


def _shift(t: Array, error: Array) -> float:
    """The d of E = a (t + d)^-b + c that fits best, to 2%; 0 if none helps."""

    def best(tries: Array) -> float:
        return float(min(tries, key=lambda d: _solve(t + d, error)[0].objective))

    coarse = best(np.concatenate(([0.0], np.geomspace(1e-3, 100, 31) * t.min())))
    return best(coarse * np.geomspace(1 / 1.45, 1.45, 21)) if coarse else 0.0


def fit_curve(curve: Curve, *, level: float = 0.95, shifted: bool = False) -> CurveFit:
    """Fit one model's curve; the interval of c is that of the profile likelihood with F(1, n - 3) of its own scatter.

    ``shifted``: with the further parameter d of arXiv 2106.04560 (its interval then holds d fixed). Raises ValueError
    for fewer than 5 points.
    """
    t, error = curve.t_gflops, curve.error
    free = len(t) - 3 - shifted
    if len(t) < MIN_POINTS:
        raise ValueError(f"{curve.model} has {len(t)} points; a curve of three parameters needs at least {MIN_POINTS}.")
    shift = _shift(t, error) if shifted else 0.0
    found, mean = _solve(t + shift, error)
    c, sigma = float(found.exponents[0]), math.sqrt(found.objective / free)
    allowed = found.objective * (1 + float(f_distribution.ppf(level, 1, free)) / free)
    inverse = np.linalg.pinv(found.jacobian.T @ found.jacobian)
    early = _shift(t[:-1], error[:-1]) if shifted else 0.0
    before, scale = _solve(t[:-1] + early, error[:-1])
    ahead = before.coefficients[0] * ((t[-1] + early) / scale) ** -before.exponents[0] + before.coefficients[1]
    return CurveFit(
        model=curve.model,
        forward_gflops=curve.forward_gflops,
        c=Interval(c, *_profile(lambda c: _solve(t + shift, error, c)[0].objective, c, allowed), "profile, F(1, n-3)"),
        amplitude=float(found.coefficients[0] * mean**c),
        floor=float(found.coefficients[1]),
        shift=shift,
        sigma=sigma,
        log_se=sigma * math.sqrt(inverse[2, 2]) / c,
        num_points=len(t),
        held_out=float(ahead / error[-1] - 1),
        residuals=tuple(np.log(error) - found.log_fit),
    )


def _profile(objective: Callable[[float], float], best: float, allowed: float) -> tuple[float, float]:
    """Where the objective passes ``allowed`` on either side of ``best``; 0 or inf where it does not within the box."""
    from scipy.optimize import brentq

    ends = []
    for far, open_end in ((BOX[0], 0.0), (BOX[1], math.inf)):
        if objective(far) <= allowed:
            ends.append(open_end)
        else:
            ends.append(math.exp(brentq(lambda x: objective(math.exp(x)) - allowed, math.log(best), math.log(far))))
    return ends[0], ends[1]


@dataclass(frozen=True)
class Comparison:
    """Whether one c fits several models.

    ``mean``: of log c over models, t(M - 1): the models are the units. ``spread``: standard deviation of log c over
    models. ``shared``: the c of least squares when all models have one, and ``f_p`` the F test against a c each, which
    takes all models to scatter alike. ``q_p``: the same question by Cochran's Q with each model's own scatter, its
    distribution simulated because a scatter rests on few degrees of freedom. ``trend``: d log c / d log (GFLOPs per
    image), and ``at_star`` the c it gives at the size of SoViT's star, `STAR_GFLOPS`. ``lag1``: correlation of
    neighbouring residuals, with ``lag1_expected``, what fitting alone leaves.
    """

    min_steps: int
    models: tuple[str, ...]
    left_out: tuple[str, ...]
    mean: Interval
    spread: float
    shared: float
    f_p: float
    q_p: float
    trend: Interval
    at_star: Interval
    lag1: float
    lag1_expected: float
    fits: tuple[CurveFit, ...] = field(repr=False)


def compare(curves: Sequence[Curve] = CURVES, *, min_steps: int = 0, level: float = 0.95, seed: int = 0) -> Comparison:
    """Fit every curve of at least 5 points from ``min_steps`` on, and ask whether one c fits all.

    Raises ValueError for fewer than three such curves.
    """
    parts = [curve.since(min_steps) for curve in curves]
    kept = [curve for curve in parts if len(curve.steps) >= MIN_POINTS]
    if len(kept) < 3:
        raise ValueError(
            f"{len(kept)} curves have {MIN_POINTS} points from {min_steps} steps on; at least 3 are needed."
        )
    fits = tuple(fit_curve(curve, level=level) for curve in kept)
    log_c = np.log([fit.c.estimate for fit in fits])
    free = np.array([fit.num_points - 3 for fit in fits])
    half = float(t_distribution.ppf((1 + level) / 2, len(fits) - 1)) * float(log_c.std(ddof=1)) / math.sqrt(len(fits))
    center = math.exp(float(log_c.mean()))

    apart = sum(fit.sigma**2 * (fit.num_points - 3) for fit in fits)
    shared, together = _shared(kept)
    ratio = (together - apart) / (len(fits) - 1) / (apart / free.sum())

    rng = np.random.default_rng(seed)
    variance = np.array([fit.log_se for fit in fits]) ** 2
    draws = rng.normal(size=(_DRAWS, len(fits))) * np.sqrt(variance)
    simulated = _cochran(draws, variance * rng.chisquare(free, draws.shape) / free)

    size = np.log([fit.forward_gflops for fit in fits])
    line = linregress(size, log_c)
    reach = float(t_distribution.ppf((1 + level) / 2, len(fits) - 2))
    slope, slope_half = float(line.slope), reach * float(line.stderr)
    away = math.log(STAR_GFLOPS) - float(size.mean())
    at_half = slope_half * math.sqrt(float(size.var()) + away**2)  # of the line itself, not of one more model
    at_star = math.exp(float(log_c.mean()) + slope * away)
    lag1, expected = _neighbours(kept, fits, rng)
    return Comparison(
        min_steps=min_steps,
        models=tuple(fit.model for fit in fits),
        left_out=tuple(curve.model for curve in parts if len(curve.steps) < MIN_POINTS),
        mean=Interval(center, center * math.exp(-half), center * math.exp(half), "log c over models, t(M-1)"),
        spread=float(log_c.std(ddof=1)),
        shared=shared,
        f_p=float(f_distribution.sf(ratio, len(fits) - 1, free.sum())),
        q_p=float((simulated >= _cochran(log_c, variance)).mean()),
        trend=Interval(slope, slope - slope_half, slope + slope_half, "least squares over models, t(M-2)"),
        at_star=Interval(at_star, at_star * math.exp(-at_half), at_star * math.exp(at_half), "on the trend, t(M-2)"),
        lag1=lag1,
        lag1_expected=expected,
        fits=fits,
    )


def _shared(curves: Sequence[Curve]) -> tuple[float, float]:
    """(c, objective) of least squares with one c and an amplitude and a floor for each curve."""
    num_points = sum(len(curve.steps) for curve in curves)
    logs = np.full((2 * len(curves), 1, num_points), -1e4)  # of a term that belongs to another curve: as good as 0
    start = 0
    for number, curve in enumerate(curves):
        here = slice(start, start := start + len(curve.steps))
        logs[2 * number, 0, here] = -np.log(curve.t_gflops / math.exp(np.log(curve.t_gflops).mean()))
        logs[2 * number + 1, 0, here] = 0.0
    found = solve(logs, np.log(np.concatenate([curve.error for curve in curves])), equal_noise(num_points))
    return float(found.exponents[0]), found.objective


def _cochran(values: Array, variance: Array) -> Array:
    """Cochran's Q of (..., M) values with their variances."""
    weight = 1 / variance
    mean = (weight * values).sum(-1) / weight.sum(-1)
    return (weight * (values - mean[..., None]) ** 2).sum(-1)


def _neighbours(curves: Sequence[Curve], fits: Sequence[CurveFit], rng: np.random.Generator) -> tuple[float, float]:
    """Lag-1 correlation of the residuals over all curves, and its mean over white noise fitted likewise."""
    above, below, expected = 0.0, 0.0, [0.0, 0.0]
    for curve, fit in zip(curves, fits, strict=True):
        residuals = np.array(fit.residuals) / fit.sigma
        basis, _ = np.linalg.qr(_solve(curve.t_gflops, curve.error)[0].jacobian)
        white = rng.normal(size=(len(residuals), 2000))
        white -= basis @ (basis.T @ white)
        above, below = above + float(residuals[1:] @ residuals[:-1]), below + float(residuals @ residuals)
        expected[0] += float((white[1:] * white[:-1]).mean(1).sum())
        expected[1] += float((white**2).mean(1).sum())
    return above / below, expected[0] / expected[1]


def shift_test(curves: Sequence[Curve] = CURVES) -> float:
    """p of the F test, over all curves of more than 5 points, that a shift d of compute (t + d) improves the fits."""
    long = [curve for curve in curves if len(curve.steps) > MIN_POINTS]
    plain, shifted = (
        sum(float(np.sum(np.square(fit_curve(curve, shifted=on).residuals))) for curve in long) for on in (False, True)
    )
    free = sum(len(curve.steps) - 4 for curve in long)
    return float(f_distribution.sf((plain - shifted) / len(long) / (shifted / free), len(long), free))


def frontier(curves: Sequence[Curve] = CURVES) -> list[tuple[float, float, str]]:
    """(t in GFLOPs, error, model), by compute, of every run better than all runs of less compute."""
    runs = [
        (float(t), float(error), curve.model)
        for curve in curves
        for t, error in zip(curve.t_gflops, curve.error, strict=True)
    ]
    best: list[tuple[float, float, str]] = []
    for run in sorted(runs):
        if not best or run[1] < best[-1][1]:
            best.append(run)
    return best


@dataclass(frozen=True)
class FrontierFit:
    """E = a (t + d)^-b + c on the frontier; intervals by leaving out one model at a time, t(M - 1).

    ``sigma``: relative scatter. ``printed``: what the law as printed for TPUv3 core-days gives over what was measured,
    less 1, at every run of the frontier, core-days taken from compute at ViT-g/14's rate (`GFLOPS_PER_CORE_DAY`).
    """

    b: Interval
    floor: Interval
    shift: float
    sigma: float
    runs: tuple[tuple[float, float, str], ...]
    printed: tuple[float, ...]


def fit_frontier(curves: Sequence[Curve] = CURVES, *, level: float = 0.95) -> FrontierFit:
    """Fit the law of arXiv 2106.04560 to the frontier of the curves."""
    runs = frontier(curves)

    def fit(runs: list[tuple[float, float, str]]) -> tuple[float, float, float, float]:
        t, error = (np.array([run[k] for run in runs]) for k in (0, 1))
        shift = _shift(t, error)
        found = _solve(t + shift, error)[0]
        return float(found.exponents[0]), float(found.coefficients[1]), shift, math.sqrt(found.objective / (len(t) - 4))

    b, floor, shift, sigma = fit(runs)
    models = sorted({model for _, _, model in runs})
    without = np.array([fit(frontier([curve for curve in curves if curve.model != model]))[:2] for model in models])
    reach = float(t_distribution.ppf((1 + level) / 2, len(models) - 1)) * math.sqrt(len(models) - 1)
    half = reach * np.sqrt(without.var(0))
    core_days = np.array([run[0] for run in runs]) / GFLOPS_PER_CORE_DAY
    law = FRONTIER["a"] * (core_days + FRONTIER["d"]) ** -FRONTIER["b"] + FRONTIER["c"]
    return FrontierFit(
        b=Interval(b, b - float(half[0]), b + float(half[0]), "jackknife over models, t(M-1)"),
        floor=Interval(floor, floor - float(half[1]), floor + float(half[1]), "jackknife over models, t(M-1)"),
        shift=shift,
        sigma=sigma,
        runs=tuple(runs),
        printed=tuple(float(value) for value in law / np.array([run[1] for run in runs]) - 1),
    )


@dataclass(frozen=True)
class Best:
    """The models in order of error at one compute, interpolated in log error over log t and never beyond a curve."""

    t_gflops: float
    models: tuple[str, ...]
    errors: tuple[float, ...]


def best_models(t_gflops: Sequence[float], curves: Sequence[Curve] = CURVES) -> tuple[Best, ...]:
    """Which model has the least error at each compute, among those that were trained for less and for more."""
    rows = []
    for t in t_gflops:
        found = sorted(
            (math.exp(float(np.interp(math.log(t), np.log(curve.t_gflops), np.log(curve.error)))), curve.model)
            for curve in curves
            if curve.t_gflops[0] <= t <= curve.t_gflops[-1]
        )
        if found:
            rows.append(Best(float(t), tuple(model for _, model in found), tuple(error for error, _ in found)))
    return tuple(rows)


def draw_curves(found: Comparison, front: FrontierFit) -> Figure:
    """Error against compute with the fitted curves and the frontier, and beside it the c of each model."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        shades = ramp(found.models, "size")
        curves = {curve.model: curve.since(found.min_steps) for curve in CURVES}
        for fit in found.fits:
            shade = color(shades[fit.model])
            t, error = curves[fit.model].t_gflops, curves[fit.model].error
            fine = np.geomspace(t[0], t[-1], 60)
            left.plot(fine, fit.error(fine), color=shade, lw=1.2)
            left.plot(t, error, "o", color=shade, ms=4)
            left.annotate(fit.model, (t[-1], error[-1]), xytext=(3, 5), textcoords="offset points", color=shade)
            ends = [[fit.c.estimate - fit.c.lo], [fit.c.hi - fit.c.estimate]]
            right.errorbar([fit.model], [fit.c.estimate], ends, fmt="o", color=shade, ms=5)
        t_front, error_front, _ = zip(*front.runs, strict=True)
        left.plot(t_front, error_front, color=GREY, lw=1, ls=":", label="frontier of all runs")
        left.annotate(front.runs[-1][2], front.runs[-1][:2], xytext=(3, -9), textcoords="offset points", color=GREY)
        left.set(xscale="log", yscale="log", xlabel="t: forward GFLOPs per image × images", ylabel="10-shot error")
        left.xaxis.set_major_formatter(lambda t, _: f"1e{math.log10(t):.0f}")
        left.set_title("Error against compute, one run a model")
        left.set_yticks(
            [0.15, 0.2, 0.3, 0.4, 0.6, 0.8], labels=["0.15", "0.2", "0.3", "0.4", "0.6", "0.8"], minor=False
        )
        left.set_yticks([], minor=True)
        left.legend(loc="lower left")
        right.axhspan(SOVIT_C.lo, SOVIT_C.hi, color=LINE, lw=0, zorder=0, label="SoViT: 0.65 ± 0.06")
        right.axhline(found.mean.estimate, color=ACCENT, lw=1, label=f"mean of the models {found.mean.estimate:.2f}")
        right.set(xlabel="model, by forward GFLOPs per image", ylabel="c, with 95% interval")
        right.set_title("The exponent of compute at fixed model")
        right.legend(loc="upper left")
        return figure
