"""``sovit export``."""

from __future__ import annotations

import argparse
from pathlib import Path

CHOICES = {"best": None, "average": True, "trained": False}


def add(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export",
        help="a trained model for others: timm, Hugging Face, ONNX, safetensors; with its shape card",
        description="A trained model as a folder with a shape card, or as one file. What is written is loaded again by the "
        "library it is for, and its logits compared, before it gets its name.",
    )
    export.add_argument(
        "source", type=Path, metavar="RUN", help="a run's folder, one of its resume points, or an exported .safetensors"
    )
    export.add_argument(
        "out", type=Path, metavar="OUT",
        help="a folder; or NAME.safetensors for the weights, NAME.onnx for a graph, NAME.ckpt for the whole resume point",
    )  # fmt: skip
    export.add_argument(
        "--format", choices=("timm", "huggingface", "onnx"), help="of a folder: what loads it (default: timm)"
    )
    export.add_argument(
        "--weights",
        choices=CHOICES,
        default="best",
        help="the moving average, those trained, or the average if there is one (default: %(default)s); not of a .ckpt",
    )
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    card = export.add_argument_group("what the card says")
    card.add_argument("--license", "--licence", metavar="NAME", help="such as apache-2.0 (default: unknown)")
    card.add_argument(
        "--fit", type=Path, action="append", default=[], metavar="PATH",
        help="a fit.json behind the shape, also several times (default: the one of the run's sweep)",
    )  # fmt: skip
    card.add_argument(
        "--prediction", type=Path, metavar="FILE",
        help="what sovit predict --json wrote (default: prediction.json beside the run or its sweep's runs)",
    )  # fmt: skip
    card.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names, one a line (default: those of the training images, if at hand)",
    )
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from sovit.ship.export import About, export  # torch loads here

    about = About(arguments.license, tuple(arguments.fit), arguments.prediction, arguments.classes)
    print(
        export(
            arguments.source,
            arguments.out,
            average=CHOICES[arguments.weights],
            overwrite=arguments.overwrite,
            kind=arguments.format,
            about=about,
        )
    )
    return 0
