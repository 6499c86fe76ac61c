"""``sovit plan``: what a sweep will do: its cells, their compute, the time and the money to expect."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sovit.cli.expected import LAW_HELP, NOISE_HELP, gflops
from sovit.cli.options import PRICE_HELP, above_0, add_sweep, positive


def add(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="the cells of a sweep, their compute, the time and the cost to expect",
        description="Prints every cell of a sweep with its compute and the time to expect. The first time, about a "
        "minute is spent on timing a few of its shapes on this machine; the result is kept in ~/.cache/sovit.",
    )
    add_sweep(plan)
    plan.add_argument("--cells-per-gpu", type=positive, metavar="K", help="small cells that share each GPU (default 1)")
    plan.add_argument("--price", type=above_0, metavar="USD", help=f"print the cost too; {PRICE_HELP}")
    plan.add_argument("--measure", action="store_true", help="time this machine anew, though a measurement is kept")
    plan.add_argument("--no-measure", action="store_true", help="assume a speed; time nothing and read no measurement")
    plan.add_argument(
        "--tflops",
        type=above_0,
        metavar="PEAK",
        help="assume GPUs of this peak (default 312), of which 40%% are reached; for GPUs that are not here",
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--noise", metavar="LIST", help=f"print what the star will tell: {NOISE_HELP}")
    plan.add_argument("--law", type=Path, metavar="FIT", help=LAW_HELP)
    plan.add_argument("--target", type=gflops, metavar="T", help="with --noise: compute of the shape to predict")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from sovit.launch.pay.throughput import expect
    from sovit.launch.plan import PEAK_TFLOPS, plan
    from sovit.launch.plan_table import plan_document, plan_summary, plan_table, terminal_width
    from sovit.launch.sweep import load_sweep, metric_of
    from sovit.launch.tables import print_table

    asked = arguments.noise is not None or arguments.law is not None
    if arguments.target and not asked:
        raise ValueError("--target needs --noise or --law; write --noise sigma=0.005,tau=0.005.")
    if arguments.json and asked:
        raise ValueError("--json prints the plan alone; leave out --noise and --law.")
    if arguments.measure and (arguments.no_measure or arguments.tflops):
        other = "--no-measure" if arguments.no_measure else "--tflops"
        raise ValueError(f"--measure and {other} exclude each other; leave one out.")
    sweep = load_sweep(arguments.file, arguments.overrides)
    made = plan(
        sweep,
        workers=arguments.workers,
        cells_per_gpu=arguments.cells_per_gpu,
        peak_tflops=arguments.tflops or PEAK_TFLOPS,
    )
    told = None
    if asked:
        from sovit.cli.expected import plan_text

        metric = metric_of(sweep.metric["name"])
        told = plan_text(made, metric, arguments.noise, arguments.law, arguments.target)
    assumed = arguments.no_measure or (arguments.tflops and made.cells[0].accelerator == "gpu")
    made = expect(made, "anew" if arguments.measure else "never" if assumed else "missing", say=_say)
    if arguments.json:
        print(json.dumps(plan_document(made, arguments.price), indent=1))
        return 0
    print_table(plan_table(made, arguments.price, width=terminal_width()))
    print(plan_summary(made, arguments.price))
    if told:
        print(f"\n{told}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # standard output may go to a program
