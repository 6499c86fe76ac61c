"""The figures of a star's report, drawn from the fit's plain dict. matplotlib is loaded when the first one is asked for.

Every function returns a matplotlib Figure that belongs to no global state; `drawing.svg` and `drawing.png` write one.
``arms`` chooses the panels: a page draws each arm by itself, so that panels can stand below each other on a phone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sovit.analysis.law import Law
from sovit.analysis.report.drawing import (
    ACCENT,
    BACK,
    BLUE,
    GREY,
    INK,
    LINE,
    SOFT,
    color,
    log_axis,
    png,
    ramp,
    style,
    svg,
    tips,
)
from sovit.analysis.report.linear import optimum_band
from sovit.analysis.report.words import ARMS, arms_of_star, count, exponent, number, value_of
from sovit.metric import shot_name, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ARMS", "count", "error_by_compute", "error_by_dimension", "exponent", "exponents", "law_of",
    "max_error", "number", "optimum_by_compute", "png", "slices", "svg",
]  # fmt: skip
_SAME_T = 0.05  # evaluations within 5% of compute belong to one isocompute slice (steps are rounded)
_PANEL = (3.75, 3.2)  # inches


def exponents(fit: dict[str, Any]) -> Figure:
    """Each exponent's interval, with what stands beside it: jackknife, the range over cut-offs, the parabola's slope."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.1, 2.85), layout="constrained")
        axis = figure.subplots()
        names = arms_of_star(fit)
        found = {arm: fit["arms"].get(arm) for arm in names}
        known = {arm: entry for arm, entry in found.items() if entry and entry["identified"] and entry["s"]}
        low, high = _exponent_range(list(known.values()))
        axis.set_xlim(low, high)
        for row, arm in enumerate(names):
            entry = known.get(arm)
            if entry is None:
                axis.text(low + 0.02 * (high - low), -row, "not identified", va="center", color=SOFT, style="italic")
                continue
            s, parabola = entry["s"], entry.get("parabola")
            _whisker(
                axis, -row + 0.24, s, ACCENT, 3.4, "o", f"{_level(fit)} interval" if arm == next(iter(known)) else ""
            )
            jackknife = entry.get("jackknife")
            if jackknife:
                _whisker(axis, -row + 0.05, jackknife, INK, 1.2, "", "jackknife")
            if entry.get("cutoff_range"):
                ends = dict(zip(("lo", "hi"), entry["cutoff_range"], strict=True))
                _whisker(axis, -row - 0.14, ends, GREY, 3.4, "", "over cut-offs")
            if parabola:
                ends = {"estimate": parabola["slope"], "lo": parabola["lo"], "hi": parabola["hi"]}
                _whisker(axis, -row - 0.33, ends, BLUE, 1.2, "D", "parabola")
        axis.set_yticks([-row for row in range(len(names))], list(names.values()))
        axis.set_ylim(-len(names) + 0.5, 0.55)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("exponent s")
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if handles:
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, handlelength=1.2,
                          columnspacing=0.9, handletextpad=0.5)  # fmt: skip
        return figure


def error_by_dimension(fit: dict[str, Any], arms: Sequence[str] | None = None) -> Figure:
    """Error against each dimension along isocompute slices, with the fitted law: one panel an arm."""
    with style():
        arms = arms or tuple(arms_of_star(fit))
        figure, axes = panels(fit, arms)
        levels = slices(fit)
        shown = ramp(levels)
        points = [point for point in fit.get("points", []) if point["error"] > 0]
        for axis, arm in zip(axes, arms, strict=True):
            _draw_slices(axis, fit, arm, points, levels, {level: color(name) for level, name in shown.items()})
            if points:
                errors = [point["error"] for point in points]
                log_axis(axis.yaxis, min(errors) / 1.06, min(_top(fit), max(errors) * 1.06))
        axes[0].set_ylabel(error_label(fit))
        if len(arms) > 1:
            _level_legend(figure, levels, {level: color(name) for level, name in shown.items()})
        return figure


