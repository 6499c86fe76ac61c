"""The law that knows its FLOPs: all three dimensions and every sweep in one fit, and the best shape for a budget.

    f(x, n) = sum_k alpha_k x_k^-a_k + beta n^-c + eps,      n = t / F(x)

x = (width, depth, MLP dimension); t is forward FLOPs per image times images seen, in GFLOPs. The paper's law (SoViT,
arXiv 2305.13035, Eq. 2) learns what a size costs from the data, one dimension at a time. Here the cost is known: F(x),
forward GFLOPs an image (`sovit.flops`), so n is the number of images seen, and nine parameters describe all shapes. An
interaction adds the product of two terms with a coefficient of its own and the exponents that are already there.

In log x every term is the exponential of a convex function, because F has only positive terms (a geometric program;
Boyd, Kim, Vandenberghe and Hassibi 2007). So at a given t the error has one minimum over shapes, found by Newton's
method. What this module does not do: rounding to whole shapes, and the paper's 1/D rule (`sovit.analysis.predict`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as t_distribution

from sovit import records
from sovit.analysis import diagnostics as check
from sovit.analysis.diagonal import hold_out
from sovit.analysis.intervals import RATIOS, Interval, index_runs
from sovit.analysis.points import DIMENSIONS, Exclusion, Point, _recipe, dimensions, plain
from sovit.analysis.star import CUTOFFS, HEADLINE
from sovit.analysis.varpro import BOX, Noise, Solution, solve
from sovit.flops import forward_flops
from sovit.shape import Shape

SCHEMA = 1
IMAGES = "images"
AXES = (*DIMENSIONS, IMAGES)
BUDGETS = (1.0, 10.0, 100.0, 1000.0)  # times the largest measured compute
_FAR_WORSE = 12.0  # of -2 log likelihood: larger ratios only fall further behind
_WIDEST = math.log(10)  # a Wald half-width of log x beyond this factor says nothing
_NEWTON = 200
Array = NDArray[np.float64]

# F is a polynomial in (width, depth, mlp_dim): exponents of its monomials, and six shapes that determine them.
_MONOMIALS = np.array([[1, 0, 0], [2, 0, 0], [1, 0, 1], [1, 1, 0], [2, 1, 0], [1, 1, 1]])
_PROBES = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 1), (1, 2, 2))


@dataclass(frozen=True)
class Geometry:
    """What the cost of a shape depends on besides its three dimensions; ``num_heads`` only names shapes, it is free."""

    image_size: int
    patch_size: int
    num_heads: int
    channels: int = 3
    pool: str = "map"
    num_classes: int = 0

    @cached_property
    def cost(self) -> Array:
        """Forward FLOPs an image for each of the six monomials, read off the closed form at six shapes."""
        flops = [
            sum(
                forward_flops(
                    Shape(*x, num_heads=1, patch_size=self.patch_size), self.image_size,
                    channels=self.channels, pool=self.pool, num_classes=self.num_classes,
                ).values()
            )
            for x in _PROBES
        ]  # fmt: skip
        table = np.prod(np.array(_PROBES, float)[:, None, :] ** _MONOMIALS, axis=2)
        return np.rint(np.linalg.solve(table, flops))

    def forward_gflops(self, x: ArrayLike) -> Array:
        """F(x) for (..., 3) sizes, which need not be whole."""
        return np.asarray(np.exp(np.log(np.asarray(x, float)) @ _MONOMIALS.T) @ self.cost / 1e9)

    def log_cost(self, log_x: Array) -> tuple[float, Array, Array]:
        """log F at (3,) log sizes, with its gradient and Hessian: mean and covariance of the monomials' exponents."""
        terms = self.cost * np.exp(_MONOMIALS @ log_x)
        share = terms / terms.sum()
        slope = share @ _MONOMIALS
        return math.log(terms.sum() / 1e9), slope, (_MONOMIALS.T * share) @ _MONOMIALS - np.outer(slope, slope)


