"""``sovit predict``: the shape for a budget, how sure it is, and whole shapes near it."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli import budget, experiment, serving
from sovit.cli.options import DIMENSIONS, above_0, by_dimension, positive
from sovit.metric import place

if TYPE_CHECKING:
    from sovit.analysis.forecast.candidates import Candidate, Regret
    from sovit.analysis.forecast.exponents import Start
    from sovit.analysis.forecast.predict import Forecast

_FITS = {"star": "fit", "grid": "grid", "diagonal": "diagonal", "joint": "joint"}
_DEFAULTS = (("law", "paper"), ("step", "paper"), ("choose", 1))


def add(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict",
        help="the shape for a compute budget, with its uncertainty",
        description="The shape for a compute budget: x_k = x0_k (T/t0)^(s_k w_k), s from a star, x0 and t0 from a grid.",
    )
    fits = predict.add_argument_group("what is known (a fit.json, or the directory that holds one)")
    fits.add_argument("--fit", type=Path, metavar="PATH", help="of a star: the exponents")
    fits.add_argument("--grid", type=Path, metavar="PATH", help="of a grid: the origin x0 and its compute t0")
    fits.add_argument("--diagonal", type=Path, metavar="PATH", help="of a diagonal sweep, for --step fitted")
    fits.add_argument(
        "--joint", type=Path, metavar="PATH", help="of a joint law: for --law flops, or to judge the regret"
    )
    fits.add_argument(
        "--exponents", type=by_dimension, metavar="width=S,...", help="instead of a star's, or single ones"
    )
    fits.add_argument("--origin", type=_sizes, metavar="WxDxM", help="instead of the grid's, such as 608x10x928")
    fits.add_argument("--t0", type=budget.compute, metavar="GFLOPS", help="compute at which the origin is best")

    budget.add(predict)
    rule = predict.add_argument_group("the rule")
    rule.add_argument("--law", choices=("paper", "flops"), default="paper", help="flops: the optimum of --joint")
    rule.add_argument(
        "--step", choices=("paper", "fitted"), default="paper", help="fitted: how far to go is --diagonal's"
    )
    rule.add_argument(
        "--weights", type=by_dimension, metavar="width=W,...", help="of the paper's step (default: 1/3 each)"
    )
    rule.add_argument(
        "--max-extrapolation", type=above_0, metavar="X", help="times the largest compute measured (1000)"
    )
    rule.add_argument("--force", action="store_true", help="go beyond it; replace a file that --write finds")

    sizes = predict.add_argument_group("whole shapes")
    sizes.add_argument("--round-width", type=positive, metavar="N", help="multiples of N (default: 16; 8 if tiny)")
    sizes.add_argument("--round-mlp", type=positive, metavar="N", help="the same for the MLP dimension")
    sizes.add_argument("--round-depth", type=positive, metavar="N", help="default: 1")
    sizes.add_argument("--heads", type=positive, metavar="N", help="at every width (default: that of the runs, or 16)")
    sizes.add_argument("--head-dim", type=positive, metavar="N", help="instead: width / heads")
    sizes.add_argument(
        "--image-size", type=positive, metavar="N", help="pixels a side (default: that of the runs, or 224)"
    )
    sizes.add_argument("--patch", type=positive, metavar="N", help="pixels a side (default: that of the runs, or 14)")
    sizes.add_argument("--channels", type=positive, metavar="N", help="default: that of the runs, or 3")
    sizes.add_argument("--pool", choices=("map", "avg", "token"), help="default: that of the runs, or map")
    sizes.add_argument("--classes", type=int, metavar="N", help="of the classifier (default: that of the runs, or 0)")

    serving.add(predict)
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.add_argument(
        "--write", type=Path, metavar="FILE", help="write a Hydra experiment, conf/experiment/NAME.yaml"
    )
    predict.add_argument(
        "--choose", type=positive, default=1, metavar="N", help="which candidate to write (default: 1)"
    )
    predict.set_defaults(command=_predict)


def _sizes(text: str) -> tuple[int, int, int]:
    from sovit.shape import parse_shape

    try:
        shape = parse_shape(text, num_heads=1, patch_size=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return shape.width, shape.depth, shape.mlp_dim


def _predict(arguments: argparse.Namespace) -> int:
    _check(arguments)
    limited = serving.asked(arguments)
    from sovit.analysis.forecast import exponents as known
    from sovit.analysis.forecast.candidates import candidate, candidates, rounding
    from sovit.analysis.forecast.region import region
    from sovit.cli import prediction

    given = {kind: getattr(arguments, option) for kind, option in _FITS.items()}
    read = {kind: known.read_fit(path, kind) for kind, path in given.items() if path is not None}
    fits = {kind: fit for kind, (_, fit) in read.items()}
    _check_metrics(fits)
    place = experiment.place(_changed(arguments), {kind: file.parent for kind, (file, _) in read.items()}, fits)
    leading = "joint" if arguments.law == "flops" else "diagonal" if arguments.step == "fitted" else "star"
    start = _start(arguments, fits.get("grid")) if leading == "star" else None
    target = budget.target(arguments, start.t0 if start else None, leading == "star")
    extrapolation = _extrapolation(arguments, fits.get(leading), target)
    forecast = _forecast(arguments, fits, leading, start, target)
    regret, regret_by = _regret(fits, forecast, target)
    how = rounding(
        forecast.x, width=arguments.round_width, depth=arguments.round_depth, mlp_dim=arguments.round_mlp,
        usual_heads=place.num_heads, num_heads=arguments.heads, head_dim=arguments.head_dim,
    )  # fmt: skip
    shapes = candidates(forecast.x, how, place.geometry, target=target, regret=regret)
    if arguments.choose > len(shapes):
        raise ValueError(f"--choose {arguments.choose}: there are {len(shapes)} candidates.")
    level = next((fit["level"] for fit in fits.values() if "level" in fit), 0.95)
    content = prediction.content(
        forecast,
        region(forecast, level),
        shapes,
        start=start,
        budget_in_words=budget.in_words(arguments),
        leading=leading,
        regret_by=regret_by,
        extrapolation=extrapolation,
        geometry=place.geometry,
        geometry_from=place.source,
        held_out=_held_out(fits.get(leading)),
    )
    chosen = shapes[arguments.choose - 1]
    if limited:
        content["constraint"], best = serving.constrained(
            arguments, fits, forecast.x, target, how, place.geometry, regret
        )
        chosen = candidate(best, "within the limits", forecast.x, how, place.geometry, target, regret)
    if arguments.write is not None:
        _write(arguments, chosen, place, content)
    print(json.dumps(content, indent=1) if arguments.json else prediction.text(content))
    if arguments.write is not None and not arguments.json:
        print(f"\nWritten: {arguments.write}\n  python -m sovit.train experiment={arguments.write.stem}")
    return 0


def _held_out(fit: Mapping[str, Any] | None) -> list[str]:
    """What the fit's own checks say of predicting its largest budgets from the smaller ones."""
    checks = (fit or {}).get("checks")
    rows = checks.get("rows", []) if isinstance(checks, dict) else []
    return [
        f"{row['subject']}: {row['text']}"
        for row in rows
        if row.get("check") == "held out" and row.get("p") is not None
    ]


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other, have no effect or are missing."""
    fitted, flops = arguments.step == "fitted", arguments.law == "flops"
    if flops and fitted:
        raise ValueError("--law flops has an optimum of its own and no step; leave out --step fitted.")
    if flops or fitted:
        option, needed = ("--law flops", "joint") if flops else ("--step fitted", "diagonal")
        if getattr(arguments, needed) is None:
            raise ValueError(f"{option} needs --{needed} PATH, the fit.json of its sweep.")
        idle = ["grid", "origin", "t0", "weights", "factor", *(("fit", "exponents", "diagonal") if flops else ())]
        for name in idle:
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"--{name} has no meaning with {option}, which does not start from an origin; leave it out."
                )
        if arguments.exponents is not None and arguments.fit is None:
            raise ValueError(
                "--exponents have no meaning with --step fitted, whose fit brings a direction; leave them out."
            )
    else:
        if arguments.grid is not None and arguments.origin is not None and arguments.t0 is not None:
            raise ValueError(
                "--grid has no meaning beside --origin and --t0, which replace all that it says; leave it out."
            )
        if arguments.diagonal is not None:
            raise ValueError("--diagonal has no meaning with the paper's step; add --step fitted, or leave it out.")
        missing = [name for name in DIMENSIONS if name not in (arguments.exponents or {})]
        if arguments.fit is None and missing:
            from sovit.analysis.report.words import listed

            raise ValueError(f"no exponent of {listed(missing)}: give --fit runs/STAR, or --exponents with all three.")
        if arguments.grid is None and arguments.origin is None:
            raise ValueError("no origin: give --grid runs/GRID, or --origin WIDTHxDEPTHxMLP and --t0 GFLOPS.")
        if arguments.weights is not None and len(arguments.weights) < 3:
            raise ValueError("--weights needs all three: width=W,depth=W,mlp=W, which sum to 1 in the paper.")
    if arguments.max_extrapolation and not (fitted or flops or arguments.fit):
        raise ValueError("--max-extrapolation has no meaning without a fit to measure it by; leave it out.")
    if arguments.heads and arguments.head_dim:
        raise ValueError(f"--heads {arguments.heads} and --head-dim {arguments.head_dim}: give one of the two.")
    if arguments.mfu is not None and arguments.mfu > 1:
        raise ValueError(f"--mfu {arguments.mfu:g} is above 1; it is the share of the peak that is reached.")
    if (arguments.tflops or arguments.mfu) and arguments.gpu_hours is None and arguments.write is None:
        raise ValueError("--tflops and --mfu have no meaning without --gpu-hours; leave them out.")
    if arguments.classes is not None and arguments.classes < 0:
        raise ValueError(f"--classes {arguments.classes} is below 0; 0 means no classifier.")
    if arguments.choose != 1 and arguments.write is None:
        raise ValueError("--choose has no meaning without --write; leave it out.")


def _check_metrics(fits: Mapping[str, Mapping[str, Any]]) -> None:
    metrics = {kind: (fit["metric"].get("dataset"), fit["metric"].get("shots")) for kind, fit in fits.items()}
    if len(set(metrics.values())) > 1:
        said = ", ".join(f"the {kind} on {place(*one)}" for kind, one in metrics.items())
        raise ValueError(f"the fits are of different metrics ({said}); fit all of them on one.")


def _changed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The geometry that options set."""
    said = {
        "image_size": arguments.image_size,
        "channels": arguments.channels,
        "pool": arguments.pool,
        "num_classes": arguments.classes,
        "patch_size": arguments.patch,
    }
    return {key: value for key, value in said.items() if value is not None}


