"""The comparison of two stars (`sovit.analysis.comparison`) as text for the terminal and as a report's document."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.analysis.report.document import (
    Cell,
    Column,
    Document,
    Figure,
    Section,
    Table,
    as_json,
    bullets,
    document,
    section,
    table,
)
from sovit.analysis.report.words import ARMS, exponent, interval, listed, number, span, visible
from sovit.metric import words

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLUMNS = 100
FILES = ("comparison.json", "report.html", "report.md", "report.json")
_TAKEN_FOR_NONE = 0.05


def verdict(found: dict[str, Any]) -> str:
    """The answer in a sentence, with the power that a silence has."""
    tested = {name: one for name, one in found["dimensions"].items() if one["p"] is not None}
    if not tested:
        return "Nothing could be compared: no dimension has an exponent in both stars."
    differ = [name for name, one in tested.items() if one["p_holm"] <= _TAKEN_FOR_NONE]
    together = f"(all dimensions together p = {p_text(found['omnibus_p'])})"
    if differ:
        said = listed([f"{ARMS.get(name, name)} by a factor of {ratio_text(tested[name]['ratio'])}" for name in differ])
        return f"The exponents differ: {said} {together}."
    if found["omnibus_p"] <= _TAKEN_FOR_NONE:
        return f"The exponents differ as a whole {together}; no dimension does by itself."
    return f"No difference is shown {together}. {_power(tested)}"


def _power(tested: dict[str, Any]) -> str:
    if any(one["seen"] is None for one in tested.values()):
        return "How large a one would have been seen was not asked for."
    said = [f"{ARMS.get(name, name)} {seen_text(one['seen'])}" for name, one in tested.items()]
    return f"Ratios that such stars would show four times in five: {'; '.join(said)}."


def seen_text(ends: list[float | None]) -> str:
    """The ratios, below 1 and above, that would be seen."""
    low, high = ends
    if not low and not high:
        return "none up to a factor of 30"
    return f"{number(low, 2) if low else 'none below 1'} or {number(high, 2) if high else 'none above 1'}"


def ratio_text(found: dict[str, Any]) -> str:
    """An estimate with its interval, whose open ends are said to be open."""
    hi = number(found["hi"], 2) if found["hi"] is not None else "open"
    return f"{number(found['estimate'], 2)} [{number(found['lo'], 2) if found['lo'] else 'open'}, {hi}]"


def _change(found: dict[str, Any]) -> str:
    ends = [f"{end:+.2f}" if end is not None else "open" for end in (found["lo"], found["hi"])]
    return f"{found['estimate']:+.2f} [{ends[0]}, {ends[1]}]"


def s_text(found: dict[str, Any] | None) -> str:
    """An exponent with its interval."""
    return f"{exponent(found['estimate'])} {interval(found)}" if found else "-"


def p_text(p: float | None) -> str:
    """A p-value, never as 0."""
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def differs(found: dict[str, Any]) -> list[str]:
    """What differs between the sweeps, a clause for each thing."""
    things: dict[str, list[str]] = {}
    for one in found["settings"]:
        things.setdefault(one["thing"], []).append(f"{one['key']} {_value(one['first'])} -> {_value(one['second'])}")
    return [f"{thing} ({', '.join(keys)})" for thing, keys in things.items()]


def _value(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, bool | list) else str(value)


def text(found: dict[str, Any]) -> str:
    """The comparison for the terminal."""
    names = [found[which]["sweep"] for which in ("first", "second")]
    metric = words(found["metric"]["dataset"], found["metric"]["shots"])
    lines = [f"{names[0]} and {names[1]}: {metric}; the best size grows as t^s", ""]
    lines += [f"what differs: {'; '.join(differs(found)) or 'nothing in the configurations'}", ""]
    asked = any(one["seen"] for one in found["dimensions"].values())
    rows = [("", *names, "ratio of s", "difference", "p", "p (Holm)")]
    for name, one in found["dimensions"].items():
        if one["p"] is not None:
            values = (ratio_text(one["ratio"]), _change(one["change"]), p_text(one["p"]), p_text(one["p_holm"]))
            rows.append((name, s_text(one["first"]), s_text(one["second"]), *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) > 1:
        table_lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [*table_lines, ""]
    for name, one in found["dimensions"].items():
        if one["p"] is None:
            lines += [f"{name}  not compared: {one['why']}", ""]
    lines += [verdict(found), ""]
    if asked and not verdict(found).startswith("No difference"):
        tested = {name: one for name, one in found["dimensions"].items() if one["p"] is not None}
        lines += [_power(tested), ""]
    lines += [f"- {note}" for note in (*found["notes"], found["pairing"])]
    wrapped = []
    for line in map(visible, lines):
        if line.startswith((" ", *found["dimensions"])) and "not compared" not in line:
            wrapped.append(line)
        else:
            indent = "  " if line.startswith("- ") else ""
            wrapped += textwrap.wrap(line, COLUMNS, subsequent_indent=indent) or [""]
    return "\n".join(wrapped)


def comparison(found: dict[str, Any]) -> Document:
    """The report of a comparison's dict (comparison.json)."""
    names = [found[which]["sweep"] for which in ("first", "second")]
    metric = words(found["metric"]["dataset"], found["metric"]["shots"])
    lead = (
        f"Two star sweeps, {metric}. For each dimension the best size is taken to grow with compute t as t^s; the ratio is "
        f"{names[1]}'s exponent over {names[0]}'s."
    )
    untested = {name: one["why"] for name, one in found["dimensions"].items() if one["p"] is None}
    doubts = [f"{ARMS.get(name, name)} is not compared: {why}." for name, why in untested.items()] + found["notes"]
    quiet = verdict(found).startswith("No difference")
    answer = [Cell(verdict(found), tone="" if quiet else "good")]
    return document(
        "comparison",
        f"{names[0]} and {names[1]}",
        lead,
        answer,
        [_table(found), _figure(found), bullets([Cell(note, tone="doubt") for note in doubts])],
        [_settings(found), _how(found)],
    )