def error_by_compute(fit: dict[str, Any], baselines: dict[str, float], arms: Sequence[str] | None = None) -> Figure:
    """Error against compute, one line a run, coloured by its place in the arm; baselines (name -> error) across."""
    with style():
        arms = arms or tuple(arms_of_star(fit))
        figure, axes = panels(fit, arms)
        points = [point for point in fit.get("points", []) if point["error"] > 0]
        for axis, arm in zip(axes, arms, strict=True):
            _draw_runs(axis, fit, arm, points)
            _draw_baselines(axis, baselines)
            everything = [point["error"] for point in points] + [error for error in baselines.values() if error > 0]
            if everything:
                # room below for the legend
                log_axis(axis.yaxis, min(everything) / 1.75, max(everything) * 1.12, top=_top(fit))
        axes[0].set_ylabel(error_label(fit))
        return figure


def optimum_by_compute(fit: dict[str, Any], arms: Sequence[str] | None = None) -> Figure:
    """The best size against compute: measured minima, parabola minima and the law's optimum, one panel an arm.

    The band is the delta method's for the law's optimum (`linear.optimum_band`), of an identified exponent only.
    """
    with style():
        arms = arms or tuple(arms_of_star(fit))
        figure, axes = panels(fit, arms)
        for axis, arm in zip(axes, arms, strict=True):
            axis.set_xlabel("compute t, GFLOPs")
            axis.set_ylabel(f"best {arms_of_star(fit)[arm]}")
            entry = fit["arms"].get(arm)
            if entry and entry.get("minima"):
                _draw_optimum(axis, fit, arm, entry, entry["minima"])
        legend: dict[str, Any] = {}
        for axis in axes:
            legend |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if legend and len(arms) > 1:
            figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=len(legend))
        return figure


