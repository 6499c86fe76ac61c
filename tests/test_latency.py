"""The latency model against machines whose rates are known, and what it refuses to say."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sovit.analysis import latency
from sovit.bench.settings import Setting, Subject, described
from sovit.flops import num_params
from sovit.memory import Model
from sovit.shape import Shape

RATES = {  # seconds, by term
    "call": 2e-4,
    "block": 3e-5,
    "products": 1 / 80,
    "attention": 1 / 30,
    "scores": 1 / 4,
    "activations": 1 / 20,
    "weights": 1 / 15,
}
HELD = {"process": 3e6, "weights": 1.1, "activations": 1.3}
MACHINE = {"cpu": "Abacus 1", "cores": 2, "gpus": [], "torch": "2.12.1", "sovit": "0"}


def by_hand(model: Model, batch: int) -> dict[str, float]:
    """The terms of a serial model without a pooling head in fp32, written out once more."""
    width, depth, mlp, heads, patch = model.shape.as_dict().values()
    n = (model.image_size // patch) ** 2
    products = 2 * n * (model.channels * patch**2 * width + depth * (4 * width**2 + 2 * width * mlp))
    return {
        "call": 1.0,
        "block": depth,
        "products": batch * (products + 2 * width * model.num_classes) / 1e9,
        "attention": batch * depth * 4 * n**2 * width / 1e9,
        "scores": batch * depth * heads * n**2 / 1e9,
        "activations": batch * depth * n * (12 * width + 2 * mlp) * 4 / 1e9,
        "weights": 4 * sum(num_params(**vars(model)).values()) / 1e9,
    }


def seconds(model: Model, batch: int) -> float:
    return sum(RATES[name] * value for name, value in by_hand(model, batch).items())


def held(model: Model, batch: int) -> float:
    memory = described(Subject("", model), setting(model, batch))["memory_estimate"]
    return (
        HELD["process"]
        + HELD["weights"] * memory["weights"]
        + HELD["activations"] * (memory["images"] + memory["activations"])
    )


def setting(model: Model, batch: int, **more) -> Setting:
    return Setting(
        model.image_size, batch, **{"precision": "fp32", "mode": "eager", "device": "cpu", "threads": 1} | more
    )


def record(model: Model, batch: int, noise: float = 1.0, **more) -> dict:
    """A row as `sovit bench` appends it."""
    return {
        "schema": 1,
        "kind": "bench",
        "machine": MACHINE,
        **described(Subject(str(model.shape), model), setting(model, batch, **more)),
        "status": "measured",
        "why": None,
        "latency_ms": {"p50": 1e3 * seconds(model, batch) * noise},
        "memory_bytes": held(model, batch),
    }


def models(num: int, seed: int = 0) -> list[Model]:
    """Models of many proportions, drawn on the logarithm."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        heads = int(rng.choice([1, 2, 4, 8]))
        width, mlp = (round(16 * 2 ** rng.uniform(0, 5)) * 8 for _ in range(2))
        shape = Shape(width, round(2 ** rng.uniform(0, 4)), mlp, heads, 8)
        size = int(rng.choice([16, 32, 64]))
        found.append(Model(shape, size, channels=1, pool="avg", num_classes=10))
    return found


@pytest.fixture(scope="module")
def rows():
    return [record(model, batch) for model in models(24) for batch in (1, 8)]


def test_the_rates_of_a_simulated_machine_are_recovered(rows):
    (fit,), left_out = latency.fit_rows(rows)
    assert left_out == []
    for name, rate in RATES.items():
        assert fit.seconds[name] == pytest.approx(rate, rel=1e-4), name
    for name, value in HELD.items():
        assert fit.bytes[name] == pytest.approx(value, rel=1e-4), name
    assert fit.held_out.worst < 1e-4 and fit.bytes_held_out.worst < 1e-4
    fresh = models(1, seed=5)[0]
    assert fit.latency_s(fresh, 4) == pytest.approx(seconds(fresh, 4), rel=1e-4)
    assert fit.memory_bytes(fresh, 4) == pytest.approx(held(fresh, 4), rel=1e-4)


def test_the_interval_holds_new_shapes_as_often_as_it_says():
    """Each shape is slower or faster by its own factor, as real ones are: then the interval is of a new shape."""
    rng = np.random.default_rng(0)
    inside, level = [], None
    for trial in range(6):
        noisy = [record(m, 1, noise=math.exp(0.1 * rng.standard_normal())) for m in models(20, seed=trial)]
        (fit,), _ = latency.fit_rows(noisy)
        level = fit.held_out.level
        for model in models(40, seed=100 + trial):
            truth = seconds(model, 1) * math.exp(0.1 * rng.standard_normal())
            inside.append(abs(math.log(truth / fit.latency_s(model, 1))) <= math.log(fit.held_out.factor))
    assert level == 0.9
    assert np.mean(inside) == pytest.approx(level, abs=0.07)


