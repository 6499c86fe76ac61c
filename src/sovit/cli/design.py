"""``sovit design`` and ``next``: which cells are worth their compute."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.expected import (
    LAW_HELP,
    NOISE_HELP,
    amount,
    columns,
    exponent_cells,
    factor_text,
    gflops,
    noise_text,
    read_fit,
    share_text,
    spreads,
    target_cells,
    target_text,
    wrap,
)
from sovit.cli.options import DEFAULT_METRIC, positive
from sovit.metric import ERROR, Metric, kind_of, words
from sovit.metric import key as key_of

if TYPE_CHECKING:
    from sovit.analysis.planning.design import Design, Step, Task
    from sovit.analysis.planning.exchange import Run
    from sovit.analysis.planning.information import Arm
    from sovit.config import RunConfig


# What a design decides itself, and the option that bears on it.
_CHOSEN = {"shape": " (the center is --center)", "seed": "", "name": " (it is that of the file written)"}
_CHOSEN |= dict.fromkeys(
    ("model.width", "model.depth", "model.mlp_dim", "model.token_dim"), " (the center is --center)"
)
_CHOSEN |= dict.fromkeys(("durations.first", "durations.last", "durations.num"), " (their number is --durations)")


def add(commands: argparse._SubParsersAction) -> None:
    design = commands.add_parser("design", help="the star that tells most about the shape at a target compute")
    design.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="set in every cell, such as model=vit")
    design.add_argument("--budget", type=gflops, required=True, help="training GFLOPs of all runs, 3 x forward")
    design.add_argument("--target", type=gflops, required=True, help="compute t of the shape to predict, in GFLOPs")
    design.add_argument("--noise", metavar="LIST", help=NOISE_HELP)
    design.add_argument("--law", type=Path, metavar="FIT", help=LAW_HELP)
    design.add_argument("--center", help="WIDTHxDEPTHxMLP (default: that of --law, else the configuration's shape)")
    design.add_argument(
        "--optimal-at",
        type=gflops,
        metavar="T",
        help="compute at which the center is assumed to be optimal, without --law",
    )
    design.add_argument("--range", type=float, default=16.0, help="largest over smallest size (default: %(default)g)")
    design.add_argument("--durations", type=positive, default=12, help="evaluations of a run (default: %(default)s)")
    design.add_argument(
        "--least-steps", type=positive, default=100, help="updates before the first evaluation (default: %(default)s)"
    )
    design.add_argument("--write", type=Path, metavar="FILE", help="sweep file to write, such as sweeps/my_star.yaml")
    design.set_defaults(command=_design)

    following = commands.add_parser("next", help="the cells to add to a fitted star, and when to stop")
    following.add_argument("runs", type=Path, help="directory of a star's runs, such as runs/star_tiny")
    following.add_argument("--fit", type=Path, help="its fit.json (default: the one in the directory)")
    following.add_argument(
        "--target", type=gflops, help="compute t of the shape to predict (default: 10 x the longest)"
    )
    following.add_argument("--budget", type=gflops, default=math.inf, help="training GFLOPs of the new cells together")
    following.add_argument("--cells", type=positive, default=8, help="list at most so many (default: %(default)s)")
    following.add_argument(
        "--enough",
        type=float,
        default=0.01,
        help="share of the target's compute that may be lost (default: %(default)g)",
    )
    following.add_argument("--noise", metavar="LIST", help=NOISE_HELP)
    following.add_argument("--file", type=Path, help="sweep file of the runs (default: sweeps/NAME.yaml)")
    following.add_argument(
        "--write", type=Path, metavar="FILE", help="sweep file to write with the cells worth running"
    )
    following.set_defaults(command=_next)


# sovit design


def _design(arguments: argparse.Namespace) -> int:
    from sovit.analysis.planning import design as search
    from sovit.analysis.planning.information import assumed_law, fitted_laws
    from sovit.analysis.points import dimensions
    from sovit.derived import shape_of

    if not 2 <= arguments.range <= 1000:
        raise ValueError(f"--range {arguments.range:g} is not between 2 and 1000; 16 is advised.")
    if arguments.durations < 3:
        raise ValueError(f"--durations {arguments.durations} are too few to see a curve; give at least 3.")
    keys = [item.partition("=")[0] for item in arguments.overrides]
    for key in keys:
        if key in _CHOSEN:
            raise ValueError(f"{key} is what the design chooses; leave it out{_CHOSEN[key]}.")
    fit = read_fit(arguments.law) if arguments.law else None
    if fit and arguments.optimal_at:
        raise ValueError("--optimal-at places an assumed law, but --law brings fitted ones; give one of them.")
    metric = _metric_of(fit) if fit else DEFAULT_METRIC
    center_text = arguments.center or ("x".join(map(str, fit["center"].values())) if fit else None)
    cfg = _composed([*arguments.overrides, *([f"shape={center_text}"] if center_text else [])])
    center = dimensions(shape_of(cfg))
    middle = search.middle_compute(cfg, center, arguments.budget)
    place = arguments.optimal_at or middle
    laws = (
        fitted_laws(fit) if fit else {name: assumed_law(name, getattr(center, name), place) for name in center._fields}
    )
    task = search.Task(
        center=center,
        cfg=cfg,
        laws=laws,
        spreads=spreads(arguments.noise, fit, laws, metric),
        budget=arguments.budget,
        target=arguments.target,
        middle=middle,
        size_range=arguments.range,
        num_durations=arguments.durations,
        least_steps=arguments.least_steps,
    )
    found = search.best_design(task)
    print(_design_text(task, found))
    assumed = (
        f"Laws: as fitted in {arguments.law}."
        if fit
        else "Laws: none is known yet, so ones with the published s are assumed (errors near 0.3, c = 0.35), by which the "
        f"center is optimal at {amount(place)} GFLOPs (--optimal-at); --law FIT takes those of an earlier star."
    )
    print(wrap([noise_text(task.spreads), assumed]))
    if arguments.write:
        print(_write_design(arguments.write, arguments.overrides, found, metric))
    return 0


def _composed(overrides: Sequence[str]) -> RunConfig:
    """The configuration of the center; unless it lists its durations, they are long enough for any cooldown."""
    from sovit.config import compose

    if any(item.startswith("experiment=") for item in overrides):
        cfg = compose(overrides)
        if cfg.durations.values:
            return cfg
    return compose([*overrides, "durations.first=10M steps", "durations.last=20M steps", "durations.num=2"])


def _design_text(task: Task, found: Design) -> str:
    from sovit.analysis.planning.design import planned_run, uniform_designs

    run = planned_run(found.cfg, found.center)
    table = [["", "runs", "s", "s.e.", "expected 95%", "optimum at T", "known within", "compute lost"]]
    sizes = []
    for name, seeds in found.seeds.items():
        expected = found.expected[name]
        table.append([name, str(expected.num_runs), *exponent_cells(expected), *target_cells(expected)])
        listed = ", ".join(f"{size} (x{count})" if count > 1 else f"{size}" for size, count in seeds.items())
        sizes.append([name, f"  {listed}"])
    width = max(len(row[1]) for row in sizes)
    said = [
        f"Every run is evaluated {len(run.t)} times, from {amount(run.t[0])} to {amount(run.t[-1])} GFLOPs, and costs "
        f"{run.train_gflops / run.t[-1]:.3g} times its longest duration.",
        target_text(task.target, run.t[-1]),
        f"The predicted shape is known within {factor_text(found.error)} a dimension; {share_text(found.wasted)} of "
        "the target's compute is expected to be lost to that.",
    ]
    parts = [
        f"{found.num_runs} runs for {amount(found.train_gflops)} of {amount(task.budget)} training GFLOPs: the center "
        f"{found.center} once, held out, and these sizes (seeds):",
        columns([[name, f"{text:<{width}}"] for name, text in sizes]),
        columns(table),
        wrap(said),
    ]
    rivals = uniform_designs(task, found)
    if rivals:
        rows = [["evenly spread, same budget", "runs", "known within", "compute lost", "efficiency"]]
        for name, rival in rivals.items():
            efficiency = f"{(found.error / rival.error) ** 2:.2f}"
            rows.append([name, str(rival.num_runs), factor_text(rival.error), share_text(rival.wasted), efficiency])
        parts.append(
            columns(rows) + "\n\nEfficiency: the share of its runs with which the proposed star would know as much."
        )
    return "\n\n".join(parts) + "\n"


def _write_design(path: Path, overrides: Sequence[str], found: Design, metric: tuple[str, int]) -> str:
    groups: dict[int, list[str]] = {}
    for seed in range(max(count for sizes in found.seeds.values() for count in sizes.values())):
        groups[seed] = [str(shape) for shape in found.shapes(seed)]
    durations = found.cfg.durations
    shared = {"name": path.stem, **dict(item.split("=", 1) for item in overrides)}
    if not durations.values:
        shared |= {"durations.first": durations.first or "", "durations.last": durations.last or ""}
        shared |= {"durations.num": str(durations.num)}
    comment = f"Proposed by sovit design: {found.num_runs} runs, {amount(found.train_gflops)} training GFLOPs."
    return write_sweeps(path, comment, shared, groups, metric)


def write_sweeps(
    path: Path, comment: str, shared: Mapping[str, str], groups: Mapping[int, Sequence[str]], metric: tuple[str, int]
) -> str:
    """Write a sweep file for each set of shapes that share their seeds, and say how to run them.

    A sweep file is a product, so shapes with more seeds than others take a file of their own; all write to one
    directory of runs. Raises ValueError for a file that exists or a cell that does not compose.
    """
    import yaml

    from sovit.launch.plan import plan
    from sovit.launch.sweep import COMMAND, PROGRAM, load_sweep

    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is no sweep file; give a name such as sweeps/my_star.yaml.")
    merged: dict[tuple[str, ...], list[int]] = {}
    for seed, shapes in groups.items():
        merged.setdefault(tuple(shapes), []).append(seed)
    written = []
    for number, (shapes, seeds) in enumerate(merged.items()):
        file = path if number == 0 else path.with_stem(f"{path.stem}_{number + 1}")
        if file.exists():
            raise ValueError(f"{file} exists already; give another name, or delete it.")
        parameters: dict[str, Any] = {key: {"value": value} for key, value in shared.items()}
        parameters |= {"shape": {"values": list(shapes)}, "seed": {"values": seeds}}
        document = {
            "program": PROGRAM,
            "command": COMMAND,
            "method": "grid",
            "metric": {"name": key_of(*metric), "goal": "minimize"},
            "parameters": parameters,
        }
        written.append(
            (
                file,
                f"# {comment}\n#\n#   sovit run {file}\n"
                + yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120),
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for file, text in written:
        file.write_text(text)
        try:
            made = plan(load_sweep(file))
        except ValueError:
            for other, _ in written:
                other.unlink(missing_ok=True)
            raise
        lines.append(f"  sovit run {file}    # {_cells(len(made.cells))}, {amount(made.train_gflops)} training GFLOPs")
    return "\n".join(["", "Written:", *lines, f"then: sovit fit {made.runs_dir / made.name}"])


def _cells(count: int) -> str:
    return f"{count} {'cell' if count == 1 else 'cells'}"


def _metric_of(fit: dict[str, Any]) -> Metric:
    """The metric of a fit. Raises ValueError for one that is no error: the plans know where errors can be fitted."""
    found = fit["metric"]["dataset"], fit["metric"]["shots"]
    if kind_of(*found) != ERROR:
        raise ValueError(
            f"the fit is of the {words(*found)}; sweeps are planned for errors only, so give the fit of a few-shot error."
        )
    return found


# sovit next


def _next(arguments: argparse.Namespace) -> int:
    from sovit.analysis.planning import design as search
    from sovit.analysis.planning.information import summary
    from sovit.analysis.points import dimensions

    if not 0 < arguments.enough < 1:
        raise ValueError(f"--enough {arguments.enough:g} is not between 0 and 1; write 0.01 for 1%.")
    fit = read_fit(arguments.fit or arguments.runs / "fit.json")
    metric = _metric_of(fit)
    chosen = spreads(arguments.noise or f"from={arguments.runs}", fit, _arms_with_law(fit), metric)
    arms, remarks = search.measured_arms(fit, chosen)
    target = arguments.target or 10 * max(points.t.max() for points in arms.values())
    candidates, seeds = _candidates(arguments.runs, fit, arms)
    before = summary(arms, target)
    steps = search.next_steps(arms, candidates, seeds, target, arguments.budget, arguments.cells)
    worth = search.worth_running(steps, before[1], target, arguments.enough)
    print(_next_text(arms, target, before, steps, fit))
    said = [noise_text(chosen), *(f"- {text}." for text in remarks)]
    longer = search.longer_pays(arms, candidates, target)
    if longer > 1:
        said.append(
            f"- Runs twice as long would tell {longer:.2g} times as much for their compute; cells of other durations are "
            "another sweep: sovit design --law."
        )
    print(wrap([*said, "", _verdict(steps, worth, before[1], target, arguments.enough)]))
    # New cells belong beside the others, wherever those are.
    elsewhere = {} if arguments.runs.parent == Path("runs") else {"runs_dir": str(arguments.runs.parent)}
    file = arguments.file or Path("sweeps") / f"{fit['sweep']}.yaml"
    center = dimensions(argparse.Namespace(**fit["center"]))
    shapes = [str(center._replace(**{step.arm: step.size})) for step in steps[:worth]]
    if arguments.write and worth:
        groups: dict[int, list[str]] = {}
        for step, shape in zip(steps, shapes, strict=False):
            groups.setdefault(step.seed, []).append(shape)
        comment = f"Proposed by sovit next: {_cells(worth)} to add to {fit['sweep']}."
        print(write_sweeps(arguments.write, comment, _shared(file) | elsewhere, groups, metric))
    elif arguments.write:
        print(f"{arguments.write} is not written: there is nothing worth running.")
    else:
        tail = "".join(f" {key}={shlex.quote(value)}" for key, value in elsewhere.items())
        for step, shape in zip(steps, shapes, strict=False):
            print(f"  sovit run {shlex.quote(str(file))} shape={shape} seed={step.seed}{tail}")
    return 0


def _arms_with_law(fit: Mapping[str, Any]) -> list[str]:
    return [name for name, row in fit["arms"].items() if row["law"]]


def _candidates(
    directory: Path, fit: Mapping[str, Any], arms: Mapping[str, Arm]
) -> tuple[dict[str, dict[int, Run]], dict[tuple[str, int], int]]:
    """Arm -> size -> run, and (arm, size) -> its first free seed, by the configuration and the names of the runs."""
    from omegaconf import OmegaConf

    from sovit import records
    from sovit.analysis.planning.design import LEAST_STEPS, friendly_sizes, planned_run
    from sovit.analysis.points import dimensions
    from sovit.config import resolve

    center = dimensions(argparse.Namespace(**fit["center"]))
    runs = [records.read_run(path.parent) or {} for path in sorted(directory.glob(f"*/{records.RUN}"))]
    configs = [run["config"] for run in runs if run.get("config")]
    if not configs:
        raise ValueError(f"the runs in {directory} do not say their configuration, so no cell can be added to them.")
    cfg = resolve(OmegaConf.create(configs[0]))
    seeds: dict[tuple[str, int], int] = {}
    for record in runs:
        for name in dimensions(argparse.Namespace(**record)).differs(center):
            seeds[name, record[name]] = max(record["seed"] + 1, seeds.get((name, record[name]), 0))
    found: dict[str, dict[int, Run]] = {}
    for name, points in arms.items():
        known = {int(size) for size in points.sizes}
        new = friendly_sizes(name, min(known) / 2, 2 * max(known), cfg)
        found[name] = {}
        for size in sorted(known.union(new) - {getattr(center, name)}):
            run = planned_run(cfg, center._replace(**{name: size}))
            if size in known or run.first_steps >= LEAST_STEPS:
                found[name][size] = run
    return found, seeds


def _next_text(
    arms: Mapping[str, Arm], target: float, before: tuple[float, float], steps: Sequence[Step], fit: Mapping[str, Any]
) -> str:
    from sovit.analysis.planning.information import expect

    table = [["", "runs", "optimum at T", "known within", "compute lost"]]
    for name, points in arms.items():
        table.append([name, str(points.num_runs), *target_cells(expect(points, target))])
    first = min(points.t.min() for points in arms.values())
    longest = max(points.t.max() for points in arms.values())
    rows = [["cell", "train GFLOPs", "known within", "compute lost", "saves GFLOPs"]]
    rows.append(["(now)", "", factor_text(before[0]), share_text(before[1]), ""])
    lost = before[1]
    for step in steps:
        cell = f"{step.arm} {step.size}, seed {step.seed}"
        saved = amount(3 * target * (lost - step.wasted))
        rows.append([cell, amount(step.train_gflops), factor_text(step.error), share_text(step.wasted), saved])
        lost = step.wasted
    return "\n\n".join(
        (
            f"{fit['sweep']}: what its runs tell about the shape at a target compute T",
            columns(table),
            wrap([target_text(target, longest)]),
            wrap(
                [
                    "Cells to add, each the best for its compute after those above it, trained for the durations of the "
                    f"sweep ({amount(first)} to {amount(longest)} GFLOPs); what one saves are training GFLOPs at T:"
                ]
            ),
            columns(rows) + "\n",
        )
    )


def _verdict(steps: Sequence[Step], worth: int, lost: float, target: float, enough: float) -> str:
    """When to stop, in a sentence."""
    allowed = f"no more than the {share_text(enough)} allowed (--enough)"
    if lost <= enough:
        return f"Stop: {share_text(lost)} of the target's compute is expected to be lost, {allowed}."
    if not steps:
        return "No cell within the budget would tell more; raise --budget, or plan a new star with sovit design --law."
    if not worth:
        return (
            "Stop: these cells cost more training GFLOPs than they save at the target, which takes "
            f"{amount(3 * target)} in all. For a larger --target they may pay."
        )
    cost, saved = sum(step.train_gflops for step in steps[:worth]), 3 * target * (lost - steps[worth - 1].wasted)
    text = f"Worth running: the first {worth}, {amount(cost)} training GFLOPs that save {amount(saved)} at the target"
    left = steps[worth - 1].wasted
    if left <= enough:
        return f"{text}; then stop, with {share_text(left)} lost, {allowed}."
    if worth < len(steps):
        return f"{text}; then stop, the next cost more than they save."
    return f"{text}; then fit and ask again."


def _shared(file: Path) -> dict[str, str]:
    """What all cells of a sweep file share, its shapes and seeds left out."""
    from sovit.launch.sweep import load_sweep

    cells = [dict(item.split("=", 1) for item in cell) for cell in load_sweep(file).cells]
    shared = {key: value for key, value in cells[0].items() if key not in ("shape", "seed")}
    if any(cell.get(key) != value for cell in cells for key, value in shared.items()):
        raise ValueError(f"{file}: its cells differ in more than shape and seed; run the commands instead of --write.")
    return shared
