"""``sovit run``: run what is left of a sweep."""

from __future__ import annotations

import argparse

from sovit.cli.options import add_sweep


def add(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="run what is left of a sweep on this machine")
    add_sweep(run)
    run.add_argument("--retry-failed", action="store_true", help="also run cells that failed or diverged before")
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sovit.launch.local import run_sweep
    from sovit.launch.plan import plan
    from sovit.launch.sweep import load_sweep, metric_of

    sweep = load_sweep(arguments.file, arguments.overrides)
    made = plan(sweep, workers=arguments.workers)
    return run_sweep(made, retry_failed=arguments.retry_failed, metric=metric_of(sweep.metric["name"]))
