"""A prediction as a document (``--json``) and as text: nothing is computed here that decides anything."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sovit.cli import serving

if TYPE_CHECKING:
    from sovit.analysis.forecast.candidates import Candidate
    from sovit.analysis.forecast.exponents import Start
    from sovit.analysis.forecast.predict import Forecast
    from sovit.analysis.forecast.region import Region

SCHEMA = 1
COLUMNS = 110
_UNSURE = ("the exponents are given without their uncertainty, so there is no region; sovit fit on a star gives both",)
_MEANING = {
    "star": "x = x0 (T/t0)^(s w)",
    "diagonal": "x = x0 G^d, G as the diagonal sweep fitted it",
    "joint": "the optimum of the law that knows its FLOPs",
}


def content(
    forecast: Forecast,
    region: Region | None,
    candidates: Sequence[Candidate],
    *,
    start: Start | None,
    budget_in_words: str,
    leading: str,
    regret_by: str,
    extrapolation: Mapping[str, Any] | None,
    geometry: Mapping[str, Any],
    geometry_from: str,
    held_out: Sequence[str] = (),
) -> dict[str, Any]:
    """JSON-ready: the forecast, its region, the candidates and what they rest on; an open end is null above, 0 below."""
    from sovit.analysis.points import DIMENSIONS, plain

    growth = {
        name: {
            "estimate": one.estimate,
            "lo": one.lo,
            "hi": one.hi,
            "source": one.source,
            "split": split,
            "growth": one.estimate * split,
        }
        for (name, one), split in zip(forecast.exponents.items(), forecast.split, strict=True)
    }
    origin = None
    if start is not None:
        origin = dict(zip(DIMENSIONS, start.x, strict=True)) | {
            "t0_gflops": start.t0,
            "source": start.source,
            "share": sum(share for x, _, share in start.draws if x == start.x) if start.draws else None,
        }
    step = forecast.step
    box = None
    if region is not None:
        box = {
            "level": region.level,
            "box": {name: {"lo": lo, "hi": hi} for name, lo, hi in zip(DIMENSIONS, region.lo, region.hi, strict=True)},
            "open": region.open_ends,
            "correlation": region.correlation,
            "ellipsoid": region.ellipsoid,
        }
    found = {
        "schema": SCHEMA,
        "kind": "prediction",
        "rule": {"star": "paper", "diagonal": "fitted", "joint": "flops"}[leading],
        "t_gflops": forecast.target,
        "budget": budget_in_words,
        "origin": origin,
        "exponents": growth,
        "step": {"estimate": step.estimate, "lo": step.lo, "hi": step.hi, "source": step.source} if step else None,
        "optimum": dict(zip(DIMENSIONS, forecast.x, strict=True)),
        "region": box,
        "extrapolation": dict(extrapolation) if extrapolation else None,
        "held_out": list(held_out),
        "geometry": dict(geometry) | {"from": geometry_from},
        "regret_by": regret_by,
        "candidates": [plain(one) | {"off": dict(zip(DIMENSIONS, one.off, strict=True))} for one in candidates],
        "notes": [*(forecast.notes if region else _UNSURE), *_remarks(forecast, candidates[0], start, geometry)],
    }
    return plain(found)


def _remarks(forecast: Forecast, first: Candidate, start: Start | None, geometry: Mapping[str, Any]) -> list[str]:
    """What a reader should know about this forecast and would not see."""
    from sovit.flops import forward_gflops
    from sovit.shape import Shape

    notes = []
    if start is not None:
        total = sum(forecast.split)
        if abs(total - 1) > 1e-3:
            notes.append(f"the weights sum to {total:.3g}; in the paper they sum to 1")
        cost = {name: geometry[name] for name in ("image_size", "channels", "pool", "num_classes")}
        shape = Shape(*map(round, start.x), 1, geometry["patch_size"])  # type: ignore[call-arg]
        before = start.t0 / forward_gflops(shape, **cost) if start.t0 else None
        if start.t0 and forecast.target and forecast.target < start.t0:
            notes.append("T is below the origin's t0: the rule makes the origin smaller, which the paper does not")
        elif before and first.images and first.images < before:
            notes.append(
                f"the shape outgrows the compute: it would see fewer images ({count(first.images)}) than the origin did "
                f"({count(before)})"
            )
    return notes


def text(found: Mapping[str, Any]) -> str:
    """The prediction for the terminal, of at most 110 columns."""
    from sovit.analysis.report.words import counted

    star = found["origin"] is not None
    origin, step, target = found["origin"], found["step"], found["t_gflops"]
    lines = []
    at = f"T = {gflops(target)} GFLOPs" if target else "T"
    said = f" ({found['budget']})" if found["budget"] else ""
    lines.append(f"{at}{said}: {_MEANING[_leading(found)]}")
    if star:
        where = f"best at t0 = {gflops(origin['t0_gflops'])} GFLOPs" if origin["t0_gflops"] else "its t0 is not given"
        share = f", elected by {origin['share']:.0%} of the draws" if origin["share"] is not None else ""
        lines.append(f"origin {_sizes(origin)}, {where} ({origin['source']}{share})")
    if step:
        lines.append(f"step {_interval(step)} ({step['source']})")
    lines += ["", *_table(_growth_rows(found, star)), ""]
    far = found["extrapolation"]
    if far:
        lines.append(
            f"extrapolation: {_times(far['factor'])} the largest compute in {far['fit']} "
            f"({gflops(far['largest_t_gflops'])} GFLOPs)"
        )
    elif star and origin["t0_gflops"] and target:
        lines.append(
            f"extrapolation: {_times(target / origin['t0_gflops'])} the origin's compute; what the exponents were measured "
            "at is not known"
        )
    else:
        lines.append("extrapolation: by the factor given; what the exponents were measured at is not known")
    for row in found["held_out"]:
        lines += textwrap.wrap(f"held out: {row}", COLUMNS, subsequent_indent="  ")
    lines += ["", *_table(_candidate_rows(found)), ""]
    place = found["geometry"]
    lines.append(
        f"{place['image_size']} px, patch {place['patch_size']}, {counted(place['channels'], 'channel')}, "
        f"pool {place['pool']}, {place['num_classes'] or 'no'} classes ({place['from']}); GFLOPs: forward, per image; "
        "images: to train on within T"
    )
    lines.append(f"regret: share of T wasted, {found['regret_by']}")
    lines += [f"- {note}" for note in found["notes"]]
    if "constraint" in found:
        lines += ["", *serving.text(found["constraint"])]
    return "\n".join(part for line in lines for part in _wrap(line))


def expectations(found: Mapping[str, Any], chosen: Candidate) -> list[str]:
    """Sentences for the head of a written experiment."""
    far, use = found["extrapolation"], found.get("constraint")
    sentences = [f"{chosen.num_params:,} parameters; unrounded {_sizes(found['optimum'], 1)}."]
    if use:
        sentences.append(serving.text(use)[0] + ".")
    if found["region"]:
        ends = ", ".join(f"{name} {_ends(ends)}" for name, ends in found["region"]["box"].items())
        sentences.append(f"the best shape lies, at {found['region']['level']:.0%}, within {ends}, all at once.")
    if chosen.regret is not None:
        cause = "the limits of use" if use else "rounding"
        sentences.append(f"{percent(chosen.regret)} of the compute wasted by {cause}, {found['regret_by']}.")
    if far:
        sentences.append(f"{_times(far['factor'])} the largest compute in {far['fit']}: an extrapolation.")
    return sentences


def _leading(found: Mapping[str, Any]) -> str:
    return {"paper": "star", "fitted": "diagonal", "flops": "joint"}[found["rule"]]


def _growth_rows(found: Mapping[str, Any], star: bool) -> list[tuple[str, ...]]:
    head = {"star": ("s", "w"), "diagonal": ("d", "step"), "joint": ("growth", "")}[_leading(found)]
    region = found["region"]
    level = f"{region['level']:.0%} region, all at once" if region else "region"
    rows = [("", *head, *(("origin",) if star else ()), "unrounded", level)]
    for name, one in found["exponents"].items():
        split = "1/3" if abs(one["split"] - 1 / 3) < 1e-9 else f"{one['split']:.3g}" if head[1] else ""
        source = " given" if one["source"] == "given" and _leading(found) == "star" else ""
        size = found["optimum"][name]
        ends = _ends(region["box"][name]) if region else "-"
        start = (f"{found['origin'][name]:g}",) if star else ()
        rows.append((name, _interval(one) + source, split, *start, f"{size:,.1f}", ends))
    return rows


def _candidate_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "shape", "heads x dimension", "parameters", "GFLOPs", "images", "regret", "what")
    ]
    for place, one in enumerate(found["candidates"], start=1):
        heads = ", ".join(f"{num}x{size}" for num, size in one["heads"][:3])
        rows.append(
            (
                str(place),
                _sizes(one),
                heads,
                count(one["num_params"]),
                f"{one['forward_gflops']:.3g}",
                count(one["images"]),
                percent(one["regret"]),
                one["label"],
            )
        )
    return rows


def _interval(found: Mapping[str, Any]) -> str:
    """0.22 [0.20, 0.24]; an open side is said to be open."""
    from sovit.analysis.report.words import exponent

    lo, hi, value = found["lo"], found["hi"], exponent(found["estimate"])
    if lo == hi:
        return value
    if hi is None:
        return f"{value} above {exponent(lo)}" if lo else f"{value} open"
    return f"{value} [{exponent(lo)}, {exponent(hi)}]" if lo else f"{value} below {exponent(hi)}"


def _ends(box: Mapping[str, Any]) -> str:
    lo, hi = box["lo"], box["hi"]
    if lo == hi:
        return f"{lo:,.1f}"
    if hi is None:
        return f"above {lo:,.1f}, open" if lo else "open at both ends"
    return f"{lo:,.1f} to {hi:,.1f}" if lo else f"below {hi:,.1f}, open"


def _sizes(row: Mapping[str, Any], decimals: int = 0) -> str:
    return "x".join(f"{row[name]:.{decimals}f}" for name in ("width", "depth", "mlp_dim"))


def _times(factor: float) -> str:
    return f"{factor:.3g} times" if factor < 100 else f"{factor:,.0f} times"


def gflops(value: float) -> str:
    """256, 1,234, 8.53e12."""
    return f"{value:,.4g}" if value < 1e4 else _power(value)


def _power(value: float) -> str:
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits}e{int(power)}"


def count(value: float | None) -> str:
    """4.2K, 26.1M, 38.6B; '-' for None."""
    if value is None:
        return "-"
    for limit, suffix in ((1e3, ""), (1e6, "K"), (1e9, "M"), (1e12, "B")):
        if value < limit * 0.9995:
            return f"{value * 1e3 / limit:.3g}{suffix}"
    return _power(value)


def percent(share: float | None) -> str:
    return "-" if share is None else "<0.01%" if 0 < share < 1e-4 else f"{100 * share:.2g}%"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _wrap(line: str) -> Sequence[str]:
    from sovit.analysis.report.words import visible

    line = visible(line)
    if len(line) <= COLUMNS or "  " in line.strip():  # a row of a table stays one line
        return [line]
    indent = "  " if line.startswith("- ") else ""
    return textwrap.wrap(line, COLUMNS, subsequent_indent=indent) or [""]