def _start(arguments: argparse.Namespace, grid: Mapping[str, Any] | None) -> Start:
    from sovit.analysis.forecast.exponents import Start, grid_origin

    if arguments.origin is not None:
        t0 = arguments.t0
        if t0 is None and grid is not None and grid["origin"]:
            t0 = grid["origin"]["t0_gflops"]
        return Start(tuple(map(float, arguments.origin)), t0)  # type: ignore[arg-type]
    assert grid is not None
    start = grid_origin(grid)
    return start if arguments.t0 is None else replace(start, t0=arguments.t0, draws=())


def _extrapolation(
    arguments: argparse.Namespace, fit: Mapping[str, Any] | None, target: float | None
) -> dict[str, Any] | None:
    """How far beyond the data of the leading fit the forecast lies; None if there is no such fit."""
    from sovit.analysis.forecast.exponents import MAX_EXTRAPOLATION, check_extrapolation, largest_compute

    if fit is None:
        return None
    if target is None:
        raise ValueError("--factor without --t0 does not say how far the forecast lies from the data; give --t0.")
    largest = largest_compute(fit)
    factor = check_extrapolation(target, largest, arguments.max_extrapolation or MAX_EXTRAPOLATION, arguments.force)
    return {
        "factor": factor,
        "largest_t_gflops": largest,
        "fit": fit.get("sweep") or " and ".join(fit.get("sweeps", ())),
    }


