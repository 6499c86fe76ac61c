"""What the runs of a proof measured, as one JSON-ready dict; `sovit.analysis.report.proof` words it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sovit import records
from sovit.analysis.points import DIMENSIONS, Exclusion, Point, load_points, plain
from sovit.analysis.proof.rivals import PREDICTED, Rival, cost, moved, parameters
from sovit.analysis.proof.standing import Standings, standings
from sovit.shape import Shape

SCHEMA = 1
_NEAR = 0.02  # of the budget: steps are whole, so a run ends a little off
Measured = dict[tuple[int, int, int], dict[int, list[Point]]]


def gather(
    rivals: Sequence[Rival],
    own: Path,
    *,
    folders: Iterable[Path],
    local: Path,
    metric: tuple[str, int],
    compute: float,
    prediction: Mapping[str, Any],
    joint: Path | None,
    star: Path,
    num_seeds: int,
) -> dict[str, Any]:
    """The standings of ``rivals``, the predicted one first, from the runs in ``folders``; written to ``own``/proof.json.

    ``local``: runs of the local grid; ``metric``: data set and shots; ``compute``: the budget in GFLOPs; ``joint``: folder
    of the law whose forecasts are held against the measurements, if any; ``star``: folder of the star. ``complete`` says
    whether every rival has all ``num_seeds`` runs. Raises ValueError if the predicted shape has no finished run.
    """
    measured, lost = _measured(folders, metric)
    geometry = prediction["geometry"]
    law = _law(joint)
    errors = {
        _key(rival.shape): {
            seed: points[-1].error
            for seed, points in sorted(measured.get(_key(rival.shape), {}).items())
            if abs(points[-1].t_gflops / compute - 1) < _NEAR
        }
        for rival in rivals
    }
    control = _key(rivals[0].shape)
    found = standings(errors, control)
    rows = [_row(rival, found, errors, measured, geometry, compute, law, control) for rival in rivals]
    around, lost_local = _measured([local], metric)
    content = {
        "schema": SCHEMA,
        "kind": "proof",
        "sweep": own.name,
        "metric": {"dataset": metric[0], "shots": metric[1]},
        "t_gflops": compute,
        "complete": all(row["num_seeds"] >= num_seeds for row in rows),
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


def _measured(folders: Iterable[Path], metric: tuple[str, int]) -> tuple[Measured, list[Exclusion]]:
    """Points by shape and seed in the order of compute, and the runs that do not count."""
    found: Measured = {}
    lost: list[Exclusion] = []
    for folder in folders:
        if not folder.is_dir():
            continue
        points, left_out = load_points(folder, *metric)
        lost += left_out
        for point in sorted(points, key=lambda one: one.t_gflops):
            shape = (point.width, point.depth, point.mlp_dim)
            found.setdefault(shape, {}).setdefault(point.seed, []).append(point)
    return found, lost


def _row(
    rival: Rival,
    found: Standings,
    errors: Mapping[Any, Mapping[int, float]],
    measured: Measured,
    geometry: Mapping[str, Any],
    compute: float,
    law: Any,
    control: Any,
) -> dict[str, Any]:
    key = _key(rival.shape)
    against = found.against.get(key)
    gflops = cost(rival.shape, geometry)
    forecast = float(law.error(key, compute)) if law is not None else None
    expected = forecast / float(law.error(control, compute)) if forecast is not None else None
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


def _local(around: Measured, predicted: Shape, compute: float, law: Any) -> list[dict[str, Any]]:
    """Every shape of the local grid, the best first."""
    rows = []
    for sizes, runs in around.items():
        for seed, points in runs.items():
            if abs(points[-1].t_gflops / compute - 1) < _NEAR:
                shape = dict(zip(DIMENSIONS, sizes, strict=True))
                there = Shape(**(predicted.as_dict() | shape))
                forecast = float(law.error(sizes, compute)) if law is not None else None
                move = moved(there, predicted) if sizes != _key(predicted) else PREDICTED
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
