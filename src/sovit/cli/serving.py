"""``sovit predict --max-latency-ms/--max-memory-gb``: the best shape within limits of use, and error by cost."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import DIMENSIONS, above_0, positive

if TYPE_CHECKING:
    from sovit.analysis.forecast.candidates import Regret, Rounding
    from sovit.analysis.forecast.constrained import Option
    from sovit.analysis.latency import Fitted
    from sovit.analysis.points import Dimensions
    from sovit.memory import Model

_CHOICES = ("precision", "mode", "device", "name", "threads", "clock", "batch")
_WORDS = {"latency_s": "ms a call", "memory_bytes": "GB"}
MS, GB = 1e3, 1e9


def add(predict: argparse.ArgumentParser) -> None:
    use = predict.add_argument_group("limits of use: the best shape within them, and the front of error by cost")
    use.add_argument("--max-latency-ms", type=above_0, metavar="X", help="of one call, by --latency")
    use.add_argument("--max-memory-gb", type=above_0, metavar="Y", help="1e9 bytes held during a call")
    use.add_argument("--latency", type=Path, metavar="FILE", help="of sovit bench --fit ... -o FILE")
    use.add_argument(
        "--serve", type=_serve, metavar="KEY=VALUE,...", help=f"which use: {', '.join(_CHOICES)} (default: batch=1)"
    )


def _serve(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _CHOICES or not value:
            raise argparse.ArgumentTypeError(f"{part!r}: write KEY=VALUE with one of {', '.join(_CHOICES)}")
        if key in found:
            raise argparse.ArgumentTypeError(f"{text!r} names {key} twice")
        if key == "batch":
            positive(value)
        found[key] = value
    return found


def asked(arguments: argparse.Namespace) -> bool:
    """Whether there is a limit. Raises ValueError for options that have no meaning, or lack another."""
    limits = [arguments.max_latency_ms, arguments.max_memory_gb]
    if all(limit is None for limit in limits):
        for name in ("latency", "serve"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} has no meaning without --max-latency-ms or --max-memory-gb; add one.")
        return False
    if arguments.max_latency_ms is not None and arguments.latency is None:
        raise ValueError(
            "--max-latency-ms needs --latency FILE: measure shapes with sovit bench --out ROWS.jsonl, then "
            "sovit bench --fit ROWS.jsonl -o FILE."
        )
    if arguments.choose != 1:
        raise ValueError("--choose has no meaning with a limit of use, which chooses; leave it out.")
    return True


def constrained(
    arguments: argparse.Namespace,
    fits: Mapping[str, Mapping[str, Any]],
    optimum: Sequence[float],
    target: float | None,
    how: Rounding,
    geometry: Mapping[str, Any],
    regret: Regret | None,
) -> tuple[dict[str, Any], Dimensions]:
    """JSON-ready, the best shape within the limits, the front, and what both rest on; and the best shape.

    Raises ValueError if there is none.
    """
    from sovit.analysis import latency
    from sovit.analysis.forecast import constrained as search
    from sovit.analysis.forecast.candidates import nearest

    wanted = dict(arguments.serve or {})
    batch_size = int(wanted.pop("batch", "1"))
    fitted = latency.choose(latency.read(arguments.latency), wanted) if arguments.latency else None
    precision = fitted.regime.precision if fitted else wanted.pop("precision", "fp32")
    if fitted is None and wanted:
        raise ValueError(f"{next(iter(wanted))} in --serve has no meaning without --latency; leave it out.")
    judge = _judge(fits, target, regret)
    reach = 1e9 if arguments.force else latency.MAX_FACTOR
    span = _span(fits, optimum)
    if fitted is not None:
        span = {
            name: (max(lo, fitted.ranges[name][0] / reach), min(hi, fitted.ranges[name][1] * reach))
            for name, (lo, hi) in span.items()
        }
    limits = {}
    if arguments.max_latency_ms is not None:
        limits["latency_s"] = arguments.max_latency_ms / MS
    if arguments.max_memory_gb is not None:
        limits["memory_bytes"] = arguments.max_memory_gb * GB

    def model(dimensions: Sequence[int]) -> Model:
        return _model(dimensions, how, geometry)

    def costs(dimensions: Sequence[int]) -> dict[str, float]:
        return _costs(model(dimensions), batch_size, precision, fitted, reach)

    options = search.search(how, span, judge.scores, costs, limits)
    if not options:
        grains = (how.grain(how.width), how.depth, how.mlp_dim)
        near = [nearest(size, grain) for size, grain in zip(optimum, grains, strict=True)]
        raise ValueError(_nothing_known(fitted, model(near), batch_size))
    best = search.best(options, limits, {name: _in_words(name) for name in limits})
    cost = "latency_s" if fitted is not None else "memory_bytes"
    within = [option for option in options if option.within({k: v for k, v in limits.items() if k != cost})]
    front = search.front(within, cost)
    shown = search.spread(front, cost, best)
    rows = [_row(option, how, geometry, fitted, judge) for option in shown]
    if best not in shown:  # a tie within rounding
        rows.append(_row(best, how, geometry, fitted, judge))
    far, which = fitted.beyond(model(best.dimensions), batch_size) if fitted else (1.0, "")
    found = {
        "limits": {"latency_ms": arguments.max_latency_ms, "memory_gb": arguments.max_memory_gb},
        "use": {"batch_size": batch_size, "precision": precision, **(vars(fitted.regime) if fitted else {})},
        "score": judge.measure,
        "best": _row(best, how, geometry, fitted, judge),
        "front_by": cost,
        "front": [_row(option, how, geometry, fitted, judge) for option in front],
        "shown": rows,
        "num_shapes": len(options),
        "extrapolation": {"factor": far, "of": which} if fitted else None,
        "held_out": vars(fitted.held_out) if fitted else None,
        "notes": _notes(fitted, geometry, far, which, limits, best, judge.measure),
    }
    return found, best.dimensions


@dataclass(frozen=True)
class _Judge:
    """What shapes are judged by, the lower the better: ``error`` by a joint law, else ``regret`` by a star's laws."""

    measure: str
    scores: Callable[[Sequence[Sequence[int]]], Sequence[float]]
    interval: Callable[[Sequence[int]], dict[str, float] | None]