def _forecast(
    arguments: argparse.Namespace,
    fits: Mapping[str, Mapping[str, Any]],
    leading: str,
    start: Start | None,
    target: float | None,
) -> Forecast:
    from sovit.analysis.forecast import exponents as known
    from sovit.analysis.forecast.predict import fitted_rule, joint_rule, paper_rule

    if leading == "joint":
        assert target is not None
        return joint_rule(fits["joint"], target)
    exponents = None
    if "star" in fits:
        exponents = known.star_exponents(fits["star"], arguments.exponents)
    elif arguments.exponents is not None and len(arguments.exponents) == 3:
        exponents = {name: known.given(arguments.exponents[name]) for name in DIMENSIONS}
    if leading == "diagonal":
        assert target is not None
        return fitted_rule(fits["diagonal"], target, exponents=exponents)
    assert start is not None and exponents is not None
    factor = arguments.factor or target / start.t0  # type: ignore[operator]
    return paper_rule(exponents, start, factor, weights=arguments.weights)


def _regret(
    fits: Mapping[str, Mapping[str, Any]], forecast: Forecast, target: float | None
) -> tuple[Regret | None, str]:
    """The compute regret of a shape, and in words what it is measured by."""
    from sovit.analysis.forecast.candidates import joint_regret, star_regret

    if target is not None and "joint" in fits:
        from sovit.analysis.forecast.joint import estimate_from

        law = estimate_from(fits["joint"]).law
        best = "x".join(f"{size:.1f}" for size in law.optimum(target))
        return joint_regret(law, target), f"by the law that knows its FLOPs, against its optimum {best}"
    regret = star_regret(fits["star"], forecast.x, target) if target is not None and "star" in fits else None
    return (
        regret,
        "by the star's laws, against the unrounded shape" if regret else "not known without the laws of a star",
    )


