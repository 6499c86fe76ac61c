"""The figures of fits over whole shapes: a grid's errors and frontier, a diagonal sweep, and a law's joint optimum.

As `figures`: from the fit's plain dict, each function returns a matplotlib Figure; ``depths`` chooses the panels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sovit.analysis.diagnostics import isocompute
from sovit.analysis.points import Point, dimensions
from sovit.analysis.report.drawing import ACCENT, BACK, BLUE, GREY, INK, SOFT, color, log_axis, ramp, style, tips
from sovit.analysis.report.figures import error_label, law_of, nearest, slices
from sovit.analysis.report.linear import optimum_band
from sovit.analysis.report.words import ARMS, number, shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WHITE, _BLACK = "#ffffff", "#000000"  # on the cells of a map, whose colours are the same in light and dark


def grid_errors(fit: dict[str, Any], depths: Sequence[int] = ()) -> Figure:
    """Error of every shape of a grid at one compute, a map of width and MLP dimension for each depth.

    The compute is the origin's t0, or the largest there is if the grid has no origin.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = [field.name for field in dataclasses.fields(Point)]
    points = [Point(**{name: row[name] for name in names}) for row in fit["points"] if row["used"]]
    t = grid_compute(fit)
    piece = min(isocompute(points, dimensions), key=lambda piece: abs(math.log(piece.t_gflops / t)))
    errors = dict(zip(piece.sizes, piece.errors, strict=True))
    least, most = float(piece.errors.min()), float(piece.errors.max())
    widths, every_depth, mlp_dims = (fit["grid"][arm] for arm in ARMS)
    depths, start = depths or every_depth, fit["origin"]
    with style():
        figure = Figure(figsize=(2.9 * len(depths), 2.6), layout="constrained")
        panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
        for axis, depth in zip(panels, depths, strict=True):
            for column, width in enumerate(widths):
                for row, mlp_dim in enumerate(mlp_dims):
                    error = errors.get((width, depth, mlp_dim))
                    if error is None:
                        axis.text(column, row, "-", ha="center", va="center", color=SOFT)
                        continue
                    place = (error - least) / (most - least or 1)
                    best = error == least
                    axis.add_patch(
                        Rectangle(
                            (column - 0.5, row - 0.5), 1, 1, facecolor=to_hex(colormaps["viridis"](place)), zorder=1
                        )
                    )
                    axis.text(
                        column, row, number(error), ha="center", va="center", fontsize=9, zorder=3,
                        color=_readable(colormaps["viridis"](place)), weight="bold" if best else "normal",
                    )  # fmt: skip
                    if best:
                        axis.add_patch(
                            Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, facecolor="none", edgecolor="#ff7a45",
                                      linewidth=2.5, zorder=2)
                        )  # fmt: skip
            if start and start["depth"] == depth:
                corner = widths.index(start["width"]) - 0.38, mlp_dims.index(start["mlp_dim"]) - 0.38
                axis.add_patch(Rectangle(corner, 0.76, 0.76, facecolor="none", edgecolor=_WHITE, linestyle=":",
                                         linewidth=1.6, zorder=2))  # fmt: skip
            axis.set_title(f"depth {depth}")
            axis.set_xlim(-0.5, len(widths) - 0.5)
            axis.set_ylim(-0.5, len(mlp_dims) - 0.5)
            axis.set_xticks(range(len(widths)), [str(width) for width in widths])
            axis.set_yticks(range(len(mlp_dims)), [str(mlp_dim) for mlp_dim in mlp_dims])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_xlabel("width")
            axis.grid(False)
        panels[0].set_ylabel("MLP dimension")
        return figure


def _readable(cell: Sequence[float]) -> str:
    """White or black, whichever stands out more from a cell (r, g, b, ...): at least 4.58 to 1 (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in cell[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _WHITE if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else _BLACK


def grid_compute(fit: dict[str, Any]) -> float:
    """The compute that the maps of a grid show, in GFLOPs: the origin's t0, or the largest."""
    return fit["origin"]["t0_gflops"] if fit["origin"] else fit["winners"][-1]["t_gflops"]


