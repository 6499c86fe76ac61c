"""Which drawing belongs to which panel of a report: from a panel's name to its figure.

A panel's name is that of its `document.Figure`, then a dash and what the panel is about: slices-width, grid-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sovit.analysis.report import figures, maps, misfit
from sovit.analysis.report.document import Document, Figure
from sovit.analysis.report.drawing import svg
from sovit.analysis.report.summary import baselines

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def panels(document: Document, fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Panel name -> <svg>, for every panel of a report."""
    blocks = [*document.first, *(block for part in document.sections for block in part.blocks)]
    return {
        name: svg(_draw(fit, runs, name), name, label)
        for block in blocks
        if isinstance(block, Figure)
        for name, label in block.panels
    }


def main_figure(fit: dict[str, Any]) -> tuple[str, Drawing] | None:
    """The figure that stands for the whole report, with the name of its block; None if there is nothing to draw."""
    if fit["kind"] == "star":
        return "slices", figures.error_by_dimension(fit)
    if fit["kind"] == "grid":
        return "grid", maps.grid_errors(fit)
    if fit["kind"] == "diagonal":
        return ("scale", maps.error_by_scale(fit)) if fit.get("points") else None
    return ("optimum", maps.joint_optimum(fit)) if fit.get("optimum") else None


def _draw(fit: dict[str, Any], runs: Sequence[dict[str, Any]], name: str) -> Drawing:
    key, _, about = name.partition("-")
    if fit["kind"] == "star":
        return {
            "exponents": lambda: figures.exponents(fit),
            "slices": lambda: figures.error_by_dimension(fit, (about,)),
            "compute": lambda: figures.error_by_compute(fit, baselines(fit, runs), (about,)),
            "optimum": lambda: figures.optimum_by_compute(fit, (about,)),
            "residuals": lambda: misfit.residuals_by_run(fit, (about,)),
            "center": lambda: misfit.center_misses(fit),
        }[key]()
    return {
        "grid": lambda: maps.grid_errors(fit, (int(about),)),
        "frontier": lambda: maps.grid_frontier(fit),
        "scale": lambda: maps.error_by_scale(fit),
        "step": lambda: maps.scale_by_compute(fit),
        "optimum": lambda: maps.joint_optimum(fit),
    }[key]()
