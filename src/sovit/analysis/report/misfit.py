"""The figures of where a star's law misses: what it leaves of each run, and the held-out center. As `figures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sovit.analysis.report.drawing import ACCENT, BLUE, GREY, INK, color, log_axis, ramp, style, tips
from sovit.analysis.report.figures import law_of, nearest, panels, slices
from sovit.analysis.report.words import arms_of_star, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def residuals_by_run(fit: dict[str, Any], arms: Sequence[str] | None = None) -> Figure:
    """How far each used point lies from its arm's law, in percent, by run: one column a run, its mean as a bar."""
    with style():
        arms = arms or tuple(arms_of_star(fit))
        figure, axes = panels(fit, arms)
        shown = ramp(slices(fit))
        for axis, arm in zip(axes, arms, strict=True):
            entry = fit["arms"].get(arm)
            law = law_of(entry) if entry else None
            used = [point for point in fit.get("points", []) if point["arm"] == arm and point["used"]]
            if law is None or not used:
                continue
            off = {
                id(point): 100 * (point["error"] / float(law.error(point[arm], point["t_gflops"])) - 1)
                for point in used
            }
            runs = sorted({(point[arm], point["seed"], point["run_id"]) for point in used})
            for place, (_, _, run) in enumerate(runs):
                own = sorted((point for point in used if point["run_id"] == run), key=lambda point: point["t_gflops"])
                mean = float(np.mean([off[id(point)] for point in own]))
                axis.plot([place - 0.32, place + 0.32], [mean, mean], color=INK, linewidth=1.6, zorder=2)
            for level, name in shown.items():
                group = [point for point in used if nearest(list(shown), point["t_gflops"]) == level]
                names = [run for _, _, run in runs]
                axis.plot(
                    [names.index(point["run_id"]) for point in group], [off[id(point)] for point in group], "o",
                    color=color(name), markersize=4.2, zorder=3,
                    gid=tips(f"{p['run_id']}: {off[id(p)]:+.1f}% at {number(p['t_gflops'])} GFLOPs" for p in group),
                )  # fmt: skip
            axis.axhline(0, color=GREY, linewidth=0.9, zorder=1)
            axis.set_xticks(range(len(runs)), [str(size) for size, _, _ in runs], rotation=45 if len(runs) > 8 else 0)
            axis.grid(axis="x", visible=False)
            axis.set_xlabel(f"{arms_of_star(fit)[arm]} of the run")
            farthest = 1.12 * max(max(map(abs, off.values())), 1.0)
            axis.set_ylim(-farthest, farthest)
        axes[0].set_ylabel("measured, % off the law")
        return figure


def center_misses(fit: dict[str, Any]) -> Figure:
    """How far each arm's law is off the held-out center, in percent, against compute; the grey band is its noise."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axis = figure.subplots()
        marks = {"width": ("o", ACCENT), "depth": ("s", BLUE), "mlp_dim": ("D", INK), "token_dim": ("^", GREY)}
        names = arms_of_star(fit)
        every: list[float] = []
        noise: dict[float, float] = {}
        for arm, (marker, ink) in marks.items():
            checks = [row for row in (fit["arms"].get(arm) or {}).get("center_check") or [] if row["measured"]]
            if not checks:
                continue
            t = [row["t_gflops"] for row in checks]
            off = [100 * (row["predicted"] / row["measured"] - 1) for row in checks]
            axis.plot(t, off, marker=marker, color=ink, markersize=4.5, linewidth=1.3, label=f"{names[arm]}'s law",
                      gid=None)  # fmt: skip
            every += t
            noise |= {row["t_gflops"]: 100 * (row["measured_stderr"] or 0) / row["measured"] for row in checks}
        axis.axhline(0, color=GREY, linewidth=0.9)
        if every:
            times = sorted(noise)
            spread = np.array([noise[time] for time in times])
            axis.fill_between(times, -spread, spread, color=GREY, alpha=0.22, linewidth=0, label="± its standard error")
            log_axis(axis.xaxis, min(every) / 1.05, max(every) * 1.05)
            figure.legend(loc="outside lower center", ncols=2)
        axis.set_xlabel("compute t, GFLOPs")
        axis.set_ylabel("predicted, % off the measured")
        return figure
