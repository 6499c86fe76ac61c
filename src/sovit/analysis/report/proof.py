"""The report of `sovit optimize`: did the predicted shape win, by how much, and where did the law fail.

Text, page and picture are made from the dict that `sovit.analysis.proof.evidence.gather` leaves in proof.json.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.analysis.proof.rivals import CONVENTIONAL, NEIGHBOUR, PREDICTED, PUBLISHED, SAME_PARAMETERS
from sovit.analysis.report import drawing
from sovit.analysis.report.document import (
    Cell,
    Column,
    Document,
    Figure,
    Paragraph,
    Table,
    as_json,
    bullets,
    document,
    section,
)
from sovit.analysis.report.page import COLUMNS, JSON, MARKDOWN, PAGE, markdown, page
from sovit.analysis.report.words import counted, listed, number, shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

PICTURE = "fit.png"
_WHO = {
    CONVENTIONAL: "conventional proportions with heads of 64",
    SAME_PARAMETERS: "conventional proportions of its size",
    PUBLISHED: "the published exponents",
    NEIGHBOUR: "its best neighbour",
}
_PANELS = {
    "ends": "error at the budget, by shape: each seed, the mean and its interval",
    "ways": "error against compute",
}


def write(found: dict[str, Any], out: Path) -> Path:
    """Write report.html, its twins and the picture into ``out``; returns the path of the page."""
    made = _document(found)
    picture = _picture(found)
    drawing.png(picture, out / PICTURE)
    (out / JSON).write_text(json.dumps(as_json(made), indent=1) + "\n", encoding="utf-8")
    (out / MARKDOWN).write_text(markdown(made, "figure"), encoding="utf-8")
    path = out / PAGE
    drawn = {name: drawing.svg(_picture(found, (name,)), name, label) for name, label in _PANELS.items()}
    path.write_text(page(made, drawn), encoding="utf-8")
    return path


def text(found: dict[str, Any]) -> str:
    """The result for the terminal, at most 100 columns."""
    header = ("", "shape", "parameters", "GFLOPs", "error", "over predicted", "verdict")
    rows = [header]
    for row in found["rows"]:
        rows.append((
            row["role"], shape(row["shape"]), f"{row['num_params']:,}", number(row["forward_gflops"]),
            _error(row), _ratio(row), _verdict(row, row["shape"] == found["rows"][0]["shape"]),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    told = [sentence for _, sentence in sentences(found)]
    notes = [f"- {note}" for note in _notes(found)]
    return "\n".join([_lead(found), "", *lines, "", *(_wrapped([*told, "", *notes]))])


def sentences(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(tone, sentence): whether the prediction won against each rival, the local grid last, and where the law failed."""
    told: list[tuple[str, str]] = []
    rivals = [row for row in found["rows"] if row["role"] != PREDICTED]
    won = [row for row in rivals if row["predicted_is_better"] is True]
    lost = [row for row in rivals if row["predicted_is_better"] is False]
    open_ = [row for row in rivals if row["ratio"] and row["predicted_is_better"] is None]
    same = [row for row in rivals if not row["ratio"] and row["shape"] == found["rows"][0]["shape"]]
    if won:
        told.append(("good", "The predicted shape beats " + _listed(won) + "."))
    if open_:
        told.append(("", "The runs do not tell it from " + _listed(open_) + "."))
    if lost:
        told.append(("bad", "The predicted shape LOSES to " + _listed(lost) + "."))
    if same:
        told.append(("", f"The predicted shape is also that of {listed([_who(row) for row in same])}."))
    least = min((row for row in found["rows"] if row["error"]["estimate"]), key=lambda row: row["error"]["estimate"])
    told.append(("", f"Least mean error: {least['role']}, {shape(least['shape'])}, {_error(least)}."))
    best = next((row for row in rivals if row["role"] == NEIGHBOUR), None)
    if best is not None and best["ratio"] and best["ratio"]["lo"]:
        most = 1 / best["ratio"]["lo"] - 1
        how = f"at most {most:.1%} higher" if most > 0 else f"at least {-most:.1%} lower"
        said = {True: "It is better than", None: "It is within the noise of", False: "It is worse than"}
        told.append((
            "bad" if best["predicted_is_better"] is False else "good",
            f"{said[best['predicted_is_better']]} the best of its local grid, {shape(best['shape'])}: its error is {how} "
            f"({found['level']:.0%}, all rivals at once).",
        ))  # fmt: skip
    told += [("doubt", sentence) for sentence in _failures(found)]
    return told


def _failures(found: dict[str, Any]) -> list[str]:
    """Where a rival that the prediction does not beat did otherwise than the law foretold, beyond the noise; and how far
    the law's own forecast of the prediction is off."""
    told = []
    for row in found["rows"]:
        ratio, expected = row["ratio"], row["forecast_ratio"]
        if not ratio or expected is None or ratio["lo"] is None or row["predicted_is_better"] is True:
            continue
        if not ratio["lo"] <= expected <= ratio["hi"]:
            told.append(
                f"The law failed at {shape(row['shape'])} ({row['role']}): it expected {expected:.2f} times the predicted "
                f"shape's error and the runs say {_ratio(row)}."
            )
    first = found["rows"][0]
    if first["forecast"] is not None and first["error"]["estimate"]:
        off = first["error"]["estimate"] / first["forecast"] - 1
        told.append(
            f"The law foretold an error of {number(first['forecast'])} for the predicted shape: it is {off:+.1%} off."
        )
    return told


