"""``sovit fit``: exponents or the best shape from the records of a sweep."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import add_metric, add_retried, chosen_metric

if TYPE_CHECKING:
    from sovit.analysis.points import AnyDimensions, Dimensions, Exclusion, Point

_SHAPE = re.compile(r"[1-9]\d{0,6}x[1-9]\d{0,6}x[1-9]\d{0,6}")
_DRAWS = 200  # simulated sweeps behind a p-value of the checks; sovit check draws more


def add(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser("fit", help="scaling exponents or the best shape from the runs of a sweep")
    fit.add_argument("runs", type=Path, nargs="+", help="directory of a sweep's runs, such as runs/star_tiny")
    add_metric(fit)
    fit.add_argument("--center", metavar="WxDxM", help="of a star; found from the shapes unless there is one arm only")
    fit.add_argument(
        "--law", choices=("paper", "flops"), default="paper",
        help="flops: one law over several sweeps that knows what a shape costs (default: the paper's, one sweep)",
    )  # fmt: skip
    fit.add_argument(
        "--direction", metavar="FIT|LIST",
        help="of a diagonal: the fit.json of a star, or width=0.22,depth=0.45,mlp=0.6 (default: from the shapes)",
    )  # fmt: skip
    fit.add_argument("--origin", metavar="FIT|WxDxM", help="of a diagonal: the fit.json of a grid, or a shape")
    fit.add_argument(
        "--prior", type=_prior, action="append", default=[], metavar="NAME=VALUE:SPREAD",
        help="a star's a, b or c is known: c=0.65:0.1 is 0.65 give or take a tenth of an e-fold",
    )  # fmt: skip
    fit.add_argument(
        "--share", metavar="LIST", help="fit a star's arms also with c, xi or eps in common, such as c,eps"
    )
    add_retried(fit)
    fit.add_argument("--no-checks", action="store_true", help="leave out the checks of sovit check (some seconds)")
    fit.add_argument("--out", type=Path, help="directory for fit.json and the report (default: the runs directory)")
    fit.set_defaults(command=_fit)


def _prior(text: str) -> tuple[str, float, float]:
    match = re.fullmatch(r"([abc])=([0-9.]+(?:e-?[0-9]+)?):([0-9.]+(?:e-?[0-9]+)?)", text)
    try:
        value, spread = (float(number) for number in match.groups()[1:]) if match else (0.0, 0.0)
    except ValueError:
        value = spread = 0.0
    if not match or not (value > 0 and spread > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no prior; write a, b or c, such as c=0.65:0.1")
    return match[1], value, spread


def _fit(arguments: argparse.Namespace) -> int:
    from sovit.analysis.report import page as report

    directories = arguments.runs
    dataset, shots = arguments.dataset, arguments.shots = chosen_metric(arguments)
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory; give the directory that holds a sweep's runs.")
    first = directories[0]
    if len(directories) > 1 and arguments.law != "flops":
        raise ValueError(f"{len(directories)} sweeps are fitted together by --law flops only; give one, or that.")
    names = [directory.resolve().name for directory in directories]
    joined = first.resolve().parent / "+".join([*names, *(["flops"] if len(names) == 1 else [])])
    out = arguments.out or (joined if arguments.law == "flops" else first)
    inputs = _fit_inputs(arguments)
    fit = _up_to_date(out, inputs)
    if fit is not None:
        print(report.text(fit, _runs(directories)))
        print(f"\nNothing has changed since the last fit: {out / 'fit.json'}, {out / 'report.html'}")
        return 0

    from sovit import records
    from sovit.analysis.points import load_points

    loaded = {directory: load_points(directory, dataset, shots, retried=arguments.retried) for directory in directories}
    for directory, (points, exclusions) in loaded.items():
        if not points:
            why = f": {exclusions[0].run_id} is left out ({exclusions[0].reason})" if exclusions else ""
            raise ValueError(f"{directory} holds no finished run{why}; see sovit status {directory}.")
    found = _joint(arguments, loaded) if arguments.law == "flops" else _one_sweep(arguments, first, *loaded[first])
    runs = _runs(directories)
    fit = found | {"inputs": inputs, "command": ["sovit", *sys.argv[1:]]}
    out.mkdir(parents=True, exist_ok=True)
    page = report.write_report(fit, runs, out)
    records.write_json(out / "fit.json", fit)  # last: it vouches for the page
    print(report.text(fit, runs))
    print(f"\n{out / 'fit.json'}, {page}")
    return 0


def _runs(directories: Sequence[Path]) -> list[dict[str, Any]]:
    from sovit.analysis.report import page as report

    return [run for directory in directories for run in report.read_runs(directory)]


def _one_sweep(
    arguments: argparse.Namespace, directory: Path, points: Sequence[Point], exclusions: Sequence[Exclusion]
) -> dict[str, Any]:
    """The fit.json of a star, a grid or a diagonal, whichever the shapes are."""
    from sovit.analysis.checks import doubts
    from sovit.analysis.fit import Prior
    from sovit.analysis.forecast.diagonal import fit_diagonal, is_diagonal
    from sovit.analysis.grid import fit_grid, load_shots, sweep_kind
    from sovit.analysis.points import only_vits
    from sovit.analysis.scale import scale_of
    from sovit.analysis.star import fit_star

    metric = {"dataset": arguments.dataset, "shots": arguments.shots}
    scale = scale_of(directory, arguments.dataset, arguments.shots, points)
    about: dict[str, Any] = {"sweep": directory.resolve().name, "exclusions": exclusions, "scale": scale} | metric
    kind = "diagonal" if is_diagonal(points) else sweep_kind(points)
    if kind != "star":
        only_vits(points, f"fit of a {kind}")
    of_a_star = {"--center": arguments.center, "--prior": arguments.prior, "--share": arguments.share}
    of_a_diagonal = {"--direction": arguments.direction, "--origin": arguments.origin}
    foreign = (of_a_star if kind != "star" else {}) | (of_a_diagonal if kind != "diagonal" else {})
    for option, value in foreign.items():
        if value:
            raise ValueError(
                f"{option} is for a {'star' if option in of_a_star else 'diagonal'}; {directory} is a {kind}."
            )
    if kind == "diagonal":
        direction, origin = _direction(arguments.direction), _origin(arguments.origin)
        return fit_diagonal(points, direction=direction, origin=origin, **about).as_dict()
    if kind == "grid":
        found = fit_grid(
            points, by_shots=load_shots(directory, arguments.dataset, retried=arguments.retried), **about
        ).as_dict()
        return (
            found if arguments.no_checks else found | {"checks": doubts.check_grid(points, scale=scale, draws=_DRAWS)}
        )
    center = _center(arguments.center, points)
    priors = {name: Prior(value, spread) for name, value, spread in arguments.prior}
    share = [name.strip() for name in arguments.share.split(",")] if arguments.share else ()
    found = fit_star(points, center, priors=priors or None, share=share, **about).as_dict()
    if arguments.no_checks:
        return found
    from sovit.analysis.points import load_points, metrics

    by_metric = {
        key: load_points(directory, *key, retried=arguments.retried)[0]
        for key in metrics(directory, retried=arguments.retried)
    }
    key = (arguments.dataset, arguments.shots)
    scales = {other: scale_of(directory, *other, group) for other, group in by_metric.items()}
    checks = doubts.check_star(points, center, metric=key, by_metric=by_metric, scales=scales, draws=_DRAWS)
    return found | {"checks": checks}


def _joint(
    arguments: argparse.Namespace, loaded: Mapping[Path, tuple[Sequence[Point], Sequence[Exclusion]]]
) -> dict[str, Any]:
    """The fit.json of the law that knows its FLOPs, over all sweeps."""
    from sovit.analysis.forecast.joint import fit_joint, read_geometry
    from sovit.analysis.points import only_vits
    from sovit.analysis.scale import scale_of

    for points, _ in loaded.values():
        only_vits(points, "law that knows what a shape costs")
    directory, (points, _) = next(iter(loaded.items()))
    for option in ("center", "direction", "origin", "prior", "share"):
        if getattr(arguments, option):
            raise ValueError(f"--{option} has no meaning for --law flops; leave it out.")
    return fit_joint(
        {directory.resolve().name: points for directory, (points, _) in loaded.items()},
        read_geometry(list(loaded)),
        dataset=arguments.dataset,
        shots=arguments.shots,
        exclusions=[one for _, exclusions in loaded.values() for one in exclusions],
        scale=scale_of(directory, arguments.dataset, arguments.shots, points),
    ).as_dict()


def _direction(text: str | None) -> dict[str, float] | None:
    """Exponents of a diagonal's direction, from a star's fit.json or as given; None to deduce it."""
    from sovit.analysis.forecast.diagonal import star_direction
    from sovit.analysis.forecast.exponents import read_fit
    from sovit.cli.options import by_dimension

    if text is None:
        return None
    if "=" not in text:
        return star_direction(read_fit(Path(text), "star")[1])
    try:
        return by_dimension(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--direction {error}") from None


def _origin(text: str | None) -> Dimensions | None:
    """A diagonal's shape at G = 1, from a grid's fit.json or as given; None for the smallest."""
    from sovit.analysis.forecast.diagonal import grid_origin
    from sovit.analysis.forecast.exponents import read_fit
    from sovit.analysis.points import parse_dimensions, vit_dimensions

    if text is None:
        return None
    return (
        vit_dimensions(parse_dimensions("--origin", text))
        if _SHAPE.fullmatch(text)
        else grid_origin(read_fit(Path(text), "grid")[1])
    )


def _center(text: str | None, points: Sequence[Point]) -> AnyDimensions | None:
    """The center of a star as given, or None to find it. Raises ValueError for one arm without a center."""
    from sovit.analysis.points import dimensions, parse_dimensions

    like = dimensions(points[0])
    if text is not None:
        return parse_dimensions("--center", text, like)
    varied = [name for name in like._fields if len({getattr(point, name) for point in points}) > 1]
    if len(varied) == 1:
        known = "x".join("?" if name == varied[0] else str(getattr(points[0], name)) for name in like._fields)
        raise ValueError(
            f"the runs differ in {varied[0]} only, one arm of a star: say which {varied[0]} its center has, "
            f"which no fit uses, with --center {known}."
        )
    return None


def _fit_inputs(arguments: argparse.Namespace) -> str:
    """Digest of everything a fit depends on: the records, the exclusions, the options and the code."""
    import hashlib

    from sovit import records
    from sovit.analysis.points import EXCLUSIONS, IMPORTS

    options = {key: str(value) for key, value in vars(arguments).items() if key not in ("command", "out")}
    sources = Path(__file__).parents[1]
    code = [path.read_text() for path in sorted([*sources.rglob("*.py"), *sources.rglob("*.j2")])]
    digest = hashlib.sha256(f"{options} {code}".encode())
    files = [Path(text, "fit.json") if Path(text).is_dir() else Path(text) for text in _named_files(arguments)]
    for directory in arguments.runs:
        files += [*directory.glob(f"*/{records.RUN}"), *directory.glob(f"*/{records.EVALS}")]
        files += [directory / EXCLUSIONS, directory / IMPORTS]
    for path in sorted(file for file in files if file.is_file()):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def _named_files(arguments: argparse.Namespace) -> list[str]:
    return [text for text in (arguments.direction, arguments.origin) if text and "=" not in text]


def _up_to_date(out: Path, inputs: str) -> dict[str, Any] | None:
    """The fit already written from the same inputs, if its page is there too."""
    try:
        fit = json.loads((out / "fit.json").read_text())
    except (OSError, ValueError):
        return None
    return fit if isinstance(fit, dict) and fit.get("inputs") == inputs and (out / "report.html").exists() else None
