"""``sovit eval``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

CHOICES = {"best": None, "average": True, "trained": False}
TASK_HELP = "task=NAME, and task.KEY=VALUE for keys of conf/task/NAME.yaml, which says what each key does"


def add(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("eval", help="what a trained model is good for: few-shot, probe, calibration, ...")
    evaluate.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run's folder, one of its resume points, or an exported .safetensors",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=TASK_HELP)
    evaluate.add_argument(
        "--weights",
        choices=CHOICES,
        default="best",
        help="the moving average, those trained, or the average if there is one (default: %(default)s)",
    )
    evaluate.add_argument("--json", action="store_true", help="print the result's file instead of a table")
    evaluate.add_argument("--again", action="store_true", help="make the result anew where it is there")
    evaluate.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from sovit.downstream.sets import unusable  # torch loads here
    from sovit.downstream.tasks import evaluate

    found = evaluate(arguments.source, arguments.overrides, average=CHOICES[arguments.weights], again=arguments.again)
    if unusable():
        print(f"{unusable():,} image files could not be used; the first of them are named above.", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found.content, indent=1))
        return 0
    about = found.content
    print(f"{about['task']} of {about['run_id']} ({about['weights']} weights, {about['step']:,} steps)")
    for line in found.lines:
        print(f"  {line}" if line else "")
    print(f"{found.path}{'' if found.fresh else ' (was there; --again makes it anew)'}")
    return 0