def _lead(found: dict[str, Any]) -> str:
    far = (found["prediction"].get("extrapolation") or {}).get("factor")
    reach = f", {far:.3g} times the largest compute of the sweeps" if far else ""
    metric = found["metric"]
    return (
        f"{found['sweep']}: {metric['shots']}-shot error on {metric['dataset']} at {found['t_gflops']:,.4g} GFLOPs "
        f"each{reach}"
    )


def _notes(found: dict[str, Any]) -> list[str]:
    seeds = max(row["num_seeds"] for row in found["rows"])
    few = "One seed" if seeds == 1 else "Too few runs"
    notes = [f"{few}: no spread between runs is known, so nothing can be told apart."]
    if found["spread"] is not None:
        notes = [
            f"Intervals are over {seeds} seeds, simultaneous for all rivals; spread between runs {found['spread']:.1%} on "
            f"{found['degrees']} degrees of freedom."
        ]
    if found["num_test_stderr"]:
        notes.append(
            "All shapes share the test images and the draws of the support, whose own luck (up to "
            f"{found['num_test_stderr']:.3f} of an error) is in no interval."
        )
    notes.append("GFLOPs are forward, an image; at equal compute a cheaper shape sees more images.")
    notes += [f"{row['role']}: {row['why']}." for row in found["rows"] if row["role"] != PREDICTED]
    notes += [f"{row['role']} has {counted(row['num_seeds'], 'seed')} only." for row in _short(found)]
    if all(row["role"] != NEIGHBOUR for row in found["rows"]):
        notes.append("No neighbour has finished, so nothing is known of the local grid.")
    notes += [f"left out: {one['run_id']}: {one['reason']}" for one in found["lost"]]
    return notes


def _short(found: dict[str, Any]) -> list[dict[str, Any]]:
    most = max(row["num_seeds"] for row in found["rows"])
    return [row for row in found["rows"] if row["num_seeds"] < most]


def _listed(rows: Sequence[dict[str, Any]]) -> str:
    named = [f"{_who(row)} ({shape(row['shape'])}, {_ratio(row)} times its error)" for row in rows]
    return listed(named)


def _who(row: dict[str, Any]) -> str:
    return _WHO.get(row["role"], row["role"])


def _error(row: dict[str, Any]) -> str:
    error = row["error"]
    if error["estimate"] is None:
        return "-"
    return number(error["estimate"]) + (f" [{number(error['lo'])}, {number(error['hi'])}]" if error["lo"] else "")


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    if not ratio:
        return "-"
    return f"{ratio['estimate']:.2f}" + (f" [{ratio['lo']:.2f}, {ratio['hi']:.2f}]" if ratio["lo"] else "")


def _verdict(row: dict[str, Any], same: bool) -> str:
    """``same``: the row has the predicted shape."""
    if row["role"] == PREDICTED:
        return ""
    if not row["ratio"]:
        return "no finished run" if not row["num_seeds"] else "the same shape" if same else "no seed in common"
    return {True: "worse", False: "BETTER", None: "not told apart"}[row["predicted_is_better"]]


def _document(found: dict[str, Any]) -> Document:
    tone = {True: "", False: "bad", None: "soft"}
    columns = (
        Column("role", ""), Column("shape", "shape"), Column("params", "parameters", True),
        Column("gflops", "GFLOPs an image", True), Column("seeds", "seeds", True),
        Column("error", "error", True), Column("ratio", "over predicted", True), Column("verdict", "verdict"),
        Column("forecast", "law foretold", True),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(row["role"]), Cell(shape(row["shape"]), row["shape"], code=True),
            Cell(f"{row['num_params']:,}", row["num_params"]),
            Cell(number(row["forward_gflops"]), row["forward_gflops"]),
            Cell(str(row["num_seeds"]), row["num_seeds"]), Cell(_error(row), row["error"]), Cell(_ratio(row), row["ratio"]),
            Cell(
                _verdict(row, row["shape"] == found["rows"][0]["shape"]),
                row["predicted_is_better"], tone[row["predicted_is_better"]],
            ),
            Cell(number(row["forecast"]), row["forecast"]),
        )
        for row in found["rows"]
    )  # fmt: skip
    proof = Table("proof", columns, rows, "Everyone at the same compute")
    around = Table(
        "local",
        (Column("shape", "shape"), Column("moved", "against the prediction"), Column("error", "error", True),
         Column("forecast", "law foretold", True)),
        tuple(
            (Cell(shape(row), code=True), Cell(row["moved"]), Cell(number(row["error"]), row["error"]),
             Cell(number(row["forecast"]), row["forecast"]))
            for row in found["local"]
        ),
        "One seed each, which is not among the seeds of the proof: it only elects the neighbour to beat",
    )  # fmt: skip
    exponents = Table(
        "exponents",
        (Column("arm", "dimension"), Column("s", "exponent", True), Column("interval", "interval", True),
         Column("verdict", "verdict")),
        tuple(
            (Cell(row["arm"]), Cell(row["s"] or "-"), Cell(row["interval"] or "-"), Cell(row["verdict"] or row["why"] or ""))
            for row in found["exponents"]
        ),
        "The star's exponents",
    )  # fmt: skip
    caption = "Left: error at the budget, each seed and the mean with its interval. Right: error on the way there."
    figure = Figure("figure", caption, tuple(_PANELS.items()))
    return document(
        "proof",
        found["sweep"],
        _lead(found) + ". The shape that the sweeps predict, against what people would have picked.",
        [Cell(sentence, tone=tone_) for tone_, sentence in sentences(found)],
        [proof],
        [
            section("errors", "Error at equal compute", figure),
            section("local", "The local grid", around if found["local"] else None),
            section("sweeps", "What the prediction rests on", exponents, *_rests(found)),
            section("notes", "How far to trust it", bullets(_notes(found))),
        ],
    )


