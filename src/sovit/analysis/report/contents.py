"""What a report holds, by the kind of fit: the `document.Document` of a star, and the choice among the other kinds.

The first screen answers the question; then figures, tables, the checklist, and how to reproduce it. Everything comes from
the dict of a fit (fit.json) and the runs' records; blocks that are not there leave no heading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sovit.analysis.report import figures, sections, summary
from sovit.analysis.report.contents_budget import diagonal, joint
from sovit.analysis.report.contents_forecast import forecast_section, forecast_sentence
from sovit.analysis.report.contents_grid import grid
from sovit.analysis.report.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    Section,
    Table,
    document,
    section,
    table,
)
from sovit.analysis.report.words import arms_of_star, counted, listed, number, shape, value_of
from sovit.families import FAMILIES


def contents(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Document:
    """The report of a fit's dict and its runs' records. Raises ValueError for a kind that it does not know."""
    kinds = {"star": star, "grid": grid, "diagonal": diagonal, "joint": joint}
    if fit.get("kind") not in kinds:
        raise ValueError(f"a fit of kind {fit.get('kind')!r} has no report; known are {', '.join(kinds)}.")
    return kinds[fit["kind"]](fit, runs)


def star(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Document:
    known = any(row["identified"] for row in summary.headline(fit))
    first: list[Block | None] = [
        _headline(fit),
        _exponents(fit) if known else None,
        sections.against(fit, runs),
    ]
    parts = [
        forecast_section(fit),
        *_figures(fit, runs),
        sections.checks(fit),
        _minima(fit),
        sections.fitted({name: fit["arms"].get(arm) or {} for arm, name in arms_of_star(fit).items()}, fit),
        *sections.endings(fit, runs),
    ]
    names = arms_of_star(fit)
    lead = (
        f"Star sweep{_family(fit)} about the center {shape(fit.get('center'))} ({' x '.join(names.values())}); "
        f"{summary.metric_name(fit)}. For each dimension the best size is taken to grow with compute t as t^s, the "
        f"{'other two' if len(names) == 3 else 'others'} held at the center."
    )
    answer = [*(Cell(text, tone=tone) for tone, text in summary.answer(fit)), *forecast_sentence(fit)]
    return document("star", fit["sweep"], lead, answer, first, parts)


def _headline(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("dimension", "dimension"),
        Column("s", "exponent s"),
        Column("interval", f"{summary.level(fit)} interval"),
        Column("growth", "at 10x compute"),
        Column("cutoffs", "over cut-offs"),
        Column("parabola", "parabola slope"),
        Column("inside", "minima inside"),
        Column("verdict", "verdict"),
    )
    rows = []
    for row in summary.headline(fit):
        name = Cell(row["name"], tone="strong")
        if not row["identified"]:
            rows.append((name, *[Cell("-")] * 6, Cell(f"not identified: {row['why']}", tone="bad")))
            continue
        entry = row["entry"]
        s = entry["s"]
        rows.append(
            (
                name,
                sections.exponent_cell(s["estimate"], bold=True),
                Cell(row["interval"], [s["lo"], s["hi"]]),
                Cell(row["growth"]),
                Cell(row["cutoffs"], entry.get("cutoff_range")),
                Cell(row["parabola"], entry.get("parabola")),
                Cell(row["inside"]),
                Cell(row["verdict"], tone="good" if row["verdict"] == "holds" else "doubt"),
            )
        )
    others, every = ("two", "three") if len(arms_of_star(fit)) == 3 else ("three", "four")
    caption = (
        f"At 10x compute: by how much the best size grows, the other {others} held; no recipe for growing all {every} at "
        "once. Over cut-offs: the lowest and highest s when only values below other limits are fitted. Parabola slope: the "
        "same exponent without the law, from a parabola through each slice of equal compute. Minima inside: at how many "
        f"computes the lowest {value_of(fit)} is not at an end of the arm; an exponent needs half of them inside."
    )
    return table("exponents", columns, rows, caption, stacks=True)


def _exponents(fit: dict[str, Any]) -> Figure:
    said = [f"{row['name']} {row['s']} {row['interval']}" for row in summary.headline(fit) if row["identified"]]
    return Figure(
        "exponents",
        "Each exponent with its interval, and beneath it what stands beside it. An arrow is an end that is open or off "
        "the page.",
        (("exponents", f"Exponents with their intervals: {'; '.join(said)}."),),
    )


def _family(fit: dict[str, Any]) -> str:
    return f" of {FAMILIES[fit['family']].title} models" if fit.get("family") in FAMILIES else ""


def _figures(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[Section]:
    names = arms_of_star(fit)
    arms = [arm for arm in names if any(point["arm"] == arm for point in fit.get("points") or [])]
    if not arms:
        return []
    known, value = summary.baselines_in_words(fit, runs), value_of(fit)
    with_minima = [arm for arm in arms if fit["arms"][arm].get("minima")]
    with_law = [arm for arm in arms if fit["arms"][arm].get("law") and fit["arms"][arm]["num_points"]]
    levels = figures.slices(fit)
    marks = sections.level_legend(levels)
    slices = Figure(
        "slices",
        "Each colour is one compute t. Points are runs with the standard error of their test set, lines the fitted law "
        f"(dotted where its {value} lies above the cut-off, where it was not fitted). Look for a U in every colour whose "
        "bottom moves to the right as compute grows.",
        tuple((f"slices-{arm}", _slices_label(fit, arm)) for arm in arms),
        (
            *marks,
            ("ink", f"{sections.DOWN} law's optimum"),
            ("ink", f"{sections.RING} center, held out"),
            ("faint", f"{sections.DOT} not used"),
        ),
    )
    compute = Figure(
        "compute",
        "One line a run, coloured by its size. The best size at a compute is the lowest line there: an exponent above zero "
        "shows as lines that cross, small sizes leading at first and falling behind later."
        + (f" Dotted: {known}." if known else ""),
        tuple(
            (f"compute-{arm}", f"{value.capitalize()} against compute, one line for each run of the {names[arm]} arm.")
            for arm in arms
        ),
    )
    optimum = Figure(
        "optimum",
        f"The law's optimum with its {summary.level(fit)} band (delta method on the law, the run as the unit of noise), "
        "and the minima as they were measured. Grey lines are the sizes that were trained; the center takes no part in "
        "the minima.",
        tuple((f"optimum-{arm}", _optimum_label(fit, arm)) for arm in with_minima),
        (
            ("accent", f"{sections.LINE} law's optimum"), ("accent", f"{sections.BAND} {summary.level(fit)} band"),
            ("ink", f"{sections.DOT} lowest {value}, inside the arm"),
            ("ink", f"{sections.RING} lowest {value}, at an edge"),
            ("blue", f"{sections.DIAMOND} parabola's minimum"),
        ),
    )  # fmt: skip
    residuals = Figure(
        "residuals",
        "How far every fitted point lies from its arm's law, one column a run; the bar is the run's mean. A run that sits "
        "off as a whole is the run's own luck or tuning; a bow from column to column is a law that does not follow the arm.",
        tuple((f"residuals-{arm}", f"Residuals of the {names[arm]} arm by run, in percent.") for arm in with_law),
        marks,
    )
    parts = [
        section("slices", f"{value.capitalize()} against each dimension", slices),
        section("compute", f"{value.capitalize()} against compute", compute),
    ]
    if with_minima:
        parts.append(section("optimum", "The optimum against compute", optimum))
    if with_law:
        parts.append(section("residuals", "Residuals by run", residuals))
    return [*parts, _center(fit)]


def _slices_label(fit: dict[str, Any], arm: str) -> str:
    minima = fit["arms"][arm].get("minima") or []
    levels = figures.slices(fit)
    ends = f"{number(levels[0])} to {number(levels[-1])} GFLOPs"
    value = value_of(fit)
    said = f"{value.capitalize()} against {arms_of_star(fit)[arm]} at {counted(len(levels), 'compute')}, {ends}."
    if minima:
        ordered = sorted(minima, key=lambda minimum: minimum["t_gflops"])
        said += (
            f" The lowest {value} is at {listed([str(minimum['x']) for minimum in ordered])}, by increasing compute."
        )
    return said


def _optimum_label(fit: dict[str, Any], arm: str) -> str:
    best = [m["law_x"] for m in sorted(fit["arms"][arm]["minima"], key=lambda m: m["t_gflops"]) if m.get("law_x")]
    said = f": the law's optimum goes from {number(best[0])} to {number(best[-1])}" if best else ""
    return f"Best {arms_of_star(fit)[arm]} against compute{said}."


def _plural(fit: dict[str, Any]) -> str:
    return "the errors" if value_of(fit) == "error" else "the log-perplexities"


def _center(fit: dict[str, Any]) -> Section:
    rows = summary.center_checks(fit)
    if not rows:
        return section("center", "The held-out center")
    arms = [arm for arm in arms_of_star(fit) if arm in rows[0]["predicted"]]
    columns = (
        Column("t_gflops", "t, GFLOPs", True),
        Column("measured", "measured", True),
        *(Column(arm, f"{arms_of_star(fit)[arm]}'s law", True) for arm in arms),
        Column("fitted", "fitted there"),
    )
    cells = [
        (
            row["t"],
            row["measured"],
            *(row["predicted"].get(arm, "-") for arm in arms),
            "yes" if row["used_range"] else "no",
        )
        for row in rows
    ]
    drawn = Figure(
        "center",
        "How far each arm's law is off the center, which no arm was fitted to. Misses of the same sign in all three arms "
        "say that the center is a better or worse run than its neighbours; grey is what its test images leave open.",
        (("center", "Relative miss of each arm's prediction for the held-out center, against compute."),),
    )
    caption = "In brackets how far the prediction is off. Fitted there: whether it is below the cut-off."
    return section("center", "The held-out center", drawn, table("center", columns, cells, caption))


def _minima(fit: dict[str, Any]) -> Section:
    columns = (
        Column("dimension", "dimension"),
        Column("t_gflops", "t, GFLOPs", True),
        Column("x", f"lowest {value_of(fit)} at", True),
        Column("error", value_of(fit), True),
        Column("interior", "inside the arm"),
        Column("parabola_x", "parabola's minimum", True),
        Column("law_x", "law's optimum", True),
    )
    rows = [
        (Cell(name), *sections.minimum_cells(minimum))
        for arm, name in arms_of_star(fit).items()
        for minimum in sorted((fit["arms"].get(arm) or {}).get("minima") or [], key=lambda one: one["t_gflops"])
    ]
    folded = counted(len(rows), "minimum").replace("minimums", "minima") if len(rows) > 24 else ""
    return section("minima", f"Where {_plural(fit)} are lowest", table("minima", columns, rows, folded=folded))
