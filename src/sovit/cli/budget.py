"""A compute budget as the command line says it: GFLOPs, GPU hours, another model's, or a multiple of the origin's."""

from __future__ import annotations

import argparse
import math

from sovit.cli.options import above_0

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add(parser: argparse.ArgumentParser) -> None:
    """The options of a budget: exactly one of four, and what a GPU hour is."""
    budget = parser.add_argument_group("the budget: one of").add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--compute", type=compute, metavar="T", help="forward FLOPs per image x images: GFLOPs, or such as 9e21flops"
    )
    budget.add_argument(
        "--gpu-hours", type=above_0, metavar="H", help="see --tflops and --mfu; training is 3 x forward"
    )
    budget.add_argument("--match", type=match, metavar="NAME:IMAGES", help="that of a model: ViT-g/14:16e9, at 224 px")
    budget.add_argument("--factor", type=above_0, metavar="T/t0", help="a multiple of the origin's compute")
    hours = parser.add_argument_group("what a GPU hour is")
    hours.add_argument("--tflops", type=above_0, metavar="PEAK", help="of one GPU (default: 312)")
    hours.add_argument("--mfu", type=above_0, metavar="SHARE", help="of the peak that is reached (default: 0.4)")


def compute(text: str) -> float:
    """GFLOPs, from a number of them or a duration in gflops or flops."""
    from sovit.duration import parse_duration

    try:
        return above_0(text)
    except argparse.ArgumentTypeError:
        try:
            found = parse_duration(text)
        except ValueError:
            found = None
    if found is None or found.unit not in ("gflops", "flops"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no compute; write GFLOPs such as 8.5e12, or 8.5T gflops, 9e21 flops"
        )
    return found.value / (1e9 if found.unit == "flops" else 1.0)


def match(text: str) -> tuple[str, float, float]:
    """(model, images, T in GFLOPs): the named model at 224 pixels with a MAP head, as the literature counts."""
    from sovit.flops import forward_gflops
    from sovit.shape import parse_shape

    name, colon, count = text.removeprefix("ViT-").rpartition(":")
    suffix = count[-1:].upper()
    try:
        images = above_0(count[:-1] if suffix in _SUFFIXES else count) * _SUFFIXES.get(suffix, 1.0)
    except argparse.ArgumentTypeError:
        images = math.nan
    if not colon or math.isnan(images):
        raise argparse.ArgumentTypeError(f"{text!r}: write MODEL:IMAGES such as ViT-g/14:16e9 or B/14:4B")
    try:
        shape = parse_shape(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return f"ViT-{name}", images, forward_gflops(shape, 224) * images


def target(arguments: argparse.Namespace, t0: float | None, starts: bool) -> float | None:
    """T in GFLOPs, None where only a factor is known; ``starts``: whether the rule starts from an origin with ``t0``."""
    if arguments.factor is not None:
        return None if t0 is None else t0 * arguments.factor
    if starts and t0 is None:
        raise ValueError(
            "--origin without --t0: a budget in FLOPs needs the compute at which it is best; or give --factor."
        )
    if arguments.gpu_hours is not None:
        return arguments.gpu_hours * 3600 * gflops_per_s(arguments) / 3
    return arguments.match[2] if arguments.match is not None else arguments.compute


def gflops_per_s(arguments: argparse.Namespace) -> float:
    from sovit.launch.plan import GPU_UTILISATION, PEAK_TFLOPS

    return (arguments.tflops or PEAK_TFLOPS) * 1e3 * (arguments.mfu or GPU_UTILISATION)


def in_words(arguments: argparse.Namespace) -> str:
    """The budget as it was given, in words."""
    if arguments.gpu_hours is not None:
        rate = gflops_per_s(arguments) / 1e3
        return f"{arguments.gpu_hours:,g} GPU hours at {rate:,.4g} TFLOP/s reached, training = 3 x forward"
    if arguments.match is not None:
        from sovit.cli.prediction import count

        name, images, _ = arguments.match
        return f"that of {name} on {count(images)} images at 224 px"
    return f"{arguments.factor:,g} times the origin's" if arguments.factor is not None else ""