def _table(found: dict[str, Any]) -> Table | None:
    level = f"{found['level']:.0%}"
    columns = (
        Column("dimension", "dimension"),
        Column("first", found["first"]["sweep"]),
        Column("second", found["second"]["sweep"]),
        Column("ratio", "ratio of s"),
        Column("change", "difference of s"),
        Column("p", "p", True),
        Column("p_holm", "p, Holm", True),
        Column("seen", "seen 4 in 5"),
    )
    rows = []
    for name, one in found["dimensions"].items():
        title = Cell(ARMS.get(name, name), tone="strong")
        ends = [Cell(s_text(one[which]), one[which]) for which in ("first", "second")]
        if one["p"] is None:
            rows.append((title, *ends, *[Cell("-")] * 4, Cell("not compared", tone="bad")))
            continue
        tone = "good" if one["p_holm"] <= _TAKEN_FOR_NONE else ""
        seen = Cell(seen_text(one["seen"]), one["seen"]) if one["seen"] else Cell("not asked for")
        rows.append(
            (title, *ends, Cell(ratio_text(one["ratio"]), one["ratio"], tone), Cell(_change(one["change"]), one["change"]),
             Cell(p_text(one["p"]), one["p"]), Cell(p_text(one["p_holm"]), one["p_holm"], tone), seen)
        )  # fmt: skip
    caption = (
        f"Intervals are {level}. p: of no difference; Holm: corrected for the number of dimensions. Seen: ratios that a "
        "test at 5% of these stars' design and noise finds with a chance of 80%."
    )
    return table("differences", columns, rows, caption, stacks=True)


def _figure(found: dict[str, Any]) -> Figure | None:
    tested = [name for name, one in found["dimensions"].items() if one["p"] is not None]
    if not tested:
        return None
    said = "; ".join(f"{ARMS.get(name, name)} {ratio_text(found['dimensions'][name]['ratio'])}" for name in tested)
    return Figure(
        "ratios",
        "The ratio of the exponents with its interval; the dashed line is no difference. The grey bar ends at the nearest "
        "ratios that would be seen four times in five; between them one is missed more often.",
        (("ratios", f"Ratio of exponents with intervals: {said}."),),
    )


