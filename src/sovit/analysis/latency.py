"""What a shape costs in use, foretold: latency and memory of a forward pass by a few rates, fitted to `sovit bench`.

    seconds = call + block depth + products P + attention Q + scores S + activations A + weights W

P and Q: FLOPs of the batch in products with weights and in products of activations with each other (`sovit.flops`); S:
attention scores, which a softmax passes over; A: bytes of activations that norms, GELU and sums pass over; W: bytes of the
weights, read once a call. This is a roofline whose parts add up instead of hiding behind one another, with an overhead by
call and by block; every coefficient is a time and cannot be negative. Bytes = process + weights W + activations, the last
two of `sovit.inference`. Both are fitted by nonnegative least squares of the relative error, for one regime: a device with
its threads, a precision, a mode. The error is that of shapes left out whole, and so is the interval.

Not here: measuring (`sovit.bench`), the choice of a shape (`sovit.analysis.forecast.constrained`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sovit import records
from sovit.flops import forward_flops
from sovit.inference import PRECISIONS, inference_memory
from sovit.memory import Model
from sovit.shape import Shape

SCHEMA = 1
KIND = "latency"
TERMS = ("call", "block", "products", "attention", "scores", "activations", "weights")
HELD = ("process", "weights", "activations")
LEAST_SHAPES = 5
LEVEL = 0.9
MAX_FACTOR = 2.0  # beyond what was measured, in any of `_ranged`
_OF_MODEL = ("channels", "pool", "num_classes", "pos_embed", "block", "qk_norm", "qkv_bias", "norm")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Regime:
    """What a fit holds for: ``name`` of the processor or GPU; ``threads`` is 0 on a GPU."""

    device: str
    name: str
    threads: int
    precision: str
    mode: str
    clock: str
    torch: str

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        clock = ", processor time" if self.clock == "processor" else ""
        return f"{self.device} ({self.name}{threads}), {self.precision}, {self.mode}{clock}"


@dataclass(frozen=True)
class HeldOut:
    """Relative errors |estimate / measured - 1| of shapes left out whole, and the interval that they give.

    ``worst_shape`` had the ``worst`` error. Of a new shape, estimate / factor to estimate * factor holds the measured value
    with probability ``level``, if it is drawn like the others (conformal, by each shape's largest error).
    """

    median: float
    worst: float
    worst_shape: str
    num_shapes: int
    factor: float
    level: float


@dataclass(frozen=True)
class Fitted:
    """Latency and memory of one regime. ``seconds`` by `TERMS`, ``bytes`` by `HELD` (None: memory was not told).

    ``ranges``: least and largest measured, by quantity; ``pools``: those measured.
    """

    regime: Regime
    seconds: dict[str, float]
    held_out: HeldOut
    bytes: dict[str, float] | None
    bytes_held_out: HeldOut | None
    ranges: dict[str, tuple[float, float]]
    pools: tuple[str, ...]
    num_rows: int

    def latency_s(self, model: Model, batch_size: int) -> float:
        """Seconds of a call, the median one."""
        return float(np.dot(list(self.seconds.values()), terms(model, batch_size, self.regime.precision)))

    def memory_bytes(self, model: Model, batch_size: int) -> float | None:
        """The most that is held during a call."""
        if self.bytes is None:
            return None
        return float(np.dot(list(self.bytes.values()), _held(model, batch_size, self.regime.precision)))

    def beyond(self, model: Model, batch_size: int) -> tuple[float, str]:
        """By what factor the quantity that lies farthest out is beyond what was measured (1: none is), and its name."""
        factors = {
            name: max(value / self.ranges[name][1], self.ranges[name][0] / value, 1.0)
            for name, value in _ranged(model, batch_size).items()
        }
        farthest = max(factors, key=lambda name: factors[name])
        return factors[farthest], farthest


def terms(model: Model, batch_size: int, precision: str) -> Array:
    """(7,): what each coefficient of ``seconds`` is multiplied by, in GFLOP, 1e9 scores and GB."""
    shape, size = model.shape, PRECISIONS[precision]
    flops = forward_flops(
        shape, model.image_size, channels=model.channels, pool=model.pool, num_classes=model.num_classes
    )
    attention = flops["attention_products"]
    tokens, width, mlp_dim = batch_size * model.tokens, shape.width, shape.mlp_dim
    # A block: two norms, two sums and attention's result read and write the width, GELU the MLP dimension.
    passed = shape.depth * tokens * (12 * width + 2 * mlp_dim) * size
    scores = shape.depth * tokens * model.tokens * shape.num_heads
    weights = inference_memory(model, batch_size, precision).weights
    return np.array(
        [
            1.0,
            shape.depth,
            batch_size * (sum(flops.values()) - attention) / 1e9,
            batch_size * attention / 1e9,
            scores / 1e9,
            passed / 1e9,
            weights / 1e9,
        ]
    )


def _held(model: Model, batch_size: int, precision: str) -> Array:
    memory = inference_memory(model, batch_size, precision)
    return np.array([1.0, memory.weights, memory.images + memory.activations])


def _ranged(model: Model, batch_size: int) -> dict[str, float]:
    shape = model.shape
    return {
        "width": shape.width,
        "depth": shape.depth,
        "mlp_dim": shape.mlp_dim,
        "head_dim": shape.head_dim,
        "tokens": model.tokens,
        "batch_size": batch_size,
    }


def fit_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Fitted], list[str]]:
    """The fits of all regimes in records of `sovit bench`, and sentences on what could not be fitted.

    Raises ValueError if no regime can be.
    """
    regimes: dict[Regime, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "measured":
            regimes.setdefault(_regime(row), []).append(row)
    unmeasured = sum(row["status"] != "measured" for row in rows)
    left_out = [f"{unmeasured} rows that could not be measured"] if unmeasured else []
    fits = []
    for regime, found in regimes.items():
        shapes = {_name(model_of(row)) for row in found}
        if len(shapes) < LEAST_SHAPES:
            left_out.append(f"{regime}: {len(shapes)} shapes, and a fit takes {LEAST_SHAPES}")
            continue
        fits.append(_fit(regime, found))
    if not fits:
        why = "; ".join(left_out) or "there is no row"
        raise ValueError(f"nothing to fit: {why}. Measure more shapes with sovit bench SHAPE SHAPE ... --out FILE.")
    return fits, left_out


def model_of(row: Mapping[str, Any]) -> Model:
    """The model of a record."""
    return Model(Shape(**row["shape"]), row["image_size"], **{name: row[name] for name in _OF_MODEL})


def _regime(row: Mapping[str, Any]) -> Regime:
    machine, gpu = row["machine"], row["device"] == "cuda"
    name = " + ".join(machine["gpus"]) if gpu else machine["cpu"]
    threads = 0 if gpu else row["threads"]
    return Regime(row["device"], name, threads, row["precision"], row["mode"], row["clock"], machine["torch"])


def _name(model: Model) -> str:
    return str(model.shape)


def _fit(regime: Regime, rows: Sequence[Mapping[str, Any]]) -> Fitted:
    repeats: dict[tuple[Model, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        repeats.setdefault((model_of(row), row["batch_size"]), []).append(row)
    uses = list(repeats)  # each counts once, by the median of its repeats
    names = [_name(model) for model, _ in uses]
    inputs = np.array([terms(*use, regime.precision) for use in uses])
    took = [float(np.median([row["latency_ms"]["p50"] for row in repeats[use]])) / 1e3 for use in uses]
    seconds, held_out = _fit_and_leave_out(inputs, took, names)
    held = {use: [row["memory_bytes"] for row in found if row["memory_bytes"]] for use, found in repeats.items()}
    told = [number for number, use in enumerate(uses) if held[use]]
    bytes_, bytes_held_out = None, None
    if len({names[number] for number in told}) >= LEAST_SHAPES:
        inside = np.array([_held(*uses[number], regime.precision) for number in told])
        measured = [float(np.median(held[uses[number]])) for number in told]
        found, bytes_held_out = _fit_and_leave_out(inside, measured, [names[number] for number in told])
        bytes_ = dict(zip(HELD, found.tolist(), strict=True))
    ranged = [_ranged(*use) for use in uses]
    return Fitted(
        regime=regime,
        seconds=dict(zip(TERMS, seconds.tolist(), strict=True)),
        held_out=held_out,
        bytes=bytes_,
        bytes_held_out=bytes_held_out,
        ranges={name: (min(r[name] for r in ranged), max(r[name] for r in ranged)) for name in ranged[0]},
        pools=tuple(sorted({model.pool for model, _ in uses})),
        num_rows=len(rows),
    )


def _fit_and_leave_out(inputs: Array, measured: Sequence[float], names: Sequence[str]) -> tuple[Array, HeldOut]:
    """The coefficients of all rows, and the errors of each shape by those of the others."""
    values, shapes = np.array(measured, float), np.array(names)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError("a row has no positive latency; it is no record of sovit bench.")
    logs: dict[str, Array] = {}
    for name in dict.fromkeys(names):
        out = shapes == name
        guess = np.maximum(inputs[out] @ relative_nnls(inputs[~out], values[~out]), 1e-300)
        logs[name] = np.log(guess / values[out])
    errors = np.abs(np.expm1(np.concatenate(list(logs.values()))))
    worst = max(logs, key=lambda name: float(np.abs(np.expm1(logs[name])).max()))
    largest = np.sort([float(np.abs(one).max()) for one in logs.values()])
    rank = min(len(largest), math.ceil((len(largest) + 1) * LEVEL))
    return relative_nnls(inputs, values), HeldOut(
        median=float(np.median(errors)),
        worst=float(errors.max()),
        worst_shape=worst,
        num_shapes=len(largest),
        factor=float(math.exp(min(largest[rank - 1], 700.0))),
        level=min(LEVEL, rank / (len(largest) + 1)),
    )


def relative_nnls(inputs: Array, values: Array) -> Array:
    """Coefficients of at least 0 with the least sum of squares of (estimate / value - 1)."""
    weighted = inputs / values[:, None]
    scale = weighted.max(axis=0)  # columns of 1 and of 1e-6 would not be told from zero alike
    scale[scale == 0] = 1.0
    found, _ = nnls(weighted / scale, np.ones(len(values)))
    return np.asarray(found / scale, float)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The records in a file that `sovit bench --out` wrote; a last line cut off by a kill is left out. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; sovit bench SHAPE ... --out {path} writes it.")
    try:
        rows = records.read_lines(path)
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path} holds a line that is no JSON; it is no file of sovit bench --out.") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.get("kind") != "bench" or row.get("schema") != SCHEMA:
            raise ValueError(f"line {number} of {path} is no record of sovit bench; take that line out.")
    return rows


def write(path: Path, fits: Sequence[Fitted], source: str, left_out: Sequence[str]) -> None:
    """The fits as a file that `read` takes."""
    content = {"schema": SCHEMA, "kind": KIND, "source": source, "left_out": list(left_out)}
    records.write_json(path, content | {"fits": [as_dict(fit) for fit in fits]})


def as_dict(fit: Fitted) -> dict[str, Any]:
    """JSON-ready."""
    found = {field.name: getattr(fit, field.name) for field in fields(fit)}
    for name in ("regime", "held_out", "bytes_held_out"):
        found[name] = None if found[name] is None else dict(vars(found[name]))
    return found


def read(path: Path) -> list[Fitted]:
    """The fits in a file that `write` made. Raises ValueError."""
    try:
        content = json.loads(path.read_text())
        if content["kind"] != KIND or content["schema"] != SCHEMA:
            raise KeyError("kind")
        return [_from_dict(found) for found in content["fits"]]
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; sovit bench --fit FILE.jsonl -o {path} writes it.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is no latency model; make it with sovit bench --fit FILE.jsonl -o {path.name}."
        ) from None


def _from_dict(found: Mapping[str, Any]) -> Fitted:
    held = found["bytes_held_out"]
    return Fitted(
        regime=Regime(**found["regime"]),
        seconds={name: float(found["seconds"][name]) for name in TERMS},
        held_out=HeldOut(**found["held_out"]),
        bytes=None if found["bytes"] is None else {name: float(found["bytes"][name]) for name in HELD},
        bytes_held_out=None if held is None else HeldOut(**held),
        ranges={name: (float(lo), float(hi)) for name, (lo, hi) in found["ranges"].items()},
        pools=tuple(found["pools"]),
        num_rows=int(found["num_rows"]),
    )


def choose(fits: Sequence[Fitted], wanted: Mapping[str, str]) -> Fitted:
    """The one fit whose regime has every value in ``wanted`` (of ``name`` a part will do). Raises ValueError if not one."""
    fitting = [
        fit
        for fit in fits
        if all(
            value.lower() in fit.regime.name.lower() if name == "name" else str(getattr(fit.regime, name)) == value
            for name, value in wanted.items()
        )
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(str(fit.regime) for fit in fitting or fits)
    said = ", ".join(f"{name}={value}" for name, value in wanted.items()) or "no choice"
    if not fitting:
        raise ValueError(f"the latency model holds for {listed}, not for {said}; measure that with sovit bench.")
    raise ValueError(
        f"the latency model holds for several settings ({listed}), and {said} does not name one; add such as "
        f"precision={fitting[0].regime.precision},mode={fitting[0].regime.mode} to --serve."
    )