def _rests(found: dict[str, Any]) -> list[Paragraph]:
    prediction = found["prediction"]
    best = " x ".join(number(prediction["optimum"][name]) for name in ("width", "depth", "mlp_dim"))
    rule = {"flops": "the law that knows its FLOPs", "paper": "the paper's rule, t^(s/3) from the grid's origin"}
    said = f"Rule: {rule.get(prediction['rule'], prediction['rule'])}; unrounded {best}"
    box = (prediction.get("region") or {}).get("box")
    if box:
        ends = " x ".join(f"[{number(box[n]['lo'])}, {number(box[n]['hi'])}]" for n in ("width", "depth", "mlp_dim"))
        said += f", {prediction['region']['level']:.0%} region {ends}"
    return [Paragraph(said + ".")]


def _picture(found: dict[str, Any], panels: Sequence[str] = tuple(_PANELS)) -> Drawing:
    """Every seed's error with the mean's interval by shape, and error against compute: one panel or both."""
    from matplotlib.figure import Figure as Drawing

    rows = [row for row in found["rows"] if row["error"]["estimate"]]
    colors = _colors(rows)
    with drawing.style():
        figure = Drawing(figsize=(5.2 * len(panels), 3.7), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, name in zip(axes, panels, strict=True):
            (_ends if name == "ends" else _ways)(axis, found, rows, colors)
    return figure


def _ends(axis: Any, found: dict[str, Any], rows: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    for place, row in enumerate(reversed(rows)):
        error, color = row["error"], colors[row["role"]]
        if error["lo"]:
            axis.plot(
                [error["lo"], error["hi"]], [place] * 2, color=color, linewidth=3, solid_capstyle="butt", alpha=0.5
            )
        axis.plot(list(row["errors"].values()), [place] * len(row["errors"]), "|", color=color, markersize=9)
        axis.plot(error["estimate"], place, "D", color=color, markersize=6)
    axis.set_yticks(range(len(rows)), [f"{row['role']}\n{shape(row['shape'])}" for row in reversed(rows)])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_title(f"at {found['t_gflops']:,.4g} GFLOPs each")
    axis.set_xlabel(f"{found['metric']['shots']}-shot error")
    ends = [
        value for row in rows for value in (*row["errors"].values(), row["error"]["lo"], row["error"]["hi"]) if value
    ]
    drawing.log_axis(axis.xaxis, min(ends) / 1.08, min(1.0, max(ends) * 1.08))


def _ways(axis: Any, found: dict[str, Any], rows: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    points = [point for row in rows for point in row["curve"]]
    for row in reversed(rows):  # the predicted one on top
        axis.plot(
            [point["t_gflops"] for point in row["curve"]], [point["error"] for point in row["curve"]],
            color=colors[row["role"]], marker="o", markersize=3.5, linewidth=2.2 if row["role"] == PREDICTED else 1.3,
            label=row["role"],
        )  # fmt: skip
    axis.set_title("on the way there")
    axis.set_xlabel("compute t, GFLOPs")
    axis.set_ylabel(f"{found['metric']['shots']}-shot error")
    if points:
        times, errors = [point["t_gflops"] for point in points], [point["error"] for point in points]
        drawing.log_axis(axis.xaxis, min(times) / 1.1, max(times) * 1.1)
        drawing.log_axis(axis.yaxis, min(errors) / 1.08, min(1.0, max(errors) * 1.08))
        handles, labels = axis.get_legend_handles_labels()
        axis.figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, handlelength=1.4)


def _colors(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    others = [row["role"] for row in rows if row["role"] != PREDICTED]
    shown = drawing.ramp(others, "size")
    return {PREDICTED: drawing.ACCENT} | {role: drawing.color(shown[role]) for role in others}


def _wrapped(lines: Sequence[str]) -> list[str]:
    made: list[str] = []
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        made += textwrap.wrap(line, COLUMNS, subsequent_indent=indent) or [""]
    return made
