"""``sovit status``: where the cells of a sweep stand, once or live."""

from __future__ import annotations

import argparse
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import DEFAULT_METRIC, PRICE_HELP, above_0

if TYPE_CHECKING:
    from sovit.launch.watch.promise import Promise
    from sovit.launch.watch.status import SweepStatus, Target

EVERY_S = 2.0
PROMISE_EVERY_S = 60.0
PATIENCE = 15  # looks without a running cell until --watch gives up waiting for the next to start
RESERVED = 17  # lines of a terminal that heads, reasons, totals and exponents need


def add(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="where the cells of a sweep stand, what they have cost and promise")
    status.add_argument("sweep", type=Path, nargs="?", help="runs/NAME or a sweep file (default: everything in runs/)")
    status.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of a sweep file, as given to sovit run")
    status.add_argument("--watch", action="store_true", help="go on showing it until nothing runs any more")
    status.add_argument("--json", action="store_true", help="one JSON document with every cell, for scripts")
    status.add_argument("--price", type=above_0, metavar="USD", help=f"print the cost too; {PRICE_HELP}")
    status.set_defaults(command=_status)


def _status(arguments: argparse.Namespace) -> int:
    if arguments.watch and arguments.json:
        raise ValueError("--watch is for eyes and --json for scripts; give one of them.")
    targets = _targets(arguments.sweep, arguments.overrides)
    if arguments.watch:
        return watch(targets, arguments.price)
    from sovit.launch.watch.status import as_document, look

    found = [look(target) for target in targets]
    promises = {sweep.name: _promised(target, sweep) for target, sweep in zip(targets, found, strict=True)}
    if arguments.json:
        exponents = {name: _plain(promise) for name, promise in promises.items()}
        print(json.dumps(as_document(found, arguments.price, exponents), indent=1, allow_nan=False))
        return 0
    from rich.console import Console

    from sovit.launch.watch.table import status_text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
    for sweep in found:
        width = console.width
        console.print(status_text(sweep, width=width, price=arguments.price, exponents=promises[sweep.name]))
    return 0


def _targets(path: Path | None, overrides: Sequence[str]) -> list[Target]:
    """What to look at. Raises ValueError if there are no runs and no plan."""
    from sovit.launch.watch.status import run_directories, target_of

    paths = [path] if path is not None else [path for path in sorted(Path("runs").glob("*")) if path.is_dir()]
    targets = [target_of(path, overrides, DEFAULT_METRIC) for path in paths]
    targets = [target for target in targets if target.planned or run_directories(target.directory)]
    if not targets:
        raise ValueError(f"{path or 'runs/'} holds no runs; give a sweep file, or a directory such as runs/star_tiny.")
    return targets


def _promised(target: Target, sweep: SweepStatus) -> dict[str, Promise] | str | None:
    """What the points so far promise; None for a sweep that varies no star."""
    from sovit.launch.watch.promise import promised

    return promised([target.directory / cell.run_id for cell in sweep.cells], sweep.metric)


def _plain(promise: dict[str, Promise] | str | None) -> dict[str, Any]:
    """The same keys whether there are promises or a reason for none."""
    if isinstance(promise, dict):
        return {"why": None, "arms": {name: dataclasses.asdict(arm) for name, arm in promise.items()}}
    return {"why": promise, "arms": {}}


class _Background:
    """The promises, computed beside the display, which they must not hold up, and at most once a minute."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.result: Any = None
        self._began = -PROMISE_EVERY_S
        self._thread: threading.Thread | None = None

    def poll(self) -> Any:
        """The newest result, or None before the first."""
        idle = self._thread is None or not self._thread.is_alive()
        if idle and time.monotonic() - self._began >= PROMISE_EVERY_S:
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._run, daemon=True)  # dies with the command
            self._thread.start()
        return self.result

    def _run(self) -> None:
        try:
            self.result = self.work()
        except ValueError as error:
            self.result = str(error).rstrip(".")


def watch(targets: Sequence[Target], price: float | None, every_s: float = EVERY_S) -> int:
    """Show the sweeps until every cell has a verdict, nothing has run for half a minute, or Ctrl-C; returns 0."""
    from rich.console import Console, Group
    from rich.live import Live

    from sovit.launch.state import RUNNING, STOPPED, WAITING
    from sovit.launch.watch.status import look
    from sovit.launch.watch.table import status_text

    console = Console(highlight=False)
    latest = [look(target) for target in targets]
    promises = [
        _Background(lambda number=number: _promised(targets[number], latest[number]))  # type: ignore[misc]
        for number in range(len(targets))
    ]
    quiet = 0
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                rows = max(3, (console.height - RESERVED * len(latest)) // len(latest))
                texts = [
                    status_text(sweep, width=console.width, rows=rows, price=price, exponents=promise.poll())
                    for sweep, promise in zip(latest, promises, strict=True)
                ]
                live.update(Group(*texts), refresh=True)
                states = {state for sweep in latest for state in sweep.states}
                quiet = 0 if RUNNING in states else quiet + 1
                if quiet and (not states & {WAITING, STOPPED} or quiet > PATIENCE):
                    break
                time.sleep(every_s)
                latest[:] = [look(target) for target in targets]
    except KeyboardInterrupt:
        pass
    return 0
