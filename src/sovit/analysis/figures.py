"""The figures of a report, drawn from a fit's plain dict. matplotlib is loaded when the first one is asked for.

Every function returns a matplotlib Figure that belongs to no global state; `svg` and `png` write one.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sovit.analysis.diagnostics import isocompute
from sovit.analysis.law import Law
from sovit.analysis.points import Point, dimensions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = {"width": "width", "depth": "depth", "mlp_dim": "MLP dimension"}
INK, GREY, FAINT, ACCENT = "#1f2933", "#7b8794", "#d5dbe1", "#b4431f"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f2",
    "text.color": INK,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "sovit",  # the same figure gives the same bytes
    "svg.fonttype": "path",
}
_STEPS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)  # of the ticks in one decade of a log axis
_SAME_T = 0.05  # evaluations within 5% of compute belong to one isocompute slice (steps are rounded)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element for a page: no header, no date, no ids that two figures would share."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def png(figure: Figure, path: Path, dpi: int = 150) -> None:
    with _style():
        figure.savefig(path, dpi=dpi)


def number(value: float | None, digits: int = 3) -> str:
    """A plain number of so many significant digits, never in scientific notation: 0.251, 267, 1,234; '-' for None."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """A whole number in full, with thousands separators; '-' for None."""
    return "-" if value is None else f"{value:,.0f}"


def exponent(value: float | None) -> str:
    """An exponent with two decimals, or one digit where those would all be zeros."""
    return "-" if value is None else number(value, 1) if 0 < abs(value) < 0.005 else f"{value:.2f}"


def error_by_dimension(fit: dict[str, Any]) -> Figure:
    """Error against each dimension along isocompute slices, with the fitted law: one panel an arm."""
    with _style():
        figure, panels = _panels(fit, height=4.3, sharey=True)
        levels = slices(fit)
        color = _colors(levels)
        used = [point for point in fit.get("points", []) if point["error"] > 0]
        for axis, arm in zip(panels, ARMS, strict=True):
            _draw_slices(axis, fit, arm, used, levels, color)
        if used:
            errors = [point["error"] for point in used]
            _log_axis(panels[0].yaxis, min(errors) / 1.06, min(1.0, max(errors) * 1.06))
        panels[0].set_ylabel(_error_label(fit))
        _level_legend(figure, levels, color)
        return figure


def error_by_compute(fit: dict[str, Any], baselines: dict[str, float]) -> Figure:
    """Error against compute, one line a run, coloured by its place in the arm; baselines (name -> error) across."""
    with _style():
        figure, panels = _panels(fit, height=4.0, sharey=True)
        points = [point for point in fit.get("points", []) if point["error"] > 0]
        for axis, arm in zip(panels, ARMS, strict=True):
            own = [point for point in points if point["arm"] in (arm, None)]
            sizes = sorted({point[arm] for point in own})
            color = _colors(sizes, "plasma")
            for size in sizes:
                runs = [p for p in own if p[arm] == size]
                for index, run in enumerate(sorted({p["run_id"] for p in runs})):
                    line = sorted((p["t_gflops"], p["error"]) for p in runs if p["run_id"] == run)
                    center = fit.get("center", {}).get(arm) == size
                    axis.plot(
                        *zip(*line, strict=True),
                        color=INK if center else color[size],
                        linewidth=1.6 if center else 1.2,
                        linestyle="--" if center else "-",
                        marker="o",
                        markersize=2.6,
                        label=(f"{size}, center" if center else str(size)) if index == 0 else None,
                    )
            if own:
                times = [point["t_gflops"] for point in own]
                _log_axis(axis.xaxis, min(times) / 1.1, max(times) * 1.1)
                axis.legend(title=ARMS[arm], loc="lower left", ncols=2, handlelength=1.4, columnspacing=1.0)
            axis.set_xlabel("compute t, GFLOPs")
            _draw_baselines(axis, baselines)
        everything = [point["error"] for point in points] + [error for error in baselines.values() if error > 0]
        if everything:
            # room below for the legend
            _log_axis(panels[0].yaxis, min(everything) / 1.6, max(everything) * 1.12, top=1.0)
        panels[0].set_ylabel(_error_label(fit))
        return figure


def optimum_by_compute(fit: dict[str, Any]) -> Figure:
    """The best size against compute: measured minima, parabola minima and the law's optimum, one panel an arm."""
    with _style():
        figure, panels = _panels(fit, height=3.7, sharey=False)
        for axis, arm in zip(panels, ARMS, strict=True):
            axis.set_xlabel("compute t, GFLOPs")
            axis.set_ylabel(f"best {ARMS[arm]}")
            entry = fit["arms"].get(arm)
            minima = entry["minima"] if entry else []
            if entry and minima:
                _draw_optimum(axis, fit, arm, entry, minima)
        legend: dict[str, Any] = {}
        for axis in panels:
            legend |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if legend:
            figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=len(legend))
        return figure