@dataclass(frozen=True)
class Form:
    """Which terms the law has beside eps: three sizes and images, and the products of those of each interaction.

    ``interactions``: groups of two or more of `AXES`. ``burden`` lets larger shapes need more images: beta n^-c is
    multiplied by x_k^q_k, three exponents more. Raises ValueError for an unknown or repeated interaction.
    """

    interactions: tuple[tuple[str, ...], ...] = ()
    burden: bool = False

    def __post_init__(self) -> None:
        for number, group in enumerate(self.interactions):
            if len(set(group)) < 2 or not set(group) <= set(AXES):
                raise ValueError(f"interaction {tuple(group)} is not known; give two or more of {', '.join(AXES)}.")
            if any(set(group) == set(other) for other in self.interactions[:number]):
                raise ValueError(f"the interaction {tuple(group)} is given twice; give it once.")

    @property
    def coefficients(self) -> tuple[str, ...]:
        products = ("_".join(("gamma", *sorted(group, key=AXES.index))) for group in self.interactions)
        return (*(f"alpha_{name}" for name in DIMENSIONS), "beta", *products, "eps")

    @property
    def exponents(self) -> tuple[str, ...]:
        return (*(f"a_{name}" for name in DIMENSIONS), "c", *(f"q_{name}" for name in DIMENSIONS if self.burden))

    @property
    def num_parameters(self) -> int:
        return len(self.coefficients) + len(self.exponents)

    @property
    def loads(self) -> Array:
        """(J, K, 4): term j is p_j exp(-sum_k theta_k loads_jk . u), u = log (width, depth, mlp_dim, n)."""
        loads = np.zeros((len(self.coefficients), len(self.exponents), 4))
        groups: list[Sequence[str]] = [*((axis,) for axis in AXES), *self.interactions]
        for row, group in zip(loads, groups, strict=False):
            for axis in group:
                row[AXES.index(axis), AXES.index(axis)] = 1.0
            if self.burden and IMAGES in group:
                row[4:, :3] = -np.eye(3)
        return loads


@dataclass(frozen=True)
class FlopsLaw:
    """A law of a form at values of its parameters, for u = log (width, depth, mlp_dim, n) counted from ``center`` (4,).

    ``coefficients`` (J,): each term's error at the center; ``exponents`` (K,).
    """

    form: Form
    coefficients: Array
    exponents: Array
    center: Array
    geometry: Geometry

    @cached_property
    def _powers(self) -> Array:
        """(J, 4): minus the power of width, depth, mlp_dim and n in each term."""
        return np.einsum("jkl,k->jl", self.form.loads, self.exponents)

    def error(self, x: ArrayLike, t: ArrayLike) -> Array:
        """f for (..., 3) sizes at t GFLOPs, which broadcast."""
        x = np.asarray(x, float)
        log_n = np.log(np.asarray(t, float)) - np.log(self.geometry.forward_gflops(x))
        u = np.stack(np.broadcast_arrays(*np.moveaxis(np.log(x), -1, 0), log_n), -1) - self.center
        return np.asarray(np.exp(-u @ self._powers.T) @ self.coefficients)

    def has_optimum(self) -> bool:
        """Whether every dimension and the images gain something: without, the best shape is infinite or vanishes."""
        return bool(np.all((self.coefficients @ (self._powers > 0)) > 0))

    def _at(self, log_x: Array, t: float) -> tuple[Array, Array, Array, Array, Array]:
        """At one shape: terms (J,), their log-gradients by log x (J, 3), the Hessian of the law (3, 3), the gradient
        (3,) of log F, and u - center (4,)."""
        log_f, slope, bend = self.geometry.log_cost(log_x)
        u = np.append(log_x, math.log(t) - log_f) - self.center
        terms = self.coefficients * np.exp(-self._powers @ u)
        slopes = self._powers[:, 3:] * slope - self._powers[:, :3]
        return terms, slopes, (slopes.T * terms) @ slopes + float(terms @ self._powers[:, 3]) * bend, slope, u

    def optimum(self, t: float) -> Array:
        """The (3,) sizes, not rounded, of least error at t GFLOPs; raises ValueError if the law has none."""
        log_x: Array = np.array(self.center[:3])
        step: Array = np.zeros(3)
        value, size = math.inf, 0.0
        for _ in range(_NEWTON if self.has_optimum() else 0):
            terms, slopes, hessian, _, _ = self._at(log_x + step, t)
            if (trial := float(terms[:-1].sum())) > value * (1 + 1e-14):
                step /= 2
                continue
            log_x += step
            value = trial
            step = np.asarray(-np.linalg.solve(hessian, terms @ slopes), float)
            size = float(np.abs(step).max())
            if size < 1e-10:
                return np.asarray(np.exp(log_x))
            step *= min(1.0, 2.0 / size)
        raise ValueError("the law has no best shape: a dimension, or the images, gain nothing; see its flags.")

    def frontier(self, t: float) -> float:
        """The least error at t GFLOPs."""
        return float(self.error(self.optimum(t), t))

    def growth(self, t: float) -> Array:
        """Local growth exponents d log x_k* / d log t of the best shape, (3,)."""
        terms, slopes, hessian, _, _ = self._at(np.log(self.optimum(t)), t)
        return np.asarray(np.linalg.solve(hessian, (self._powers[:, 3] * terms) @ slopes))

    def sensitivity(self, t: float) -> Array:
        """d log x_k* by every parameter, (3, J + K): coefficients, then exponents (implicit function theorem)."""
        terms, slopes, hessian, slope, u = self._at(np.log(self.optimum(t)), t)
        by_coefficient = slopes.T * np.exp(-self._powers @ u)
        loads = self.form.loads
        direct = loads[:, :, 3:] * slope - loads[:, :, :3]  # (J, K, 3): d slopes_j / d theta_k
        by_exponent = np.einsum("j,jki->ik", terms, direct - (loads @ u)[:, :, None] * slopes[:, None, :])
        return -np.linalg.solve(hessian, np.hstack((by_coefficient, by_exponent)))

    def parameters(self) -> dict[str, float]:
        """Coefficients, for x as counted and n in images, and exponents by name."""
        raw = self.coefficients * np.exp(self._powers @ self.center)
        names = (*self.form.coefficients, *self.form.exponents)
        return dict(zip(names, map(float, (*raw, *self.exponents)), strict=True))