def grid_frontier(fit: dict[str, Any]) -> Figure:
    """Error against compute: one faint line a shape, and the best shape at each compute named along the lower edge."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        used = [point for point in fit["points"] if point["used"] and point["error"] > 0]
        runs: dict[str, list[dict[str, Any]]] = {}
        for point in sorted(used, key=lambda point: point["t_gflops"]):
            runs.setdefault(point["run_id"], []).append(point)
        for run, line in runs.items():
            axis.plot(
                [p["t_gflops"] for p in line], [p["error"] for p in line], color=GREY, alpha=0.45, linewidth=0.7,
                marker="o", markersize=2, gid=tips(f"{run}: {number(p['error'])}" for p in line),
            )  # fmt: skip
        winners = fit["winners"]
        t, error = [w["t_gflops"] for w in winners], [w["error"] for w in winners]
        axis.plot(
            t, error, color=ACCENT, linewidth=1.8, marker="o", markersize=5, zorder=4,
            gid=tips(f"{shape(w['best'])}: {number(w['error'])}" for w in winners),
        )  # fmt: skip
        every = [point["error"] for point in used] + error
        times = [point["t_gflops"] for point in used] + t
        log_axis(axis.xaxis, min(times) / 1.12, max(times) * 1.3)
        log_axis(axis.yaxis, min(every) / 1.12, min(1.0, max(every) * 1.05))
        before = ""
        for winner in winners:
            name = shape(winner["best"])
            if name != before:
                axis.annotate(
                    name, (winner["t_gflops"], winner["error"]), xytext=(3, -5), textcoords="offset points",
                    ha="left", va="top", fontsize=8, color=ACCENT, clip_on=False,
                )  # fmt: skip
            before = name
        axis.set_xlabel("compute t, GFLOPs")
        axis.set_ylabel(error_label(fit))
        return figure


def scale_of(fit: dict[str, Any], point: dict[str, Any]) -> float:
    """G of a point of a diagonal sweep: recorded, or from its depth and width, x_k = origin_k G^direction_k."""
    if point.get("g"):
        return float(point["g"])
    logs = [
        (math.log(point[arm] / fit["origin"][arm]), fit["direction"][arm]) for arm in ARMS if fit["direction"].get(arm)
    ]
    return math.exp(sum(log * s for log, s in logs) / sum(s * s for _, s in logs))


def error_by_scale(fit: dict[str, Any]) -> Figure:
    """A diagonal sweep: error against the joint scale G along isocompute slices, with the fitted law."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axis = figure.subplots()
        points = [point for point in fit.get("points", []) if point["error"] > 0]
        levels = slices(fit)
        shown = ramp(levels)
        law = law_of(fit)
        scales = sorted({round(scale_of(fit, point), 6) for point in points})
        for level, name in shown.items():
            group = [p for p in points if nearest(levels, p["t_gflops"]) == level]
            for used in (True, False):
                part = [point for point in group if bool(point.get("used", True)) is used]
                drawn = axis.errorbar(
                    [scale_of(fit, point) for point in part], [point["error"] for point in part],
                    yerr=[point.get("stderr") or 0.0 for point in part], linestyle="none", marker="o",
                    markersize=4.6 if used else 3.0, elinewidth=0.9, color=color(name), alpha=1.0 if used else 0.45,
                )  # fmt: skip
                drawn.lines[0].set_gid(tips(f"{point['run_id']}: {number(point['error'])}" for point in part))
            if law and len(scales) > 1:
                x = np.geomspace(scales[0], scales[-1], 120)
                axis.plot(x, law.error(x, level), color=color(name), linewidth=1.3)
                best = float(law.optimum(level))
                if scales[0] <= best <= scales[-1]:
                    axis.plot(best, law.error(best, level), "v", color=color(name), markeredgecolor=INK, markersize=6.5)
        if points:
            errors = [point["error"] for point in points]
            log_axis(axis.yaxis, min(errors) / 1.06, min(1.0, max(errors) * 1.06))
            log_axis(axis.xaxis, scales[0] / 1.1, scales[-1] * 1.1)
        axis.set_xlabel("joint scale G")
        axis.set_ylabel(error_label(fit))
        return figure