def _write(arguments: argparse.Namespace, chosen: Candidate, place: experiment.Place, content: dict[str, Any]) -> None:
    from sovit.cli import prediction

    target = content["t_gflops"]
    if target is None:
        raise ValueError("--write needs the budget in FLOPs: give --t0 beside --origin, or --compute.")
    hours = 3 * target / budget.gflops_per_s(arguments) / 3600
    comment = [
        f"{chosen.dimensions}, predicted for {prediction.gflops(target)} GFLOPs (forward FLOPs per image x images seen).",
        "",
        f"  python -m sovit.train experiment={arguments.write.stem}",
        "",
        f"Cost: {prediction.count(chosen.images)} images at {chosen.forward_gflops:.4g} GFLOPs forward each; training is "
        f"3 x that, {prediction.gflops(3 * target)} GFLOPs,",
        f"or {hours:,.3g} GPU hours at {budget.gflops_per_s(arguments) / 1e3:,.4g} TFLOP/s reached.",
        *(f"Expect: {line}" for line in prediction.expectations(content, chosen)),
        f"Made by: {_command(arguments)}",
    ]
    shape = chosen.shape(place.geometry["patch_size"])
    experiment.write(arguments.write, comment, shape, place.geometry, target, place.recipe, force=arguments.force)


def _command(arguments: argparse.Namespace) -> str:
    """The command that does this again, on one line whatever its paths hold."""
    from sovit.analysis.report.words import visible

    words = ["sovit", "predict"]
    for name, value in vars(arguments).items():
        if name in ("command", "name", "json", "force") or value in (None, False) or (name, value) in _DEFAULTS:
            continue
        if name == "match":
            value = f"{value[0]}:{value[1]:.10g}"
        elif isinstance(value, dict):
            value = ",".join(f"{key}={one if isinstance(one, str) else f'{one:.10g}'}" for key, one in value.items())
        elif isinstance(value, tuple):
            value = "x".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:.10g}"
        words += [f"--{name.replace('_', '-')}", str(value)]
    return visible(shlex.join(words))
