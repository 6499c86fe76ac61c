"""What the runs of a proof measured, as one JSON-ready dict; `sovit.analysis.report.proof` words it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sovit import records
from sovit.analysis.points import DIMENSIONS, Dimensions, Exclusion, Point, load_points, plain
from sovit.analysis.proof.rivals import NEIGHBOUR, PREDICTED, Rival, cost, moved, parameters
from sovit.analysis.proof.standing import Standings, standings
from sovit.shape import Shape

SCHEMA = 1
_NEAR = 0.02  # of the budget: steps are whole, so a run ends a little off
Runs = dict[int, list[Point]]  # by seed, in the order of compute


def gather(
    rivals: Sequence[Rival],
    own: Path,
    *,
    folders: Mapping[Path, Iterable[Shape]],
    local: Path,
    metric: tuple[str, int],
    compute: float,
    prediction: Mapping[str, Any],
    joint: Path | None,
    star: Path,
    num_seeds: int,
) -> dict[str, Any]:
    """The standings of ``rivals``, the predicted one first, from the runs in ``folders``; written to ``own``/proof.json.

    ``folders``: of which shapes each holds the runs, for records of two numbers of heads look alike; ``local``: runs of the
    local grid; ``metric``: data set and shots; ``compute``: the budget in GFLOPs; ``joint``: folder of the law whose
    forecasts are held against the measurements, if any; ``star``: folder of the star. ``complete`` says whether every
    rival, a neighbour among them, has all ``num_seeds`` runs. Raises ValueError if the predicted shape has no finished run.
    """
    measured: dict[Shape, Runs] = {}
    lost: list[Exclusion] = []
    for folder, shapes in folders.items():
        here, left_out = _measured(folder, metric, compute)
        measured |= {shape: here.get(_key(shape), {}) for shape in shapes}
        lost += left_out
    geometry = prediction["geometry"]
    law = _law(joint)
    errors = {
        rival.shape: {seed: points[-1].error for seed, points in sorted(measured.get(rival.shape, {}).items())}
        for rival in rivals
    }
    control = rivals[0].shape
    found = standings(errors, control)
    rows = [_row(rival, found, errors, measured, geometry, compute, law, control) for rival in rivals]
    around, lost_local = _measured(local, metric, compute)
    content = {
        "schema": SCHEMA,
        "kind": "proof",
        "sweep": own.name,
        "metric": {"dataset": metric[0], "shots": metric[1]},
        "t_gflops": compute,
        "complete": all(row["num_seeds"] >= num_seeds for row in rows)
        and any(row["role"] == NEIGHBOUR for row in rows),
        "level": found.level,
        "spread": found.spread,
        "degrees": found.degrees,
        "critical": found.critical,
        "num_test_stderr": _binomial(measured.get(control, {})),
        "rows": rows,
        "local": _local(around, rivals[0].shape, compute, law),
        "lost": [plain(one) for one in (*lost, *lost_local)],
        "prediction": {key: prediction[key] for key in ("rule", "optimum", "region", "extrapolation", "notes")},
        "exponents": _exponents(star),
        "command": ["sovit", "optimize"],
    }
    content = plain(content)
    records.write_json(own / "proof.json", content)
    return content


def _measured(
    folder: Path, metric: tuple[str, int], compute: float
) -> tuple[dict[tuple[int, int, int], Runs], list[Exclusion]]:
    """The runs that end at the budget by dimensions and seed, and those that do not count."""
    if not folder.is_dir():
        return {}, []
    points, lost = load_points(folder, *metric)
    by_run: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda one: one.t_gflops):
        by_run.setdefault(point.run_id, []).append(point)
    found: dict[tuple[int, int, int], Runs] = {}
    for run_id, run in by_run.items():
        end = run[-1]
        if abs(end.t_gflops / compute - 1) < _NEAR:
            found.setdefault((end.width, end.depth, end.mlp_dim), {})[end.seed] = run
        else:
            lost.append(Exclusion(run_id, f"ended at {end.t_gflops:.4g} GFLOPs, which is not the budget"))
    return found, lost


def _row(
    rival: Rival,
    found: Standings,
    errors: Mapping[Shape, Mapping[int, float]],
    measured: Mapping[Shape, Runs],
    geometry: Mapping[str, Any],
    compute: float,
    law: Any,
    control: Shape,
) -> dict[str, Any]:
    key = rival.shape
    against = found.against.get(key)
    gflops = cost(rival.shape, geometry)
    forecast = float(law.error(_key(key), compute)) if law is not None else None
    expected = forecast / float(law.error(_key(control), compute)) if forecast is not None else None
    lo, hi = found.interval.get(key, (None, None))
    return {
        "role": rival.role,
        "shape": rival.shape.as_dict(),
        "why": rival.why,
        "num_params": parameters(rival.shape, geometry),
        "forward_gflops": gflops,
        "images": compute / gflops,
        "num_seeds": len(errors[key]),
        "errors": {str(seed): error for seed, error in errors[key].items()},
        "error": {"estimate": found.mean.get(key), "lo": lo, "hi": hi},
        "ratio": {"estimate": against.ratio, "lo": against.lo, "hi": against.hi} if against else None,
        "predicted_is_better": against.better if against else None,
        "forecast": forecast,
        "forecast_ratio": expected,
        "curve": _curve(measured.get(key, {})),
    }


def _curve(runs: Mapping[int, Sequence[Point]]) -> list[dict[str, float]]:
    """Mean error over the seeds at each evaluation that all of them have."""
    slices: dict[str, list[Point]] = {}
    for points in runs.values():
        for point in points:
            slices.setdefault(point.duration, []).append(point)
    whole = [group for group in slices.values() if len(group) == len(runs)]
    return [
        {
            "t_gflops": sum(point.t_gflops for point in group) / len(group),
            "error": sum(point.error for point in group) / len(group),
        }
        for group in sorted(whole, key=lambda group: group[0].t_gflops)
    ]


def _local(
    around: Mapping[tuple[int, int, int], Runs], predicted: Shape, compute: float, law: Any
) -> list[dict[str, Any]]:
    """Every shape of the local grid, the best first."""
    rows = []
    for sizes, runs in around.items():
        forecast = float(law.error(sizes, compute)) if law is not None else None
        move = moved(Dimensions(*sizes), predicted) if sizes != _key(predicted) else PREDICTED
        for seed, points in runs.items():
            shape = dict(zip(DIMENSIONS, sizes, strict=True))
            rows.append(shape | {"seed": seed, "moved": move, "error": points[-1].error, "forecast": forecast})
    return sorted(rows, key=lambda row: row["error"])


def _binomial(runs: Mapping[int, Sequence[Point]]) -> float | None:
    """Standard error of the predicted shape's error that the test images and draws alone make."""
    ends = [points[-1].stderr for points in runs.values()]
    return max(ends) if ends else None


def _law(joint: Path | None) -> Any:
    """The law that knows its FLOPs, from its fit.json."""
    if joint is None:
        return None
    from sovit.analysis.forecast.exponents import read_fit
    from sovit.analysis.forecast.joint import estimate_from

    return estimate_from(read_fit(joint, "joint")[1]).law


def _exponents(star: Path) -> list[dict[str, Any]]:
    """The star's exponents with their verdicts, as its own report words them."""
    from sovit.analysis.report import summary

    fit = json.loads((star / "fit.json").read_text(encoding="utf-8"))
    wanted = ("arm", "s", "interval", "identified", "why", "verdict")
    return [{key: row.get(key) for key in wanted} for row in summary.headline(fit)]


def _key(shape: Shape) -> tuple[int, int, int]:
    return shape.width, shape.depth, shape.mlp_dim
