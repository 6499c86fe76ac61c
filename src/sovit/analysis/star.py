"""A star sweep: the exponent of each dimension, how sure it is, and what speaks against it (SoViT, arXiv 2305.13035).

Each arm varies one dimension with the others held at the center. The center enters no fit and no diagnostic: its error,
predicted by the law of every arm, is shown beside the measured one. An exponent is reported only with an interval, and
only if the measured minima lie inside the arm for at least half of the durations.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit import records
from sovit.analysis import diagnostics as check
from sovit.analysis.fit import BOX, Prior
from sovit.analysis.intervals import (
    Interval,
    Jackknife,
    RunFit,
    exponent_interval,
    fit_with_runs,
    jackknife_runs,
)
from sovit.analysis.law import Law
from sovit.analysis.points import AnyDimensions, Exclusion, HasShape, Point, dimensions, plain
from sovit.analysis.scale import ERROR, Scale
from sovit.analysis.shared import SharedFit, fit_shared
from sovit.analysis.specification import BreakTest, break_test, structure_test
from sovit.families import VIT

SCHEMA = 1
CUTOFFS, HEADLINE = ERROR.cutoffs, ERROR.headline


def find_center(shapes: Iterable[HasShape]) -> AnyDimensions:
    """The center of a star: the most common value in each dimension.

    Raises ValueError if no center makes the shapes a star, or if several do (a single arm).
    """
    distinct = sorted({dimensions(shape) for shape in shapes})
    if not distinct:
        raise ValueError("no shapes; give the shapes of a star sweep.")
    kind = type(distinct[0])
    counts = [Counter(shape[k] for shape in distinct) for k in range(len(kind._fields))]
    common = kind(*(count.most_common(1)[0][0] for count in counts))
    centers = [
        center
        for center in (kind(*choice) for choice in itertools.product(*counts))
        if all(len(shape.differs(center)) <= 1 for shape in distinct)
    ]
    if not centers:
        stray = next(shape for shape in distinct if len(shape.differs(common)) > 1)
        raise ValueError(
            f"the shapes are no star: {stray} differs from the most common values {common} in "
            f"{' and '.join(stray.differs(common))}; a star varies one dimension at a time."
        )
    weight = {center: sum(count[value] for count, value in zip(counts, center, strict=True)) for center in centers}
    best = [center for center in centers if weight[center] == max(weight.values())]
    if len(best) > 1:
        raise ValueError(f"the center of the star could be {' or '.join(map(str, best[:3]))}; give the center.")
    return best[0]


@dataclass(frozen=True)
class Minimum:
    """The least error measured at one compute, where a parabola has its minimum, and where the law has its own."""

    t_gflops: float
    x: int
    interior: bool
    error: float
    parabola_x: float | None
    law_x: float | None


@dataclass(frozen=True)
class CenterCheck:
    """The held-out center at one duration: an arm's prediction and what was measured. ``used_range``: not cut off."""

    t_gflops: float
    predicted: float
    measured: float
    measured_stderr: float
    used_range: bool


@dataclass(frozen=True)
class ArmFit:
    """One arm. ``s`` is None, and ``why`` says so, unless ``identified``. sigma, tau: relative, see `intervals`.

    ``break_test``, ``structure_p``: tests of the law on its residuals, see `specification`.
    """

    identified: bool
    why: str | None
    s: Interval | None
    jackknife: dict[str, float] | None
    cutoffs: tuple[check.Cutoff, ...]
    cutoff_range: tuple[float, float] | None
    late: tuple[check.Late, ...]
    parabola: check.Parabola | None
    minima: tuple[Minimum, ...]
    interior_share: float | None
    law: Law | None
    sigma: float | None
    tau: float | None
    log_se: float | None
    num_runs: int
    num_sizes: int
    num_points: int
    objective: float | None
    converged: float | None
    spread: float | None
    flags: tuple[str, ...]
    warnings: tuple[str, ...]
    outliers: tuple[check.Outlier, ...]
    outlier_points: tuple[check.OutlierPoint, ...]
    break_test: BreakTest | None
    structure_p: float | None
    center_check: tuple[CenterCheck, ...]


