"""The forecast stored with a fit (the document of `sovit predict --json`) as a section and a sentence of its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sovit.analysis.report.document import Bullets, Cell, Column, Paragraph, Section, Table, bullets, section, table
from sovit.analysis.report.words import ARMS, count, exponent, interval, listed, number, percent, shape

_RULES = {
    "paper": "x = x0 (T/t0)^(s w)",
    "fitted": "x = x0 G^d, G as the diagonal sweep fitted it",
    "flops": "the optimum of the law that knows its FLOPs",
}


def forecast_sentence(fit: dict[str, Any]) -> list[Cell]:
    """The forecast in a sentence, never without how far it lies beyond the data; [] without a forecast."""
    found = _forecast(fit)
    if not found:
        return []
    at = f"At {number(found['t_gflops'], 4)} GFLOPs" if found.get("t_gflops") else "At the budget asked for"
    box = (found.get("region") or {}).get("box") or {}
    ends = {arm: f" ({_end(box[arm].get('lo'))} to {_end(box[arm].get('hi'))})" for arm in ARMS if box.get(arm)}
    best = " x ".join(f"{number(found['optimum'][arm])}{ends.get(arm, '')}" for arm in ARMS)
    first = (found.get("candidates") or [None])[0]
    rounded = f", rounded {shape(first)}" if _sizes(first) else ""
    return [Cell(f"{at} the best shape is {best}{rounded}: {_reach(found)}.")]


def forecast_section(fit: dict[str, Any]) -> Section:
    """Growth, region, candidates and remarks of the forecast; no blocks without one."""
    found = _forecast(fit)
    if not found:
        return section("forecast", "The forecast")
    said = [f"budget {found['budget']}"] if found.get("budget") else []
    said += [f"rule {_RULES[found['rule']]}"] if found.get("rule") in _RULES else []
    start = found.get("origin") or {}
    if _sizes(start):
        t0 = f", best at t0 = {number(start['t0_gflops'])} GFLOPs" if start.get("t0_gflops") else ""
        share = f", elected by {start['share']:.0%} of the draws" if start.get("share") is not None else ""
        said.append(f"origin {shape({arm: f'{start[arm]:g}' for arm in ARMS})}{t0}{share}")
    step = found.get("step")
    if step:
        said.append(f"step {exponent(step['estimate'])} {interval(step)}")
    said.append(_reach(found))
    text = "; ".join(said)
    return section(
        "forecast",
        "The forecast",
        Paragraph(f"{text[0].upper()}{text[1:]}."),
        _growth(found),
        _candidates(found),
        _notes(found),
    )


def _forecast(fit: dict[str, Any]) -> dict[str, Any]:
    found = fit.get("forecast")
    return found if isinstance(found, dict) and _sizes(found.get("optimum")) else {}


def _sizes(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(arm), int | float) for arm in ARMS)


def _reach(found: dict[str, Any]) -> str:
    """The extrapolation factor, or that it is not known."""
    far = found.get("extrapolation") or {}
    if not far.get("factor"):
        return "how far that lies beyond the data is not recorded"
    return f"an extrapolation to {far['factor']:.3g} times the largest compute measured"


def _growth(found: dict[str, Any]) -> Table | None:
    region = found.get("region") or {}
    level = f"{region['level']:.0%} region, all at once" if region.get("level") else "region"
    columns = (
        Column("dimension", "dimension"), Column("exponent", "exponent"), Column("interval", "interval"),
        Column("split", "share of the budget", True), Column("growth", "grows as t^", True),
        Column("size", "best size, not rounded", True), Column("region", level, True),
    )  # fmt: skip
    rows = []
    for arm, title in ARMS.items():
        one, box = (found.get("exponents") or {}).get(arm) or {}, (region.get("box") or {}).get(arm)
        known = one.get("lo") != one.get("hi")
        rows.append(
            (
                Cell(title, tone="strong"), Cell(exponent(one.get("estimate")), one.get("estimate")),
                Cell(interval(one), [one.get("lo"), one.get("hi")]) if known else Cell("given"),
                Cell(number(one.get("split")), one.get("split")), Cell(exponent(one.get("growth")), one.get("growth")),
                Cell(number(found["optimum"][arm]), found["optimum"][arm]),
                Cell(f"{_end(box.get('lo'))} to {_end(box.get('hi'))}", box) if box else Cell("-"),
            )
        )  # fmt: skip
    return table("forecast", columns, rows, stacks=True)


def _end(value: float | None) -> str:
    return number(value) if value else "open"


def _candidates(found: dict[str, Any]) -> Table | None:
    columns = (
        Column("shape", "shape"), Column("heads", "heads x dimension"), Column("num_params", "parameters", True),
        Column("forward_gflops", "GFLOPs/image", True), Column("images", "images to train on", True),
        Column("regret", "compute wasted", True), Column("label", "what"),
    )  # fmt: skip
    rows: list[Sequence[Cell]] = []
    for one in found.get("candidates") or []:
        heads = listed([f"{num}x{size}" for num, size in (one.get("heads") or [])[:3]])
        rows.append(
            (
                Cell(shape(one), {arm: one.get(arm) for arm in ARMS}, tone="strong"), Cell(heads, one.get("heads")),
                Cell(count(one.get("num_params")), one.get("num_params")),
                Cell(number(one.get("forward_gflops")), one.get("forward_gflops")),
                Cell(count(one.get("images")), one.get("images")),
                Cell(percent(one.get("regret"), sign=False), one.get("regret")), Cell(str(one.get("label", "-"))),
            )
        )  # fmt: skip
    by = f"Compute wasted by rounding: {found['regret_by']}." if found.get("regret_by") else ""
    return table("candidates", columns, rows, by)


def _notes(found: dict[str, Any]) -> Bullets | None:
    return bullets([Cell(str(note), tone="doubt") for note in found.get("notes") or []])