def grid_errors(fit: dict[str, Any]) -> Figure:
    """Error of every shape of a grid at one compute, a map of width and MLP dimension for each depth.

    The compute is the origin's t0, or the largest there is if the grid has no origin.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = [field.name for field in dataclasses.fields(Point)]
    points = [Point(**{name: row[name] for name in names}) for row in fit["points"] if row["used"]]
    t = fit["origin"]["t0_gflops"] if fit["origin"] else fit["winners"][-1]["t_gflops"]
    piece = min(isocompute(points, dimensions), key=lambda piece: abs(math.log(piece.t_gflops / t)))
    errors = dict(zip(piece.sizes, piece.errors, strict=True))
    least, most = float(piece.errors.min()), float(piece.errors.max())
    widths, depths, mlp_dims = (fit["grid"][arm] for arm in ARMS)
    with _style():
        figure = Figure(figsize=(11.5, 3.6), layout="constrained")
        panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
        for axis, depth in zip(panels, depths, strict=True):
            table = np.array([[errors.get((w, depth, m), math.nan) for w in widths] for m in mlp_dims])
            image = axis.imshow(table, origin="lower", cmap="viridis", vmin=least, vmax=most, aspect="auto")
            for (row, column), error in np.ndenumerate(table):
                if math.isnan(error):
                    continue
                best = error == least
                axis.text(
                    column, row, number(error), ha="center", va="center", fontsize=8.5,
                    color="white" if error < (least + most) / 2 else INK, weight="bold" if best else "normal",
                )  # fmt: skip
                if best:
                    corner = (column - 0.46, row - 0.46)
                    axis.add_patch(Rectangle(corner, 0.92, 0.92, facecolor="none", edgecolor=ACCENT, linewidth=2.5))
            axis.set_title(f"depth {depth}")
            axis.set_xticks(range(len(widths)), [str(width) for width in widths])
            axis.set_yticks(range(len(mlp_dims)), [str(mlp_dim) for mlp_dim in mlp_dims])
            axis.set_xlabel("width")
            axis.grid(False)
        panels[0].set_ylabel("MLP dimension")
        figure.colorbar(image, ax=list(panels), label=f"{_error_label(fit)}, at {number(t)} GFLOPs", shrink=0.95)
        return figure


def slices(fit: dict[str, Any]) -> list[float]:
    """Compute levels (GFLOPs, ascending) of the isocompute slices: those of the minima, or else of the points."""
    times = sorted(
        {m["t_gflops"] for arm in fit.get("arms", {}).values() for m in arm.get("minima", [])}
        or {point["t_gflops"] for point in fit.get("points", [])}
    )
    groups: list[list[float]] = []
    for time in times:
        if groups and time <= groups[-1][0] * (1 + _SAME_T):
            groups[-1].append(time)
        else:
            groups.append([time])
    return [float(np.median(group)) for group in groups]


def law_of(entry: dict[str, Any]) -> Law | None:
    """The law of an arm's entry in a fit's dict, or None where it has none."""
    return Law(**entry["law"]) if entry.get("law") else None


def max_error(entry: dict[str, Any]) -> float:
    """The headline cut-off of an arm: the law was fitted to errors up to here (1.0: to all)."""
    return next((cut["max_error"] for cut in entry["cutoffs"] if cut["headline"]), 1.0)


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE)


def _panels(fit: dict[str, Any], height: float, sharey: bool) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, height), layout="constrained")
    panels = list(figure.subplots(1, len(ARMS), sharey=sharey))
    for axis, (arm, name) in zip(panels, ARMS.items(), strict=True):
        entry = fit["arms"].get(arm)
        title = name
        if entry and entry["identified"] and entry["s"]:
            title += f":  s = {exponent(entry['s']['estimate'])}"
        elif entry:
            title += ":  not identified"
        axis.set_title(title)
        if not any(point["arm"] == arm for point in fit.get("points", [])):
            axis.text(0.5, 0.5, "no points", transform=axis.transAxes, ha="center", color=GREY)
    return figure, panels


def _draw_slices(
    axis: Axes,
    fit: dict[str, Any],
    arm: str,
    points: Sequence[dict[str, Any]],
    levels: Sequence[float],
    color: dict[float, Any],
) -> None:
    own = [point for point in points if point["arm"] in (arm, None)]
    sizes = sorted({point[arm] for point in own})
    axis.set_xlabel(ARMS[arm])
    if not sizes:
        return
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}  # drawn together, which is ten times as fast
    for point in own:
        level = min(levels, key=lambda level: abs(math.log(level / point["t_gflops"])))
        kind = "center" if point["arm"] is None else "used" if point["used"] else "unused"
        groups.setdefault((level, kind), []).append(point)
    for (level, kind), group in groups.items():
        axis.errorbar(
            [point[arm] for point in group],
            [point["error"] for point in group],
            yerr=[point["stderr"] or 0.0 for point in group],
            linestyle="none",
            marker="o",
            markersize=3.0 if kind == "unused" else 4.6,
            color=color[level],
            markerfacecolor="white" if kind == "center" else color[level],
            markeredgewidth=1.2 if kind == "center" else 0,
            elinewidth=0.9,
            alpha=0.32 if kind == "unused" else 1.0,
            zorder=4 if kind == "center" else 3,
        )
    entry = fit["arms"].get(arm)
    law = law_of(entry) if entry else None
    if entry and law:
        limit = max_error(entry)
        x = np.geomspace(sizes[0], sizes[-1], 200)
        for level in levels:
            error = law.error(x, level)
            within = error <= limit
            axis.plot(x, np.where(within, error, np.nan), color=color[level], linewidth=1.3, zorder=2)
            axis.plot(
                x, np.where(within, np.nan, error), color=color[level], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1
            )
            best = float(law.optimum(level))
            if sizes[0] <= best <= sizes[-1]:
                axis.plot(
                    best, law.error(best, level), "v", color=color[level], markeredgecolor=INK, markersize=6.5, zorder=5
                )
    _size_axis(axis, sizes)


def _draw_baselines(axis: Axes, baselines: dict[str, float]) -> None:
    """Dotted lines with their names above them, or below where the line above is too near."""
    above = math.inf
    for name, error in sorted(baselines.items(), key=lambda item: -item[1]):
        below = error > above / 1.15
        axis.axhline(error, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axis.annotate(
            name, (1, error), xycoords=("axes fraction", "data"), xytext=(0, -2 if below else 2),
            textcoords="offset points", ha="right", va="top" if below else "bottom", fontsize=7.5, color=GREY,
        )  # fmt: skip
        above = error


def _draw_optimum(
    axis: Axes, fit: dict[str, Any], arm: str, entry: dict[str, Any], minima: Sequence[dict[str, Any]]
) -> None:
    times = np.array([minimum["t_gflops"] for minimum in minima])
    sizes = sorted({point[arm] for point in fit["points"] if point["arm"] in (arm, None)}) or [1]
    line = np.geomspace(times.min() / 1.15, times.max() * 1.15, 100)
    law, interval = law_of(entry), entry["s"]
    shown = [float(size) for minimum in minima for size in (minimum["x"], minimum["parabola_x"]) if size]
    if law and law.alpha and law.beta:
        best = law.optimum(line)
        shown += list(law.optimum(times))
        dashes, label = ("-", "law's optimum") if entry["identified"] else ("--", "law's optimum, not identified")
        axis.plot(line, best, color=ACCENT, linewidth=1.6, linestyle=dashes, label=label, zorder=3)
        if entry["identified"] and interval and interval["lo"] is not None and interval["hi"] is not None:
            middle = math.sqrt(times.min() * times.max())
            turned = [law.optimum(middle) * (line / middle) ** interval[side] for side in ("lo", "hi")]
            axis.fill_between(
                line, np.minimum(*turned), np.maximum(*turned), color=ACCENT, alpha=0.12, linewidth=0,
                label="its slope within the interval",
            )  # fmt: skip
    for inside, label in ((True, "lowest error, inside the arm"), (False, "lowest error, at an edge")):
        x = [m["x"] if m["interior"] is inside else math.nan for m in minima]
        axis.plot(times, x, "o", color=INK, markerfacecolor=INK if inside else "white", markersize=5, label=label)
    parabola = [minimum["parabola_x"] or math.nan for minimum in minima]
    axis.plot(times, parabola, "D", color="#2680c2", markersize=4.5, markerfacecolor="none", label="parabola's minimum")
    for size in sizes:
        axis.axhline(size, color=FAINT, linewidth=0.6, zorder=0)
    axis.grid(False)
    axis.set_xscale("log")
    _log_axis(axis.xaxis, line[0], line[-1])
    low, high = max(min(shown), sizes[0] / 2), min(max(shown), sizes[-1] * 2)
    _log_axis(axis.yaxis, low / 1.35, high * 1.35, among=sizes)


def _error_label(fit: dict[str, Any]) -> str:
    metric = fit.get("metric") or {}
    return f"{metric.get('shots', '')}-shot error, {metric.get('dataset', '')}".replace("$", r"\$")


def _colors(values: Sequence[float], name: str = "viridis") -> dict[float, Any]:
    """A colour a value, dark to light, without the palest end that a white page swallows."""
    from matplotlib import colormaps

    places = np.linspace(0.0, 0.86, len(values)) if len(values) != 1 else [0.3]
    return {value: colormaps[name](float(place)) for value, place in zip(values, places, strict=True)}


def _level_legend(figure: Figure, levels: Sequence[float], color: dict[float, Any]) -> None:
    from matplotlib.lines import Line2D

    if not levels:
        return
    shown = levels if len(levels) <= 12 else [levels[round(i * (len(levels) - 1) / 11)] for i in range(12)]
    handles = [Line2D([], [], color=color[level], marker="o", markersize=4.6, label=number(level)) for level in shown]
    handles += [
        Line2D([], [], color=GREY, marker="v", markeredgecolor=INK, linestyle="none", label="law's optimum"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none", label="center, held out"),
        Line2D([], [], color=GREY, marker="o", alpha=0.35, markersize=3, linestyle="none", label="not used"),
    ]
    figure.legend(
        handles=handles, title="compute t, GFLOPs", loc="outside lower center", ncols=len(handles),
        columnspacing=1.2, handletextpad=0.4, handlelength=1.4,
    )  # fmt: skip


def _size_axis(axis: Axes, sizes: Sequence[float]) -> None:
    _log_axis(axis.xaxis, sizes[0] / 1.12, sizes[-1] * 1.12, among=sizes)


def _log_axis(axis: Any, low: float, high: float, *, among: Iterable[float] = (), top: float | None = None) -> None:
    """Log scale from low to high, ticks in plain numbers: at the values of ``among``, or at round ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if low >= high:
        low, high = low / 1.1, high * 1.1
    round_ones = [step * 10.0**k for k in range(-9, 16) for step in _STEPS]
    ticks = [value for value in (list(among) or round_ones) if low <= value <= high and (not top or value <= top)]
    if len(ticks) < 2:
        ticks = [value for value in round_ones if low <= value <= high]
    kept: list[float] = []
    apart = math.log(high / low) / (9 if axis.axis_name == "x" else 14)
    for tick in ticks:
        if not kept or math.log(tick / kept[-1]) > apart:
            kept.append(tick)
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(kept))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
