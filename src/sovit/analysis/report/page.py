"""The report of a fit: plain text for the terminal, and one HTML page with a Markdown and a JSON twin.

All are made from the dict of a fit (the content of fit.json) and the runs' records (`read_runs`), and compute nothing
that a reader could not recompute from these. The page needs nothing beside it: figures are inline, there is no script,
and its Content-Security-Policy allows one style sheet, by its digest. Everything that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit import records
from sovit.analysis.points import read_rows
from sovit.analysis.report import summary
from sovit.metric import ERROR, kind_of

if TYPE_CHECKING:
    from sovit.analysis.report.document import Document

COLUMNS, MAX_WARNINGS, MAX_EXCLUDED = 100, 6, 5  # of the text; the page holds everything
PAGE, MARKDOWN, JSON, FIGURE = "report.html", "report.md", "report.json", "fit.png"


def read_runs(sweep_dir: Path) -> list[dict[str, Any]]:
    """The records of every run of ``runs/<name>`` by run id, each with its evaluations of the random initialisation as
    "init" and, as "metrics", what its evaluations have in common for each data set and number of shots.

    What cannot be read is left out here: `load_points` has refused it, or the run counts for nothing and is listed.
    """
    found = []
    for path in sorted(sweep_dir.glob(f"*/{records.RUN}")):
        record, rows = _read(path.parent)
        if record is not None:
            first = [row for row in rows if row["step"] == 0]
            found.append(record | {"init": first, "metrics": _metrics(rows)})
    return found


def _read(run_dir: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    try:
        record = records.read_run(run_dir)
    except ValueError:
        return None, []
    if record is None or not isinstance(record.get("config") or {}, dict):
        return None, []
    record = {"run_id": run_dir.name} | record
    try:
        return record, read_rows(run_dir / records.EVALS)
    except ValueError:
        return record, []


def _metrics(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and number of shots: draws, range of l2, weights, image size, most images seen, and the
    number of test images, which is error (1 - error) / stderr^2 of the recorded binomial standard error."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] > 0:
            groups.setdefault((row["dataset"], row["shots"]), []).append(row)
    found = []
    for (dataset, shots), group in groups.items():
        ridges = [row["l2_reg"] for row in group if isinstance(row.get("l2_reg"), int | float)]
        tests = sorted(
            row["error"] * (1 - row["error"]) / row["stderr"] ** 2
            for row in group
            if row.get("stderr") and row.get("error") and 0 < row["error"] < 1 and kind_of(dataset, shots) == ERROR
        )
        found.append(
            {
                "dataset": dataset,
                "shots": shots,
                "draws": len({row.get("draw") for row in group}),
                "l2_reg": [min(ridges), max(ridges)] if ridges else [],
                "weights": sorted({str(row["weights"]) for row in group if row.get("weights")}),
                "image_size": group[0].get("image_size"),
                "examples_seen": max((row.get("examples_seen") or 0 for row in group), default=0),
                "num_test": round(tests[len(tests) // 2]) if tests and math.isfinite(tests[-1]) else None,
            }
        )
    return found


def text(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The result for the terminal: about 40 lines of at most 100 columns, in plain characters.

    ``fit``: the dict of a fit of any kind; ``runs``: the sweep's records from `read_runs`, failed runs included.
    """
    lines = {"star": _star_text, "grid": _grid_text, "diagonal": _diagonal_text, "joint": _joint_text}[fit["kind"]](fit)
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
    from sovit.analysis.report.words import shape, value_of

    center = shape(fit["center"])
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
        value = value_of(fit)
        lines += ["", f"center, held out of every fit: measured {value} against what each arm's law predicts"]
        lines += [
            f"  {row['t']:>8} GFLOPs  {row['measured']}  "
            + "  ".join(f"{arm} {predicted}" for arm, predicted in row["predicted"].items())
            for row in checks[-3:]
        ]
    return lines


def _grid_text(fit: dict[str, Any]) -> list[str]:
    from sovit.analysis.report.contents_grid import origin, winners

    titles = {"t": "GFLOPs", "best": "best shape", "error": "error", "runner_up": "runner-up", "lead": "lead",
              "smooth": "smoothed", "edge": "at an edge", "shapes": "shapes"}  # fmt: skip
    found = winners(fit)
    keys = [key for key in titles if any(key in row for row in found)]
    rows = [tuple(titles[key] for key in keys), *(tuple(row.get(key, "-") for key in keys) for row in found)]
    lines = [f"{fit['sweep']}: {summary.metric_name(fit)}, the best shape at each compute", "", *_table(rows), ""]
    return [*lines, origin(fit), *fit["extend"]]


