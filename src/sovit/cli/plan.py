"""``sovit plan``: what a sweep will do: its cells, their compute, the time to expect."""

from __future__ import annotations

import argparse
from pathlib import Path

from sovit.cli.expected import LAW_HELP, NOISE_HELP, gflops
from sovit.cli.options import add_sweep


def add(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser("plan", help="the cells of a sweep, their compute and the time to expect")
    add_sweep(plan)
    plan.add_argument(
        "--tflops", type=float, metavar="PEAK", help="of one GPU (default: 312, of which 40%% are reached)"
    )
    plan.add_argument("--noise", metavar="LIST", help=f"print what the star will tell: {NOISE_HELP}")
    plan.add_argument("--law", type=Path, metavar="FIT", help=LAW_HELP)
    plan.add_argument("--target", type=gflops, metavar="T", help="with --noise: compute of the shape to predict")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from sovit.launch.plan import PEAK_TFLOPS, plan
    from sovit.launch.plan_table import plan_summary, plan_table
    from sovit.launch.sweep import load_sweep, metric_of
    from sovit.launch.tables import print_table

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
    print_table(plan_table(made))
    print(plan_summary(made))
    if told:
        print(f"\n{told}")
    return 0
