"""Two metrics of one star (`sovit.analysis.domains`) as text for the terminal and as a report's document."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sovit.analysis.report import sections
from sovit.analysis.report.contents_compare import (
    COLUMNS,
    FILES,
    p_text,
    ratio_text,
    ratios_figure,
    s_text,
    seen_text,
)
from sovit.analysis.report.document import (
    Bullets,
    Cell,
    Column,
    Commands,
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
from sovit.analysis.report.words import arms_of_star, listed, number, shape, span, visible

_TAKEN_FOR_NONE = 0.05
_BOTH = ("first", "second")


def names_of(found: dict[str, Any]) -> dict[str, str]:
    """Dimension -> its name."""
    return arms_of_star(found["first"]["fit"])


def tested(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The dimensions that could be compared."""
    return {name: one for name, one in found["dimensions"].items() if one["exponents"] is not None}


def middle(one: dict[str, Any]) -> dict[str, Any]:
    """The best sizes of a dimension at the middle compute."""
    shapes = one["shapes"]
    return dict(shapes[len(shapes) // 2])


def verdict(found: dict[str, Any]) -> list[str]:
    """The answer in sentences: about the exponents, and about the sizes, each with the power that a silence has."""
    known, names = tested(found), names_of(found)
    if not known:
        return ["Nothing could be compared: no dimension has an exponent by both metrics."]
    first, second = (found[which]["label"] for which in _BOTH)
    together = f"(all dimensions together p = {p_text(found['parallel_p'])})"
    differ = [name for name, one in known.items() if one["p_holm"] <= _TAKEN_FOR_NONE]
    if differ:
        said = [f"{names[name]} by a factor of {ratio_text(known[name]['exponents']['ratio'])}" for name in differ]
        parallel = (
            f"The paths are not parallel: by {second} the exponent differs from that by {first} in {listed(said)}"
        )
        parallel = f"{parallel} {together}."
    elif found["parallel_p"] <= _TAKEN_FOR_NONE:
        parallel = f"The paths are not parallel as a whole {together}; no dimension shows it by itself."
    else:
        said = [f"{names[name]} {seen_text(one['exponents']['seen'])}" for name, one in known.items()]
        parallel = (
            f"No difference of the exponents is shown {together}: the paths may be parallel. Ratios that would be seen four "
            f"times in five: {'; '.join(said)}."
        )
    return [parallel, _sizes(found)]


def _sizes(found: dict[str, Any]) -> str:
    known, names = tested(found), names_of(found)
    together = f"(all dimensions together p = {p_text(found['same_p'])})"
    first, second = (found[which]["label"] for which in _BOTH)
    differ = [name for name, one in known.items() if one["shapes_p_holm"] <= _TAKEN_FOR_NONE]
    if differ:
        said = [
            f"the best {names[name]} at {number(middle(known[name])['t_gflops'])} GFLOPs is "
            f"{ratio_text(middle(known[name])['tested']['ratio'])} times as large"
            for name in differ
        ]
        return f"The best shapes are not the same: by {second}, against {first}, {listed(said)} {together}."
    if found["same_p"] <= _TAKEN_FOR_NONE:
        return f"The best shapes are not the same as a whole {together}; no dimension shows it by itself."
    said = [f"{names[name]} {seen_text(middle(one)['tested']['seen'])}" for name, one in known.items()]
    return (
        f"No difference of the best sizes is shown either, in the middle of the compute {together}. Ratios that would be "
        f"seen: {'; '.join(said)}."
    )


def doubts(found: dict[str, Any]) -> list[str]:
    """What is not compared and why, and what to know of the rest."""
    names = names_of(found)
    said = [
        f"{names[name]} is not compared: {_why(found, one)}." for name, one in found["dimensions"].items() if one["why"]
    ]
    for name, one in tested(found).items():
        own = [found["dimensions"][name][which] for which in _BOTH]
        moved = [
            f"{number(here, 2)} instead of {number(whole['estimate'], 2)} by {found[which]['label']}"
            for which, whole, here in zip(_BOTH, own, one["same"], strict=True)
            if whole and abs(here / whole["estimate"] - 1) > 0.1
        ]
        if moved:
            said.append(f"{names[name]}: from the evaluations that both metrics can use alone, s is {listed(moved)}.")
    return [*said, *found["notes"]]


def _why(found: dict[str, Any], one: dict[str, Any]) -> str:
    """The reason with the metrics by name."""
    why = str(one["why"])
    for which in _BOTH:
        why = why.replace(f"the {which} metric", found[which]["label"]).replace(
            f"{which}: ", f"{found[which]['label']}: "
        )
    return why


def text(found: dict[str, Any]) -> str:
    """The comparison for the terminal."""
    first, second = (found[which]["label"] for which in _BOTH)
    lines = [
        f"{found['sweep']}: {found['first']['name']}, and {found['second']['name']}; the best size grows as t^s", ""
    ]  # fmt: skip
    rows = [("exponents", first, second, "ratio of s", "p", "p (Holm)")]
    rows += [
        (name, s_text(one["first"]), s_text(one["second"]), ratio_text(one["exponents"]["ratio"]),
         p_text(one["exponents"]["p"]), p_text(one["p_holm"]))
        for name, one in tested(found).items()
    ]  # fmt: skip
    rows += [
        (name, s_text(one["first"]), s_text(one["second"]), "-", "-", "-")
        for name, one in found["dimensions"].items()
        if one["why"]
    ]
    known = [*_columns(rows), ""]
    shapes = [("best sizes", "GFLOPs", first, second, "ratio", "p")]
    for name, one in tested(found).items():
        for k, at in enumerate(one["shapes"]):
            ratio, p = at["tested"]["ratio"], at["tested"]["p"]
            shapes.append(
                (name if k == 0 else "", number(at["t_gflops"]), number(at["first"]), number(at["second"]),
                 ratio_text(ratio), p_text(p))
            )  # fmt: skip
    known += [*_columns(shapes), ""] if len(shapes) > 1 else []
    said = [*verdict(found), "", *(f"- {note}" for note in doubts(found)), *(f"- {note}" for note in _beaten(found))]
    wrapped = [*lines, *known]
    for line in said:
        wrapped += textwrap.wrap(line, COLUMNS, subsequent_indent="  " if line.startswith("- ") else "") or [""]
    return "\n".join(map(visible, wrapped))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _beaten(found: dict[str, Any]) -> list[str]:
    """What each metric's values have to beat, and what the best run reaches."""
    lines = []
    for which in _BOTH:
        least = min((p["error"] for p in found[which]["fit"]["points"]), default=None)
        known = ", ".join(f"{name} {number(value)}" for name, value in found[which]["to_beat"].items())
        if least is not None:
            lines.append(
                f"{found[which]['name']}: the best run reaches {number(least)}; to beat: {known or 'not recorded'}."
            )
    return lines


def comparison(found: dict[str, Any]) -> Document:
    """The report of comparison.json."""
    center = shape(found["first"]["fit"]["center"])
    lead = (
        f"One star sweep about the center {center}, scored twice: {found['first']['name']}, and {found['second']['name']}. "
        "For each dimension the best size is taken to grow with compute t as t^s, the others held at the center. Do the "
        "best shapes follow the same path? Equal exponents are parallel paths; a ratio of sizes of 1 as well is one path."
    )
    known = tested(found)
    good = [
        found["parallel_p"] is not None and found["parallel_p"] <= _TAKEN_FOR_NONE,
        found["same_p"] is not None and found["same_p"] <= _TAKEN_FOR_NONE,
    ]
    tones = ["good" if seen else "" for seen in good] if known else ["bad"]
    answer = [Cell(line, tone=tone) for line, tone in zip(verdict(found), tones, strict=True)]
    return document(
        "metrics",
        f"{found['sweep']}: {found['first']['label']} and {found['second']['label']}",
        lead,
        answer,
        [_exponents(found), _ratios(found), _doubts(found)],
        [
            section("paths", "The paths of the best sizes", _paths(found), _shapes(found)),
            _metrics(found),
            _how(found),
        ],
    )


def _doubts(found: dict[str, Any]) -> Bullets | None:
    return bullets([Cell(note, tone="doubt") for note in doubts(found)], "What to know of it")


def _exponents(found: dict[str, Any]) -> Table | None:
    first, second = (found[which]["label"] for which in _BOTH)
    columns = (
        Column("dimension", "dimension"), Column("first", f"s by {first}"), Column("second", f"s by {second}"),
        Column("ratio", "ratio of s"), Column("p", "p", True), Column("p_holm", "p, Holm", True),
        Column("seen", "seen 4 in 5"), Column("evaluations", "of"),
    )  # fmt: skip
    rows = []
    for name, one in found["dimensions"].items():
        title = Cell(names_of(found)[name], tone="strong")
        ends = [Cell(s_text(one[which]), one[which]) for which in _BOTH]
        tests = one["exponents"]
        if tests is None:
            rows.append((title, *ends, *[Cell("-")] * 4, Cell("not compared", tone="bad")))
            continue
        tone = "good" if one["p_holm"] <= _TAKEN_FOR_NONE else ""
        used = f"{one['num_points']} points, {one['num_runs']} runs"
        rows.append(
            (title, *ends, Cell(ratio_text(tests["ratio"]), tests["ratio"], tone), Cell(p_text(tests["p"]), tests["p"]),
             Cell(p_text(one["p_holm"]), one["p_holm"], tone), Cell(seen_text(tests["seen"]), tests["seen"]),
             Cell(used, one["num_points"]))
        )  # fmt: skip
    caption = (
        f"Intervals are {found['level']:.0%}. s by each metric: of all its points, as sovit fit has it. The ratio: of the "
        "evaluations that both metrics can use. p: of equal exponents; Holm: corrected for the number of dimensions. Seen: "
        "ratios that a test at 5% finds with a chance of about 80%."
    )
    return table("exponents", columns, rows, caption, stacks=True)


def _drawn(found: dict[str, Any]) -> list[str]:
    """The arms with something measured by either metric."""
    arms = [found[which]["fit"]["arms"] for which in _BOTH]
    return [name for name in names_of(found) if any((one.get(name) or {}).get("minima") for one in arms)]


def _paths(found: dict[str, Any]) -> Figure | None:
    if not _drawn(found):
        return None
    first, second = (found[which]["label"] for which in _BOTH)
    level = f"{found['level']:.0%}"
    return Figure(
        "paths",
        f"The best size against compute by both metrics: the law's optimum with its {level} band, dashed and without a band "
        "where the exponent is not identified. Marks are the sizes of the lowest value measured, hollow at an end of the "
        "arm. Parallel lines are equal exponents; the gap between them is another size at equal compute.",
        tuple((f"paths-{arm}", f"Best {names_of(found)[arm]} against compute by both metrics.") for arm in _drawn(found)),
        (
            ("accent", f"{sections.LINE} {first}"), ("blue", f"{sections.LINE} {second}"),
            ("accent", f"{sections.DOT} lowest by {first}"), ("blue", f"◆ lowest by {second}"),
        ),
    )  # fmt: skip


def _shapes(found: dict[str, Any]) -> Table | None:
    first, second = (found[which]["label"] for which in _BOTH)
    columns = (
        Column("dimension", "dimension"), Column("t_gflops", "t, GFLOPs", True), Column("first", f"best by {first}", True),
        Column("second", f"best by {second}", True), Column("ratio", "ratio"), Column("p", "p", True),
        Column("seen", "seen 4 in 5"),
    )  # fmt: skip
    rows = []
    for name, one in tested(found).items():
        for k, at in enumerate(one["shapes"]):
            test = at["tested"]
            rows.append(
                (Cell(names_of(found)[name] if k == 0 else "", names_of(found)[name]),
                 Cell(number(at["t_gflops"]), at["t_gflops"]), Cell(number(at["first"]), at["first"]),
                 Cell(number(at["second"]), at["second"]), Cell(ratio_text(test["ratio"]), test["ratio"]),
                 Cell(p_text(test["p"]), test["p"]), Cell(seen_text(test["seen"]), test["seen"]))
            )  # fmt: skip
    caption = (
        "The laws' optima at the least, the middle and the largest compute that both metrics use. p: of equal sizes, not "
        "corrected; the verdict takes the middle one of each dimension, Holm's correction over the dimensions."
    )
    return table("shapes", columns, rows, caption)


def _ratios(found: dict[str, Any]) -> Figure | None:
    if not tested(found):
        return None
    return Figure(
        "ratios",
        "The ratio of the exponents, and of the best sizes at the middle compute, with intervals; the dashed line is none. "
        "The grey bar ends at the nearest ratios that would be seen about four times in five.",
        (("ratios-exponents", "Ratios of the exponents."), ("ratios-sizes", "Ratios of the best sizes.")),
    )


def _metrics(found: dict[str, Any]) -> Section:
    columns = (
        Column("metric", ""), Column("first", found["first"]["label"]), Column("second", found["second"]["label"])
    )  # fmt: skip
    both = [found[which] for which in _BOTH]
    cuts, least = [_cutoff(one["fit"]) for one in both], [_least(one["fit"]) for one in both]
    rows: list[Sequence[Cell | str]] = [
        ("what it is", *(Cell(one["name"]) for one in both)),
        ("runs", *(Cell(str(one["num_runs"]), one["num_runs"]) for one in both)),
        ("compute fitted, GFLOPs", *(Cell(span(one["compute"]), one["compute"]) for one in both)),
        ("largest value fitted", *(Cell(number(value), value) for value in cuts)),
        ("lowest value", *(Cell(number(value), value) for value in least)),
    ]
    for name in dict.fromkeys(name for which in _BOTH for name in found[which]["to_beat"]):
        values = [found[which]["to_beat"].get(name) for which in _BOTH]
        rows.append((f"to beat: {name}", *(Cell(number(value), value) for value in values)))
    warnings = [
        Cell(f"{found[which]['label']}, {warning}", tone="doubt")
        for which in _BOTH
        for warning in found[which]["fit"]["warnings"]
    ]
    return section("metrics", "The two metrics", table("metrics", columns, rows, stacks=True), bullets(warnings))


def _cutoff(fit: dict[str, Any]) -> float | None:
    cuts = [cut["max_error"] for arm in fit["arms"].values() for cut in arm["cutoffs"] if cut["headline"]]
    return cuts[0] if cuts else None


def _least(fit: dict[str, Any]) -> float | None:
    return min((point["error"] for point in fit["points"]), default=None)


def _how(found: dict[str, Any]) -> Section:
    command = sections.shell_line(found.get("command"))
    return section(
        "method",
        "How it is tested",
        bullets(
            [
                "Both metrics score the same runs, so luck that a run brings to both cancels: the standard error of a "
                "difference of logarithms comes from leaving out each run for both metrics at once.",
                "That difference over its standard error is compared with the same in sweeps drawn from the two fits, each "
                "metric with its own noise, correlated between the metrics as its residuals are. The interval uses the same "
                "quantile.",
                "The arms of a star share no run, so all dimensions together are the sum of squares, against that of draws.",
                "Size, coverage and power by simulation: benchmarks/domains.py.",
            ]
        ),
        Commands((command,)) if command else None,
    )


def write(found: dict[str, Any], out: Path) -> Path:
    """Write comparison.json and the report's page with its twins into ``out``; returns the page's path."""
    from sovit import records
    from sovit.analysis.report import page as report
    from sovit.analysis.report.drawing import svg

    out.mkdir(parents=True, exist_ok=True)
    made = comparison(found)
    blocks = [*made.first, *(block for part in made.sections for block in part.blocks)]
    panels = {
        name: svg(_draw(found, name), name, label)
        for block in blocks
        if isinstance(block, Figure)
        for name, label in block.panels
    }
    path = out / report.PAGE
    (out / report.JSON).write_text(json.dumps(as_json(made), indent=1) + "\n", encoding="utf-8")
    (out / report.MARKDOWN).write_text(report.markdown(made), encoding="utf-8")
    path.write_text(report.page(made, panels), encoding="utf-8")
    records.write_json(out / FILES[0], found)  # last: it vouches for the page
    return path


def _draw(found: dict[str, Any], name: str) -> Any:
    from sovit.analysis.report import figures_domains

    key, _, about = name.partition("-")
    if key == "paths":
        return figures_domains.paths(found, (about,))
    of = {
        dimension: one["exponents"] if about == "exponents" else middle(one)["tested"]
        for dimension, one in tested(found).items()
    }
    return ratios_figure({"dimensions": of}, "exponents s" if about == "exponents" else "best sizes")
