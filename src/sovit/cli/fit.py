"""``sovit fit``: exponents or the best shape from the records of a sweep."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sovit.cli.options import DEFAULT_METRIC, positive


def add(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser("fit", help="scaling exponents or the best shape from the runs of a sweep")
    fit.add_argument("runs", type=Path, help="directory of a sweep's runs, such as runs/star_tiny")
    fit.add_argument("--dataset", default=DEFAULT_METRIC[0], help="default: %(default)s")
    fit.add_argument("--shots", type=positive, default=DEFAULT_METRIC[1], help="default: %(default)s")
    fit.add_argument("--out", type=Path, help="directory for fit.json and the report (default: the runs directory)")
    fit.set_defaults(command=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from sovit.analysis import report

    directory, dataset, shots = arguments.runs, arguments.dataset, arguments.shots
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the directory that holds a sweep's runs.")
    out = arguments.out or directory
    inputs = _fit_inputs(directory, dataset, shots)
    runs = report.read_runs(directory)
    fit = _up_to_date(out, inputs)
    if fit is not None:
        print(report.text(fit, runs))
        print(f"\nNothing has changed since the last fit: {out / 'fit.json'}, {out / 'report.html'}")
        return 0

    from sovit import records
    from sovit.analysis.grid import fit_grid, sweep_kind
    from sovit.analysis.points import load_points
    from sovit.analysis.star import fit_star

    points, exclusions = load_points(directory, dataset, shots)
    if not points:
        raise ValueError(f"{directory} holds no finished run; see sovit status {directory}.")
    fit_sweep = fit_star if sweep_kind(points) == "star" else fit_grid
    found = fit_sweep(points, sweep=directory.resolve().name, dataset=dataset, shots=shots, exclusions=exclusions)
    fit = found.as_dict() | {"inputs": inputs}
    out.mkdir(parents=True, exist_ok=True)
    page = report.write_report(fit, runs, out)
    records.write_json(out / "fit.json", fit)  # last: it vouches for the page
    print(report.text(fit, runs))
    print(f"\n{out / 'fit.json'}, {page}")
    return 0


def _fit_inputs(directory: Path, dataset: str, shots: int) -> str:
    """Digest of everything a fit depends on: the records, the exclusions, the metric and the code."""
    import hashlib

    from sovit import records

    code = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(f"{dataset} {shots} {[path.read_text() for path in code]}".encode())
    files = [*directory.glob(f"*/{records.RUN}"), *directory.glob(f"*/{records.EVALS}"), directory / "exclusions.csv"]
    for path in sorted(file for file in files if file.is_file()):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def _up_to_date(out: Path, inputs: str) -> dict[str, Any] | None:
    """The fit already written from the same inputs, if its page is there too."""
    try:
        fit = json.loads((out / "fit.json").read_text())
    except (OSError, ValueError):
        return None
    return fit if fit.get("inputs") == inputs and (out / "report.html").exists() else None