@dataclass(frozen=True)
class StarFit:
    sweep: str
    metric: dict[str, Any]
    center: dict[str, int]
    level: float
    arms: dict[str, ArmFit]
    by_seed: dict[str, dict[str, Interval | None]]
    points: tuple[dict[str, Any], ...]
    excluded: tuple[Exclusion, ...]
    warnings: tuple[str, ...]
    fit: dict[str, Any]
    shared: SharedFit | None
    family: str = VIT

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the content of fit.json; an open end of an interval is null above and 0 below.

        ``family`` is left out of a ViT's, as it was before there were others.
        """
        content = plain(self)
        if self.family == VIT:
            del content["family"]
        return {"schema": SCHEMA, "kind": "star", **content}

    def write(self, path: Path) -> None:
        records.write_json(path, self.as_dict())


def fit_star(
    points: Sequence[Point],
    center: HasShape | None = None,
    *,
    sweep: str = "",
    dataset: str = "",
    shots: int = 0,
    exclusions: Sequence[Exclusion] = (),
    level: float = 0.95,
    scale: Scale = ERROR,
    cutoffs: Sequence[float] | None = None,
    headline: float | None = None,
    weights: str = "equal",
    priors: Mapping[str, Prior] | None = None,
    share: Sequence[str] = (),
) -> StarFit:
    """Fit every arm of a star.

    ``cutoffs``: largest errors fitted, ``headline`` the one that counts; those of ``scale`` if not given.
    ``weights``: ``"equal"`` gives all points the same relative precision, ``"stderr"`` that of their own standard error.
    ``priors``: on the exponents a, b, c of every arm (see `fit_law`). ``share``: parameters among c, xi, eps that a second
    fit of all arms holds in common (see `shared`). Raises ValueError if the points are no star or an option has no meaning.
    """
    if weights not in ("equal", "stderr"):
        raise ValueError(f"weights={weights!r} is not known; write 'equal' or 'stderr'.")
    cutoffs = scale.cutoffs if cutoffs is None else cutoffs
    headline = scale.headline if headline is None else headline
    if headline not in cutoffs:
        raise ValueError(f"headline={headline} is not among the cut-offs {tuple(cutoffs)}; add it.")
    if weights == "stderr" and any(point.stderr <= 0 for point in points):
        raise ValueError("weights='stderr' needs points with standard errors above 0; use weights='equal'.")
    middle = dimensions(center) if center is not None else find_center(points)
    arm_of = {shape: _arm(shape, middle) for shape in sorted({dimensions(point) for point in points})}
    reasons = check.unusable(points, scale)
    usable = [point for point in points if (point.run_id, point.duration) not in reasons]
    arms, by_seed = {}, {}
    seeds = sorted({point.seed for point in points})
    for name in middle._fields:
        group = [point for point in usable if arm_of[dimensions(point)] == name]
        if name in arm_of.values():
            at_center = [point for point in usable if arm_of[dimensions(point)] is None]
            arms[name] = fit_arm(
                name, group, at_center, sorted(cutoffs, reverse=True), headline, level, weights, priors, scale.name
            )
            if len(seeds) > 1:
                by_seed[name] = {seed: _seed_interval(name, group, seed, headline, level, weights) for seed in seeds}
    rows = []
    for point in points:
        arm = arm_of[dimensions(point)]
        why_not = reasons.get((point.run_id, point.duration))
        if why_not is None and arm is None:
            why_not = "center: held out"
        elif why_not is None and point.error > headline:
            why_not = f"{scale.name} {point.error:.3g} is above the cut-off {headline:g}"
        rows.append(plain(point) | {"arm": arm, "used": why_not is None, "why_not": why_not})
    warnings = [f"{name}: {text}" for name, fit in arms.items() for text in fit.warnings]
    if None not in arm_of.values():
        warnings.append(f"no run at the center {middle}: nothing is held out that the laws could be checked against")
    if exclusions:
        warnings.append(f"{len(exclusions)} runs, or rows of an import, are left out")
    return StarFit(
        sweep=sweep,
        metric={"dataset": dataset, "shots": shots},
        center=middle._asdict(),
        level=level,
        arms=arms,
        by_seed={str(seed): {name: by_seed[name][seed] for name in by_seed} for seed in seeds if by_seed},
        points=tuple(rows),
        excluded=tuple(exclusions),
        warnings=tuple(warnings),
        fit=_description(cutoffs, headline, level, weights) | ({"priors": plain(priors)} if priors else {}),
        shared=_share(
            share,
            {name: [p for p in usable if arm_of[dimensions(p)] == name and p.error <= headline] for name in arms},
            weights,
            level,
        ),
        family=points[0].family if points else VIT,
    )


def _arm(shape: AnyDimensions, center: AnyDimensions) -> str | None:
    different = shape.differs(center)
    if len(different) > 1:
        raise ValueError(
            f"{shape} differs from the center {center} in {' and '.join(different)}; a star varies one at a time."
        )
    return different[0] if different else None


def _fit(name: str, points: Sequence[Point], weights: str, priors: Mapping[str, Prior] | None = None) -> RunFit | str:
    """The fit, or why there is none."""
    return check.too_few(name, points) or fit_with_runs(
        *check.vectors(name, points), scale=check.scales(points, weights), priors=priors
    )


def _share(share: Sequence[str], groups: Mapping[str, Sequence[Point]], weights: str, level: float) -> SharedFit | None:
    """All arms fitted together, those of them that can be fitted at all."""
    if not share:
        return None
    arms = {}
    for name, used in groups.items():
        fit = _fit(name, used, weights)
        if not isinstance(fit, str):
            arms[name] = (*check.vectors(name, used)[:3], fit)
    return fit_shared(arms, share, level=level)


def _interval(name: str, points: Sequence[Point], fit: RunFit | str, level: float) -> Interval | str:
    """The exponent's interval, or why there is none."""
    if isinstance(fit, str):
        return fit
    if check.optimal_exponent(fit.fit) is None:
        return f"the best law has no optimum ({', '.join(fit.fit.flags)})"
    interval = exponent_interval(*check.vectors(name, points)[:3], fit, level=level)
    if isinstance(interval, Interval) and interval.is_open:
        return "the data leave the exponent open on both sides"
    return interval


