"""What a report holds of a fit that names a shape for a budget: a diagonal sweep, and the law that knows its FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sovit.analysis.report import figures, sections, summary
from sovit.analysis.report.contents_forecast import forecast_section, forecast_sentence
from sovit.analysis.report.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    Paragraph,
    Table,
    document,
    pairs,
    section,
    table,
)
from sovit.analysis.report.words import ARMS, count, exponent, interval, listed, number, percent, shape, span


def is_paper_step(fit: dict[str, Any]) -> bool:
    """Whether a diagonal's step is to be compared with the paper's 1/D: its direction holds the star's exponents."""
    return fit.get("direction_from", "given") == "given"


def step_sentences(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """(tone, sentence) of a diagonal's result."""
    step = fit.get("step")
    if not step:
        why = str(fit.get("why") or "no reason was recorded").removeprefix("not identified: ")
        return [("bad", f"The step is not identified: {why}.")]
    grown = [f"{name} as t^{exponent(step['estimate'] * fit['direction'][arm])}" for arm, name in ARMS.items()]
    best = f"Along this direction the best joint scale G grows as t^{exponent(step['estimate'])} {interval(step)}"
    said = [("good", f"{best}: {listed(grown)}.")]
    if is_paper_step(fit) and step.get("lo") is not None:
        inside = step["lo"] <= 1 / 3 and (step.get("hi") is None or step["hi"] >= 1 / 3)
        said.append(("", f"The published rule's step of 1/3 lies {'inside' if inside else 'outside'} that interval."))
    if fit.get("arm") and fit["arm"].get("s"):
        verdict = summary.verdict(fit["arm"])
        if verdict != "holds":
            said.append(("doubt", f"Something speaks against it: {verdict}."))
    return said


def diagonal(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Document:
    answer = [Cell(text, tone=tone) for tone, text in step_sentences(fit)] + forecast_sentence(fit)
    marks = sections.level_legend(figures.slices(fit)) if fit.get("points") else ()
    drawn = Figure(
        "scale",
        "Left: each colour is one compute t; lines are the fitted law, triangles its optimum. G is the common scale of the "
        "three dimensions, 1 at the origin. Right: the best scale against compute.",
        (
            ("scale", "Error against the joint scale G at equal compute."),
            ("step", "Best joint scale against compute, with the fitted step."),
        ),
        marks,
    )
    arm = {"G": fit["arm"]} if fit.get("arm") else {}
    parts = [
        forecast_section(fit),
        section("scale", "How far to go", drawn if fit.get("points") else None, _step_minima(fit)),
        section("held_out", "The largest budgets, predicted from the smaller", _held_out_rows(fit)),
        sections.checks(fit),
        sections.fitted(arm, fit),
        *sections.endings(fit, runs),
    ]
    lead = (
        f"Diagonal sweep from the origin {shape(fit['origin'])} (width x depth x MLP dimension); "
        f"{summary.metric_name(fit)}. All three dimensions are scaled together along one direction, "
        "x_k = origin_k G^direction_k; the step says how far to go for a budget."
    )
    first: list[Block | None] = [_step(fit), sections.against(fit, runs)]
    return document("diagonal", fit["sweep"], lead, answer, first, parts)


def _step(fit: dict[str, Any]) -> Table | None:
    step, arm = fit.get("step"), fit.get("arm") or {}
    if not step:
        return None
    row = summary.arm_row(arm) if arm else {}
    columns = [
        Column("quantity", "grows as t^"), Column("direction", "direction", True), Column("s", "exponent"),
        Column("interval", f"{summary.level(fit)} interval"), Column("cutoffs", "over cut-offs"),
        Column("parabola", "parabola slope"), Column("inside", "minima inside"),
    ]  # fmt: skip
    rows: list[tuple[Cell | str, ...]] = [
        (
            Cell("joint scale G", tone="strong"), "1", sections.exponent_cell(step["estimate"], bold=True),
            Cell(interval(step), [step.get("lo"), step.get("hi")]), row.get("cutoffs", "-"), row.get("parabola", "-"),
            row.get("inside", "-"),
        )
    ]  # fmt: skip
    for name, title in ARMS.items():
        along = fit["direction"][name]
        ends = {key: None if step.get(key) is None else step[key] * along for key in ("lo", "hi")}
        ranges = arm.get("cutoff_range")
        rows.append(
            (
                Cell(title), Cell(exponent(along), along), sections.exponent_cell(step["estimate"] * along),
                Cell(interval(ends), [ends["lo"], ends["hi"]]),
                span([end * along if end is not None else None for end in ranges]) if ranges else "-", "-", "-",
            )
        )  # fmt: skip
    caption = (
        "The intervals of the dimensions take the direction as known. "
        + ("The direction was given." if fit.get("direction_from") == "given" else "")
        + ("The direction was deduced from the shapes." if fit.get("direction_from") == "shapes" else "")
    ).strip()
    return table("step", columns, rows, caption, stacks=True)


def _step_minima(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("t_gflops", "t, GFLOPs", True), Column("x", "lowest error at G", True), Column("error", "error", True),
        Column("interior", "inside"), Column("parabola_x", "parabola's minimum", True),
        Column("law_x", "law's optimum", True),
    )  # fmt: skip
    minima = sorted(fit.get("minima") or [], key=lambda minimum: minimum["t_gflops"])
    return table("minima", columns, [sections.minimum_cells(minimum) for minimum in minima])


def _held_out_rows(fit: dict[str, Any]) -> Block | None:
    held = fit.get("held_out")
    if isinstance(held, list):
        columns = (
            Column("t_gflops", "t, GFLOPs", True), Column("fitted_up_to", "fitted up to", True),
            Column("num_points", "points", True), Column("rms", "rms miss", True), Column("bias", "mean miss", True),
            Column("predicted_g", "predicted G", True), Column("measured_g", "measured G", True),
            Column("excess", "error lost", True),
        )  # fmt: skip
        rows = [
            (
                Cell(number(row["t_gflops"]), row["t_gflops"]), Cell(number(row["fitted_up_to"]), row["fitted_up_to"]),
                Cell(str(row["num_points"]), row["num_points"]), sections.percent_cell(row["rms"]),
                sections.percent_cell(row["bias"], sign=True), Cell(number(row.get("predicted_g")), row.get("predicted_g")),
                Cell(number(row.get("measured_g")), row.get("measured_g")), sections.percent_cell(row.get("excess")),
            )
            for row in held
        ]  # fmt: skip
        return table(
            "held_out", columns, rows, "Error lost: by how much the predicted G is worse than the measured minimum."
        )
    if isinstance(held, dict) and held.get("rms") is not None:
        ends = held["t_gflops"] if isinstance(held["t_gflops"], list) else [held["t_gflops"]]
        return Paragraph(
            f"Fitted up to {number(held['fitted_up_to'])} GFLOPs, the law predicts the {held['num_points']} points at "
            f"{' to '.join(dict.fromkeys(number(end) for end in ends))} GFLOPs to {percent(held['rms'], sign=False)} (root "
            f"mean square), {percent(held['bias'])} on average."
        )
    return None


def joint_sentences(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """(tone, sentence) of the joint law's result."""
    if not fit.get("exponents"):
        why = str(fit.get("why") or "no reason was recorded").removeprefix("not identified: ")
        return [("bad", f"No best shape: {why}.")]
    grown = [
        f"{name} as t^{exponent(fit['exponents'][arm]['estimate'])}"
        for arm, name in ARMS.items()
        if fit["exponents"].get(arm)
    ]
    said = [("", f"Under one budget the best shape grows together: {listed(grown)}, at the largest compute measured.")]
    wide = [
        ARMS[arm]
        for arm, one in fit["exponents"].items()
        if not (one.get("lo") and one.get("hi")) or one["hi"] / one["lo"] > summary.WIDE
    ]
    if wide:
        said.append(("doubt", f"The data hardly determine the growth of {listed(wide)}."))
    if fit.get("flags"):
        said.append(("doubt", f"Parameters at a bound: {', '.join(fit['flags'])}."))
    return said


def joint(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Document:
    drawn = None
    if fit.get("optimum"):
        drawn = Figure(
            "optimum",
            "Each dimension of the best shape over its size at the first compute. Shaded: beyond the data.",
            (("optimum", "Best width, depth and MLP dimension against compute."),),
        )
    parameters = [
        (Cell(name, code=True), Cell(f"{value:.4g}", value)) for name, value in (fit.get("parameters") or {}).items()
    ]
    geometry = [
        (Cell(name.replace("_", " ")), Cell(str(value), value)) for name, value in (fit.get("geometry") or {}).items()
    ]
    noise = None
    if fit.get("sigma") is not None:
        noise = Paragraph(
            f"Noise: {percent(fit['sigma'], sign=False)} of a point, {percent(fit['tau'], sign=False)} of a run; "
            f"{fit['num_runs']} runs."
        )
    parts = [
        forecast_section(fit),
        section("optimum", "The best shape against compute", drawn, _optimum(fit)),
        section("held_out", "The largest budgets, predicted from the smaller", _held_out_rows(fit)),
        sections.checks(fit),
        section(
            "fitted",
            "How it was fitted",
            noise,
            pairs(
                "parameters", parameters, "f(x, n) = sum over k of alpha_k x_k^-a_k, + beta n^-c + eps; n = t / F(x)."
            ),
            pairs("geometry", geometry, "What the cost F(x) of a shape depends on besides its three dimensions."),
        ),
        *sections.endings(fit, runs),
    ]
    names = [str(name) for name in fit.get("sweeps") or []]
    lead = (
        f"One law for whole shapes, fitted to {listed(names)}; {summary.metric_name(fit)}. The forward cost F(x) of a shape "
        "is known, so the law sees how many images n = t / F(x) a budget buys, and has one best shape for it."
    )
    first: list[Block | None] = [_joint_exponents(fit), sections.against(fit, runs)]
    answer = [Cell(text, tone=tone) for tone, text in joint_sentences(fit)] + forecast_sentence(fit)
    return document("joint", ", ".join(names) or "joint law", lead, answer, first, parts)


def _joint_exponents(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("dimension", "dimension"), Column("s", "grows as t^"), Column("interval", f"{summary.level(fit)} interval"),
        Column("size", "best size at the largest compute"), Column("jackknife", "jackknife, times as wide"),
    )  # fmt: skip
    here = min(fit.get("optimum") or [], key=lambda row: abs(row.get("factor", 1.0) - 1.0), default=None)
    rows = []
    for arm, title in ARMS.items():
        one = (fit.get("exponents") or {}).get(arm)
        if one:
            wide = (fit.get("jackknife") or {}).get(arm)
            rows.append(
                (
                    Cell(title, tone="strong"), sections.exponent_cell(one["estimate"], bold=True),
                    Cell(interval(one), [one.get("lo"), one.get("hi")]), _size(here, arm) if here else Cell("-"),
                    Cell(number(wide, 2), wide),
                )
            )  # fmt: skip
    return table("exponents", columns, rows, stacks=True)


def _size(row: dict[str, Any], arm: str) -> Cell:
    ends = (row.get("intervals") or {}).get(arm)
    said = number(row[arm])
    if ends:
        low, high = (number(ends.get(key)) if ends.get(key) else None for key in ("lo", "hi"))
        said += f" [{low or 'open'}, {high or 'open'}]"
    return Cell(said, row[arm])


def _optimum(fit: dict[str, Any]) -> Table | None:
    rows = sorted(fit.get("optimum") or [], key=lambda row: row["t_gflops"])
    columns = [
        Column("t_gflops", "t, GFLOPs", True), Column("factor", "beyond the data", True),
        *(Column(arm, title, True) for arm, title in ARMS.items()), Column("forward_gflops", "GFLOPs/image", True),
        Column("examples_seen", "images", True), Column("error", "error", True),
    ]  # fmt: skip
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]

    def cell(row: dict[str, Any], key: str) -> Cell:
        value = row.get(key)
        if key in ARMS:
            return _size(row, key)
        if key == "factor":
            return Cell(f"{number(value, 2)}x" if value is not None and value > 1 else "no", value)
        return Cell(count(value) if key == "examples_seen" else number(value), value)

    cells = [[cell(row, column.key) for column in columns] for row in rows]
    return table("optimum", columns, cells, "The best shape, not rounded, with its interval.")