@dataclass(frozen=True)
class Estimate:
    """A law and how sure it is: ``covariance`` (J + 4, J + 4) of coefficients and exponents, and the degrees of freedom
    of its t distribution, runs less parameters."""

    law: FlopsLaw
    covariance: Array
    degrees: int

    def log_shape(self, t: float) -> tuple[Array, Array]:
        """log x* at t GFLOPs and its standard error (delta method), (3,) each."""
        return np.log(self.law.optimum(t)), self._spread(self.law.sensitivity(t))

    def log_growth(self, t: float) -> tuple[Array, Array]:
        """log of the local growth exponents at t and its standard error (delta method), (3,) each."""
        step, growth = 1e-3, self.law.growth(t)
        above, below = (self.law.sensitivity(t * math.exp(sign * step)) for sign in (1, -1))
        return np.log(growth), self._spread((above - below) / (2 * step) / growth[:, None])

    def _spread(self, gradient: Array) -> Array:
        return np.asarray(np.sqrt(np.einsum("ki,ij,kj->k", gradient, self.covariance, gradient)))


@dataclass(frozen=True)
class FlopsFit:
    """The law with an offset per run. sigma, tau: relative spread of an evaluation and of a run's offset.

    ``residuals``: log measured - log fitted; ``flags``: what is degenerate.
    """

    estimate: Estimate
    solution: Solution
    residuals: Array
    noise: Noise
    sigma: float
    tau: float
    num_runs: int
    flags: tuple[str, ...]

    @property
    def law(self) -> FlopsLaw:
        return self.estimate.law


def wald(log_value: float, log_se: float, degrees: int, level: float) -> Interval:
    """The interval of a positive value; open on both sides where it is wider than a factor of ten each way."""
    half = float(t_distribution.ppf((1 + level) / 2, degrees)) * log_se if degrees > 0 else math.inf
    value, open_ended = math.exp(log_value), not half <= _WIDEST
    low, high = (0.0, math.inf) if open_ended else (value * math.exp(-half), value * math.exp(half))
    return Interval(value, low, high, "REML, Wald on the logarithm, t(G-p)")