def _seed_interval(
    name: str, group: Sequence[Point], seed: int, headline: float, level: float, weights: str
) -> Interval | None:
    """The exponent of one seed alone; None if that seed's minima or points do not identify it."""
    points = [point for point in group if point.seed == seed]
    used = [point for point in points if point.error <= headline]
    if _at_edge(name, check.edges(check.isocompute(points, check.size_along(name)))):
        return None
    interval = _interval(name, used, _fit(name, used, weights), level)
    return interval if isinstance(interval, Interval) else None


def _at_edge(name: str, edge: check.Edge) -> str | None:
    """Where the minimum is, if it is at an edge of the arm for most durations; else None."""
    if 2 * (edge.num_smallest + edge.num_largest) <= edge.num_slices:
        return None
    counts = ((edge.num_smallest, "smallest"), (edge.num_largest, "largest"))
    where = " and ".join(f"at the {side} {name} for {count}" for count, side in counts if count)
    return f"the minimum is {where} of {edge.num_slices} durations"


def fit_arm(
    name: str,
    points: Sequence[Point],
    at_center: Sequence[Point],
    cutoffs: Sequence[float],
    headline: float,
    level: float,
    weights: str,
    priors: Mapping[str, Prior] | None = None,
    value: str = ERROR.name,
) -> ArmFit:
    """The fit of one arm, or why there is none; arguments as of `fit_star`, ``value`` is what an error is called."""
    used = [point for point in points if point.error <= headline]
    whole = _fit(name, used, weights, priors)
    rows = check.cutoff_fits(name, points, whole, weights, cutoffs, headline)
    distinct = {row.num_points: row.s for row in rows if row.s is not None}.values()
    cutoff_range = (min(distinct), max(distinct)) if len(distinct) > 1 else None
    slices = check.isocompute(points, check.size_along(name))
    edge = check.edges(slices)
    found = _interval(name, used, whole, level)
    reason = _at_edge(name, edge) or (found if isinstance(found, str) else None)
    interval = found if isinstance(found, Interval) and reason is None else None
    run_fit = None if isinstance(whole, str) else whole
    law = run_fit.fit.law if run_fit else None
    jackknife = None
    if run_fit and isinstance(found, Interval):
        jackknife = jackknife_runs(*check.vectors(name, used), run_fit, level=level)
    outliers = check.outliers(name, used, run_fit, jackknife) if run_fit and jackknife else ()
    x, t, *_ = check.vectors(name, used)
    enough = run_fit if run_fit and run_fit.num_runs >= 5 else None
    broken = break_test(x, t, enough) if enough else None
    structure_p = structure_test(x, t, enough) if enough else None
    flags = run_fit.fit.flags if run_fit else ()
    return ArmFit(
        identified=reason is None,
        why=f"not identified: {reason}" if reason else None,
        s=interval,
        jackknife={"lo": jackknife.lo, "hi": jackknife.hi} if jackknife else None,
        cutoffs=rows,
        cutoff_range=cutoff_range,
        late=check.late_fits(name, used, whole, weights),
        parabola=check.parabola_slope(points, check.size_along(name), level),
        minima=tuple(
            Minimum(
                t_gflops=piece.t_gflops,
                x=piece.sizes[piece.best],
                interior=0 < piece.best < len(piece.sizes) - 1,
                error=float(piece.errors[piece.best]),
                parabola_x=check.parabola_minimum(piece),
                law_x=float(law.optimum(piece.t_gflops)) if law else None,
            )
            for piece in slices
        ),
        interior_share=edge.share,
        law=law,
        sigma=run_fit.sigma if run_fit else None,
        tau=run_fit.tau if run_fit else None,
        log_se=run_fit.log_se if run_fit else None,
        num_runs=len({point.run_id for point in used}),
        num_sizes=len({getattr(point, name) for point in used}),
        num_points=len(used),
        objective=run_fit.fit.objective if run_fit else None,
        converged=run_fit.fit.converged if run_fit else None,
        spread=run_fit.fit.spread if run_fit else None,
        flags=flags,
        warnings=tuple(_warnings(points, slices, run_fit, interval, jackknife, cutoff_range, outliers, value))
        + _law_warnings(broken, structure_p),
        outliers=outliers,
        outlier_points=check.outlier_points(used, run_fit) if run_fit else (),
        break_test=broken,
        structure_p=structure_p,
        center_check=_center_check(name, law, at_center, headline) if law else (),
    )


