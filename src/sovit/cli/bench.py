"""``sovit bench``: what a shape costs in use, measured; and a latency model fitted to such measurements."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import above_0, positive

if TYPE_CHECKING:
    from sovit.bench.settings import Setting, Subject

BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 64, 256)}
SECONDS = 1.0
_OF_SHAPE = ("heads", "head_dim", "patch", "channels", "pool", "classes", "recipe")  # a checkpoint has its own
_OF_MEASURING = (*_OF_SHAPE, "image_size", "batch", "precision", "mode", "device", "threads", "clock", "seconds", "out")


def add(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="latency, memory, energy and utilisation of a shape or checkpoint in use",
        description="Inference measured on this machine, against timm's own model in turns. A run that is stopped keeps the "
        "rows that it has.",
    )
    bench.add_argument(
        "subjects",
        nargs="*",
        metavar="SOURCE|SHAPE",
        help="a run's folder, a resume point, a .safetensors; or a shape such as S/16 or 32x4x128, with random weights",
    )
    use = bench.add_argument_group("how it is used")
    use.add_argument("--batch", type=_counts, metavar="N,N", help="images a call (default: 1,8; on a GPU 1,8,64,256)")
    use.add_argument("--precision", type=_words, metavar="P,P", help="fp32, bf16 (default: both)")
    use.add_argument("--mode", type=_words, metavar="M,M", help="eager, compiled (default: both)")
    use.add_argument(
        "--image-size", type=_counts, metavar="N,N", help="pixels a side (default: the checkpoint's own, or 224)"
    )
    use.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    use.add_argument("--threads", type=positive, metavar="N", help="of a CPU (default: its cores)")
    use.add_argument(
        "--clock",
        choices=("wall", "processor"),
        help="processor: leaves out the time of other programs; one thread only",
    )
    use.add_argument("--seconds", type=above_0, metavar="S", help="of calls for each row and rival (default: 1)")
    use.add_argument("--no-timm", action="store_true", help="do not time timm's model beside it")
    shape = bench.add_argument_group("what a shape leaves open (as in sovit shape)")
    shape.add_argument("--heads", type=positive, metavar="N")
    shape.add_argument("--head-dim", type=positive, metavar="N")
    shape.add_argument("--patch", type=positive, metavar="N", help="default: 14, or the named shape's own")
    shape.add_argument("--channels", type=positive, metavar="N", help="default: 3")
    shape.add_argument("--pool", choices=("map", "avg", "token"), help="default: map")
    shape.add_argument("--classes", type=int, metavar="N", help="of a classifier (default: 0, none)")
    shape.add_argument("--recipe", choices=("vit", "vit22b"), help="default: vit, but vit22b for 22B")
    kept = bench.add_argument_group("what is kept")
    kept.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="append the rows here, each as soon as it is there"
    )
    kept.add_argument("--missing", action="store_true", help="only rows that --out does not hold yet")
    kept.add_argument("--json", action="store_true", help="print JSON")
    fit = bench.add_argument_group("a latency model instead of measurements")
    fit.add_argument("--fit", type=Path, metavar="FILE.jsonl", help="fit it to these rows")
    fit.add_argument("-o", "--write", type=Path, metavar="FILE.json", help="for sovit predict --latency")
    bench.set_defaults(command=_bench)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.fit is not None:
        return _fit(arguments)
    if arguments.write is not None:
        raise ValueError("-o is for the model that --fit makes; rows are kept with --out.")
    if not arguments.subjects:
        raise ValueError("nothing to measure: give a checkpoint, or a shape such as S/16.")
    if arguments.missing and arguments.out is None:
        raise ValueError("--missing needs --out FILE.jsonl, whose rows it leaves out.")
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    from sovit.bench.processes import measure_all, same
    from sovit.bench.table import line, notes, rows
    from sovit.launch.pay.hardware import hardware
    from sovit.launch.tables import print_table

    work = _work(arguments)
    if arguments.missing and arguments.out.is_file():
        from sovit.analysis.latency import read_rows

        known, machine = read_rows(arguments.out), hardware("gpu" if work[0][1].device == "cuda" else "cpu")
        asked = len(work)
        work = [one for one in work if not any(same(record, *one, machine) for record in known)]
        print(f"{asked - len(work)} of {asked} rows are in {arguments.out} already.", file=sys.stderr)
    found: list[dict[str, Any]] = []
    stopped = False
    seconds = SECONDS if arguments.seconds is None else arguments.seconds
    try:
        for record in measure_all(work, seconds=seconds, against_timm=not arguments.no_timm, out=arguments.out):
            found.append(record)
            print(f"{len(found)}/{len(work)} {line(record)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        stopped = True
        print(f"\nStopped; {len(found)} of {len(work)} rows are measured.", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found, indent=1))
    elif found:
        print_table(rows(found))
        print("\n".join(notes(found)))
        if arguments.out is not None:
            print(f"Appended to {arguments.out}.")
    return 130 if stopped else 0


def _work(arguments: argparse.Namespace) -> list[tuple[Subject, Setting]]:
    """All rows, checked before the first is measured."""
    from sovit.bench.settings import settings
    from sovit.launch.devices import cores, visible_gpus

    gpus = visible_gpus()
    device = arguments.device or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: no GPU is visible here; leave it out to measure the CPU.")
    for name in ("threads", "clock"):
        if device == "cuda" and getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for a CPU, and this measures a GPU; add --device cpu, or leave it out.")
    work = []
    for text in arguments.subjects:
        subject = _subject(text, arguments)
        chosen = settings(
            subject,
            image_sizes=arguments.image_size or (),
            batch_sizes=arguments.batch or BATCHES[device],
            precisions=arguments.precision or ("fp32", "bf16"),
            modes=arguments.mode or ("eager", "compiled"),
            device=device,
            threads=arguments.threads or len(cores()),
            clock=arguments.clock or "wall",
        )
        work += [(subject, setting) for setting in chosen]
    return work


def _subject(text: str, arguments: argparse.Namespace) -> Subject:
    """The checkpoint that is at this path, or else the shape that the text is. Raises ValueError."""
    from sovit.bench.settings import Subject
    from sovit.cli.shape import model_of

    path = Path(text)
    if path.exists():
        for name in _OF_SHAPE:
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is for a shape, and {text} is a checkpoint, which says its own; leave it out."
                )
        return Subject(text, _model_of_checkpoint(path), path)
    if path.suffix in (".ckpt", ".safetensors") or text.startswith((".", "/")):
        raise ValueError(f"{text} is not there; give a run's folder, a resume point, a .safetensors, or a shape.")
    usual = {"channels": 3, "pool": "map", "classes": 0, "image_size": None}
    filled = {name: getattr(arguments, name) for name in _OF_SHAPE}
    filled |= {name: value for name, value in usual.items() if filled.get(name) is None}
    size = (arguments.image_size or (224,))[0]
    return Subject(text, model_of(argparse.Namespace(**filled | {"shape": text, "image_size": size})))


def _model_of_checkpoint(path: Path) -> Any:
    from sovit.config import from_mapping
    from sovit.derived import model_geometry, model_options, vit_shape_of
    from sovit.lit.trained import read
    from sovit.memory import Model

    cfg = from_mapping(read(path).config)
    return Model(vit_shape_of(cfg, "bench"), **model_geometry(cfg), **model_options(cfg))


def _fit(arguments: argparse.Namespace) -> int:
    from sovit.analysis import latency

    if arguments.subjects:
        raise ValueError(f"--fit measures nothing; leave out {arguments.subjects[0]}, or measure it first with --out.")
    idle = [name for name in _OF_MEASURING if getattr(arguments, name) is not None]
    idle += [name for name in ("no_timm", "missing") if getattr(arguments, name)]
    if idle:
        raise ValueError(
            f"--{idle[0].replace('_', '-')} has no meaning with --fit, which measures nothing; leave it out."
        )
    fits, left_out = latency.fit_rows(latency.read_rows(arguments.fit))
    if arguments.write is not None:
        latency.write(arguments.write, fits, str(arguments.fit), left_out)
    if arguments.json:
        print(json.dumps({"fits": [latency.as_dict(fit) for fit in fits], "left_out": left_out}, indent=1))
        return 0
    print("\n\n".join("\n".join(_fit_text(fit)) for fit in fits))
    if left_out:
        print("\n" + "\n".join(f"Left out: {text}." for text in left_out))
    if arguments.write is not None:
        print(f"\nWritten: {arguments.write}\n  sovit predict ... --max-latency-ms MS --latency {arguments.write}")
    return 0


def _fit_text(fit: Any) -> list[str]:
    from sovit.analysis.report.words import number

    seconds, ranges = fit.seconds, fit.ranges
    rates = [
        f"{1e3 * seconds['call']:.3g} ms a call, {1e6 * seconds['block']:.3g} us a block",
        *(f"{number(1 / seconds[name])} GFLOP/s {what}" for name, what in _RATES.items() if seconds[name] > 0),
        *(f"{number(1 / seconds[name])} GB/s {what}" for name, what in _WIDTHS.items() if seconds[name] > 0),
    ]
    if seconds["scores"] > 0:
        rates.append(f"{number(1 / seconds['scores'])} billion attention scores a second")
    measured = ", ".join(f"{name} {_range(*ranges[name])}" for name in ranges)
    lines = [
        f"{fit.regime}: {fit.num_rows} rows, {fit.held_out.num_shapes} shapes",
        f"  measured: {measured}",
        f"  {'; '.join(rates)}",
        f"  latency of a shape left out: {_held_out(fit.held_out)}",
    ]
    if fit.bytes is not None:
        held = fit.bytes
        lines += [
            f"  memory: {held['process'] / 1e6:,.1f} MB, {held['weights']:.3g} x weights, {held['activations']:.3g} x "
            "images and activations",
            f"  memory of a shape left out: {_held_out(fit.bytes_held_out)}",
        ]
    wrapped = [textwrap.wrap(line, 100, subsequent_indent="    ", break_on_hyphens=False) for line in lines]
    return [part for parts in wrapped for part in parts]


_RATES = {"products": "in products with weights", "attention": "in attention"}
_WIDTHS = {"activations": "of activations", "weights": "of weights"}


def _range(lo: float, hi: float) -> str:
    return f"{lo:g}" if lo == hi else f"{lo:g} to {hi:g}"


def _held_out(found: Any) -> str:
    return (
        f"off by {found.median:.1%} in the median, {found.worst:.0%} at worst ({found.worst_shape}); "
        f"{found.level:.0%} interval: times or over {found.factor:.2f}"
    )
