"""``sovit plan``, ``run`` and ``status``: what a sweep will do, doing it, and where it stands."""

from __future__ import annotations

import argparse
from pathlib import Path

from sovit.cli.expected import LAW_HELP, NOISE_HELP, gflops
from sovit.cli.options import DEFAULT_METRIC, positive


def add(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser("plan", help="the cells of a sweep, their compute and the time to expect")
    run = commands.add_parser("run", help="run what is left of a sweep on this machine")
    for command in (plan, run):
        command.add_argument("file", type=Path, help="sweep file, such as sweeps/star_tiny.yaml")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="set in every cell, such as seed=0")
        command.add_argument("--workers", type=positive, metavar="N", help="cells at once (default: by cores or GPUs)")
    plan.add_argument(
        "--tflops", type=float, metavar="PEAK", help="of one GPU (default: 312, of which 40%% are reached)"
    )
    plan.add_argument("--noise", metavar="LIST", help=f"print what the star will tell: {NOISE_HELP}")
    plan.add_argument("--law", type=Path, metavar="FIT", help=LAW_HELP)
    plan.add_argument("--target", type=gflops, metavar="T", help="with --noise: compute of the shape to predict")
    plan.set_defaults(command=_plan)
    run.add_argument("--retry-failed", action="store_true", help="also run cells that failed or diverged before")
    run.set_defaults(command=_run)

    status = commands.add_parser("status", help="where the cells of a sweep stand")
    status.add_argument("sweep", type=Path, nargs="?", help="runs/NAME or a sweep file (default: everything in runs/)")
    status.set_defaults(command=_status)


def _plan(arguments: argparse.Namespace) -> int:
    from sovit.launch import display
    from sovit.launch.plan import PEAK_TFLOPS, plan
    from sovit.launch.sweep import load_sweep, metric_of

    asked = arguments.noise is not None or arguments.law is not None
    if arguments.target and not asked:
        raise ValueError("--target needs --noise or --law; write --noise sigma=0.005,tau=0.005.")
    sweep = load_sweep(arguments.file, arguments.overrides)
    made = plan(sweep, workers=arguments.workers, peak_tflops=arguments.tflops or PEAK_TFLOPS)
    told = None
    if asked:
        from sovit.cli.expected import plan_text

        metric = metric_of(sweep.metric["name"])
        told = plan_text(made, metric, arguments.noise, arguments.law, arguments.target)
    display.print_table(display.plan_table(made))
    print(display.plan_summary(made))
    if told:
        print(f"\n{told}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from sovit.launch.local import run_sweep
    from sovit.launch.plan import plan
    from sovit.launch.sweep import load_sweep, metric_of

    sweep = load_sweep(arguments.file, arguments.overrides)
    made = plan(sweep, workers=arguments.workers)
    return run_sweep(made, retry_failed=arguments.retry_failed, metric=metric_of(sweep.metric["name"]))


def _status(arguments: argparse.Namespace) -> int:
    from sovit.launch import display
    from sovit.launch.state import summary

    metric = DEFAULT_METRIC
    if arguments.sweep is not None and arguments.sweep.is_file():
        from sovit.launch.plan import plan
        from sovit.launch.sweep import load_sweep, metric_of

        sweep = load_sweep(arguments.sweep)
        metric = metric_of(sweep.metric["name"])
        groups = {sweep.name: [cell.run_dir for cell in plan(sweep).cells]}
    else:
        groups = _run_directories(arguments.sweep)
    for name, directories in groups.items():
        table, states = display.status_table(directories, metric)
        display.print_table(table)
        print(f"{name}: {len(states)} cells, {summary(states)}.")
    return 0


def _run_directories(path: Path | None) -> dict[str, list[Path]]:
    """Sweep name -> run directories, of one sweep's directory or of everything in runs/."""
    from sovit.records import RUN

    sweeps = [path] if path is not None else sorted(Path("runs").glob("*"))
    found = {sweep.name: sorted(file.parent for file in sweep.glob(f"*/{RUN}")) for sweep in sweeps}
    found = {name: directories for name, directories in found.items() if directories}
    if not found:
        raise ValueError(f"{path or 'runs/'} holds no runs; give a sweep file, or a directory such as runs/star_tiny.")
    return found