def _judge(fits: Mapping[str, Mapping[str, Any]], target: float | None, regret: Regret | None) -> _Judge:
    if target is not None and "joint" in fits:
        import numpy as np

        from sovit.analysis.forecast.joint import estimate_from

        estimate, level = estimate_from(fits["joint"]), fits["joint"]["level"]

        def interval(shape: Sequence[int]) -> dict[str, float]:
            (lo,), (hi,) = estimate.error_interval(np.array([shape], float), target, level)
            return {"lo": float(lo), "hi": float(hi), "level": level}

        return _Judge("error", lambda shapes: estimate.law.error(np.array(shapes, float), target).tolist(), interval)
    if regret is None:
        raise ValueError(
            "a limit of use needs laws to judge shapes by, and a budget in FLOPs: give --joint FIT, or --fit runs/STAR "
            "with --t0 or --compute."
        )
    return _Judge("regret", lambda shapes: [regret(shape) for shape in shapes], lambda shape: None)


def _span(fits: Mapping[str, Mapping[str, Any]], optimum: Sequence[float]) -> dict[str, tuple[float, float]]:
    """By dimension, the sizes that the laws were measured at, and on to twice the predicted optimum.

    From a quarter of it where the fits do not say at which sizes they were measured.
    """
    span = {}
    for name, size in zip(DIMENSIONS, optimum, strict=True):
        seen = [
            float(row[name])
            for kind in ("joint", "star")
            for row in fits.get(kind, {}).get("points", ())
            if row.get("used", True) and name in row
        ]
        span[name] = (min([size, *(seen or [size / 4])]), max([2 * size, *seen]))
    return span


def _model(dimensions: Sequence[int], how: Rounding, geometry: Mapping[str, Any]) -> Model:
    from sovit.analysis.forecast.candidates import OPTIONS, heads
    from sovit.memory import Model
    from sovit.shape import Shape

    num_heads = heads(dimensions[0], how)[0][0]
    said = {name: geometry[name] for name in ("channels", "pool", "num_classes", *OPTIONS) if name in geometry}
    width, depth, mlp_dim = dimensions
    return Model(Shape(width, depth, mlp_dim, num_heads, geometry["patch_size"]), geometry["image_size"], **said)


def _costs(model: Model, batch_size: int, precision: str, fitted: Fitted | None, reach: float) -> dict[str, float]:
    """Empty for a shape too far from what was measured."""
    from sovit.inference import inference_memory

    if fitted is None:
        return {"memory_bytes": float(inference_memory(model, batch_size, precision).total)}
    if fitted.beyond(model, batch_size)[0] > reach:
        return {}
    memory = fitted.memory_bytes(model, batch_size)
    if memory is None:
        memory = float(inference_memory(model, batch_size, precision).total)
    return {"latency_s": fitted.latency_s(model, batch_size), "memory_bytes": memory}


