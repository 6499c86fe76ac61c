"""``sovit compare``: do the exponents of two stars differ?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import DEFAULT_METRIC, add_retried, positive

if TYPE_CHECKING:
    from sovit.analysis.comparison import Paired
    from sovit.analysis.points import Point
    from sovit.analysis.star import StarFit

_SAME_T = 1.05  # computes within 5% are the same: steps are rounded

EPILOG = """for each dimension the ratio and the difference of the two exponents with 95% intervals, a test of no
difference (Holm's correction over the dimensions), and the ratio such stars would show four times in five.
What differs between the configurations is listed; lay a difference to one thing only where one thing differs.
"""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="do exponents differ between two stars: other data, resolution or objective",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("first", type=Path, metavar="RUNS", help="directory of a star's runs, such as runs/star_quick")
    command.add_argument("second", type=Path, metavar="RUNS", help="directory of the star to compare it with")
    command.add_argument("--dataset", default=DEFAULT_METRIC[0], help="default: %(default)s")
    command.add_argument("--shots", type=positive, default=DEFAULT_METRIC[1], help="default: %(default)s")
    command.add_argument(
        "--same-compute", action="store_true", help="use only the range of compute that both stars have"
    )
    command.add_argument(
        "--no-power", action="store_true", help="leave out the ratios that would be seen (some seconds)"
    )
    add_retried(command)
    command.add_argument("--json", action="store_true", help="print comparison.json instead of the text")
    command.add_argument("--out", type=Path, help="directory of the report (default: FIRST-vs-SECOND beside the first)")
    command.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from sovit.analysis.report import contents_compare as report

    found = _found(arguments)
    first, second = (found[which]["sweep"] for which in ("first", "second"))
    out = arguments.out or arguments.first.resolve().parent / f"{first}-vs-{second}"
    page = report.write(found, out)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(report.text(found))
    print(f"\n{out / report.FILES[0]}, {page}")
    return 0


def _found(arguments: argparse.Namespace) -> dict[str, Any]:
    """The content of comparison.json. Raises ValueError for sweeps that cannot be compared."""
    from sovit.analysis import comparison, settings
    from sovit.analysis.points import plain
    from sovit.analysis.star import fit_star

    directories = (arguments.first, arguments.second)
    if directories[0].resolve() == directories[1].resolve():
        raise ValueError(f"{directories[0]} is given twice; sovit check compares the metrics of one sweep.")
    loaded = [_load(directory, arguments) for directory in directories]
    configurations = [
        settings.configuration(directory, (point.run_id for point in points))
        for directory, (points, _) in zip(directories, loaded, strict=True)
    ]
    _refuse(directories, configurations)
    ranges = [_range(points) for points, _ in loaded]
    if arguments.same_compute:
        loaded = [(_within(points, ranges), exclusions) for points, exclusions in loaded]
    stars = [
        (fit_star(points, sweep=directory.resolve().name, exclusions=exclusions), points)
        for directory, (points, exclusions) in zip(directories, loaded, strict=True)
    ]
    compared = comparison.compare(stars[0], stars[1], power=not arguments.no_power)
    differing = settings.settings(*configurations)
    about = [_about(directory, *star) for directory, star in zip(directories, stars, strict=True)]
    notes = _notes(arguments, differing, configurations, about)
    return {
        "schema": comparison.SCHEMA,
        "kind": "comparison",
        "first": about[0],
        "second": about[1],
        "metric": {"dataset": arguments.dataset, "shots": arguments.shots},
        "level": stars[0][0].level,
        "same_compute": arguments.same_compute,
        "settings": plain(differing),
        **plain(compared),
        "notes": notes,
        "pairing": _pairing(compared.paired, all(one.thing not in ("data", "resolution") for one in differing)),
        "command": ["sovit", *sys.argv[1:]],
    }


def _load(directory: Path, arguments: argparse.Namespace) -> tuple[list[Point], list[Any]]:
    from sovit.analysis.forecast.diagonal import is_diagonal
    from sovit.analysis.grid import sweep_kind
    from sovit.analysis.points import load_points

    points, exclusions = load_points(directory, arguments.dataset, arguments.shots, retried=arguments.retried)
    if not points:
        raise ValueError(f"{directory} holds no finished run; see sovit status {directory}.")
    kind = "diagonal" if is_diagonal(points) else sweep_kind(points)
    if kind != "star":
        raise ValueError(f"{directory} is a {kind}; exponents are compared between two stars.")
    return points, exclusions


def _refuse(directories: tuple[Path, ...], configurations: list[dict[str, Any]]) -> None:
    """Raise ValueError for two stars whose exponents are not of the same thing."""
    families = [found.get("model.family", "vit") for found in configurations]
    if families[0] != families[1]:
        raise ValueError(
            f"{directories[0]} holds models of family {families[0]}, {directories[1]} of {families[1]}; their dimensions do "
            "not mean the same, so their exponents are not compared."
        )
    drawn = [bool(found["simulated"]) for found in configurations]
    if drawn[0] != drawn[1]:
        which = directories[drawn.index(True)]
        raise ValueError(f"{which} is simulated and the other star is not; compare what was measured with its like.")


def _range(points: list[Point]) -> tuple[float, float]:
    return min(point.t_gflops for point in points), max(point.t_gflops for point in points)


def _within(points: list[Point], ranges: list[tuple[float, float]]) -> list[Point]:
    """The points in the compute that both stars have. Raises ValueError if there is none."""
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    kept = [point for point in points if low / _SAME_T <= point.t_gflops <= high * _SAME_T]
    if not kept:
        raise ValueError("the stars share no compute, so --same-compute leaves nothing; leave it out.")
    return kept


def _about(directory: Path, star: StarFit, points: list[Point]) -> dict[str, Any]:
    used = [row["t_gflops"] for row in star.points if row["used"]]
    return {
        "sweep": star.sweep,
        "directory": str(directory),
        "center": "x".join(map(str, star.center.values())),
        "num_runs": len({point.run_id for point in points}),
        "num_left_out": len(star.excluded),
        "seeds": sorted({point.seed for point in points}),
        "compute": [min(used), max(used)] if used else None,
    }


def _notes(
    arguments: argparse.Namespace,
    differing: list[Any],
    configurations: list[dict[str, Any]],
    about: list[dict[str, Any]],
) -> list[str]:
    """What a reader has to know before laying a difference to something."""
    from sovit.analysis.report.words import listed
    from sovit.analysis.settings import other_task

    things = list(dict.fromkeys(one.thing for one in differing))
    centers = [one["center"] for one in about]
    if centers[0] != centers[1]:
        things.append(f"the center ({centers[0]} and {centers[1]}), at which the other dimensions are held")
    ends = [one["compute"] for one in about]
    if all(ends) and any(not 1 / _SAME_T <= ends[0][k] / ends[1][k] <= _SAME_T for k in (0, 1)):
        shown = [f"{low:.3g} to {high:.3g}" for low, high in ends]
        things.append(f"the compute fitted ({shown[0]} and {shown[1]} GFLOPs; --same-compute uses what both have)")
    notes = []
    if len(things) > 1:
        notes.append(f"{len(things)} things differ: {'; '.join(things)}. A difference could come from any of them.")
    unknown = [one["sweep"] for one, found in zip(about, configurations, strict=True) if not found["recorded"]]
    if unknown:
        notes.append(f"What {listed(unknown)} was trained with is not recorded, so what differs is not known.")
    elif not things:
        notes.append("Nothing differs between the configurations: a difference here is chance, machine or code.")
    if other_task(arguments.dataset, differing):
        notes.append(
            f"The few-shot task {arguments.dataset} is itself another one in the two sweeps: what differs may be the task "
            "rather than what was trained."
        )
    left_out = [f"{one['num_left_out']} of {one['sweep']}" for one in about if one["num_left_out"]]
    if left_out:
        notes.append(f"Runs left out: {listed(left_out)}; sovit fit says why.")
    return notes


def _pairing(paired: Paired, same_images: bool) -> str:
    """Whether the stars' runs are independent, as the test takes them, and what it means if not."""
    most = max(paired.num_runs)
    if not paired.num_shared:
        return "The stars share no shape and seed: their runs are independent, as the test takes them."
    shares = "initial weights and training images" if same_images else "seeds"
    said = f"{paired.num_shared} of {most} runs have a twin of the same shape and seed, which shares {shares}."
    if paired.correlation is None:
        return f"{said} The test takes all as independent: conservative if twins are lucky together."
    r = f"{paired.correlation:+.2f} [{paired.lo:+.2f}, {paired.hi:+.2f}]"
    if (paired.lo or 0) > 0:
        verdict = "so the test, which takes runs as independent, is conservative"
    elif (paired.hi or 0) < 0:
        verdict = "so the test, which takes runs as independent, is somewhat too ready to see a difference"
    else:
        verdict = "so nothing speaks against taking runs as independent, as the test does"
    return f"{said} The offsets of twins from their laws correlate by {r}, {verdict}."