def scale_by_compute(fit: dict[str, Any]) -> Figure:
    """A diagonal sweep: the best joint scale against compute, the fitted step with its band, and the paper's 1/3.

    The paper's step only where the direction holds the exponents of a star, as its 1/D does.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axis = figure.subplots()
        anchor, step = fit.get("anchor"), fit.get("step")
        minima = fit.get("minima") or []
        times = [minimum["t_gflops"] for minimum in minima] or slices(fit)
        line = np.geomspace(min(times) / 1.15, max(times) * 1.15, 50)
        shown: list[float] = []
        if anchor and step:
            _draw_step(axis, fit, line, shown)
        for minimum in minima:
            if minimum.get("x"):
                inside = minimum.get("interior", True)
                shown.append(minimum["x"])
                axis.plot(minimum["t_gflops"], minimum["x"], "o", color=INK, markerfacecolor=INK if inside else BACK,
                          markersize=5, label="lowest error" + ("" if inside else ", at an edge"), zorder=4)  # fmt: skip
            if minimum.get("parabola_x"):
                shown.append(minimum["parabola_x"])
                axis.plot(minimum["t_gflops"], minimum["parabola_x"], "D", color=BLUE, markerfacecolor="none",
                          markersize=4.5, label="parabola's minimum", zorder=4)  # fmt: skip
        log_axis(axis.xaxis, line[0], line[-1])
        if shown:
            log_axis(axis.yaxis, min(shown) / 1.2, max(shown) * 1.2)
        _legend_below(figure, axis)
        axis.set_xlabel("compute t, GFLOPs")
        axis.set_ylabel("best joint scale G")
        return figure


def _draw_step(axis: Axes, fit: dict[str, Any], line: np.ndarray, shown: list[float]) -> None:
    anchor, step = fit["anchor"], fit["step"]

    def along(power: float) -> np.ndarray:
        return anchor["g"] * (line / anchor["t_gflops"]) ** power

    axis.plot(line, along(step["estimate"]), color=ACCENT, linewidth=1.6, label="fitted step", zorder=3)
    shown += [*along(step["estimate"])[[0, -1]]]
    if fit.get("direction_from", "given") == "given":
        axis.plot(line, along(1 / 3), color=GREY, linewidth=1.2, linestyle="--", label="the paper's 1/3", zorder=2)
        shown += [*along(1 / 3)[[0, -1]]]
    level = f"{100 * (fit.get('level') or 0.95):.0f}% band"
    band = optimum_band("g", fit.get("arm") or {}, fit.get("points") or [], line, fit.get("level") or 0.95)
    if band:
        axis.fill_between(line, *band, color=ACCENT, alpha=0.16, linewidth=0, label=level)


def joint_optimum(fit: dict[str, Any]) -> Figure:
    """The law that knows its FLOPs: the best width, depth and MLP dimension against compute, over the smallest of each."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        rows = sorted(fit["optimum"], key=lambda row: row["t_gflops"])
        times = [row["t_gflops"] for row in rows]
        reach = max((point["t_gflops"] for point in fit.get("points", [])), default=max(times))
        grown: list[float] = []
        for (arm, name), (marker, ink) in zip(ARMS.items(), (("o", ACCENT), ("s", BLUE), ("D", INK)), strict=True):
            sizes = [row[arm] / rows[0][arm] for row in rows]
            grown += sizes
            axis.plot(times, sizes, marker=marker, markersize=4, color=ink, linewidth=1.4, label=name,
                      gid=tips(f"{name} {number(row[arm])}: {number(row['t_gflops'])} GFLOPs" for row in rows))  # fmt: skip
        log_axis(axis.xaxis, times[0] / 1.1, times[-1] * 1.1)
        log_axis(axis.yaxis, min(grown) / 1.15, max(grown) * 1.15)
        if times[-1] > reach * 1.01:
            axis.axvspan(reach, times[-1] * 1.1, color=GREY, alpha=0.16, linewidth=0, label="beyond the data")
        _legend_below(figure, axis)
        axis.set_xlabel("compute t, GFLOPs")
        axis.set_ylabel("size over that at the first compute")
        return figure


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)
