"""``sovit wandb``: sweeps that W&B hands out, records sent there or fetched from there, and a report that draws them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sovit.cli.options import add_metric, add_sweep, chosen_metric

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LISTED = 20


def add(commands: argparse._SubParsersAction) -> None:
    wandb = commands.add_parser("wandb", help="sweeps through W&B, records sent there or fetched from there")
    actions = wandb.add_subparsers(dest="action", required=True, metavar="ACTION")

    sweep = actions.add_parser(
        "sweep",
        help="register a sweep at W&B, run it with agents on this machine, and finish what they leave",
        description="Register FILE at W&B, start `wandb agent`s here and wait for them; then run the cells that they left. "
        "The same command again goes on with the same sweep. More machines: wandb agent ENTITY/PROJECT/SWEEP.",
    )
    add_sweep(sweep)
    sweep.set_defaults(command=_sweep)

    push = actions.add_parser(
        "push",
        help="send runs that were trained offline",
        description="Send the finished runs of a sweep that W&B does not have whole. A second time sends nothing new.",
    )
    push.add_argument("sweep", type=Path, help="such as runs/star_tiny")
    push.set_defaults(command=_push)

    pull = actions.add_parser(
        "pull",
        help="rebuild local records from a finished sweep",
        description="Write runs/NAME from the files that the runs of a sweep have left at W&B. Nothing is overwritten.",
    )
    pull.add_argument("path", metavar="ENTITY/PROJECT/SWEEP")
    pull.add_argument("--name", dest="under", help="write to runs/NAME (default: the name the runs were trained under)")
    pull.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
    pull.set_defaults(command=_pull)

    dashboard = actions.add_parser(
        "dashboard",
        help="write a report at W&B that draws a sweep",
        description="Write a report at W&B, or bring it up to date: error against compute by arm, isocompute curves, "
        "parallel coordinates, throughput and loss of the finished runs. Needs: pip install wandb-workspaces.",
    )
    dashboard.add_argument("path", metavar="ENTITY/PROJECT")
    dashboard.add_argument("--sweep", metavar="NAME", help="the name its runs were trained under, if there are several")
    add_metric(dashboard)
    dashboard.set_defaults(command=_dashboard)


def _sweep(arguments: argparse.Namespace) -> int:
    from sovit.launch.local.runner import refuse_changed, run_sweep
    from sovit.launch.plan import plan
    from sovit.launch.sweep import load_sweep, metric_of
    from sovit.launch.wandb.sweep import adopt, all_done, document_of, register, run_agents

    sweep = load_sweep(arguments.file, arguments.overrides)
    made = plan(sweep, workers=arguments.workers)
    refuse_changed(made)
    if not all_done(made):
        found = register(document_of(sweep, arguments.overrides), made)
        print(f"{made.name}: {'registered as' if found.new else 'goes on with'} {found.path}")
        stopped = run_agents(found.path, made)
        if stopped:
            print(f"{made.name}: stopped; the same command goes on from there.")
            return 128 + stopped
        adopt(found.path, made)
    return run_sweep(made, metric=metric_of(sweep.metric["name"]))


def _push(arguments: argparse.Namespace) -> int:
    from sovit.launch.wandb.records import push

    found = push(arguments.sweep)
    print(f"{arguments.sweep}: {len(found.sent)} runs sent, {len(found.there)} were there already.")
    _list_left_out(found.left_out, "not sent")
    return 1 if found.left_out else 0


def _pull(arguments: argparse.Namespace) -> int:
    from sovit.launch.wandb.records import pull

    found = pull(arguments.path, arguments.runs_dir, arguments.under)
    print(f"{arguments.path}: {len(found.new)} runs pulled, {len(found.equal)} were here already.")
    _list_left_out(found.left_out, "not pulled")
    if any("has no " in why for _, why in found.left_out):
        print("Runs without these files are read by: sovit import wandb ENTITY/PROJECT/SWEEP --help")
    sweeps = sorted({directory.parent for directory in (*found.new, *found.equal)})
    if sweeps:
        print(f"Next: {' && '.join(f'sovit fit {sweep}' for sweep in sweeps)}")
    return 1 if found.left_out else 0


def _dashboard(arguments: argparse.Namespace) -> int:
    from sovit.launch.wandb.dashboard import dashboard

    address, new = dashboard(arguments.path, arguments.sweep, chosen_metric(arguments))
    print(f"{'Written' if new else 'Brought up to date'}: {address}")
    return 0


def _list_left_out(left_out: Sequence[tuple[str, str]], what: str) -> None:
    for name, why in left_out[:MAX_LISTED]:
        print(f"  {what}: {name}: {why}")
    if len(left_out) > MAX_LISTED:
        print(f"  and {len(left_out) - MAX_LISTED} more")