def fit_flops(
    x: ArrayLike,
    t: ArrayLike,
    error: ArrayLike,
    run: ArrayLike,
    geometry: Geometry,
    *,
    form: Form = Form(),
    scale: ArrayLike | None = None,
    ratio: float | None = None,
    start: ArrayLike | None = None,
) -> FlopsFit:
    """Fit the law to points: sizes (n, 3), t in GFLOPs (n,), errors (n,), and the run (n,) each belongs to.

    ``scale`` (n,): relative standard deviations up to a factor, equal if not given. ``ratio``: tau / sigma, by REML if
    not given. ``start``: exponents to start from, cold starts if not given. Raises ValueError for fewer points than
    parameters, a dimension or a number of images that does not vary, or values without a logarithm.
    """
    x, t, error = (np.asarray(values, float) for values in (x, t, error))
    num_parameters = form.num_parameters
    if x.shape != (len(t), 3) or error.shape != t.shape or len(np.asarray(run)) != len(t):
        raise ValueError(
            f"sizes {x.shape}, compute {t.shape} and errors {error.shape} do not match; give (n, 3), n, n."
        )
    for what, values in (("size", x), ("compute", t), ("error", error)):
        if not np.all(np.isfinite(values) & (values > 0)):
            bad = values[~(np.isfinite(values) & (values > 0))].flat[0]
            raise ValueError(f"{what} {bad} has no logarithm; leave that point out.")
    if len(t) <= num_parameters:
        raise ValueError(f"{len(t)} points cannot fit a law of {num_parameters} parameters; give more.")
    u = np.column_stack((np.log(x), np.log(t / geometry.forward_gflops(x))))
    for name, values in zip(AXES, u.T, strict=True):
        if np.ptp(values) < 1e-9:
            raise ValueError(f"{name} is the same at every point; add runs in which it differs.")
    center = u.mean(0)
    logs = -(form.loads @ (u - center).T)
    log_error = np.log(error)
    weights = np.ones(len(t)) if scale is None else np.asarray(scale, float)
    weights = weights / np.exp(np.log(weights).mean())
    index = index_runs(run)

    def fitted(ratio: float, start: ArrayLike | None) -> tuple[Noise, Solution]:
        noise = Noise(index, ratio, weights)
        return noise, solve(logs, log_error, noise, starts=None if start is None else np.atleast_2d(start))

    noise, solution = fitted(ratio or 0.0, start)
    if ratio is None and index.max() > 0:
        cold, best, chosen = solution, _reml(solution, noise), 0.0
        for trial in RATIOS[1:]:
            noise, solution = fitted(float(trial), solution.exponents)
            criterion = _reml(solution, noise)
            if criterion < best:
                best, chosen = criterion, float(trial)
            elif criterion > best + _FAR_WORSE:
                break
        noise, solution = fitted(chosen, None) if chosen else (Noise(index, 0.0, weights), cold)
    # A term below 1e-9 of every error is rounding: it is 0, and flagged as such.
    share = solution.coefficients * solution.jacobian[:, : len(solution.coefficients)].max(0)
    coefficients = np.where(share > 1e-9, solution.coefficients, 0.0)
    law = FlopsLaw(form, coefficients, solution.exponents, center, geometry)
    sigma = math.sqrt(solution.objective / (len(t) - num_parameters))
    num_runs = int(index.max()) + 1
    covariance = sigma**2 * _inverse(noise.whiten(solution.jacobian))
    return FlopsFit(
        estimate=Estimate(law, covariance, num_runs - num_parameters),
        solution=solution,
        residuals=log_error - solution.log_fit,
        noise=noise,
        sigma=sigma,
        tau=noise.ratio * sigma,
        num_runs=num_runs,
        flags=_flags(law, error),
    )


def _reml(solution: Solution, noise: Noise) -> float:
    """-2 x the restricted log likelihood of tau / sigma, sigma profiled out, up to a constant (law linearised)."""
    free = solution.jacobian.shape[0] - solution.jacobian.shape[1]
    singular = np.linalg.svd(noise.whiten(solution.jacobian), compute_uv=False)
    singular = singular[singular > 1e-10 * singular[0]]
    return free * math.log(max(solution.objective, 1e-300)) + noise.log_det() + 2 * float(np.log(singular).sum())


def _inverse(jacobian: Array) -> Array:
    """(J^T J)^-1, 0 in the rows of parameters that move no error, huge where the data leave a direction open."""
    norms = np.linalg.norm(jacobian, axis=0)
    live = np.flatnonzero(norms > 0)
    _, singular, rows = np.linalg.svd(jacobian[:, live] / norms[live], full_matrices=False)
    half = rows.T / np.maximum(singular, 1e-10 * singular[0])
    inverse = np.zeros((len(norms), len(norms)))
    inverse[np.ix_(live, live)] = (half @ half.T) / np.outer(norms[live], norms[live])
    return inverse


def _flags(law: FlopsLaw, error: Array) -> tuple[str, ...]:
    flags = [f"{name}=0" for name, value in zip(law.form.coefficients, law.coefficients, strict=True) if value == 0]
    if law.coefficients[-1] >= 0.95 * error.min():
        flags.append("eps at the smallest error")
    for name, value in zip(law.form.exponents, law.exponents, strict=True):
        if value <= BOX[0] * 1.001:
            flags.append(f"{name} at its lower bound")
        elif value >= BOX[1] * 0.999:
            flags.append(f"{name} at its upper bound")
    return tuple(flags)


