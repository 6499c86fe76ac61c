"""What runs can tell before they are run: the Fisher information of the law (Eq. 2 of SoViT, arXiv 2305.13035).

Log errors are log f(x, t) + an offset of each run (spread tau) + noise of each evaluation (spread sigma). The inverse of
the information of such points is the smallest covariance any unbiased fit can have (Cramer-Rao), and least squares
reaches it where the standard error of log s is small. The standard errors of log s and of log x*(T), the optimum at a
target compute T, follow by the delta method; the arms of a star share no run, so their information adds up arm by arm.

xi and eps count as free even where an assumed law has them at 0. It says nothing about errors that the model does not
know: a learning rate uneven along an arm, or a law that does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as t_distribution

from sovit.analysis.fit import NUM_PARAMETERS, Noise
from sovit.analysis.intervals import MIN_RUNS, MIN_SIZES, index_runs
from sovit.analysis.law import Law
from sovit.analysis.points import Point, dimensions
from sovit.analysis.star import HEADLINE

Array = NDArray[np.float64]

WIDE = math.log(2)  # half-width of an expected 95% interval of log s beyond which a plan is said to tell too little
SHORT, GOOD = 4.0, 16.0  # largest over smallest size: too short below the one, the other is what is advised
# Exponents (a, b) that give the published s = 0.22, 0.45, 0.60 (arXiv 2305.13035) at c = 0.35. The rest is assumed: at
# the middle of an arm and of the durations the cost of size is 0.07, xi is 0.03 and eps 0.15, an error near 0.3.
ASSUMED = {"width": (1.10, 0.49), "depth": (0.45, 0.328), "mlp_dim": (0.30, 0.283)}
_LIKE = {"token_dim": "mlp_dim"}  # of a Mixer's token MLP nothing is published
_BETA, _XI, _C, _EPS = 0.07, 0.03, 0.35, 0.15


@dataclass(frozen=True)
class Spread:
    """Relative spreads: ``sigma`` of one evaluation, ``tau`` of a run's offset, ``slope`` of a run's drift in log t.

    ``basis`` says where they come from. Raises ValueError unless sigma is positive and the others at least 0.
    """

    sigma: float
    tau: float
    slope: float = 0.0
    basis: str = "given"

    def __post_init__(self) -> None:
        if not (0 < self.sigma < 1 and 0 <= self.tau < 1 and 0 <= self.slope < 1):
            raise ValueError(
                f"noise sigma={self.sigma:g}, tau={self.tau:g}, slope={self.slope:g} is not possible; they are shares "
                "of the error such as 0.005, sigma above 0."
            )


@dataclass(frozen=True)
class Arm:
    """Planned or measured points (n,) of one arm, and the law and noise assumed for them.

    ``x``: sizes; ``t``: compute in GFLOPs; ``run``: whole numbers naming each point's run.
    """

    name: str
    law: Law
    spread: Spread
    x: Array
    t: Array
    run: NDArray[np.intp]

    @property
    def num_runs(self) -> int:
        return len(set(self.run.tolist()))

    @property
    def sizes(self) -> list[float]:
        return sorted(set(self.x.tolist()))


def arm(name: str, law: Law, spread: Spread, x: ArrayLike, t: ArrayLike, run: ArrayLike) -> Arm:
    """An `Arm` of the points (n,) that a fit would use: those whose assumed error is at most the headline's cut-off.

    Raises ValueError if there are none.
    """
    x, t, run = np.asarray(x, float), np.asarray(t, float), np.asarray(run)
    keep = law.error(x, t) <= HEADLINE
    if not keep.any():
        raise ValueError(
            f"{name}: the assumed law puts every error above the cut-off {HEADLINE:g}; train longer, or assume another."
        )
    return Arm(name, law, spread, x[keep], t[keep], index_runs(run[keep]))


def assumed_law(name: str, x: float, t: float) -> Law:
    """The law assumed without data: the exponents of ``ASSUMED``, its optimum at size ``x`` for compute ``t`` (GFLOPs)."""
    a, b = ASSUMED[_LIKE.get(name, name)]
    return Law(_BETA * b / a * x**a, a, _BETA * x**-b * t**_C, b, _XI * t**_C, _C, _EPS)


def log_jacobian(law: Law, x: Array, t: Array, unit_x: float, unit_t: float) -> Array:
    """(n, 7) derivative of log f by (alpha, a, beta, b, xi, c, eps), for x and t counted in the given units."""
    log_x, log_t = np.log(x / unit_x), np.log(t / unit_t)
    size, decay = np.exp(-law.a * log_x), np.exp(-law.c * log_t)
    cost = np.exp(law.b * log_x) * decay
    alpha, beta, xi = _coefficients(law, unit_x, unit_t)
    columns = (
        size,
        -alpha * log_x * size,
        cost,
        beta * log_x * cost,
        decay,
        -log_t * (beta * cost + xi * decay),
        np.ones_like(size),
    )
    return np.column_stack(columns) / law.error(x, t)[:, None]


def _coefficients(law: Law, unit_x: float, unit_t: float) -> tuple[float, float, float]:
    """alpha, beta, xi for x and t counted in the given units."""
    return law.alpha * unit_x**-law.a, law.beta * unit_x**law.b * unit_t**-law.c, law.xi * unit_t**-law.c


def information(
    law: Law, spread: Spread, x: Array, t: Array, run: NDArray[np.intp], units: tuple[float, float]
) -> Array:
    """(7, 7) Fisher information of points (n,) by the parameters of `log_jacobian`; it adds up over sets of runs.

    A slope per run does not enter: see `expect`.
    """
    noise = Noise(run, spread.tau / spread.sigma, np.ones(len(x)))
    whitened = noise.whiten(log_jacobian(law, x, t, *units)) / spread.sigma
    return whitened.T @ whitened


def exponent_gradient(law: Law) -> Array:
    """(7,) derivative of log s = log c - log (a + b) by the parameters."""
    gradient = np.zeros(NUM_PARAMETERS)
    gradient[[1, 3]] = -1 / (law.a + law.b)
    gradient[5] = 1 / law.c
    return gradient


def optimum_gradient(law: Law, target: float, units: tuple[float, float]) -> Array:
    """(7,) derivative of log x*(T) (Eq. 4) by the parameters in the given units; ``target`` T in GFLOPs.

    Raises ValueError for a law without an optimum.
    """
    alpha, beta, _ = _coefficients(law, *units)
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"a law with {'alpha' if alpha <= 0 else 'beta'} = 0 has no optimum; assume another law.")
    log_best = math.log(float(law.optimum(target)) / units[0])
    total = law.a + law.b
    gradient = np.zeros(NUM_PARAMETERS)
    gradient[0], gradient[2] = 1 / (alpha * total), -1 / (beta * total)
    gradient[1], gradient[3] = (1 / law.a - log_best) / total, (-1 / law.b - log_best) / total
    gradient[5] = math.log(target / units[1]) / total
    return gradient


def variance(matrix: Array, gradient: Array, drift: Array | None = None) -> float:
    """Variance of a function of the parameters with this gradient (7,), inf if the information does not determine it.

    ``drift`` (7, runs): what a unit of each run's drift adds to the score, for noise that the weights do not know.
    """
    scale = np.sqrt(matrix.diagonal())
    if np.any(scale == 0):
        return math.inf
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    if values[0] <= 1e-13 * values[-1]:
        return math.inf
    direction = vectors @ ((vectors.T @ (gradient / scale)) / values) / scale
    return float(gradient @ direction) + (0.0 if drift is None else float(np.sum((drift.T @ direction) ** 2)))


@dataclass(frozen=True)
class Expected:
    """What an arm will tell. ``s`` of the assumed law, ``log_se`` the standard error of log s to expect.

    ``lo``, ``hi``: the expected 95% interval of s with t(G - 3), 0 and inf with too few runs. ``log_se_best``: standard
    error of log x*(T), and ``wasted``: the share of the target's compute lost, on average, to that error (both nan
    without a target).
    """

    s: float
    log_se: float
    lo: float
    hi: float
    num_runs: int
    best: float
    log_se_best: float
    wasted: float


def expect(points: Arm, target: float | None = None) -> Expected:
    """What the points of an arm will tell about s, and about the optimum at ``target`` GFLOPs."""
    law, spread = points.law, points.spread
    units = _units(points)
    noise = Noise(points.run, spread.tau / spread.sigma, np.ones(len(points.x)))
    whitened = noise.whiten(log_jacobian(law, points.x, points.t, *units)) / spread.sigma
    matrix, drift = whitened.T @ whitened, None
    if spread.slope:
        loading = np.zeros((len(points.x), points.num_runs))
        log_t = np.log(points.t)
        means = np.bincount(points.run, log_t) / np.bincount(points.run)
        loading[np.arange(len(points.x)), points.run] = spread.slope * (log_t - means[points.run])
        drift = whitened.T @ noise.whiten(loading) / spread.sigma
    log_se = math.sqrt(variance(matrix, exponent_gradient(law), drift))
    half = half_width(log_se, points)
    best = log_se_best = wasted = math.nan
    if target is not None:
        best = float(law.optimum(target))
        log_se_best = math.sqrt(variance(matrix, optimum_gradient(law, target, units), drift))
        wasted = compute_wasted(law, target, log_se_best)
    s = law.exponent
    high = s * math.exp(half) if half < 700 else math.inf
    return Expected(s, log_se, s * math.exp(-half), high, points.num_runs, best, log_se_best, wasted)


def _units(points: Arm) -> tuple[float, float]:
    return math.exp(np.log(points.x).mean()), math.exp(np.log(points.t).mean())


def half_width(log_se: float, points: Arm) -> float:
    """Half-width of the expected 95% interval of log s; inf with fewer runs or sizes than an interval needs."""
    if points.num_runs < MIN_RUNS or len(points.sizes) < MIN_SIZES:
        return math.inf
    return float(t_distribution.ppf(0.975, points.num_runs - 3)) * log_se


def compute_wasted(law: Law, target: float, log_se: float) -> float:
    """Expected share of compute lost at T when log x is off the optimum by a normal error of spread ``log_se``.

    A size x at T has the error that the optimum reaches at a smaller t': 1 - t'/T is lost. In [0, 1]; 1 for log_se inf.
    """
    if not math.isfinite(log_se):
        return 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(31)
    sizes = float(law.optimum(target)) * np.exp(np.clip(log_se * nodes, -300, 300))
    with np.errstate(over="ignore"):
        errors = law.error(sizes, target)
    t = target * np.geomspace(1e-9, 1, 1000)
    reached = np.interp(-errors, -law.frontier(t), t / target)
    return float(weights @ (1 - reached) / weights.sum())


def together(rows: Iterable[Expected]) -> tuple[float, float]:
    """Root mean square of the arms' standard errors of log x*(T), and the share of compute lost to all of them.

    The losses act one after the other: 1 - product of (1 - share).
    """
    rows = list(rows)
    error = math.sqrt(sum(row.log_se_best**2 for row in rows) / len(rows))
    return error, 1 - math.prod(1 - row.wasted for row in rows)


def summary(arms: Mapping[str, Arm], target: float) -> tuple[float, float]:
    """`together` of what the arms tell about the shape at ``target`` GFLOPs."""
    return together(expect(points, target) for points in arms.values())


def weaknesses(points: Arm, expected: Expected, nominal: Sequence[float]) -> list[str]:
    """Sentences that say why these points cannot determine the exponent; none if they can.

    ``nominal``: sizes of the arm as planned, before points above the cut-off are set aside.
    """
    texts = []
    sizes = points.sizes
    if points.num_runs < MIN_RUNS:
        texts.append(f"{points.num_runs} runs are too few for an interval; give the arm at least {MIN_RUNS}")
    if len(sizes) < MIN_SIZES:
        texts.append(f"{len(sizes)} distinct sizes are too few for an interval; give the arm at least {MIN_SIZES}")
    if len(sizes) < len(set(nominal)):
        texts.append(
            f"{len(set(nominal)) - len(sizes)} of {len(set(nominal))} sizes reach no error below the cut-off {HEADLINE:g}"
        )
    half = half_width(expected.log_se, points)
    if math.isfinite(half) and half > WIDE:
        texts.append(
            f"the expected 95% interval is a factor of {math.exp(half):.3g} either way; that is hardly an exponent"
        )
    span = sizes[-1] / sizes[0]
    if 1 < span < SHORT:
        wide = _stretched(points, GOOD)
        texts.append(
            f"the sizes span only x{span:.2g}; over x{GOOD:g} around the same middle the same runs would have a standard "
            f"error of {expected.s * expect(wide).log_se:.2g} instead of {expected.s * expected.log_se:.2g}"
        )
    t = np.unique(points.t)
    inside = [sizes[0] < best < sizes[-1] for best in points.law.optimum(t)]
    if 2 * sum(inside) < len(inside):
        low, high = points.law.optimum(t[0]), points.law.optimum(t[-1])
        side = "larger" if math.sqrt(low * high) > math.sqrt(sizes[0] * sizes[-1]) else "smaller"
        texts.append(
            f"the assumed optimum, {low:.3g} to {high:.3g}, lies outside the sizes {sizes[0]:g} to {sizes[-1]:g} at most "
            f"durations; add {side} ones"
        )
    if t[-1] < 10 * t[0]:
        texts.append(
            f"the durations span only x{t[-1] / t[0]:.2g} of compute; under a decade hardly tests the law's form in t"
        )
    return texts


def _stretched(points: Arm, span: float) -> Arm:
    """The same runs with their sizes spread over another range around the same middle."""
    low, high = math.log(points.sizes[0]), math.log(points.sizes[-1])
    x = np.exp((low + high) / 2 + (np.log(points.x) - (low + high) / 2) * math.log(span) / (high - low))
    return Arm(points.name, points.law, points.spread, x, points.t, points.run)


def seed_spread(points: Sequence[Point]) -> Spread | None:
    """sigma and tau from runs that differ in nothing but the seed, or None if no shape has two.

    One-way variance components of log errors, pooled over shapes: between the runs of a shape and within them, each
    duration's mean taken out. Durations that a seed lacks are left out for that shape.
    """
    groups: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}
    for point in points:
        if point.error > 0:
            runs = groups.setdefault(dimensions(point), {})
            runs.setdefault(point.run_id, {})[point.duration] = math.log(point.error)
    within = between = 0.0
    free_within = free_between = num_shapes = num_runs = 0
    weighted = 0
    for runs in groups.values():
        shared = sorted(set.intersection(*(set(values) for values in runs.values())))
        if len(runs) < 2 or not shared:
            continue
        table = np.array([[values[name] for name in shared] for values in runs.values()])
        table = table - table.mean(0)
        offsets = table.mean(1)
        count, width = table.shape
        within += float(np.sum((table - offsets[:, None]) ** 2))
        between += width * float(np.sum(offsets**2))
        free_within += (count - 1) * (width - 1)
        free_between += count - 1
        weighted += width * (count - 1)
        num_shapes += 1
        num_runs += count
    if not free_between or not free_within or within == 0:
        return None
    sigma2 = within / free_within
    tau2 = max(0.0, (between - sigma2 * free_between) / weighted)
    basis = (
        f"from repeated seeds: {num_runs} runs of {num_shapes} {'shape' if num_shapes == 1 else 'shapes'}, "
        f"{free_between} degrees of freedom between runs"
    )
    return Spread(math.sqrt(sigma2), math.sqrt(tau2), basis=basis)


def fitted_spreads(fit: Mapping[str, Any]) -> dict[str, Spread]:
    """Arm -> sigma and tau that REML found from how its shapes scatter about the law, of a star's fit.json.

    So few runs cannot show that tau is 0: an arm for which REML says so gets the others' root mean square.
    """
    rows = {name: row for name, row in fit["arms"].items() if (row or {}).get("sigma")}
    known = [row["tau"] for row in rows.values() if row["tau"] > 0]
    usual = math.sqrt(sum(tau**2 for tau in known) / len(known)) if known else 0.0
    basis = "from how each arm's shapes scatter about its fitted law (REML), for there are no repeated seeds"
    return {name: Spread(row["sigma"], row["tau"] or usual, basis=basis) for name, row in rows.items()}


def fitted_laws(fit: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, Law]:
    """Arm -> law, of a star's fit.json; of all dimensions unless ``names`` says which.

    Raises ValueError if an arm has none, or one without an optimum.
    """
    laws = {}
    for name in fit["center"] if names is None else names:
        row = fit["arms"].get(name)
        if not row or not row["law"]:
            raise ValueError(f"the fit has no law for the {name} arm; give another fit, or none.")
        law = laws[name] = Law(**row["law"])
        if not (law.alpha > 0 and law.beta > 0):
            which = "alpha" if law.alpha <= 0 else "beta"
            raise ValueError(
                f"{name}: the fitted law has {which} = 0 and no optimum; give another fit, or widen the arm first."
            )
    return laws
