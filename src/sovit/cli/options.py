"""What several commands share: defaults and the types of arguments."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sovit.metric import DEFAULT_SHOTS, MULTITASK, Metric, shots_of

DEFAULT_METRIC = ("fractals", DEFAULT_SHOTS)
PRICE_HELP = "dollars an hour: of one GPU, or of the whole machine where the cells run on its CPU"
DIMENSIONS = ("width", "depth", "mlp_dim")  # as in analysis.points, which is slow to import


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def above_0(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def by_dimension(text: str) -> dict[str, float]:
    """{dimension: number} of width=..,depth=..,mlp=.."""
    found: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        name = {"mlp": "mlp_dim"}.get(key.strip(), key.strip())
        if name not in DIMENSIONS:
            raise argparse.ArgumentTypeError(f"{part!r}: write width=NUMBER,depth=NUMBER,mlp=NUMBER")
        if name in found:
            raise argparse.ArgumentTypeError(f"{text!r} names {key} twice")
        found[name] = above_0(value)
    return found


def at_least_0(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def add_metric(command: argparse.ArgumentParser) -> None:
    """The metric that a command is about; `chosen_metric` reads it."""
    command.add_argument(
        "--dataset", default=DEFAULT_METRIC[0],
        help=f"of the evaluation, or {MULTITASK}, the decoder's log-perplexity (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--shots", type=at_least_0, help=f"default: {DEFAULT_SHOTS}; {MULTITASK} and zero-shot have 0")


def chosen_metric(arguments: argparse.Namespace) -> Metric:
    """Data set and shots, which follow from the data set where they are not given."""
    return arguments.dataset, shots_of(arguments.dataset, arguments.shots)


def add_retried(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--retried", action="store_true", help="let in runs that repeat a diverged one at a lower learning rate"
    )


def add_sweep(command: argparse.ArgumentParser) -> None:
    """The arguments of every command that takes a sweep file."""
    command.add_argument("file", type=Path, help="sweep file, such as sweeps/star_tiny.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="set in every cell, such as seed=0")
    command.add_argument("--workers", type=positive, metavar="N", help="cells at once (default: by cores or GPUs)")
