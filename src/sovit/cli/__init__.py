"""The ``sovit`` command, one module a command or two. Heavy imports happen inside the commands that need them.

Exit codes: 0 done, 1 some cells are not done, 2 something the user can mend (one sentence on standard error),
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sovit import __version__
from sovit.cli import (
    bench,
    check,
    compare,
    design,
    eval,
    export,
    fit,
    importers,
    memory,
    optimize,
    plan,
    predict,
    rerun,
    run,
    shape,
    simulate,
    status,
    vocabulary,
    wandb,
)

COMMANDS = (
    optimize,
    shape,
    memory,
    plan,
    run,
    status,
    rerun,
    eval,
    vocabulary,
    export,
    bench,
    wandb,
    fit,
    check,
    compare,
    predict,
    design,
    simulate,
    importers,
)  # modules with add(commands); the order of sovit --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parse(argv)
    try:
        return arguments.command(arguments)
    except ValueError as error:
        print(f"sovit {arguments.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # sovit plan FILE | head
        sys.stderr.close()
        return 0
    except OSError as error:  # no permission, a directory where a file should be, a full disk
        print(f"sovit {arguments.name}: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with KEY=VALUE also accepted behind options, which argparse alone does not."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sovit", description="Which width, depth and MLP dimension should my vision transformer have?"
    )
    parser.add_argument("--version", action="version", version=f"sovit {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser
