"""``sovit rerun``: run a cell again from its record, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    rerun = commands.add_parser("rerun", help="run a cell again from its run.json alone, and compare the records")
    rerun.add_argument("run", type=Path, help="directory of one run, such as runs/star_tiny/RUN_ID")
    rerun.add_argument(
        "--out", type=Path, default=Path("reruns"), help="runs folder to train in (default: %(default)s)"
    )
    rerun.set_defaults(command=_rerun)


def _rerun(arguments: argparse.Namespace) -> int:
    from sovit.launch.rerun import rerun

    return rerun(arguments.run, arguments.out)
