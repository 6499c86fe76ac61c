"""``sovit fit``: exponents or the best shape from the records of a sweep."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import DEFAULT_METRIC, positive

if TYPE_CHECKING:
    from sovit.analysis.grid import GridFit
    from sovit.analysis.points import Dimensions, Point
    from sovit.analysis.star import StarFit


def add(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser("fit", help="scaling exponents or the best shape from the runs of a sweep")
    fit.add_argument("runs", type=Path, help="directory of a sweep's runs, such as runs/star_tiny")
    fit.add_argument("--dataset", default=DEFAULT_METRIC[0], help="default: %(default)s")
    fit.add_argument("--shots", type=positive, default=DEFAULT_METRIC[1], help="default: %(default)s")
    fit.add_argument("--center", metavar="WxDxM", help="of a star; found from the shapes unless there is one arm only")
    fit.add_argument("--out", type=Path, help="directory for fit.json and the report (default: the runs directory)")
    fit.set_defaults(command=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from sovit.analysis import report

    directory, dataset, shots = arguments.runs, arguments.dataset, arguments.shots
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the directory that holds a sweep's runs.")
    out = arguments.out or directory
    inputs = _fit_inputs(directory, dataset, shots, arguments.center)
    fit = _up_to_date(out, inputs)
    if fit is not None:
        print(report.text(fit, report.read_runs(directory)))
        print(f"\nNothing has changed since the last fit: {out / 'fit.json'}, {out / 'report.html'}")
        return 0

    from sovit import records
    from sovit.analysis.grid import fit_grid, sweep_kind
    from sovit.analysis.points import load_points
    from sovit.analysis.star import fit_star

    points, exclusions = load_points(directory, dataset, shots)
    if not points:
        why = f": {exclusions[0].run_id} is left out ({exclusions[0].reason})" if exclusions else ""
        raise ValueError(f"{directory} holds no finished run{why}; see sovit status {directory}.")
    about: dict[str, Any] = {
        "sweep": directory.resolve().name,
        "dataset": dataset,
        "shots": shots,
        "exclusions": exclusions,
    }
    if sweep_kind(points) == "star":
        found: StarFit | GridFit = fit_star(points, _center(arguments.center, points), **about)
    elif arguments.center:
        raise ValueError(f"--center {arguments.center} is for a star; the runs of {directory} are a grid.")
    else:
        found = fit_grid(points, **about)
    runs = report.read_runs(directory)
    fit = found.as_dict() | {"inputs": inputs}
    out.mkdir(parents=True, exist_ok=True)
    page = report.write_report(fit, runs, out)
    records.write_json(out / "fit.json", fit)  # last: it vouches for the page
    print(report.text(fit, runs))
    print(f"\n{out / 'fit.json'}, {page}")
    return 0


def _center(text: str | None, points: Sequence[Point]) -> Dimensions | None:
    """The center of a star as given, or None to find it. Raises ValueError for one arm without a center."""
    from sovit.analysis.points import DIMENSIONS, Dimensions

    if text is not None:
        if not re.fullmatch(r"[1-9]\d{0,6}x[1-9]\d{0,6}x[1-9]\d{0,6}", text):
            raise ValueError(f"--center {text!r} is no shape; write WIDTHxDEPTHxMLP such as 32x4x128.")
        return Dimensions(*map(int, text.split("x")))
    varied = [name for name in DIMENSIONS if len({getattr(point, name) for point in points}) > 1]
    if len(varied) == 1:
        known = "x".join("?" if name == varied[0] else str(getattr(points[0], name)) for name in DIMENSIONS)
        raise ValueError(
            f"the runs differ in {varied[0]} only, one arm of a star: say which {varied[0]} its center has, "
            f"which no fit uses, with --center {known}."
        )
    return None


def _fit_inputs(directory: Path, dataset: str, shots: int, center: str | None) -> str:
    """Digest of everything a fit depends on: the records, the exclusions, the metric, the center and the code."""
    import hashlib

    from sovit import records
    from sovit.analysis.points import EXCLUSIONS, IMPORTS

    code = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(f"{dataset} {shots} {center} {[path.read_text() for path in code]}".encode())
    files = [
        *directory.glob(f"*/{records.RUN}"),
        *directory.glob(f"*/{records.EVALS}"),
        directory / EXCLUSIONS,
        directory / IMPORTS,
    ]
    for path in sorted(file for file in files if file.is_file()):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def _up_to_date(out: Path, inputs: str) -> dict[str, Any] | None:
    """The fit already written from the same inputs, if its page is there too."""
    try:
        fit = json.loads((out / "fit.json").read_text())
    except (OSError, ValueError):
        return None
    return fit if isinstance(fit, dict) and fit.get("inputs") == inputs and (out / "report.html").exists() else None