def _settings(found: dict[str, Any]) -> Section:
    columns = (
        Column("thing", "what"), Column("key", "key"), Column("first", found["first"]["sweep"]),
        Column("second", found["second"]["sweep"]),
    )  # fmt: skip
    rows: list[Sequence[Cell | str]] = [
        (
            one["thing"],
            Cell(one["key"], code=True),
            Cell(_value(one["first"]), one["first"]),
            Cell(_value(one["second"]), one["second"]),
        )
        for one in found["settings"]
    ]
    for key, title in (
        ("center", "center"),
        ("num_runs", "runs"),
        ("seeds", "seeds"),
        ("compute", "compute fitted, GFLOPs"),
    ):
        ends = [found[which][key] for which in ("first", "second")]
        shown = [span(end) if key == "compute" else _value(end) for end in ends]
        rows.append(("design", title, *(Cell(words, end) for words, end in zip(shown, ends, strict=True))))
    return section("settings", "What differs", table("settings", columns, rows, stacks=True))


def _how(found: dict[str, Any]) -> Section:
    return section(
        "method",
        "How it is tested",
        bullets(
            [
                "Each star is fitted as sovit fit does: an offset per run on top of the noise of an evaluation.",
                "Ratio and difference are tested by Welch's t on log s, with each star's own standard error, or its profile "
                "interval where that is not symmetric.",
                found["pairing"],
                "All dimensions together: the sum of squares of their t, against that of independent t.",
                "Ratios that would be seen: both stars drawn again from their laws and noise, the second with another "
                "exponent, fitted again and tested.",
                "Size, coverage and power by simulation: benchmarks/comparing.md.",
            ]
        ),
    )


def ratios_figure(found: dict[str, Any], of: str = "exponents s") -> Drawing:
    """Forest plot of the ratios, with what would have been missed behind them."""
    from matplotlib.figure import Figure as Canvas

    from sovit.analysis.report.drawing import ACCENT, GREY, INK, LINE, log_axis, style

    tested = {name: one for name, one in found["dimensions"].items() if one["p"] is not None}
    ends = [end for one in tested.values() for end in (one["ratio"]["lo"], one["ratio"]["hi"], 0.8, 1.25) if end]
    low, high = max(min(ends) / 1.2, 0.02), min(max(ends) * 1.2, 50.0)
    with style():
        figure = Canvas(figsize=(4.6, 0.9 + 0.55 * len(tested)), layout="constrained")
        axis = figure.subplots()
        for row, one in enumerate(tested.values()):
            ratio, seen = one["ratio"], one["seen"] or (1.0, 1.0)
            ends = [max(seen[0] or low, low), min(seen[1] or high, high)]
            axis.plot(ends, [-row, -row], color=LINE, linewidth=11, solid_capstyle="butt")
            lo, hi = max(ratio["lo"] or low, low), min(ratio["hi"] or high, high)
            axis.plot([lo, hi], [-row, -row], color=ACCENT, linewidth=2.6)
            axis.plot([min(max(ratio["estimate"], low), high)], [-row], "o", color=ACCENT, markersize=6)
        axis.axvline(1.0, color=GREY, linewidth=1, linestyle="--")
        axis.set_yticks([-row for row in range(len(tested))], [ARMS.get(name, name) for name in tested])
        axis.set_ylim(-len(tested) + 0.45, 0.55)
        log_axis(axis.xaxis, low, high)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(f"ratio of {of}", color=INK)
        return figure


def write(found: dict[str, Any], out: Path) -> Path:
    """Write comparison.json and the report's page with its twins into ``out``; returns the page's path."""
    from sovit import records
    from sovit.analysis.report import page as report
    from sovit.analysis.report.drawing import svg

    out.mkdir(parents=True, exist_ok=True)
    made = comparison(found)
    panels = {
        name: svg(ratios_figure(found), name, label)
        for block in made.first
        if isinstance(block, Figure)
        for name, label in block.panels
    }
    path = out / report.PAGE
    (out / report.JSON).write_text(json.dumps(as_json(made), indent=1) + "\n", encoding="utf-8")
    (out / report.MARKDOWN).write_text(report.markdown(made), encoding="utf-8")
    path.write_text(report.page(made, panels), encoding="utf-8")
    records.write_json(out / FILES[0], found)  # last: it vouches for the page
    return path