def _row(
    option: Option, how: Rounding, geometry: Mapping[str, Any], fitted: Fitted | None, judge: _Judge
) -> dict[str, Any]:
    from sovit.flops import num_params

    model = _model(option.dimensions, how, geometry)
    seconds, factor = option.costs.get("latency_s"), fitted.held_out.factor if fitted else 1.0
    interval = None
    if seconds is not None and fitted is not None:
        level = fitted.held_out.level
        interval = {"lo": MS * seconds / factor, "hi": MS * seconds * factor, "level": level}
    return {
        **dict(zip(DIMENSIONS, option.dimensions, strict=True)),
        "num_heads": model.shape.num_heads,
        "num_params": sum(num_params(**vars(model)).values()),
        judge.measure: option.score,
        f"{judge.measure}_interval": judge.interval(option.dimensions),
        "latency_ms": None if seconds is None else MS * seconds,
        "latency_interval_ms": interval,
        "memory_gb": option.costs["memory_bytes"] / GB,
    }


def _notes(
    fitted: Fitted | None,
    geometry: Mapping[str, Any],
    far: float,
    which: str,
    limits: Mapping[str, float],
    best: Option,
    measure: str,
) -> list[str]:
    notes = []
    if measure == "regret":
        notes.append(
            "without a law of all dimensions the error is not known: shapes are judged by their regret, the share of T "
            "that they waste against the unconstrained optimum, by the star's laws"
        )
    if fitted is None or fitted.bytes is None:
        notes.append("memory by the closed form: weights, images, activations; the device's own context comes on top")
    if fitted is None:
        return notes
    held = fitted.held_out
    notes.append(
        f"latency holds for {fitted.regime}; shapes left out of its fit were off by {held.median:.1%} in the median, "
        f"{held.worst:.0%} at worst"
    )
    limit = limits.get("latency_s")
    if limit is not None and best.costs["latency_s"] * held.factor > limit:
        notes.append(
            "the interval of its latency reaches beyond the limit: measure it with sovit bench before you rely on it"
        )
    if far > 1:
        notes.append(f"its {which} lies {far:.2f} times beyond what latency was measured at")
    if geometry["pool"] not in fitted.pools:
        notes.append(f"latency was measured with pool {' and '.join(fitted.pools)}, not {geometry['pool']}")
    return notes


def _nothing_known(fitted: Fitted | None, optimum: Model, batch_size: int) -> str:
    assert fitted is not None
    factor, name = fitted.beyond(optimum, batch_size)
    lo, hi = fitted.ranges[name]
    return (
        f"the latency model says nothing of shapes near {optimum.shape}: {name} is {factor:.3g} times beyond what was "
        f"measured ({lo:g} to {hi:g}); measure such shapes with sovit bench, or force it with --force."
    )


def _in_words(name: str) -> Callable[[float], str]:
    """A cost as its option takes it, not rounded down: whoever asks for what is said gets it."""
    from sovit.analysis.report.words import number

    scale = MS if name == "latency_s" else 1 / GB

    def words(value: float) -> str:
        value *= scale * (1 - 1e-12)
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)
        return f"{number(math.ceil(value / unit) * unit)} {_WORDS[name]}"

    return words


def text(found: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: the choice, the front with the choice marked, and the notes."""
    from sovit.analysis.report.words import number
    from sovit.cli.prediction import count, percent
    from sovit.inference import gb

    use, best, limits = found["use"], found["best"], found["limits"]
    said = [f"{limits['latency_ms']:g} ms a call"] if limits["latency_ms"] is not None else []
    said += [f"{limits['memory_gb']:g} GB"] if limits["memory_gb"] is not None else []
    where = f"{use['precision']}, {use['mode']}, {use['name']}" if "mode" in use else use["precision"]
    lines = [
        f"within {' and '.join(said)} (batch {use['batch_size']}, {where}): {_name(best)}, the least {found['score']} of "
        f"{found['num_shapes']:,} shapes looked at",
    ]
    head = ("", "shape", "heads", "parameters", "latency, ms", "interval", "memory", found["score"])
    rows: list[tuple[str, ...]] = [head]
    for row in found["shown"]:
        interval = row["latency_interval_ms"]
        score, off = row[found["score"]], row[f"{found['score']}_interval"]
        rows.append(
            (
                ">" if _name(row) == _name(best) else "",
                _name(row),
                str(row["num_heads"]),
                count(row["num_params"]),
                number(row["latency_ms"]),
                f"{number(interval['lo'])} to {number(interval['hi'])}" if interval else "-",
                gb(GB * row["memory_gb"]),
                percent(score)
                if found["score"] == "regret"
                else f"{number(score, 4)} [{number(off['lo'])}, {number(off['hi'])}]",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    by = "latency" if found["front_by"] == "latency_s" else "memory"
    lines += ["", f"no shape beats these in both {found['score']} and {by} ({len(found['front'])} in all):"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *(f"- {note}" for note in found["notes"])]


def _name(row: Mapping[str, Any]) -> str:
    return "x".join(str(row[name]) for name in DIMENSIONS)