@dataclass(frozen=True)
class JointFit:
    """The law fitted to every sweep at once; ``as_dict`` is the content of fit.json.

    ``exponents``: growth of the best shape at the largest measured compute, empty (and ``why``) if the law has no best
    shape. ``optimum``: the best shape, not rounded, with its interval, at `BUDGETS`. ``jackknife``: by dimension, the
    half-width of log x* at the largest compute when whole runs are left out, over that of the interval. ``cutoffs``: the
    exponents when only points of at most some error are fitted. ``held_out``: the largest budgets, predicted from the
    smaller ones. ``estimate``: what `estimate_from` needs.
    """

    sweeps: tuple[str, ...]
    metric: dict[str, Any]
    level: float
    parameters: dict[str, float]
    exponents: dict[str, Interval]
    why: str | None
    optimum: tuple[dict[str, Any], ...]
    jackknife: dict[str, float] | None
    cutoffs: tuple[dict[str, float | int | None], ...]
    geometry: Geometry
    sigma: float
    tau: float
    num_runs: int
    num_points: int
    held_out: dict[str, Any] | None
    flags: tuple[str, ...]
    warnings: tuple[str, ...]
    points: tuple[dict[str, Any], ...]
    excluded: tuple[Exclusion, ...]
    estimate: Estimate

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the content of fit.json; an open end of an interval is null above and 0 below."""
        return {"schema": SCHEMA, "kind": "joint", "law": "flops", **plain(self)}

    def write(self, path: Path) -> None:
        records.write_json(path, self.as_dict())


def fit_joint(
    sweeps: Mapping[str, Sequence[Point]],
    geometry: Geometry,
    *,
    form: Form = Form(),
    dataset: str = "",
    shots: int = 0,
    exclusions: Sequence[Exclusion] = (),
    level: float = 0.95,
    cutoffs: Sequence[float] = CUTOFFS,
    headline: float = HEADLINE,
    weights: str = "equal",
) -> JointFit:
    """Fit the law to the points of several sweeps (name -> points), stars, grids and diagonals alike.

    Two runs of one shape and seed are one run: the same recipe trains them alike, so the second says nothing new.
    ``cutoffs``: largest errors fitted, ``headline`` the one that counts. ``weights``, ``level``: as of `star.fit_star`.
    A star's center is a point like any other. Raises ValueError if the points cannot be fitted, or an argument has no
    meaning.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1; write 0.95 for 95%.")
    if weights not in ("equal", "stderr"):
        raise ValueError(f"weights={weights!r} is not known; write 'equal' or 'stderr'.")
    if headline not in cutoffs:
        raise ValueError(f"headline={headline} is not among the cut-offs {tuple(cutoffs)}; add it.")
    rows, usable = [], []
    seen: dict[tuple[Any, ...], str] = {}
    for name, points in sweeps.items():
        reasons = check.unusable(points)
        for point in points:
            why_not = reasons.get((point.run_id, point.duration))
            first = seen.setdefault((*_same_run(point), round(math.log(point.t_gflops), 9)), point.run_id)
            if why_not is None and first != point.run_id:
                why_not = f"measured already by {first}, the same shape and seed"
            usable += [point] if why_not is None else []
            if why_not is None and point.error > headline:
                why_not = f"error {point.error:.3g} is above the cut-off {headline:g}"
            rows.append(plain(point) | {"sweep": name, "used": why_not is None, "why_not": why_not})
    used = [point for point in usable if point.error <= headline]
    fit = fit_points(used, geometry, form, weights)
    law, warnings = fit.law, [f"{len(exclusions)} runs of the sweeps are left out"] if exclusions else []
    why, exponents, optimum, jackknife = None, {}, [], None
    by_cutoff = _by_cutoff(usable, fit, sorted(cutoffs, reverse=True), weights)
    if not law.has_optimum():
        why = f"not identified: the best law has no optimum ({', '.join(fit.flags)})"
    elif fit.estimate.degrees < 1:
        why = f"not identified: {fit.num_runs} runs are too few for {len(fit.estimate.covariance)} parameters"
    else:
        largest = max(point.t_gflops for point in used)
        growth = zip(DIMENSIONS, *fit.estimate.log_growth(largest), strict=True)
        exponents = {name: wald(value, se, fit.estimate.degrees, level) for name, value, se in growth}
        optimum = [_best(fit.estimate, largest * factor, factor, level) for factor in BUDGETS]
        jackknife = _jackknife(used, fit, largest, level, weights)
        warnings += [
            f"{name}: leaving out whole runs gives an interval {ratio:.2g} times as wide: trust the wider one"
            for name, ratio in (jackknife or {}).items()
            if not 0.5 <= ratio <= 2
        ]
    for name, one in exponents.items():
        found = [value for row in by_cutoff if isinstance(value := row[name], float)]
        if found and (min(found) < one.lo or max(found) > one.hi):
            warnings.append(
                f"{name}: the cut-off moves the exponent from {min(found):.2g} to {max(found):.2g}, beyond the interval: "
                "the law does not hold over the whole range"
            )
    if fit.solution.converged < 0.5:
        warnings.append(f"only {fit.solution.converged:.0%} of the starts reached the best fit")
    return JointFit(
        sweeps=tuple(sweeps),
        metric={"dataset": dataset, "shots": shots},
        level=level,
        parameters=law.parameters(),
        exponents=exponents,
        why=why,
        optimum=tuple(optimum),
        jackknife=jackknife,
        cutoffs=by_cutoff,
        geometry=geometry,
        sigma=fit.sigma,
        tau=fit.tau,
        num_runs=fit.num_runs,
        num_points=len(used),
        held_out=_held_out(used, geometry, form, weights),
        flags=fit.flags,
        warnings=tuple(warnings),
        points=tuple(rows),
        excluded=tuple(exclusions),
        estimate=fit.estimate,
    )


