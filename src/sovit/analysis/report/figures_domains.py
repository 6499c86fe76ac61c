"""The figures of two metrics of one star: the paths of the best sizes on the same axes, and the ratios between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sovit.analysis.report.drawing import ACCENT, BACK, BLUE, LINE, log_axis, style
from sovit.analysis.report.figures import law_of
from sovit.analysis.report.linear import optimum_band
from sovit.analysis.report.words import arms_of_star

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = (("first", ACCENT, "o", 1.0), ("second", BLUE, "D", 1.035))  # colour, mark, and a step aside in compute
_WIDEST = 30.0  # an optimum so many times outside of the sizes trained is not drawn


def paths(found: dict[str, Any], arms: Sequence[str]) -> Figure:
    """Best size against compute by both metrics, a panel for each arm: laws with their bands, and what was measured."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(3.75 * len(arms), 3.2), layout="constrained")
        axes = list(figure.subplots(1, len(arms), squeeze=False)[0])
        for axis, arm in zip(axes, arms, strict=True):
            _path(axis, found, arm)
        return figure


def _path(axis: Axes, found: dict[str, Any], arm: str) -> None:
    names = arms_of_star(found["first"]["fit"])
    sizes = sorted({p[arm] for which in ("first", "second") for p in found[which]["fit"]["points"] if p["arm"] == arm})
    shown: list[float] = []
    times: list[float] = []
    for which, ink, mark, aside in _METRICS:
        fit = found[which]["fit"]
        entry = fit["arms"].get(arm) or {}
        minima = entry.get("minima") or []
        if not minima:
            continue
        at = np.array([minimum["t_gflops"] for minimum in minima])
        times += at.tolist()
        line = np.geomspace(at.min() / 1.15, at.max() * 1.15, 60)
        law = law_of(entry)
        if law and law.alpha and law.beta:
            best = law.optimum(line)
            best = np.where((best > sizes[0] / _WIDEST) & (best < sizes[-1] * _WIDEST), best, math.nan)
            axis.plot(
                line, best, color=ink, linewidth=1.8, linestyle="-" if entry["identified"] else (0, (4, 3)), zorder=3
            )
            shown += [float(value) for value in best if math.isfinite(value)] if entry["identified"] else []
            band = optimum_band(arm, entry, fit["points"], line, found["level"]) if entry["identified"] else None
            if band:
                axis.fill_between(line, *band, color=ink, alpha=0.13, linewidth=0, zorder=1)
        for inside in (True, False):
            x = [m["x"] if m["interior"] is inside else math.nan for m in minima]
            axis.plot(
                at * aside, x, mark, color=ink, markerfacecolor=ink if inside else BACK, markersize=4.6, zorder=4,
            )  # fmt: skip
        shown += [float(minimum["x"]) for minimum in minima]
    for size in sizes:
        axis.axhline(size, color=LINE, linewidth=0.6, zorder=0)
    axis.grid(False)
    axis.set_title(names[arm])
    axis.set_xlabel("compute t, GFLOPs")
    axis.set_ylabel(f"best {names[arm]}")
    if times and sizes:
        log_axis(axis.xaxis, min(times) / 1.15, max(times) * 1.15)
        low, high = max(min(shown), sizes[0] / 2), min(max(shown), sizes[-1] * 2)
        log_axis(axis.yaxis, low / 1.35, high * 1.35, among=sizes)
