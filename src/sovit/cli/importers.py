"""``sovit published`` and ``sovit import``: numbers that were not made here, and runs that were trained elsewhere."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import positive

if TYPE_CHECKING:
    from sovit.analysis.imports.imported import Imported
    from sovit.analysis.intervals import Interval

COLUMNS, MAX_LEFT_OUT = 100, 10
KINDS = ("csv", "jsonl", "wandb")
UNITS = ("flops", "gflops", "tflops", "pflops", "eflops")


def add(commands: argparse._SubParsersAction) -> None:
    published = commands.add_parser(
        "published",
        help="the laws and rules fitted to published few-shot errors and shapes",
        description="Fit the law's t axis to the published 10-shot errors of Scaling Vision Transformers, and ask which "
        "rule gives back the published shapes of SoViT.",
    )
    published.add_argument("--json", action="store_true", help="print JSON")
    published.set_defaults(command=_published)

    add_import(commands)


def add_import(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "import",
        help="runs trained elsewhere, from a CSV or JSON-lines file or from W&B, as the runs of a sweep",
        description="Write runs/NAME from a table of results, one row an evaluation. sovit fit runs/NAME reads them like "
        "runs that were trained here.",
        epilog="Keys of --map: width, depth, mlp_dim; t (compute) or images, with forward_gflops or --patch and "
        "--image-size; error or accuracy; and if there are any seed, run, duration, draw, stderr, recipe.NAME. Of W&B, "
        "config.NAME and summary.NAME are a run's configuration and summary; every other column is logged over time.",
    )
    command.add_argument("kind", choices=KINDS, help="what is read")
    command.add_argument("source", help="the file, or ENTITY/PROJECT[/SWEEP]")
    command.add_argument("--name", required=True, dest="sweep", help="of the sweep: the runs go to runs/NAME")
    command.add_argument("--map", required=True, action="append", metavar="KEY=COLUMN,...", help="what stands where")
    command.add_argument("--dataset", required=True, help="that the error was measured on")
    command.add_argument("--shots", required=True, type=positive, help="training images a class of the error")
    command.add_argument(
        "--percent", action="store_true", help="error, accuracy and stderr are percent, not shares of 1"
    )
    command.add_argument("--t-unit", choices=UNITS, default="gflops", help="of t (default: %(default)s)")
    command.add_argument("--macs", action="store_true", help="t or forward_gflops counts multiply-adds: double it")
    command.add_argument("--heads", type=positive, help="attention heads")
    command.add_argument("--patch", type=positive, help="patch size in pixels")
    command.add_argument("--image-size", type=positive, help="pixels a side")
    command.add_argument("--channels", type=positive, default=3, help="default: %(default)s")
    command.add_argument("--pool", default="map", help="map, avg or token (default: %(default)s)")
    command.add_argument("--classes", type=int, default=0, help="of a classifier; 0 for none (default)")
    command.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used, and list them")
    command.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
    command.set_defaults(command=_import)


def _published(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sovit.analysis.points import plain
    from sovit.analysis.published import curves as errors
    from sovit.analysis.published import shapes

    found, late = errors.compare(), errors.compare(min_steps=errors.LATE)
    front, shift_p = errors.fit_frontier(), errors.shift_test()
    best = errors.best_models([float(t) for t in np.geomspace(1e8, 1e13, 11)])
    rules, growth = shapes.shape_rules(), shapes.fitted_growth()
    if arguments.json:
        content = {
            "errors": {
                "curves": errors.CURVES,
                "all_durations": found,
                "late_durations": late,
                "shift_p": shift_p,
                "frontier": front,
                "best": best,
                "sovit_c": errors.SOVIT_C,
                "printed_frontier": errors.FRONTIER,
            },
            "shapes": {
                "origin": shapes.ORIGIN,
                "exponents": shapes.EXPONENTS,
                "published": shapes.SHAPES,
                "budgets_gflops": shapes.budgets(),
                "implied_log_factors": shapes.implied_factors(),
                "rules": rules,
                "fitted": growth,
            },
        }
        print(json.dumps(plain(content), indent=1))
        return 0
    lines = [*_error_lines(found, late, front, shift_p), "", *_best_lines(best), "", *_shape_lines(rules, growth)]
    print("\n".join(lines))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from sovit.analysis.imports.imported import build, write
    from sovit.analysis.imports.imported_rows import Options
    from sovit.analysis.imports.importers import parse_map, read_csv, read_jsonl, read_wandb

    columns = parse_map(arguments.map)
    options = Options(
        dataset=arguments.dataset,
        shots=arguments.shots,
        unit=arguments.t_unit,
        macs=arguments.macs,
        percent=arguments.percent,
        num_heads=arguments.heads,
        patch_size=arguments.patch,
        image_size=arguments.image_size,
        channels=arguments.channels,
        pool=arguments.pool,
        num_classes=arguments.classes,
        skip_bad=arguments.skip_bad,
    )
    if arguments.kind == "wandb":
        table = read_wandb(_wandb_api, arguments.source, columns)
    else:
        table = (read_csv if arguments.kind == "csv" else read_jsonl)(Path(arguments.source))
    imported = build(table, columns, arguments.sweep, options)
    directory, num_new = write(imported, arguments.runs_dir)
    print("\n".join(_import_lines(imported, directory, num_new, options)))
    return 0


def _wandb_api() -> Any:
    import wandb

    return wandb.Api()


def _import_lines(imported: Imported, directory: Path, num_new: int, options: Any) -> list[str]:
    """What was imported, what was left out, and the command that fits it."""
    from sovit.analysis.report.words import counted, number, visible

    about, records = imported.about, list(imported.runs.values())
    rows = [row for _, lines in records for row in lines if row["step"] > 0]
    computes, errors = [row["t_gflops"] for row in rows], [row["error"] for row in rows]
    runs = counted(sum(record["status"] == "done" for record, _ in records), "run")
    lines = [
        f"{imported.name}: {runs}, {counted(len(rows), 'evaluation')}, {counted(num_new, 'directory').replace('ys', 'ies')}"
        f" new in {directory}, from {visible(about['source'])} (SHA-256 {about['sha256'][:12]})",
        f"errors {number(min(errors))} to {number(max(errors))}, t = {min(computes):.3g} to {max(computes):.3g} GFLOPs"
        + _how_compute(about["map"], options),
    ]
    lines += [
        f"did not finish: {run} ({record['reason']})" for run, (record, _) in imported.runs.items() if record["reason"]
    ]
    if imported.left_out:
        lines += ["", f"left out, {counted(len(imported.left_out), 'row')}:"]
        lines += [f"  {visible(row.where)} {visible(row.why)}" for row in imported.left_out[:MAX_LEFT_OUT]]
        if len(imported.left_out) > MAX_LEFT_OUT:
            lines.append(f"  and {len(imported.left_out) - MAX_LEFT_OUT} more, in {directory / 'import.json'}")
    lines += ["", *_bullets(imported.notes), *([""] if imported.notes else [])]
    return [*lines, f"sovit fit {directory} --dataset {options.dataset} --shots {options.shots}"]


def _how_compute(columns: dict[str, str], options: Any) -> str:
    """Where t comes from, in words."""
    doubled = ", multiply-adds doubled" if options.macs else ""
    if "t" in columns:
        return f" ({columns['t']} in {options.unit}{doubled})"
    if "forward_gflops" in columns:
        return f" ({columns['images']} x {columns['forward_gflops']}{doubled})"
    return (
        f" ({columns['images']} x the closed form at {options.image_size} px, patch {options.patch_size}, "
        f"{options.channels} channels, pool {options.pool}, {options.num_classes} classes)"
    )


def _error_lines(found: Any, late: Any, front: Any, shift_p: float) -> list[str]:
    """The curves and the frontier; ``found``, ``late``: Comparison, ``front``: FrontierFit."""
    from sovit.analysis.published.curves import FRONTIER, LATE, SOVIT_C, STAR_GFLOPS
    from sovit.analysis.report.words import percent

    again = {fit.model: fit.c for fit in late.fits}
    thousands = f"from {LATE // 1000}K steps"
    rows = [("model", "GFLOPs", "points", "c", "95% interval", thousands, "floor B", "scatter", "last, held out")]
    for fit in found.fits:
        rows.append(
            (
                fit.model, f"{fit.forward_gflops:g}", str(fit.num_points), f"{fit.c.estimate:.2f}", _ends(fit.c),
                f"{again[fit.model].estimate:.2f} {_ends(again[fit.model])}" if fit.model in again else "-",
                f"{fit.floor:.3f}", percent(fit.sigma, sign=False), percent(fit.held_out),
            )
        )  # fmt: skip
    table = _table(rows)
    printed = front.printed
    top = [value for value, run in zip(printed, front.runs, strict=True) if run[0] >= 3e10]
    low = [value for value, run in zip(printed, front.runs, strict=True) if run[0] < 1e10]
    overlap = found.mean.lo <= SOVIT_C.hi and SOVIT_C.lo <= found.mean.hi
    agrees = found.at_star.lo <= SOVIT_C.hi and SOVIT_C.lo <= found.at_star.hi
    moved = [
        f"{fit.model} from {fit.c.estimate:.2f} to {again[fit.model].estimate:.2f}"
        for fit in found.fits
        if fit.model in again and not fit.c.lo <= again[fit.model].estimate <= fit.c.hi
    ]
    notes = [
        f"Mean of the models: c = {found.mean.estimate:.2f} {_ends(found.mean)}, the models being the units; "
        f"{late.mean.estimate:.2f} {_ends(late.mean)} {thousands}. SoViT states 0.65 ± 0.06 for all dimensions: the "
        f"intervals {'overlap' if overlap else 'do not overlap'}.",
        f"One c for all models is {_rejected(found)}; {thousands}, {_rejected(late)}. The first p takes all models to "
        "scatter alike, the second does not.",
        f"c is larger for larger models: d log c / d log GFLOPs = {found.trend.estimate:.3f} {_ends(found.trend, 3)}; "
        f"{late.trend.estimate:.3f} {_ends(late.trend, 3)} {thousands}. At {STAR_GFLOPS:g} GFLOPs, about the middle of "
        f"SoViT's star, the trend has c = {found.at_star.estimate:.2f} {_ends(found.at_star)}, which "
        f"{'agrees' if agrees else 'does not agree'} with SoViT's. It was seen in the table, not foretold, and the models "
        "differ in patch and data too; but a law with one c for all sizes is not what these curves show.",
        *(
            [
                f"Without the runs below {LATE // 1000}K steps c moves beyond its interval for {', '.join(moved)}: the "
                "intervals hold only if the law does, from the first point on."
            ]
            if moved
            else []
        ),
        f"Neighbouring residuals correlate by {found.lag1:+.2f}, where fitting white noise leaves "
        f"{found.lag1_expected:+.2f}: no sign that the points of a curve deviate together. One run a model cannot show "
        "how far another run of it would deviate.",
        f"A shift d of compute, (t + d)^-c, does not improve the curves (F test, p {_equals(shift_p)}).",
        f"Frontier of all runs, E = a (t + d)^-b + c: b = {front.b.estimate:.2f} {_ends(front.b)}, "
        f"c = {front.floor.estimate:.3f} {_ends(front.floor, 3)}, over compute. The paper prints b = {FRONTIER['b']:g} and "
        f"c = {FRONTIER['c']:g}, over TPU core-days. With core-days from compute at ViT-g/14's rate, its law is off by "
        f"{percent(min(top))} to {percent(max(top))} above 3e10 GFLOPs and by {percent(min(low))} to "
        f"{percent(max(low))} below 1e10: over FLOPs the frontier is another curve than over core-days.",
    ]
    return [
        "10-shot ImageNet error of single models at several durations, one run each (arXiv 2106.04560)",
        "f(t) = A t^-c + B, t = forward GFLOPs per image x images",
        "",
        *table,
        "",
        *_bullets(notes),
    ]


def _rejected(found: Any) -> str:
    verdict = "rejected" if max(found.f_p, found.q_p) < 0.05 else "not rejected"
    return f"{verdict} (F test p {_equals(found.f_p)}, Cochran's Q p {_equals(found.q_p)})"


def _equals(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.1g}"


def _best_lines(best: Sequence[Any]) -> list[str]:
    rows = [("t in GFLOPs", "best", "10-shot error", "next")]
    for row in best:
        behind = [f"{model} {error:.3f}" for model, error in zip(row.models[1:3], row.errors[1:3], strict=True)]
        rows.append((f"{row.t_gflops:.1e}", row.models[0], f"{row.errors[0]:.3f}", ", ".join(behind) or "-"))
    return [
        "The best model at equal compute, interpolated along each curve",
        "",
        *_table(rows),
        "",
        *_bullets(
            [
                "Compute moves the best model from large patches to small ones as well as from small sizes to large: the "
                "x axis here is no shape dimension. Leads below 0.006 are within two standard errors of 50,000 images."
            ]
        ),
    ]


def _shape_lines(rules: Sequence[Any], growth: dict[str, Interval]) -> list[str]:
    """The shapes of SoViT; ``rules``: ShapeRule."""
    from sovit.analysis.published.shapes import EXPONENTS, ORIGIN, SHAPES, budgets, implied_factors

    named = ["x".join(map(str, sizes)) for sizes in SHAPES.values()]
    rows = [("rule", "fitted", "t0 in GFLOPs", *(f"{shape} {text}" for shape, text in zip(SHAPES, named, strict=True)))]
    for rule in rules:
        made = [" ".join(f"{_signed(100 * value)}%" for value in errors) for errors in rule.errors.values()]
        rows.append((rule.name, str(rule.num_fitted), f"{rule.t0_gflops:.2g}", *made))
    implied = [
        f"{shape} {' / '.join(f'{value:.2f}' for value in factors['t^(s/3)'])}"
        for shape, factors in implied_factors().items()
    ]
    by_name = {rule.name: rule for rule in rules}
    free, third = by_name["t^e, fitted exponents e"], by_name["t^(s/3)"]
    t0 = growth["t0_gflops"]
    notes = [
        f"t^s with s = {', '.join(f'{s:g}' for s in EXPONENTS)} is out. t^(s/3) fits to {abs(100 * third.worst):.0f}% at "
        f"worst, with t0 = {third.t0_gflops:.2g} GFLOPs; log (t / t0) would have to be, by width / depth / MLP dimension, "
        f"{'; '.join(implied)}: three different computes.",
        "Four fitted numbers give all six sizes back within their rounding, "
        + ", ".join(f"{name} t^{_short(growth[name], 3)}" for name in ("width", "depth", "mlp_dim"))
        + f", t0 = {t0.estimate:.1e} [{t0.lo:.1e}, {t0.hi:.1e}]: three times those exponents are "
        + ", ".join(f"{3 * value:.2f}" for value in free.exponents)
        + ". The intervals are what the rounding of the six sizes leaves open, not how sure the exponents are.",
        "Depth grew less than the printed exponents say, by more than their rounding. Which weights or unrounded exponents "
        "were used is not published.",
    ]
    target = ", ".join(f"{name} {t:.3g}" for name, t in budgets().items())
    return [
        f"The shapes of SoViT (arXiv 2305.13035) from {'x'.join(map(str, ORIGIN))}: x_k = x0_k (t / t0)^e_k",
        f"errors of width, depth, MLP dimension; t in GFLOPs: {target}",
        "",
        *_table(rows),
        "",
        *_bullets(notes),
    ]


def _ends(interval: Interval, digits: int = 2) -> str:
    from sovit.analysis.report.words import interval as in_words

    if digits == 2 and interval.lo > 0:
        return in_words({"lo": interval.lo, "hi": interval.hi if interval.hi < float("inf") else None})
    return f"[{interval.lo:.{digits}f}, {interval.hi:.{digits}f}]"


def _signed(value: float) -> str:
    return f"{round(value) + 0.0:+.0f}" if abs(value) >= 0.5 else "0"


def _short(interval: Interval, digits: int) -> str:
    return f"{interval.estimate:.{digits}f} {_ends(interval, digits)}"


def _bullets(notes: Sequence[str]) -> list[str]:
    return [
        line
        for note in notes
        for line in textwrap.wrap(note, COLUMNS, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