def fit_points(
    points: Sequence[Point],
    geometry: Geometry,
    form: Form = Form(),
    weights: str = "equal",
    **options: Any,
) -> FlopsFit:
    """`fit_flops` of points, with its options and errors; a run is a shape and a seed."""
    x = np.array([[getattr(point, name) for name in DIMENSIONS] for point in points], float).reshape(-1, 3)
    t, error = (np.array([getattr(point, name) for point in points], float) for name in ("t_gflops", "error"))
    scale, runs = check.scales(points, weights), [str(_same_run(point)) for point in points]
    return fit_flops(x, t, error, runs, geometry, form=form, scale=scale, **options)


def _same_run(point: Point) -> tuple[int, int, int, int]:
    """What a run is across sweeps of one recipe: its shape and seed."""
    return (*dimensions(point), point.seed)


def estimate_from(fit: Mapping[str, Any]) -> Estimate:
    """The estimate in a fit.json of kind "joint"; raises ValueError for another kind or schema."""
    if fit.get("kind") != "joint" or fit.get("schema") != SCHEMA:
        raise ValueError(f"a fit of kind {fit.get('kind')!r}, schema {fit.get('schema')!r} is none of this law.")
    saved = fit["estimate"]
    arrays = {name: np.array(saved["law"][name], float) for name in ("coefficients", "exponents", "center")}
    form = Form(tuple(map(tuple, saved["law"]["form"]["interactions"])), saved["law"]["form"]["burden"])
    law = FlopsLaw(form, **arrays, geometry=Geometry(**fit["geometry"]))
    return Estimate(law, np.array(saved["covariance"], float), int(saved["degrees"]))


def _best(estimate: Estimate, t: float, factor: float, level: float) -> dict[str, Any]:
    """The best shape at t, not rounded, with its interval; ``factor``: t over the largest measured compute."""
    centre, spread = estimate.log_shape(t)
    found = [wald(value, se, estimate.degrees, level) for value, se in zip(centre, spread, strict=True)]
    gflops = float(estimate.law.geometry.forward_gflops(np.exp(centre)))
    return {
        "t_gflops": t,
        "factor": factor,
        **{name: one.estimate for name, one in zip(DIMENSIONS, found, strict=True)},
        "intervals": {name: {"lo": one.lo, "hi": one.hi} for name, one in zip(DIMENSIONS, found, strict=True)},
        "forward_gflops": gflops,
        "examples_seen": t / gflops,
        "error": float(estimate.law.error(np.exp(centre), t)),
    }


