"""``sovit export``."""

from __future__ import annotations

import argparse
from pathlib import Path

CHOICES = {"best": None, "average": True, "trained": False}


def add(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="a resume point, sharded or not, as one .safetensors or .ckpt file")
    export.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or one of its resume points")
    export.add_argument(
        "out", type=Path, metavar="FILE", help="NAME.safetensors for the weights, NAME.ckpt for all of it"
    )
    export.add_argument(
        "--weights",
        choices=CHOICES,
        default="best",
        help="of a .safetensors: the moving average, those trained, or the average if there is one (default: %(default)s)",
    )
    export.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from sovit.lit.export import export  # torch loads here

    print(export(arguments.source, arguments.out, average=CHOICES[arguments.weights], overwrite=arguments.overwrite))
    return 0
