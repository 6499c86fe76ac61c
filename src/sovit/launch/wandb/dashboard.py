"""A report at W&B that draws a sweep: error against compute by arm, isocompute curves, parallel coordinates, rate and loss.

It draws what the finished runs there have logged, and nothing else. It fits no law: that is `sovit fit`, from the records.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sovit import duration
from sovit.launch.wandb import run as wandb_run
from sovit.launch.wandb.records import NAME, connect
from sovit.metric import ERROR, LOG_PERPLEXITY, value_name
from sovit.metric import key as key_of

DIMENSIONS = {"width": "Width", "depth": "Depth", "mlp_dim": "MLP dimension"}
TOKEN = {"token_dim": "Token MLP dimension"}  # of an MLP-Mixer, beside the others
LOSS, RATE, STEP, COMPUTE = "train/loss", "perf/images_per_s", "trainer/global_step", "t_gflops"
MAX_SLICES = 4  # isocompute curves of an arm: as many as a row of panels holds
ROW, HEIGHT = 24, 10  # of a report, in W&B's units


def dashboard(path: str, sweep: str | None, metric: tuple[str, int]) -> tuple[str, bool]:
    """Write the report of a sweep in ENTITY/PROJECT, or bring it up to date; (its address, whether it is new).

    ``sweep`` is the name its runs were trained under; it may be left out where the project has one. ``metric``: (data set,
    shots). Raises ValueError if the library or the login is missing, or if W&B has no such finished runs.
    """
    wandb_run.quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own deprecations are not the user's business
            import wandb_workspaces.reports.v2 as library
    except ImportError:
        raise ValueError("The dashboard needs wandb-workspaces; run `pip install wandb-workspaces`.") from None
    entity, _, project = path.partition("/")
    if not NAME.fullmatch(entity) or not NAME.fullmatch(project):
        raise ValueError(f"{path!r} is not ENTITY/PROJECT; the address of the project at W&B ends so.")
    api = connect()
    try:
        runs = [run for run in api.runs(path, filters={"state": "finished"}) if NAME.fullmatch(run.group or "")]
    except Exception as error:
        raise ValueError(f"W&B did not give the runs of {path}: {wandb_run.reason(error)}; check the path.") from None
    name = _the_sweep(path, sweep, {run.group for run in runs})
    runs = [run for run in runs if run.group == name]
    logged = set.intersection(*(set(run.summary.keys()) for run in runs))
    wanted, value = key_of(*metric), value_name(*metric).capitalize()
    if wanted not in logged:
        there = sorted(key for key in logged if key.startswith("eval/") and key.endswith((f"/{ERROR}", LOG_PERPLEXITY)))
        raise ValueError(f"{wanted} is not logged by the runs of {name}; they log {', '.join(there) or 'no errors'}.")
    arms = {str(run.config.get("arm")) for run in runs}
    dimensions = DIMENSIONS | (TOKEN if any("token_dim" in run.config for run in runs) else {})
    report = library.Report(entity=entity, project=project, title=f"sovit: {name}", width="fluid")
    report.blocks = _blocks(library, report, name, (wanted, value), logged, arms, dimensions)
    try:
        old = [view for view in api.reports(path) if view.display_name == report.title]
        if old:
            report.id = old[0].id
        report.save()
    except Exception as error:
        raise ValueError(f"W&B did not take the report: {wandb_run.reason(error)}; try again later.") from None
    return report.url, not old


def _the_sweep(path: str, wanted: str | None, there: set[str]) -> str:
    if not there:
        raise ValueError(f"W&B has no finished runs of a sweep in {path}; `sovit wandb push runs/NAME` sends them.")
    if wanted is None and len(there) == 1:
        return next(iter(there))
    if wanted is None or wanted not in there:
        advice = "say which with --sweep" if wanted is None else f"none of {wanted!r}"
        raise ValueError(f"{path} has finished runs of {', '.join(sorted(there))}; {advice}.")
    return wanted


def _blocks(
    library: Any,
    report: Any,
    name: str,
    metric: tuple[str, str],
    logged: set[str],
    arms: set[str],
    dimensions: Mapping[str, str],
) -> list[Any]:
    """Text and grids of panels: the whole sweep, then every arm of a star with its center. ``metric``: key, and word."""
    from wandb_workspaces import expr

    error, value = metric
    plural = "errors" if value == "Error" else "log-perplexities"

    def grid(panels: Sequence[Any], *conditions: Any) -> Any:
        for k, panel in enumerate(panels):
            width = ROW // len(panels)
            panel.layout = library.Layout(x=k * width, y=0, w=width, h=HEIGHT)
        runs = library.Runset(
            entity=report.entity,
            project=report.project,
            name=name,
            filters=expr.And(expr.Metric("Group") == name, *conditions),
        )
        return library.PanelGrid(runsets=[runs], panels=list(panels))

    def curves(title: str, **kind: Any) -> Any:
        return library.LinePlot(title=title, x=COMPUTE, y=[error], log_x=True, log_y=True, **kind)

    def slices(dimension: str) -> list[Any]:
        return [
            library.ScatterPlot(
                title=f"{value} after {_label(key)} against {dimension}",
                x=library.Config(dimension),
                y=library.SummaryMetric(key),
                log_x=True,
                log_y=True,
            )
            for key in _slices(error, logged)
        ]

    axes = [
        *(library.ParallelCoordinatesPlotColumn(metric=library.Config(key), log=True) for key in dimensions),
        library.ParallelCoordinatesPlotColumn(metric=library.Config("seed")),
        library.ParallelCoordinatesPlotColumn(metric=library.SummaryMetric(error), log=True),
    ]
    by_arm = {"groupby": library.Config("arm"), "groupby_aggfunc": "min", "groupby_rangefunc": "minmax"}
    blocks = [
        library.P(f"{error} of the runs of {name}. Compute is in GFLOPs: forward FLOPs per image x images seen."),
        grid(
            [
                curves(f"{value} against compute, every run"),
                curves(f"Lowest {value.lower()} of an arm against compute", **by_arm),
            ]
        ),
        grid([library.ParallelCoordinatesPlot(title=f"Shapes, seeds and final {plural}", columns=axes)]),
    ]
    star = [dimension for dimension in dimensions if dimension in arms]
    for dimension in star or dimensions:
        on = [expr.Config("arm").isin(["center", dimension])] if star else []
        title = f"{dimensions[dimension]}: the arm and the center" if star else dimensions[dimension]
        blocks += [library.H2(title), grid(slices(dimension), *on)]
        if star:
            blocks.append(grid([curves(f"{value} against compute, {dimension}")], *on))
    panels = {LOSS: "Training loss", RATE: "Images per second"}  # a run that was sent afterwards has no rates over time
    found = [library.LinePlot(title=title, x=STEP, y=[key]) for key, title in panels.items() if key in logged]
    if wandb_run.IMAGES_PER_S in logged:
        x, y = library.Config("forward_gflops"), library.SummaryMetric(wandb_run.IMAGES_PER_S)
        found.append(
            library.ScatterPlot(title="Throughput against the size of a shape", x=x, y=y, log_x=True, log_y=True)
        )
    return [*blocks, library.H2("Training"), grid(found)] if found else blocks


def _slices(error: str, logged: set[str]) -> list[str]:
    """Names of the error at up to MAX_SLICES durations, spread over them, the longest included."""
    prefix = wandb_run.slice_key(error, "")
    found = sorted((key for key in logged if key.startswith(prefix)), key=_duration)
    every = -(-len(found) // MAX_SLICES) or 1
    return found[::-1][::every][::-1]


def _duration(key: str) -> float:
    return duration.parse_duration(_label(key)).value


def _label(key: str) -> str:
    return key.rpartition("/")[2].replace(",", ".")