def test_held_out_errors_are_those_of_fits_that_never_saw_the_shape(rows):
    """Done again with scipy's bounded least squares instead of NNLS, by dropping every row of a shape."""
    from scipy.optimize import lsq_linear

    rng = np.random.default_rng(1)
    noisy = [
        row | {"latency_ms": {"p50": row["latency_ms"]["p50"] * math.exp(0.2 * rng.standard_normal())}} for row in rows
    ]
    (fit,), _ = latency.fit_rows(noisy)
    inputs = np.array([list(by_hand(latency.model_of(row), row["batch_size"]).values()) for row in noisy])
    values = np.array([row["latency_ms"]["p50"] / 1e3 for row in noisy])
    names = np.array([str(latency.model_of(row).shape) for row in noisy])
    errors = []
    for name in dict.fromkeys(names):
        kept = names != name
        weighted = inputs[kept] / values[kept, None]
        scale = weighted.max(axis=0)
        found = lsq_linear(weighted / scale, np.ones(kept.sum()), bounds=(0, np.inf), tol=1e-14).x / scale
        errors += list(abs(inputs[~kept] @ found / values[~kept] - 1))
    assert fit.held_out.median == pytest.approx(np.median(errors), rel=1e-3)
    assert fit.held_out.worst == pytest.approx(max(errors), rel=1e-3)
    assert fit.held_out.num_shapes == len(set(names))


def test_no_rate_is_negative_whatever_the_rows_say():
    rng = np.random.default_rng(2)
    noisy = [record(model, 1, noise=math.exp(rng.standard_normal())) for model in models(12)]
    (fit,), _ = latency.fit_rows(noisy)
    assert min(fit.seconds.values()) >= 0


def test_every_regime_has_a_fit_of_its_own_and_is_named_to_be_used(rows):
    slower = [record(model, 1, noise=3.0, precision="bf16") for model in models(8)]
    few = [record(model, 1, mode="compiled") for model in models(3)]
    failed = record(models(1)[0], 64) | {"status": "not measured", "why": "out of memory", "latency_ms": None}
    fits, left_out = latency.fit_rows([*rows, *slower, *few, failed])
    assert [fit.regime.precision for fit in fits] == ["fp32", "bf16"]
    assert any("compiled: 3 shapes, and a fit takes 5" in text for text in left_out)
    assert any("1 rows that could not be measured" in text for text in left_out)
    assert latency.choose(fits, {"precision": "bf16"}).regime.precision == "bf16"
    assert latency.choose(fits, {"precision": "fp32", "name": "abacus", "threads": "1"}).regime.threads == 1
    for wanted, sentence in (({}, "does not name one"), ({"device": "cuda"}, "not for device=cuda")):
        with pytest.raises(ValueError, match=sentence):
            latency.choose(fits, wanted)
    with pytest.raises(ValueError, match=r"nothing to fit: .*3 shapes"):
        latency.fit_rows(few)


def test_what_lies_beyond_the_measurements_is_said_with_its_factor(rows):
    (fit,), _ = latency.fit_rows(rows)
    inside = latency.model_of(rows[0])
    assert fit.beyond(inside, 1) == (1.0, "width")
    assert fit.beyond(inside, 32) == (4.0, "batch_size")
    deep = dataclasses.replace(inside, shape=dataclasses.replace(inside.shape, depth=160))
    factor, name = fit.beyond(deep, 1)
    assert name == "depth" and factor == 160 / max(row["shape"]["depth"] for row in rows)
    small = dataclasses.replace(inside, shape=dataclasses.replace(inside.shape, mlp_dim=2))
    assert fit.beyond(small, 1) == (min(row["shape"]["mlp_dim"] for row in rows) / 2, "mlp_dim")


def test_a_fit_comes_back_from_its_file_as_it_was(rows, tmp_path):
    fits, left_out = latency.fit_rows(rows)
    latency.write(tmp_path / "latency.json", fits, "rows.jsonl", left_out)
    assert latency.read(tmp_path / "latency.json") == fits


def test_rows_survive_a_kill_and_other_files_are_refused(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in rows[:3]]
    path.write_text("\n".join(lines) + "\n" + lines[0][:40])
    assert latency.read_rows(path) == rows[:3]
    path.write_text(lines[0] + "\n" + '{"kind": "other"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is no record"):
        latency.read_rows(path)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="no JSON"):
        latency.read_rows(path)
    with pytest.raises(ValueError, match="is not there"):
        latency.read_rows(tmp_path / "none.jsonl")
    path.write_text(json.dumps({"kind": "latency", "schema": 1, "fits": [{}]}))
    with pytest.raises(ValueError, match="is no latency model"):
        latency.read(path)
