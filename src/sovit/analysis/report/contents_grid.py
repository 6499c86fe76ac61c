"""What a report holds of a grid: the origin, how sure it is, the frontier, the map of every shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sovit.analysis.report import sections, summary
from sovit.analysis.report.contents_forecast import forecast_section, forecast_sentence
from sovit.analysis.report.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    Table,
    document,
    section,
    table,
)
from sovit.analysis.report.maps import grid_compute
from sovit.analysis.report.words import ARMS, number, shape


def grid(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Document:
    found = fit["origin"]
    sure = found and (found.get("share") is None or found["share"] >= 0.5)
    answer = [Cell(origin(fit), tone="good" if sure else "doubt" if found else "bad")]
    answer += [Cell(sentence, tone="doubt") for sentence in fit.get("extend") or []]
    answer += forecast_sentence(fit)
    maps = Figure(
        "grid",
        f"Error of every shape at {number(grid_compute(fit))} GFLOPs, "
        + ("the smallest compute of the origin's range" if found else "the largest compute, as there is no origin")
        + "; the one that measured best is framed"
        + (", the origin dotted" if found else "")
        + ". Look for a dark spot that is not at the rim of the maps, nor in the first or last of them.",
        tuple((f"grid-{depth}", f"Error of every shape of depth {depth}.") for depth in fit["grid"]["depth"]),
    )
    frontier = Figure(
        "frontier",
        "One faint line a run; the coloured line joins the best shape at each compute, named where it changes.",
        (("frontier", "Error against compute, with the best shape at each compute."),),
    )
    parts = [
        forecast_section(fit),
        section("maps", "Error of every shape", maps),
        section("frontier", "The frontier", frontier, _frontier(fit)),
        section("runners", "How sure the best shape is", _runners(fit), _origins(fit)),
        section("agreement", "Other numbers of shots", _agreement(fit)),
        sections.checks(fit),
        *sections.endings(fit, runs),
    ]
    lead = (
        f"Grid sweep: every combination of some widths, depths and MLP dimensions; {summary.metric_name(fit)}. Scaling "
        "starts from the origin: the shape inside the grid that is the best over a range of compute."
    )
    first: list[Block | None] = [_winners(fit), sections.against(fit, runs)]
    return document("grid", fit["sweep"], lead, answer, first, parts)


def origin(fit: dict[str, Any]) -> str:
    """Where scaling starts according to a grid, or why the grid does not say."""
    found = fit["origin"]
    if not found:
        return f"No origin: {fit['why']}."
    share = ""
    if found.get("share") is not None:
        share = f", in {'only ' if found['share'] < 0.5 else ''}{found['share']:.0%} of the draws of the noise"
    return (
        f"Origin: {shape(found)}, the best shape from t0 = {number(found['t0_gflops'])} to "
        f"{number(found['t_hi_gflops'])} GFLOPs ({found['num_slices']} computes){share}."
    )


def winners(fit: dict[str, Any]) -> list[dict[str, str]]:
    """One row a compute of a grid: the best shape, its lead over the runner-up, and where it touches the grid's edge.

    With "share", the share of the draws that elect it, and "smooth", the best of the smoothed errors, where known.
    """
    rows = []
    for winner in fit["winners"]:
        row = {
            "t": number(winner["t_gflops"]),
            "best": shape(winner["best"]),
            "error": number(winner["error"]),
            "runner_up": shape(winner["runner_up"]),
            "lead": f"{number(winner['difference'], 2)} ± {number(winner['difference_se'], 1)}",
            "edge": ", ".join(ARMS[arm] for arm, inside in winner["interior"].items() if not inside) or "none",
            "shapes": f"{winner['num_shapes']}{'' if winner['complete'] else ', incomplete'}",
        }
        if winner.get("share") is not None:
            row["share"] = f"{winner['share']:.0%}"
        if winner.get("smooth"):
            own = winner.get("smooth_share")
            row["smooth"] = shape(winner["smooth"]) + (f" ({own:.0%})" if own is not None else "")
        rows.append(row)
    return rows


def _winners(fit: dict[str, Any]) -> Table | None:
    rows = winners(fit)
    columns = [
        Column("t", "t, GFLOPs", True), Column("best", "best as measured"), Column("error", "error", True),
        Column("runner_up", "runner-up"), Column("lead", "its lead", True), Column("share", "its share of draws", True),
        Column("smooth", "best of the smoothed errors"), Column("edge", "at an edge of the grid"),
        Column("shapes", "shapes measured", True),
    ]  # fmt: skip
    columns = [column for column in columns if any(column.key in row for row in rows)]
    cells = []
    for row, winner in zip(rows, fit["winners"], strict=True):
        values = {"t": winner["t_gflops"], "error": winner["error"], "share": winner.get("share")}
        tones = {"edge": "doubt" if row["edge"] != "none" else "", "best": "strong"}
        cells.append([Cell(row.get(c.key, "-"), values.get(c.key), tones.get(c.key, "")) for c in columns])
    caption = (
        "Shapes are width x depth x MLP dimension. A lead within its standard error is a tie. A best shape at an edge means "
        "that the true optimum may lie outside the grid."
    )
    if any("share" in row for row in rows):
        caption += (
            " Share of draws: how often a shape is the best when the noise of the runs is drawn again about errors "
            "smoothed over the shapes; the lowest of many errors is low partly by luck, so the origin follows the smoothed."
        )
    return table("winners", columns, cells, caption, stacks=True)


def _frontier(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("t_gflops", "t, GFLOPs", True), Column("shape", "shape"), Column("error", "error", True),
        Column("stderr", "± s.e.", True), Column("num_runs", "runs", True),
    )  # fmt: skip
    rows = [
        (
            Cell(number(row["t_gflops"]), row["t_gflops"]), shape(row), Cell(number(row["error"]), row["error"]),
            Cell(number(row.get("stderr"), 2), row.get("stderr")), Cell(str(row.get("num_runs", "-")), row.get("num_runs")),
        )
        for row in fit.get("frontier") or []
    ]  # fmt: skip
    caption = "The Pareto frontier: no other evaluation has both less error and less compute."
    return table(
        "frontier", columns, rows, caption, folded=f"the frontier, {len(rows)} points" if len(rows) > 12 else ""
    )


def _runners(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("t_gflops", "t, GFLOPs", True), Column("shape", "shape"), Column("share", "share of draws", True),
        Column("inside", "inside the grid"),
    )  # fmt: skip
    rows = [
        (
            Cell(number(winner["t_gflops"]), winner["t_gflops"]), shape(runner),
            Cell(f"{runner['share']:.0%}", runner["share"]),
            Cell("yes", True) if runner["inside"] else Cell("no", False, "doubt"),
        )
        for winner in fit["winners"]
        for runner in winner.get("runners") or []
    ]  # fmt: skip
    return table("runners", columns, rows, "The shapes that most draws elect, at each compute.")


def _origins(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("shape", "origin"),
        Column("t0_gflops", "t0, GFLOPs", True),
        Column("share", "share of draws", True),
    )
    rows = [
        (shape(row), Cell(number(row["t0_gflops"]), row["t0_gflops"]), Cell(f"{row['share']:.0%}", row["share"]))
        for row in (fit.get("origins") or [])[:8]
    ]
    return table(
        "origins", columns, rows, "The origins of the draws; what is missing of 100% elects none, or rarer ones."
    )


def _agreement(fit: dict[str, Any]) -> Table | None:
    columns = (
        Column("shots", "shots", True), Column("origin", "origin"), Column("same", "same as here"),
        Column("num_same", "computes with the same best shape"),
    )  # fmt: skip
    rows = [
        (
            Cell(str(row["shots"]), row["shots"]), shape(row["origin"]) if row.get("origin") else "none",
            Cell("yes", True, "good") if row["same"] else Cell("no", False, "doubt"),
            f"{row['num_same']} of {row['num_slices']}",
        )
        for row in fit.get("agreement") or []
        if isinstance(row, dict)
    ]  # fmt: skip
    return table("agreement", columns, rows, "The same runs judged by another number of labelled images a class.")