def slices(fit: dict[str, Any]) -> list[float]:
    """Compute levels (GFLOPs, ascending) of the isocompute slices: those of the minima, or else of the points."""
    times = sorted(
        {m["t_gflops"] for arm in fit.get("arms", {}).values() for m in arm.get("minima") or []}
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


def nearest(levels: Sequence[float], t: float) -> float:
    return min(levels, key=lambda level: abs(math.log(level / t)))


def _level(fit: dict[str, Any]) -> str:
    return f"{100 * fit.get('level', 0.95):.0f}%"


def _exponent_range(entries: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """From 0 (or a negative slope) to the largest end, but not past three times the largest estimate."""
    estimates, ends = [0.1], [0.0]
    for entry in entries:
        estimates.append(entry["s"]["estimate"])
        for part in (entry["s"], entry.get("jackknife") or {}, entry.get("parabola") or {}):
            ends += [part[key] for key in ("lo", "hi", "slope") if part.get(key) is not None]
        ends += [value for value in entry.get("cutoff_range") or () if value is not None]
    most = 3 * max(estimates)
    return max(min(ends), -0.25 * most) * 1.05, min(max([*ends, *estimates]) * 1.05, most)


def _whisker(axis: Axes, y: float, ends: dict[str, Any], ink: str, width: float, marker: str, label: str) -> None:
    """A line from lo to hi with its estimate; an end that is open or outside the axis is an arrow."""
    low, high = axis.get_xlim()
    lo = ends.get("lo")
    hi = ends.get("hi")
    if lo is not None or hi is not None:
        left, right = max(lo or low, low), high if hi is None else min(hi, high)
        axis.plot(
            [left, right], [y, y], color=ink, linewidth=width, solid_capstyle="butt", label=label or None, zorder=2
        )
        if hi is None or hi > high:
            axis.plot(high, y, ">", color=ink, markersize=5, clip_on=False, zorder=3)
        if (lo is not None and lo < low) or not lo:
            axis.plot(max(low, 0), y, "<", color=ink, markersize=5, clip_on=False, zorder=3)
    if marker and low <= ends["estimate"] <= high:
        face = BACK if marker == "D" else ink
        axis.plot(ends["estimate"], y, marker, color=ink, markerfacecolor=face, markersize=5.5 if marker == "D" else 7,
                  label=None if lo is not None or hi is not None else label, zorder=4)  # fmt: skip


def panels(fit: dict[str, Any], arms: Sequence[str]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    several = len(arms) > 1
    figure = Figure(figsize=(_PANEL[0] * len(arms), _PANEL[1] + 0.9 * several), layout="constrained")
    axes = list(figure.subplots(1, len(arms), squeeze=False)[0])
    for axis, arm in zip(axes, arms, strict=True):
        entry = fit["arms"].get(arm)
        title = arms_of_star(fit)[arm]
        if entry and entry["identified"] and entry["s"]:
            title += f":  s = {exponent(entry['s']['estimate'])}"
        elif entry:
            title += ":  not identified"
        axis.set_title(title)
        if not any(point["arm"] == arm for point in fit.get("points", [])):
            axis.text(0.5, 0.5, "no points", transform=axis.transAxes, ha="center", color=SOFT)
    return figure, axes


def _draw_slices(
    axis: Axes,
    fit: dict[str, Any],
    arm: str,
    points: Sequence[dict[str, Any]],
    levels: Sequence[float],
    ink: dict[float, str],
) -> None:
    own = [point for point in points if point["arm"] in (arm, None)]
    sizes = sorted({point[arm] for point in own})
    axis.set_xlabel(arms_of_star(fit)[arm])
    if not sizes:
        return
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}  # drawn together, which is ten times as fast
    for point in own:
        kind = "center" if point["arm"] is None else "used" if point["used"] else "unused"
        groups.setdefault((nearest(levels, point["t_gflops"]), kind), []).append(point)
    for (level, kind), group in groups.items():
        drawn = axis.errorbar(
            [point[arm] for point in group],
            [point["error"] for point in group],
            yerr=[point["stderr"] or 0.0 for point in group],
            linestyle="none",
            marker="o",
            markersize=3.0 if kind == "unused" else 4.6,
            color=ink[level],
            markerfacecolor=BACK if kind == "center" else ink[level],
            markeredgewidth=1.2 if kind == "center" else 0,
            elinewidth=0.9,
            alpha=0.45 if kind == "unused" else 1.0,
            zorder=4 if kind == "center" else 3,
        )
        drawn.lines[0].set_gid(tips(f"{point['run_id']}: {number(point['error'])}" for point in group))
    entry = fit["arms"].get(arm)
    law = law_of(entry) if entry else None
    if entry and law:
        limit = max_error(entry)
        x = np.geomspace(sizes[0], sizes[-1], 200)
        for level in levels:
            error = law.error(x, level)
            within = error <= limit
            axis.plot(x, np.where(within, error, np.nan), color=ink[level], linewidth=1.3, zorder=2)
            axis.plot(
                x, np.where(within, np.nan, error), color=ink[level], linewidth=0.9, linestyle=(0, (1, 2)), zorder=1
            )
            best = float(law.optimum(level))
            if sizes[0] <= best <= sizes[-1]:
                axis.plot(
                    best, law.error(best, level), "v", color=ink[level], markeredgecolor=INK, markersize=6.5, zorder=5
                )
    log_axis(axis.xaxis, sizes[0] / 1.12, sizes[-1] * 1.12, among=sizes)


def _draw_runs(axis: Axes, fit: dict[str, Any], arm: str, points: Sequence[dict[str, Any]]) -> None:
    own = [point for point in points if point["arm"] in (arm, None)]
    sizes = sorted({point[arm] for point in own})
    shown = ramp(sizes, "size")
    for size in sizes:
        runs = [point for point in own if point[arm] == size]
        center = (fit.get("center") or {}).get(arm) == size
        for index, run in enumerate(sorted({point["run_id"] for point in runs})):
            line = sorted((point["t_gflops"], point["error"]) for point in runs if point["run_id"] == run)
            axis.plot(
                *zip(*line, strict=True),
                color=INK if center else color(shown[size]),
                linewidth=1.6 if center else 1.2,
                linestyle="--" if center else "-",
                marker="o",
                markersize=2.8,
                label=(f"{size}, center" if center else str(size)) if index == 0 else None,
                gid=tips(f"{run}: {number(error)}" for _, error in line),
            )
    if own:
        times = [point["t_gflops"] for point in own]
        log_axis(axis.xaxis, min(times) / 1.1, max(times) * 1.1)
        axis.legend(loc="lower left", ncols=3, handlelength=1.2, columnspacing=0.9, handletextpad=0.5)
    axis.set_xlabel("compute t, GFLOPs")


def _draw_baselines(axis: Axes, baselines: dict[str, float]) -> None:
    """Dotted lines with their names above them, or below where the line above is too near."""
    above = math.inf
    for name, error in sorted(baselines.items(), key=lambda item: -item[1]):
        below = error > above / 1.22
        axis.axhline(error, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axis.annotate(
            name, (1, error), xycoords=("axes fraction", "data"), xytext=(0, -2 if below else 2),
            textcoords="offset points", ha="right", va="top" if below else "bottom", fontsize=8, color=SOFT,
        )  # fmt: skip
        above = error


def _draw_optimum(
    axis: Axes, fit: dict[str, Any], arm: str, entry: dict[str, Any], minima: Sequence[dict[str, Any]]
) -> None:
    times = np.array([minimum["t_gflops"] for minimum in minima])
    sizes = sorted({point[arm] for point in fit["points"] if point["arm"] in (arm, None)}) or [1]
    line = np.geomspace(times.min() / 1.15, times.max() * 1.15, 60)
    law = law_of(entry)
    shown = [float(size) for minimum in minima for size in (minimum["x"], minimum["parabola_x"]) if size]
    if law and law.alpha and law.beta:
        shown += list(law.optimum(times))
        dashes, label = ("-", "law's optimum") if entry["identified"] else ("--", "law's optimum, not identified")
        axis.plot(line, law.optimum(line), color=ACCENT, linewidth=1.6, linestyle=dashes, label=label, zorder=3)
        band = optimum_band(arm, entry, fit["points"], line, fit.get("level", 0.95)) if entry["identified"] else None
        if band:
            axis.fill_between(line, *band, color=ACCENT, alpha=0.16, linewidth=0, label=f"{_level(fit)} band", zorder=1)
    value = value_of(fit)
    for inside, label in ((True, f"lowest {value}, inside the arm"), (False, f"lowest {value}, at an edge")):
        x = [m["x"] if m["interior"] is inside else math.nan for m in minima]
        axis.plot(
            times, x, "o", color=INK, markerfacecolor=INK if inside else BACK, markersize=5, label=label, zorder=4
        )
    parabola = [minimum["parabola_x"] or math.nan for minimum in minima]
    axis.plot(
        times, parabola, "D", color=BLUE, markersize=4.5, markerfacecolor="none", label="parabola's minimum", zorder=5
    )
    for size in sizes:
        axis.axhline(size, color=LINE, linewidth=0.6, zorder=0)
    axis.grid(False)
    axis.set_xscale("log")
    log_axis(axis.xaxis, line[0], line[-1])
    low, high = max(min(shown), sizes[0] / 2), min(max(shown), sizes[-1] * 2)
    log_axis(axis.yaxis, low / 1.35, high * 1.35, among=sizes)


def error_label(fit: dict[str, Any]) -> str:
    """10-shot error, fractals; a name with more than plain letters stays out of figures, whose font may lack them."""
    metric = fit.get("metric") or {}
    dataset = str(metric.get("dataset", ""))
    plain = re.fullmatch(r"[A-Za-z0-9_.+ -]{1,40}", dataset)
    shots = metric.get("shots", "")
    if value_of(fit) != "error":
        return words(dataset, shots) + ", nats a token"
    return shot_name(dataset, shots) + (f", {dataset}" if plain else "")


def _top(fit: dict[str, Any]) -> float:
    """No error is above 1."""
    return 1.0 if value_of(fit) == "error" else math.inf


def _level_legend(figure: Figure, levels: Sequence[float], ink: dict[float, str]) -> None:
    from matplotlib.lines import Line2D

    if not levels:
        return
    shown = levels if len(levels) <= 12 else [levels[round(i * (len(levels) - 1) / 11)] for i in range(12)]
    handles = [Line2D([], [], color=ink[level], marker="o", markersize=4.6, label=number(level)) for level in shown]
    handles += [
        Line2D([], [], color=GREY, marker="v", markeredgecolor=INK, linestyle="none", label="law's optimum"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor=BACK, linestyle="none", label="center, held out"),
        Line2D([], [], color=GREY, marker="o", alpha=0.45, markersize=3, linestyle="none", label="not used"),
    ]
    figure.legend(
        handles=handles, title="compute t, GFLOPs", loc="outside lower center", ncols=len(handles),
        columnspacing=1.2, handletextpad=0.4, handlelength=1.4,
    )  # fmt: skip
