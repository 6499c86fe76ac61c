"""``sovit compare``: do the exponents of two stars differ, or those of one star by two metrics?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import add_metric, add_retried, chosen_metric
from sovit.metric import Metric, label, parse, words

if TYPE_CHECKING:
    from sovit.analysis.comparison import Paired
    from sovit.analysis.points import AnyDimensions, Point
    from sovit.analysis.star import StarFit

_SAME_T = 1.05  # computes within 5% are the same: steps are rounded

EPILOG = """for each dimension the ratio and the difference of the two exponents with 95% intervals, a test of no
difference (Holm's correction over the dimensions), and the ratio such stars would show four times in five.
What differs between the configurations is listed; lay a difference to one thing only where one thing differs.

one star, two metrics of its runs: sovit compare runs/star_multitask --metrics fractals multitask
for each dimension the ratio of the exponents (1: parallel paths) and of the best sizes at equal compute (1: the same).
"""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="do exponents differ between two stars: other data, resolution or objective",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("first", type=Path, metavar="RUNS", help="directory of a star's runs, such as runs/star_quick")
    command.add_argument(
        "second", type=Path, nargs="?", metavar="RUNS", help="directory of the star to compare it with"
    )
    command.add_argument(
        "--metrics", nargs=2, metavar="METRIC",
        help="two metrics of the first star instead, such as fractals@10 multitask (DATASET is DATASET@10)",
    )  # fmt: skip
    add_metric(command)
    command.add_argument("--center", metavar="WxDxM", help="of the star of --metrics, where its shapes leave it open")
    command.add_argument(
        "--same-compute", action="store_true", help="use only the range of compute that both stars have"
    )
    command.add_argument(
        "--no-power", action="store_true", help="leave out the ratios that would be seen (some seconds)"
    )
    add_retried(command)
    command.add_argument("--json", action="store_true", help="print comparison.json instead of the text")
    command.add_argument(
        "--out", type=Path,
        help="directory of the report (default: FIRST-vs-SECOND, or FIRST-METRIC-vs-METRIC, beside the first)",
    )  # fmt: skip
    command.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from sovit.analysis.report import contents_compare as report

    if arguments.metrics:
        return _metrics(arguments)
    if arguments.second is None:
        raise ValueError(
            "one star is given; give the directory of another, or two metrics of it such as --metrics fractals multitask."
        )
    if arguments.center is not None:
        raise ValueError("--center is for --metrics; two stars must show theirs.")
    arguments.dataset, arguments.shots = chosen_metric(arguments)
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


def _metrics(arguments: argparse.Namespace) -> int:
    from sovit.analysis.report import contents_compare, contents_domains

    directory = arguments.first
    if arguments.second is not None:
        raise ValueError(f"--metrics are two of one star; leave out {arguments.second}, or --metrics.")
    foreign = {"--shots": arguments.shots is not None, "--same-compute": arguments.same_compute}
    for option in (option for option, given in foreign.items() if given):
        raise ValueError(f"{option} has no meaning with --metrics; write DATASET@SHOTS for shots, and leave it out.")
    pair = parse(arguments.metrics[0]), parse(arguments.metrics[1])
    if pair[0] == pair[1]:
        raise ValueError(f"{label(*pair[0])} is given twice; give two metrics, such as fractals@10 and multitask.")
    found = _found_domains(arguments, pair)
    names = "-vs-".join(label(*one).replace("@", "-") for one in pair)
    out = arguments.out or directory.resolve().parent / f"{directory.resolve().name}-{names}"
    page = contents_domains.write(found, out)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(contents_domains.text(found))
    print(f"\n{out / contents_compare.FILES[0]}, {page}")
    return 0


def _found_domains(arguments: argparse.Namespace, pair: tuple[Metric, Metric]) -> dict[str, Any]:
    """The content of comparison.json for two metrics. Raises ValueError for what cannot be compared."""
    from sovit.analysis import domains
    from sovit.analysis.points import load_points, plain
    from sovit.analysis.report.page import read_runs
    from sovit.analysis.report.summary import baselines
    from sovit.analysis.scale import scale_of
    from sovit.analysis.star import fit_star

    directory = arguments.first
    runs = read_runs(directory) if directory.is_dir() else []
    stars, about = [], []
    for one in pair:
        points, exclusions = load_points(directory, *one, retried=arguments.retried)
        _only_star(directory, points)
        made = fit_star(
            points,
            sweep=directory.resolve().name,
            center=_center(arguments.center, points),
            dataset=one[0],
            shots=one[1],
            exclusions=exclusions,
            scale=scale_of(directory, *one, points),
        )
        stars.append((made, points))
        fit = made.as_dict()
        keys = ("metric", "level", "arms", "points", "center", "warnings")
        known = {"name": words(*one), "label": label(*one), "to_beat": baselines(fit, runs)}
        about.append(_about(directory, made, points) | known | {"fit": {key: fit[key] for key in keys}})
    compared = domains.beside(stars[0], stars[1], draws=200 if arguments.no_power else domains.DRAWS)
    notes = []
    if about[0]["num_left_out"] or about[1]["num_left_out"]:
        left_out = [f"{one['num_left_out']} for {one['label']}" for one in about]
        notes.append(f"Runs left out: {left_out[0]}, {left_out[1]}; sovit fit says why.")
    if any("simulated" in run for run in runs):
        notes.append("These runs were simulated: their values were drawn from laws that are known.")
    return {
        "schema": domains.SCHEMA,
        "kind": "metrics",
        "sweep": directory.resolve().name,
        "first": about[0],
        "second": about[1],
        "level": stars[0][0].level,
        **plain(compared),
        "notes": notes,
        "command": ["sovit", *sys.argv[1:]],
    }


def _center(text: str | None, points: list[Point]) -> AnyDimensions | None:
    from sovit.analysis.points import dimensions, parse_dimensions

    return None if text is None else parse_dimensions("--center", text, dimensions(points[0]))


def _found(arguments: argparse.Namespace) -> dict[str, Any]:
    """The content of comparison.json. Raises ValueError for sweeps that cannot be compared."""
    from sovit.analysis import comparison, settings
    from sovit.analysis.points import plain
    from sovit.analysis.scale import scale_of
    from sovit.analysis.star import fit_star

    directories = (arguments.first, arguments.second)
    if directories[0].resolve() == directories[1].resolve():
        raise ValueError(
            f"{directories[0]} is given twice; --metrics compares two metrics of one sweep, and sovit check all of them."
        )
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
        (
            fit_star(
                points,
                sweep=directory.resolve().name,
                exclusions=exclusions,
                scale=scale_of(directory, arguments.dataset, arguments.shots, points),
            ),
            points,
        )
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
    from sovit.analysis.points import load_points

    points, exclusions = load_points(directory, arguments.dataset, arguments.shots, retried=arguments.retried)
    _only_star(directory, points)
    return points, exclusions


def _only_star(directory: Path, points: list[Point]) -> None:
    """Raise ValueError if there is nothing to compare, or it is no star's."""
    from sovit.analysis.forecast.diagonal import is_diagonal
    from sovit.analysis.grid import sweep_kind

    if not points:
        raise ValueError(f"{directory} holds no finished run; see sovit status {directory}.")
    kind = "diagonal" if is_diagonal(points) else sweep_kind(points)
    if kind != "star":
        raise ValueError(f"{directory} is a {kind}; exponents are compared of stars.")


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
