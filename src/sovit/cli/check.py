"""``sovit check``: what speaks against a sweep's answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sovit.cli.options import add_metric, add_retried, chosen_metric, positive
from sovit.metric import words

if TYPE_CHECKING:
    from sovit.analysis.points import Point

EPILOG = """what is checked, each with a p-value or an interval and the effect it would have seen:
  quasiconvex      the error at fixed compute falls and then rises, with no second dip (arms; pairs of a grid)
  center           the exponent without the sizes next to the star's center
  star NAME        the exponent against that of another star (further directories)
  shots, data sets the exponent by other metrics of the same runs; domains, tasks: with metric=multitask
  held out         the largest budgets and the best size there, predicted from the smaller ones
  influence        the run whose absence moves the exponent most
  laws             other forms of the law, by what they predict
"""


def add(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check",
        help="what speaks against a sweep's answer: second dips, center, metrics, extrapolation, single runs, other laws",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("runs", type=Path, help="directory of a sweep's runs, such as runs/star_tiny")
    check.add_argument("others", type=Path, nargs="*", help="directories of other stars to compare it with")
    add_metric(check)
    check.add_argument("--center", metavar="WxDxM", help="of the star in RUNS, where its shapes leave it open")
    check.add_argument(
        "--draws", type=positive, default=1000, help="simulated sweeps for a p-value (default: %(default)s)"
    )
    add_retried(check)
    check.add_argument("--json", action="store_true", help="print JSON, with the details behind every row")
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from sovit.analysis.checks import doubts
    from sovit.analysis.forecast.diagonal import is_diagonal
    from sovit.analysis.grid import sweep_kind
    from sovit.analysis.points import dimensions, load_points, metrics, only_vits, parse_dimensions
    from sovit.analysis.scale import scale_of

    directory, metric = arguments.runs, chosen_metric(arguments)
    points, exclusions = load_points(directory, *metric, retried=arguments.retried)
    if not points:
        raise ValueError(f"{directory} holds no finished run; see sovit status {directory}.")
    if is_diagonal(points):
        raise ValueError(f"{directory} is a diagonal; the checks are for stars and grids, see sovit fit {directory}.")
    kind = sweep_kind(points)
    if kind == "star":
        others = _others(directory, arguments.others, metric)
        by_metric = {
            key: load_points(directory, *key, retried=arguments.retried)[0]
            for key in metrics(directory, retried=arguments.retried)
        }
        center = (
            None if arguments.center is None else parse_dimensions("--center", arguments.center, dimensions(points[0]))
        )
        found = doubts.check_star(
            points,
            center,
            metric=metric,
            by_metric=by_metric,
            others=others,
            scales={key: scale_of(directory, *key, group) for key, group in by_metric.items()},
            draws=arguments.draws,
        )
    elif arguments.others or arguments.center:
        what = "other directories" if arguments.others else "--center"
        raise ValueError(f"{directory} is a {kind}; {what} can be given for a star only.")
    else:
        only_vits(points, "check of a grid")
        scale = scale_of(directory, *metric, points)
        found = doubts.check_grid(points, scale=scale, draws=min(arguments.draws, 400))
    found = {"sweep": directory.resolve().name, "metric": {"dataset": metric[0], "shots": metric[1]}} | found
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    left_out = f", {len(exclusions)} runs left out" if exclusions else ""
    print(f"{found['sweep']}: {words(*metric)}, {len({p.run_id for p in points})} runs{left_out}\n")
    print(doubts.text(found))
    return 0


def _others(directory: Path, others: list[Path], metric: tuple[str, int]) -> dict[str, list[Point]]:
    from sovit.analysis.grid import sweep_kind
    from sovit.analysis.points import load_points

    found = {}
    for other in others:
        if other.resolve() == directory.resolve():
            raise ValueError(f"{other} is the sweep itself; give another star to compare it with.")
        points, _ = load_points(other, *metric)
        if not points:
            raise ValueError(f"{other} holds no finished run; see sovit status {other}.")
        if sweep_kind(points) != "star":
            raise ValueError(f"{other} is no star; exponents are compared between stars.")
        found[str(other)] = points
    return found