def _diagonal_text(fit: dict[str, Any]) -> list[str]:
    from sovit.analysis.report.contents_budget import step_sentences
    from sovit.analysis.report.words import shape

    head = f"{fit['sweep']}: {summary.metric_name(fit)}, along one direction from {shape(fit['origin'])}"
    return [head, "", *(sentence for _, sentence in step_sentences(fit))]


def _joint_text(fit: dict[str, Any]) -> list[str]:
    from sovit.analysis.report.contents_budget import joint_sentences
    from sovit.analysis.report.words import ARMS, exponent, interval, number

    lines = [f"{', '.join(fit['sweeps'])}: {summary.metric_name(fit)}, one law for whole shapes", ""]
    if fit["exponents"]:
        rows = [("", "grows as t^", f"{summary.level(fit)} interval")]
        rows += [(arm, exponent(s["estimate"]), interval(s)) for arm, s in fit["exponents"].items()]
        lines += [*_table(rows), ""]
        for row in fit["optimum"]:
            sizes = " x ".join(number(row[arm]) for arm in ARMS)
            lines.append(f"  {number(row['t_gflops']):>10} GFLOPs  best {sizes}")
        lines.append("")
    return [*lines, *(sentence for _, sentence in joint_sentences(fit))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_report(fit: dict[str, Any], runs: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write ``report.html``, which refers to no other file, its twins ``report.md`` and ``report.json``, and the main
    figure as ``fit.png`` into ``out``.

    Arguments as of `text`; returns the path of the page.
    """
    from sovit.analysis.report import drawing, plates
    from sovit.analysis.report.contents import contents
    from sovit.analysis.report.document import as_json

    out.mkdir(parents=True, exist_ok=True)
    made = contents(fit, runs)
    main = plates.main_figure(fit)
    if main:
        drawing.png(main[1], out / FIGURE)
    (out / JSON).write_text(json.dumps(as_json(made), indent=1) + "\n", encoding="utf-8")
    (out / MARKDOWN).write_text(markdown(made, main[0] if main else ""), encoding="utf-8")
    path = out / PAGE
    path.write_text(page(made, plates.panels(made, fit, runs)), encoding="utf-8")
    return path


def page(document: Document, figures: Mapping[str, str]) -> str:
    """The HTML page around figures that are drawn already (panel name -> <svg>, put in as they are)."""
    from markupsafe import Markup

    from sovit.analysis.report.drawing import RAMPS, STEPS, palette

    light, dark = palette()
    ramps = [f"{name}-{step}" for name in RAMPS for step in range(STEPS)]
    css = _template("report.css.j2").render(light=light, dark=dark, ramps=ramps)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    drawn = {name: Markup(figure) for name, figure in figures.items()}
    blank = {name: "" for part in (document.first, *(s.blocks for s in document.sections)) for name in _names(part)}
    html = _template("report.html.j2").render(doc=document, figures=blank | drawn, css=Markup(css), css_digest=digest)
    return html.lstrip()


def _names(blocks: Iterable[Any]) -> list[str]:
    return [name for block in blocks if block.kind == "figure" for name, _ in block.panels]


def markdown(document: Document, main_figure: str = "") -> str:
    """The Markdown twin; the figure of that name is shown as ``fit.png``, the others are named."""
    made = _template("report.md.j2").render(doc=document, main_figure=main_figure)
    return re.sub(r"\n{3,}", "\n\n", made).strip() + "\n"


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sovit.analysis.report", "."),
        autoescape=name.endswith(".html.j2"),  # only there is text markup; a fit's text never gets into the style sheet
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": escape_markdown, "md_code": _code_markdown}
    return environment.get_template(name)


def escape_markdown(text: str) -> str:
    """Plain text for Markdown: every character that could start markup, a table cell, HTML or a link is escaped."""
    escaped = re.sub(r"[\\`*\[\]<>|~$&!#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    escaped = re.sub(r"(?i)\b(https?|ftp|mailto|javascript|data|vbscript|file):", r"\1\\:", escaped)
    return re.sub(r"(?i)\bwww\.", r"www\\.", re.sub(r"^(\s*)([-+=]|\d+[.)])(?=\s|$)", r"\1\\\2", escaped)).replace(
        "@", "\\@"
    )


def _code_markdown(text: str) -> str:
    """A code span; text that holds backticks or bars, which end spans and cells, is escaped plain text instead."""
    return f"`{text}`" if text.strip() and not set(text) & set("`|\\") else escape_markdown(text)


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
