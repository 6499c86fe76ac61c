"""``sovit status``: where the cells of a sweep stand."""

from __future__ import annotations

import argparse
from pathlib import Path

from sovit.cli.options import DEFAULT_METRIC


def add(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="where the cells of a sweep stand")
    status.add_argument("sweep", type=Path, nargs="?", help="runs/NAME or a sweep file (default: everything in runs/)")
    status.set_defaults(command=_status)


def _status(arguments: argparse.Namespace) -> int:
    from sovit.launch.state import summary
    from sovit.launch.status import status_table
    from sovit.launch.tables import print_table

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
        table, states = status_table(directories, metric)
        print_table(table)
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
