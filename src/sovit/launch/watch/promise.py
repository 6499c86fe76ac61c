"""What the points evaluated until now promise about a star's exponents, while its runs are still going on.

Each arm's law is fitted to the points so far, runs that are not over included; the standard error is then that of
`sovit.analysis.planning.information` for those points, not the interval of `sovit fit`, which is for finished sweeps and
takes seconds. Loads scipy and the fitting kernel, and only when there are points enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit import records
from sovit.families import FAMILIES, VIT
from sovit.launch.state import DIVERGED, FAILED
from sovit.metric import ERROR, kind_of

if TYPE_CHECKING:
    from sovit.analysis.intervals import RunFit
    from sovit.analysis.points import AnyDimensions, Point

MIN_ROWS = 8  # as many points as the law of an arm needs at least; with fewer nothing heavy is loaded


@dataclass(frozen=True)
class Promise:
    """Of one arm: the exponent as fitted so far, its standard error and 95% interval to expect; or ``why`` there is none.

    ``hi`` is None where the interval is open above.
    """

    points: int
    runs: int
    s: float | None = None
    stderr: float | None = None
    lo: float | None = None
    hi: float | None = None
    why: str | None = None


def promised(directories: Sequence[Path], metric: tuple[str, int]) -> dict[str, Promise] | str | None:
    """Arm -> what its points promise, one clause that says why nothing can be said yet, or None for no star."""
    rows = [row for directory in directories for row in _points(directory, metric)]
    if len(rows) < MIN_ROWS:
        return f"{len(rows)} points so far are too few to fit the law"
    from sovit.analysis.points import POINTS, dimensions
    from sovit.analysis.star import HEADLINE, find_center

    # What a decoder reaches without an image is known when the first run is done; until then all log-perplexities count.
    most = HEADLINE if kind_of(*metric) == ERROR else math.inf
    labels = {row.pop("center") for row in rows}
    families = {row.pop("family") for row in rows}
    if len(families) > 1:
        return f"the runs are of {' and '.join(sorted(families))}: this is no star"
    family = families.pop()
    points = [POINTS[family](**row, stderr=0.0, num_draws=1) for row in rows]
    try:
        center = _center(labels, family) or find_center(points)
    except ValueError as error:
        return None if "are no star" in str(error) else str(error).rstrip(".")
    arms: dict[str, list[Point]] = {name: [] for name in center._fields}
    for point in points:
        different = dimensions(point).differs(center)
        if len(different) > 1:
            return f"{dimensions(point)} differs from the center {center} in {' and '.join(different)}: this is no star"
        if different and 0 < point.error <= most:
            arms[different[0]].append(point)
    if not any(arms.values()):
        return f"no arm has an error of at most {most:g} yet"
    return _of_arms({name: group for name, group in arms.items() if any(_along(name, points, center))})


def _along(name: str, points: Sequence[Point], center: AnyDimensions) -> list[Point]:
    return [point for point in points if getattr(point, name) != getattr(center, name)]


def _center(labels: set[str | None], family: str) -> AnyDimensions | None:
    """The center that the runs were given, if they all were given the same."""
    from sovit.analysis.points import dimensions_of

    label = labels.pop() if len(labels) == 1 else None
    return dimensions_of(FAMILIES[family], label) if label else None


def _of_arms(arms: Mapping[str, Sequence[Point]]) -> dict[str, Promise]:
    """Fits every arm; one whose own spread between runs comes out as 0 is given the others' (see `fitted_spreads`)."""
    from sovit.analysis import diagnostics
    from sovit.analysis.intervals import fit_with_runs
    from sovit.analysis.planning.information import Spread, arm, expect

    fits: dict[str, RunFit] = {}
    found: dict[str, Promise] = {}
    for name, points in arms.items():
        runs = len({point.run_id for point in points})
        why = diagnostics.too_few(name, points)
        if why is None:
            try:
                fits[name] = fit_with_runs(*diagnostics.vectors(name, points))
            except ValueError as error:
                why = str(error).rstrip(".")
            else:
                if diagnostics.optimal_exponent(fits[name].fit) is None:
                    why = f"the best law so far has no optimum ({', '.join(fits.pop(name).fit.flags)})"
        found[name] = Promise(len(points), runs, why=why)
    known = [fit.tau for fit in fits.values() if fit.tau > 0]
    usual = math.sqrt(sum(tau**2 for tau in known) / len(known)) if known else 0.0
    for name, fit in fits.items():
        x, t, _, run = diagnostics.vectors(name, arms[name])
        try:
            spread = Spread(fit.sigma, fit.tau or usual)
            expected = expect(arm(name, fit.fit.law, spread, x, t, run))
        except ValueError as error:
            found[name] = Promise(len(x), found[name].runs, why=str(error).rstrip("."))
            continue
        if not math.isfinite(expected.log_se):
            found[name] = Promise(len(x), found[name].runs, s=expected.s, why="the points do not determine it yet")
            continue
        found[name] = Promise(
            points=len(x),
            runs=found[name].runs,
            s=expected.s,
            stderr=expected.s * expected.log_se,
            lo=expected.lo,
            hi=expected.hi if math.isfinite(expected.hi) else None,
        )
    return found


def _points(directory: Path, metric: tuple[str, int]) -> list[dict[str, Any]]:
    """A point for each duration of a run, its error averaged over the draws; none of a run that failed or diverged."""
    try:
        record = records.read_run(directory) or {}
        if record.get("status") in (FAILED, DIVERGED, None):
            return []
        groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in records.read_lines(directory / records.EVALS):
            if (row["dataset"], row["shots"]) == metric and row["step"] > 0:
                groups.setdefault((row["step"], row["duration"]), []).append(row)
        family = FAMILIES[record.get("family", VIT)]
        return [
            {key: rows[0][key] for key in (*family.dimensions, "seed", "t_gflops", "duration")}
            | {
                "family": family.name,
                "run_id": directory.name,
                "error": sum(row["error"] for row in rows) / len(rows),
                "center": (record.get("config") or {}).get("center"),
            }
            for rows in groups.values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return []  # the table says so in the run's own line