def _warnings(
    points: Sequence[Point],
    slices: Sequence[check.Slice],
    fit: RunFit | None,
    interval: Interval | None,
    jackknife: Jackknife | None,
    cutoff_range: tuple[float, float] | None,
    outliers: Sequence[check.Outlier],
    value: str,
) -> list[str]:
    texts = []
    if not slices:
        texts.append("no compute is shared by enough sizes to see whether the minimum lies inside the arm")
    if interval and jackknife and 0 < interval.lo < interval.hi < math.inf:
        ratio = 2 * jackknife.half / math.log(interval.hi / interval.lo)
        if not 0.5 <= ratio <= 2:
            texts.append(
                f"the jackknife interval is {ratio:.2g} times as wide as the headline's: "
                "the noise is not a plain offset per run, trust the wider one"
            )
    if interval and cutoff_range and (cutoff_range[0] < interval.lo or cutoff_range[1] > interval.hi):
        texts.append(
            f"the cut-off moves s from {cutoff_range[0]:.2g} to {cutoff_range[1]:.2g}, beyond the interval: "
            "the law does not hold over the whole range"
        )
    texts += [
        f"{row.run_id} lies {abs(row.t):.2g} standard errors {'above' if row.t > 0 else 'below'} what the other runs "
        f"predict; without it s would move by {row.shift:+.2g}"
        for row in outliers
    ]
    if fit:
        texts += [f"{value} rises with compute in {run}" for run in check.rising_runs(points, fit.sigma)]
        if fit.fit.converged < 0.5:
            texts.append(f"only {fit.fit.converged:.0%} of the starts reached the best fit")
    return texts


def _law_warnings(broken: BreakTest | None, structure_p: float | None) -> tuple[str, ...]:
    texts = []
    if broken and broken.p <= 0.05:
        texts.append(
            f"the data exponent c changes to {broken.factor:.2g} times its value near {broken.t_gflops:.3g} GFLOPs "
            f"(p = {broken.p:.2g}): s is not one number over this range"
        )
    if structure_p is not None and structure_p <= 0.05:
        texts.append(f"smooth structure is left in the residuals (RESET, p = {structure_p:.2g})")
    return tuple(texts)


def _center_check(name: str, law: Law, at_center: Sequence[Point], headline: float) -> tuple[CenterCheck, ...]:
    groups: dict[str, list[Point]] = {}
    for point in at_center:
        groups.setdefault(point.duration, []).append(point)
    rows = []
    for group in groups.values():
        t = math.exp(float(np.mean([math.log(point.t_gflops) for point in group])))
        errors = [point.error for point in group]
        spread = float(np.std(errors, ddof=1)) if len(errors) > 1 else group[0].stderr
        measured = float(np.mean(errors))
        predicted = float(law.error(getattr(group[0], name), t))
        rows.append(CenterCheck(t, predicted, measured, spread / math.sqrt(len(errors)), measured <= headline))
    return tuple(sorted(rows, key=lambda row: row.t_gflops))


def _description(cutoffs: Sequence[float], headline: float, level: float, weights: str) -> dict[str, Any]:
    """What was done, for the record: the items of the (Mis)Fitting checklist (arXiv 2502.18969) a fit knows."""
    return {
        "law": "f(x, t) = alpha x^-a + (beta x^b + xi) t^-c + eps, s = c / (a + b)",
        "shared_parameters": "none between arms",
        "transform": "natural logarithm of the error; x and t over their geometric means",
        "loss": "sum of squared log residuals, whitened by an offset per run",
        "reduction": "sum",
        "weights": weights,
        "bounds": {"a, b, c": list(BOX), "alpha, beta, xi, eps": [0.0, None]},
        "optimiser": "variable projection: non-negative least squares inside Levenberg-Marquardt over (a, b, c)",
        "tolerance": "relative gain of the objective below 1e-8 in a step, 1e-9 in a pass",
        "starts": "4, one for each a of a coarse grid",
        "noise": "sigma per evaluation and tau per run, tau / sigma by REML",
        "interval": f"{level:.0%}; Wald on log s with t(G - 3), profile likelihood at bounds; G runs",
        "resampling_unit": "run",
        "cutoffs": list(cutoffs),
        "headline_cutoff": headline,
        "held_out": "center",
        "compute": "forward FLOPs per image x images seen, 2 FLOPs per multiply-add, in GFLOPs",
    }
