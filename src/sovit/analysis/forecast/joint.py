"""The law that knows its FLOPs: all three dimensions and every sweep in one fit, and the best shape for a budget.

    f(x, n) = sum_k alpha_k x_k^-a_k + beta n^-c + eps,      n = t / F(x)

x = (width, depth, MLP dimension); t is forward FLOPs per image times images seen, in GFLOPs. The paper's law (SoViT,
arXiv 2305.13035, Eq. 2) learns what a size costs from the data, one dimension at a time. Here the cost is known: F(x),
forward GFLOPs an image (`sovit.flops`), so n is the number of images seen, and nine parameters describe all shapes. An
interaction adds the product of two terms with a coefficient of its own and the exponents that are already there.

Here is the fit of sweeps: which points count, what was held out, what speaks against the result. The law is in
`sovit.analysis.forecast.flops_law`, the arithmetic of the fit in `flops_fit`. Neither rounds shapes, nor knows the
paper's 1/D rule (`sovit.analysis.forecast.predict`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as t_distribution

from sovit import records
from sovit.analysis import diagnostics as check
from sovit.analysis.forecast.diagonal import hold_out
from sovit.analysis.forecast.flops_fit import Estimate, FlopsFit, fit_flops, wald
from sovit.analysis.forecast.flops_law import PLAIN, FlopsLaw, Form, Geometry
from sovit.analysis.intervals import Interval
from sovit.analysis.points import DIMENSIONS, Exclusion, Point, dimensions, plain, recipe
from sovit.analysis.scale import ERROR, Scale

SCHEMA = 1
BUDGETS = (1.0, 10.0, 100.0, 1000.0)  # times the largest measured compute
# The law need hold only where shapes compete. One far too wide or deep for its compute has taken too few steps to follow
# it, and pulls at the optimum: so a point counts if its error is within a factor of the best one of its compute. 1.5 was
# chosen on the tiny star and grid, whose largest budgets it predicts to 6% instead of 13% (benchmarks/joint.md); the
# other factors show how far the choice moves the exponents.
NEARNESS = (math.inf, 2.0, 1.5, 1.3, 1.2)
NEAR = 1.5
_LUCK = 0.05  # a run-to-run spread above what seeds of one shape have shown anywhere here (2%)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class JointFit:
    """The law fitted to every sweep at once; ``as_dict`` is the content of fit.json.

    ``exponents``: growth of the best shape at the largest measured compute, empty (and ``why``) if the law has no best
    shape. ``optimum``: the best shape, not rounded, with its interval, at `BUDGETS`. ``jackknife``: by dimension, the
    half-width of log x* at the largest compute when whole runs are left out, over that of the interval. ``nearness``:
    the exponents when only points within a factor of the best of their compute are fitted. ``held_out``: the largest
    budgets, predicted from the smaller ones. ``estimate``: what `estimate_from` needs.
    """

    sweeps: tuple[str, ...]
    metric: dict[str, Any]
    level: float
    parameters: dict[str, float]
    exponents: dict[str, Interval]
    why: str | None
    optimum: tuple[dict[str, Any], ...]
    jackknife: dict[str, float] | None
    nearness: tuple[dict[str, float | int | None], ...]
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
    form: Form = PLAIN,
    dataset: str = "",
    shots: int = 0,
    exclusions: Sequence[Exclusion] = (),
    level: float = 0.95,
    nearness: Sequence[float] = NEARNESS,
    near: float = NEAR,
    scale: Scale = ERROR,
    max_error: float | None = None,
    weights: str = "equal",
) -> JointFit:
    """Fit the law to the points of several sweeps (name -> points), stars, grids and diagonals alike.

    Two runs of one shape and seed are one run: the same recipe trains them alike, so the second says nothing new.
    A point is fitted if its error is at most ``max_error`` (that of ``scale`` if not given) and within the factor
    ``near``, one of ``nearness``, of the least error measured with no more compute. ``weights``, ``level``: as of
    `star.fit_star`.
    A star's center is a point like any other. Raises ValueError if the points cannot be fitted, or an argument has no
    meaning.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1; write 0.95 for 95%.")
    if weights not in ("equal", "stderr"):
        raise ValueError(f"weights={weights!r} is not known; write 'equal' or 'stderr'.")
    if near not in nearness:
        raise ValueError(f"near={near} is not among the factors {tuple(nearness)}; add it.")
    max_error = scale.headline if max_error is None else max_error
    rows, usable = [], []
    seen: dict[tuple[Any, ...], str] = {}
    for name, points in sweeps.items():
        reasons = check.unusable(points, scale)
        for point in points:
            why_not = reasons.get((point.run_id, point.duration))
            first = seen.setdefault((*_same_run(point), round(math.log(point.t_gflops), 9)), name)
            if why_not is None and first != name:
                why_not = f"the same shape and seed was measured in {first}"
            if why_not is None and point.error > max_error:
                why_not = f"{scale.name} {point.error:.3g} is above the cut-off {max_error:g}"
            usable += [point] if why_not is None else []
            rows.append(plain(point) | {"sweep": name, "used": why_not is None, "why_not": why_not})
    far = excess([point.t_gflops for point in usable], [point.error for point in usable])
    for row, factor in zip([row for row in rows if row["used"]], far, strict=True):
        if factor > near:
            row |= {"used": False, "why_not": f"more than {near:g} times the best error of its compute"}
    used = [point for point, factor in zip(usable, far, strict=True) if factor <= near]
    fit = fit_points(used, geometry, form, weights)
    law, warnings = fit.law, [f"{len(exclusions)} runs of the sweeps are left out"] if exclusions else []
    why, exponents, optimum, jackknife = None, {}, [], None
    by_nearness = _by_nearness(usable, far, fit, sorted(nearness, reverse=True), weights)
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
        found = [value for row in by_nearness if isinstance(value := row[name], float)]
        if found and (min(found) < one.lo or max(found) > one.hi):
            warnings.append(
                f"{name}: which points are near enough to the best moves the exponent from {min(found):.2g} to "
                f"{max(found):.2g}, beyond the interval: the law does not hold over the whole range"
            )
    if fit.tau > _LUCK:
        warnings.append(
            f"whole runs lie {fit.tau:.0%} off the law (tau), more than seeds of one shape differ: it does not hold for all "
            "these shapes, and no interval covers that"
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
        nearness=by_nearness,
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
    form: Form = PLAIN,
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
    form = Form(tuple(map(tuple, saved["law"]["form"]["interactions"])))
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


def excess(t: ArrayLike, error: ArrayLike) -> Array:
    """By what factor each error (n,) is above the least one measured with no more compute (n,), to 1%."""
    t, error = np.asarray(t, float), np.asarray(error, float)
    return np.array([value / error[t <= 1.01 * time].min() for time, value in zip(t, error, strict=True)])


def _by_nearness(
    usable: Sequence[Point], far: Array, fit: FlopsFit, nearness: Sequence[float], weights: str
) -> tuple[dict[str, float | int | None], ...]:
    """The growth exponents, at the headline's tau / sigma and the largest compute, of the points within each factor."""
    t, rows = max(point.t_gflops for point in usable), []
    for near in nearness:
        kept = [point for point, factor in zip(usable, far, strict=True) if factor <= near]
        growth: list[float | None] = [None] * 3
        with contextlib.suppress(ValueError):  # too few points, or no best shape: the row says None
            law = fit_points(kept, fit.law.geometry, fit.law.form, weights, ratio=fit.noise.ratio).law
            growth = law.growth(t).tolist()
        rows.append({"near": near, "num_points": len(kept), **dict(zip(DIMENSIONS, growth, strict=True))})
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
    if "model" not in (first.get("config") or {}):
        raise ValueError(f"{first_name} does not record its geometry; import it with --patch and --image-size.")
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
    common = {key: value for key, value in recipe(first["config"]).items() if not key.startswith(own)}
    for name, record in runs:
        other = {key: value for key, value in recipe(record["config"]).items() if not key.startswith(own)}
        different = [key for key in {**common, **other} if common.get(key) != other.get(key)]
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