def _jackknife(
    used: Sequence[Point],
    fit: FlopsFit,
    t: float,
    level: float,
    weights: str,
) -> dict[str, float] | None:
    """Half-width of log x*(t) by leaving out whole runs, t(G - 1), over that of the delta method; by dimension."""
    values = []
    for run in sorted({_same_run(point) for point in used}):
        kept = [point for point in used if _same_run(point) != run]
        options = {"ratio": fit.noise.ratio, "start": fit.law.exponents}
        law = fit_points(kept, fit.law.geometry, fit.law.form, weights, **options).law
        if not law.has_optimum():
            return None
        values.append(np.log(law.optimum(t)))
    count = len(values)
    spread = math.sqrt(count - 1) * np.std(values, axis=0)
    quantile = t_distribution.ppf((1 + level) / 2, [count - 1, fit.estimate.degrees])
    ratio = quantile[0] * spread / (quantile[1] * fit.estimate.log_shape(t)[1])
    return dict(zip(DIMENSIONS, map(float, ratio), strict=True))


def _by_cutoff(
    usable: Sequence[Point], fit: FlopsFit, cutoffs: Sequence[float], weights: str
) -> tuple[dict[str, float | int | None], ...]:
    """The growth exponents, at the headline's tau / sigma and the largest compute, of the points up to each error."""
    t, rows = max(point.t_gflops for point in usable), []
    for cutoff in cutoffs:
        kept = [point for point in usable if point.error <= cutoff]
        growth: list[float | None] = [None] * 3
        with contextlib.suppress(ValueError):  # too few points, or no best shape: the row says None
            law = fit_points(kept, fit.law.geometry, fit.law.form, weights, ratio=fit.noise.ratio).law
            growth = law.growth(t).tolist()
        rows.append({"max_error": cutoff, "num_points": len(kept), **dict(zip(DIMENSIONS, growth, strict=True))})
    return tuple(rows)


def _held_out(used: Sequence[Point], geometry: Geometry, form: Form, weights: str) -> dict[str, Any] | None:
    """How well the smaller budgets predict the largest; None if they are too few to fit."""
    early, late = hold_out(used)
    try:
        law = fit_points(early, geometry, form, weights).law
    except ValueError:
        return None
    x = np.array([[getattr(point, name) for name in DIMENSIONS] for point in late], float)
    t, error = (np.array([getattr(point, name) for point in late]) for name in ("t_gflops", "error"))
    residuals = np.log(error / law.error(x, t))
    return {
        "fitted_up_to": max(point.t_gflops for point in early),
        "t_gflops": [float(t.min()), float(t.max())],
        "num_points": len(late),
        "rms": float(np.sqrt(np.mean(residuals**2))),
        "bias": float(residuals.mean()),
    }


def read_geometry(sweep_dirs: Sequence[str | Path]) -> Geometry:
    """What the finished runs of several sweeps' directories have in common beside their shapes.

    Raises ValueError if there is no finished run, the runs differ in more than shape, seed and durations, or a run's
    recorded forward FLOPs are not those of the closed form.
    """
    runs = [
        (path.name, record)
        for sweep_dir in map(Path, sweep_dirs)
        for path in sorted(sweep_dir.iterdir())
        if path.is_dir() and (record := records.read_run(path)) and record.get("status") == records.DONE
    ]
    if not runs:
        raise ValueError(f"{', '.join(map(str, sweep_dirs))}: no finished run; give directories of sweeps' runs.")
    first_name, first = runs[0]
    model = first["config"]["model"]
    geometry = Geometry(
        image_size=model["image_size"],
        patch_size=first["patch_size"],
        num_heads=first["num_heads"],
        channels=model["channels"],
        pool=model["pool"],
        num_classes=first["config"]["data"]["num_classes"],
    )
    own = ("name", "tag", "durations.", "eval.")
    recipe = {key: value for key, value in _recipe(first["config"]).items() if not key.startswith(own)}
    for name, record in runs:
        other = {key: value for key, value in _recipe(record["config"]).items() if not key.startswith(own)}
        different = [key for key in {**recipe, **other} if recipe.get(key) != other.get(key)]
        if different:
            raise ValueError(
                f"the sweeps differ in {', '.join(different)} ({first_name} and {name}); fit sweeps of one recipe."
            )
        gflops = float(geometry.forward_gflops([record[name] for name in DIMENSIONS]))
        if abs(gflops / record["forward_gflops"] - 1) > 1e-6:
            raise ValueError(
                f"{name} records {record['forward_gflops']} forward GFLOPs, the closed form says {gflops}."
            )
    return geometry
