"""The report of a sweep's fit: plain text for the terminal, and one HTML page that needs nothing beside it.

Both are made from the dict of `analysis.star` or `analysis.grid` (the content of fit.json) and the runs' records
(`read_runs`), and compute nothing that is not there. The template escapes everything except the figures drawn here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sovit import records
from sovit.analysis import summary

COLUMNS, MAX_WARNINGS, MAX_EXCLUDED = 100, 6, 5  # of the text; the page holds everything


def read_runs(sweep_dir: Path) -> list[dict[str, Any]]:
    """The records of every run of ``runs/<name>`` by run id, each with its evaluations of the random
    initialisation as "init". Raises ValueError for a record that is no JSON."""
    found = []
    for path in sorted(sweep_dir.glob(f"*/{records.RUN}")):
        record = records.read_run(path.parent)
        if record is not None:
            first = [row for row in records.read_lines(path.with_name(records.EVALS)) if row["step"] == 0]
            found.append(record | {"init": first})
    return found


def text(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The result for the terminal: about 40 lines of at most 100 columns, in plain characters.

    ``fit``: the dict of a star or a grid; ``runs``: the sweep's records from `read_runs`, failed runs included.
    """
    lines = _star_text(fit) if fit["kind"] == "star" else _grid_text(fit)
    known = summary.baselines_in_words(fit, runs)
    if known:
        lines += ["", f"to beat: {known}"]
    left_out = _left_out_lines(fit)
    if left_out:
        lines += ["", "left out:", *(f"  {line}" for line in left_out)]
    warnings = fit["warnings"]
    notes = [*warnings[:MAX_WARNINGS], *summary.trust(fit, runs)]
    if len(warnings) > MAX_WARNINGS:
        notes.insert(MAX_WARNINGS, f"and {len(warnings) - MAX_WARNINGS} more warnings, in the report")
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(part for line in lines for part in _wrap(_printable(line)))


def _star_text(fit: dict[str, Any]) -> list[str]:
    center = summary.shape_name(fit["center"])
    lines = [f"{fit['sweep']}: {summary.metric_name(fit)}, center {center}; the best size grows as t^s", ""]
    header = ("", "s", f"{summary.level(fit)} interval", "cut-offs", "parabola", "inside", "verdict")
    rows = [header]
    reasons = []
    for row in summary.headline(fit):
        if row["identified"]:
            cells = (row["arm"], row["s"], row["interval"], row["cutoffs"], row["parabola"], row["inside"])
            first, *more = textwrap.wrap(row["verdict"], 28)
            rows.append((*cells, first))
            rows += [("", "", "", "", "", "", line) for line in more]
        else:
            reasons.append(f"{row['arm']}  not identified: {row['why']}")
    if len(rows) > 1:
        lines += _table(rows)
    lines += reasons
    checks = summary.center_checks(fit)
    if checks:
        lines += ["", "center, held out of every fit: measured error against what each arm's law predicts"]
        lines += [
            f"  {row['t']:>8} GFLOPs  {row['measured']}  "
            + "  ".join(f"{arm} {predicted}" for arm, predicted in row["predicted"].items())
            for row in checks[-3:]
        ]
    return lines


def _grid_text(fit: dict[str, Any]) -> list[str]:
    keys = {"t": "GFLOPs", "best": "best shape", "error": "error", "runner_up": "runner-up", "lead": "lead",
            "edge": "at an edge", "shapes": "shapes"}  # fmt: skip
    rows = [tuple(keys.values()), *(tuple(row[key] for key in keys) for row in summary.winners(fit))]
    lines = [f"{fit['sweep']}: {summary.metric_name(fit)}, the best shape at each compute", "", *_table(rows), ""]
    return [*lines, summary.origin(fit), *fit["extend"]]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_report(fit: dict[str, Any], runs: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write ``report.html``, which refers to no other file, and its main figure as ``fit.png`` into ``out``.

    Arguments as of `text`; returns the path of the page.
    """
    from sovit.analysis import figures

    out.mkdir(parents=True, exist_ok=True)
    if fit["kind"] == "star":
        drawn = {
            "slices": figures.error_by_dimension(fit),
            "compute": figures.error_by_compute(fit, summary.baselines(fit, runs)),
            "optimum": figures.optimum_by_compute(fit),
        }
    else:
        drawn = {"grid": figures.grid_errors(fit)}
    figures.png(next(iter(drawn.values())), out / "fit.png")
    path = out / "report.html"
    path.write_text(page(fit, runs, {name: figures.svg(figure) for name, figure in drawn.items()}))
    return path


def page(fit: dict[str, Any], runs: Sequence[dict[str, Any]], drawn: Mapping[str, str]) -> str:
    """The HTML page around figures that are drawn already (name -> <svg>, put in as they are)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("sovit.analysis", "."),
        autoescape=True,  # for a template of any name, or a reason holding markup would become part of the page
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    star = fit["kind"] == "star"
    return environment.get_template("report.html.j2").render(
        star=star,
        title=fit["sweep"],
        metric=summary.metric_name(fit),
        center=summary.shape_name(fit.get("center")),
        percent=summary.level(fit),
        headline=summary.headline(fit) if star else [],
        winners=[] if star else summary.winners(fit),
        origin="" if star else summary.origin(fit),
        extend=fit.get("extend", []),
        seeds=summary.by_seed(fit),
        choices=summary.choices(fit),
        laws=summary.law_rows(fit),
        trust=summary.trust(fit, runs),
        warnings=fit["warnings"],
        baselines=summary.baselines_in_words(fit, runs),
        checks=summary.center_checks(fit),
        runs=summary.run_rows(fit, runs),
        left_out=summary.left_out(fit),
        excluded=fit["excluded"],
        checklist=summary.flatten(fit.get("fit", {})),
        provenance=summary.provenance(runs),
        common=summary.common_config(runs),
        figures={name: Markup(figure) for name, figure in drawn.items()},
    )


def _left_out_lines(fit: dict[str, Any]) -> list[str]:
    lines = [f"{count} points of {runs}: {why}" for why, count, runs in summary.left_out(fit)]
    excluded = fit["excluded"]
    lines += [f"{run['run_id']}: {run['reason']}" for run in excluded[:MAX_EXCLUDED]]
    return lines + ([f"and {len(excluded) - MAX_EXCLUDED} more runs"] if len(excluded) > MAX_EXCLUDED else [])


def _printable(line: str) -> str:
    """A line without characters that could drive a terminal (records are untrusted)."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _wrap(line: str) -> Iterable[str]:
    indent = len(line) - len(line.lstrip(" -"))
    return textwrap.wrap(line, COLUMNS, subsequent_indent=" " * indent, drop_whitespace=True) or [""]
