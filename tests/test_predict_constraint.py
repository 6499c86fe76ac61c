"""The best shape that a limit of use allows, against brute force; and the sentence where there is none."""
# ruff: noqa: F811  (fixtures of another file)

import itertools
import json
import math
import re

import numpy as np
import pytest

from sovit import config, derived
from sovit.analysis import latency
from sovit.analysis.forecast import constrained
from sovit.analysis.forecast.candidates import Rounding, star_regret
from sovit.analysis.forecast.constrained import Option
from sovit.analysis.points import Dimensions
from sovit.inference import inference_memory
from sovit.memory import Model
from sovit.shape import Shape
from test_latency import record
from test_predict import conf, grid_fit, joint_dir, run, star_fit, write, write_runs  # noqa: F401

NAMES = ("width", "depth", "mlp_dim")
WORDS = {"latency_s": lambda s: f"{1e3 * s:.0f} ms a call", "memory_bytes": lambda b: f"{b / 1e9:.3g} GB"}
TINY = {"channels": 1, "pool": "avg", "num_classes": 256}


def drawn(seed, num=60):
    """Options with costs and scores on a coarse grid, so that there are ties."""
    rng = np.random.default_rng(seed)
    return [
        Option(
            Dimensions(number + 1, 1, 1),
            float(rng.integers(8)),
            {"latency_s": float(rng.integers(1, 9)), "memory_bytes": float(rng.integers(1, 9))},
        )
        for number in range(num)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_brute_force_leaves(seed):
    options = drawn(seed)

    def beaten(one):
        here = (one.costs["latency_s"], one.score)
        return any(
            (there := (other.costs["latency_s"], other.score)) != here and there[0] <= here[0] and there[1] <= here[1]
            for other in options
        )

    expected = {(one.costs["latency_s"], one.score) for one in options if not beaten(one)}
    found = constrained.front(options, "latency_s")
    assert [(one.costs["latency_s"], one.score) for one in found] == sorted(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limits", [{"latency_s": 3.0}, {"memory_bytes": 2.0}, {"latency_s": 2.0, "memory_bytes": 3.0}])
def test_the_best_within_the_limits_is_that_of_brute_force(seed, limits):
    options = drawn(seed)
    allowed = [one for one in options if all(one.costs[name] <= limit for name, limit in limits.items())]
    found = constrained.best(options, limits, WORDS)
    assert found in allowed and found.score == min(one.score for one in allowed)


def test_where_nothing_fits_the_least_that_can_be_met_is_named():
    options = drawn(1)
    limits = {"latency_s": 0.5, "memory_bytes": 3.0}
    least = min(one.costs["latency_s"] for one in options if one.costs["memory_bytes"] <= 3.0)
    with pytest.raises(ValueError, match=f"no shape meets 500 ms a call .* is {1e3 * least:.0f} ms a call, by"):
        constrained.best(options, limits, WORDS)
    with pytest.raises(ValueError, match="nor any of these alone"):
        constrained.best(options, {"latency_s": 0.5, "memory_bytes": 0.5}, WORDS)


@pytest.mark.parametrize("limit", [0.02, 0.2, 2.0, 1e9])
def test_looking_closer_finds_the_best_of_every_multiple(limit):
    """A thinned lattice and then its neighbourhood, against all 40 x 30 x 50 shapes."""
    how = Rounding(16, 1, 32, (16,), (64,))
    span = {"width": (16.0, 640.0), "depth": (1.0, 30.0), "mlp_dim": (32.0, 1600.0)}

    def score(shape):
        w, d, m = shape
        return 5 / w**0.6 + 1 / d**0.5 + 3 / m**0.4 + 0.01 * (w * d * (4 * w + 2 * m) / 1e6) ** 0.3

    def costs(shape):
        w, d, m = shape
        return {"latency_s": 1e-3 * d + 1e-9 * w * d * (4 * w + 2 * m)}

    found = constrained.best(
        constrained.search(how, span, lambda shapes: list(map(score, shapes)), costs, {"latency_s": limit}),
        {"latency_s": limit},
        WORDS,
    )
    every = itertools.product(range(16, 641, 16), range(1, 31), range(32, 1601, 32))
    least = min(score(shape) for shape in every if costs(shape)["latency_s"] <= limit)
    assert found.within({"latency_s": limit})
    assert found.score <= least * 1.005  # the search is no proof: within half a percent of the best there is


def test_a_shape_of_unknown_cost_is_left_out():
    how = Rounding(8, 1, 8, (8,), (8,))
    span = {"width": (8.0, 64.0), "depth": (1.0, 4.0), "mlp_dim": (8.0, 64.0)}
    found = constrained.search(
        how,
        span,
        lambda shapes: [-s[0] for s in shapes],
        lambda s: {"latency_s": 1.0} if s[0] < 30 else {},
        {"latency_s": 2.0},
    )
    assert max(option.dimensions.width for option in found) == 24


@pytest.fixture(scope="module")
def use(tmp_path_factory):
    """The latency model of a simulated machine, as a file."""
    sizes = itertools.product((16, 32, 96), (1, 4, 12), (32, 512))
    rows = [record(Model(Shape(*size, 4, 8), 16, **TINY), batch) for size in sizes for batch in (1, 8)]
    fits, left_out = latency.fit_rows(rows)
    path = tmp_path_factory.mktemp("use") / "latency.json"
    latency.write(path, fits, "rows.jsonl", left_out)
    return path, fits[0]


def tiny(row):
    return Model(Shape(*(row[name] for name in NAMES), row["num_heads"], 8), 16, **TINY)


ASKED = ("--law", "flops", "--compute", 1024, "--heads", 4, "--json")


def test_the_choice_is_feasible_and_no_listed_shape_that_is_does_better(run, joint_dir, use):
    """Latency and error of every listed shape once more from the fitted rates and the law; then the choice by hand."""
    from sovit.analysis.forecast.joint import estimate_from

    path, fit = use
    law = estimate_from(json.loads((joint_dir / "fit.json").read_text())).law
    free = json.loads(run(*ASKED, "--joint", joint_dir)[1])["optimum"]
    limit = 0.6e3 * fit.latency_s(tiny({**{name: round(free[name]) for name in NAMES}, "num_heads": 1}), 8)
    code, out, err = run(
        *ASKED, "--joint", joint_dir, "--max-latency-ms", limit, "--latency", path, "--serve", "batch=8"
    )
    assert code == 0, err
    found = json.loads(out)["constraint"]
    rows, best = found["front"], found["best"]
    for row in rows:
        assert row["latency_ms"] == pytest.approx(1e3 * fit.latency_s(tiny(row), 8))
        assert row["error"] == pytest.approx(float(law.error([row[name] for name in NAMES], 1024.0)))
        assert row["error_interval"]["lo"] < row["error"] < row["error_interval"]["hi"]
    assert best["latency_ms"] <= limit
    assert best["error"] == min(row["error"] for row in rows if row["latency_ms"] <= limit)
    assert any(row["latency_ms"] > limit and row["error"] < best["error"] for row in rows)  # the limit binds
    assert best["latency_interval_ms"]["lo"] <= best["latency_ms"] <= best["latency_interval_ms"]["hi"]
    code, out, _ = run(
        *ASKED[:-1], "--joint", joint_dir, "--max-latency-ms", limit, "--latency", path, "--serve", "batch=8"
    )
    assert code == 0 and "x".join(str(best[name]) for name in NAMES) in out and "no shape beats these" in out


def test_a_limit_that_no_shape_meets_is_one_sentence_with_the_least_latency(run, joint_dir, use):
    path, _ = use
    code, out, err = run(*ASKED, "--joint", joint_dir, "--max-latency-ms", 1e-3, "--latency", path)
    assert code == 2 and out == "" and err.count("\n") == 1
    code, out, _ = run(*ASKED, "--joint", joint_dir, "--max-latency-ms", 1e6, "--latency", path)
    least = min(row["latency_ms"] for row in json.loads(out)["constraint"]["front"])
    said = re.search(r"the least that can be met is ([0-9.]+) ms a call", err)[1]
    assert least <= float(said) <= 1.01 * least
    code, out, _ = run(*ASKED, "--joint", joint_dir, "--max-latency-ms", said, "--latency", path)
    assert code == 0 and json.loads(out)["constraint"]["best"]["latency_ms"] <= float(said)


def test_memory_alone_is_by_the_closed_form_and_a_star_gives_the_regret(run, tmp_path):
    fit = star_fit()
    star, grid = write(tmp_path / "star", fit), write(tmp_path / "grid", grid_fit(origin=(48, 4, 128)))
    geometry = ("--image-size", 16, "--patch", 8, "--channels", 1, "--pool", "avg", "--classes", 256, "--heads", 4)
    asked = ("--fit", star, "--grid", grid, "--compute", 256, *geometry, "--max-memory-gb", 0.0004, "--json")
    code, out, err = run(*asked, "--serve", "batch=16,precision=bf16")
    assert code == 0, err
    content = json.loads(out)
    found = content["constraint"]
    assert found["score"] == "regret" and found["best"]["latency_ms"] is None
    judge = star_regret(fit, [content["optimum"][name] for name in NAMES], 256.0)
    for row in found["front"]:
        assert row["memory_gb"] == pytest.approx(inference_memory(tiny(row), 16, "bf16").total / 1e9)
        assert row["regret"] == pytest.approx(judge([row[name] for name in NAMES]))
    assert found["best"]["memory_gb"] <= 0.0004 < max(row["memory_gb"] for row in found["front"])
    assert any("regret" in note and "error is not known" in note for note in found["notes"])


def test_the_written_experiment_has_the_chosen_shape_and_the_command_that_chose_it(run, joint_dir, use, conf, tmp_path):
    path, fit = use
    runs = write(tmp_path / "joint", json.loads((joint_dir / "fit.json").read_text()))
    write_runs(runs)
    asked = (*ASKED, "--joint", runs, "--max-latency-ms", 1.5, "--latency", path, "--serve", "batch=8,mode=eager")
    code, out, err = run(*asked, "--write", conf / "fast.yaml")
    assert code == 0, err
    best = json.loads(out)["constraint"]["best"]
    shape = derived.shape_of(config.compose(["experiment=fast"]))
    assert (shape.width, shape.depth, shape.mlp_dim) == tuple(best[name] for name in NAMES)
    assert 1e3 * fit.latency_s(Model(shape, 16, **TINY), 8) <= 1.5
    text = (conf / "fast.yaml").read_text()
    assert (
        "--max-latency-ms 1.5" in text
        and "--serve batch=8,mode=eager" in text
        and "Expect: within 1.5 ms a call" in text
    )


def test_the_interval_of_an_error_is_the_delta_methods():
    """Gradients by central differences in every parameter."""
    from sovit.analysis.forecast.flops_fit import Estimate
    from sovit.analysis.forecast.flops_law import PLAIN, FlopsLaw, Geometry

    rng = np.random.default_rng(0)
    geometry = Geometry(16, 8, 4, channels=1, pool="avg", num_classes=256)
    start = np.array([0.05, 0.04, 0.06, 0.1, 0.02, 0.5, 0.7, 0.4, 0.3])
    root = 0.01 * rng.standard_normal((9, 9))

    def law(parameters):
        return FlopsLaw(PLAIN, parameters[:5], parameters[5:], np.array([3.0, 1.0, 4.0, 12.0]), geometry)

    x, t = np.array([[24.0, 3.0, 80.0], [64.0, 8.0, 256.0]]), 300.0
    steps = 1e-6 * np.eye(9)
    numeric = np.array([(law(start + h).error(x, t) - law(start - h).error(x, t)) / 2e-6 for h in steps]).T
    estimate = Estimate(law(start), root @ root.T, 20)
    lo, hi = estimate.error_interval(x, t, 0.95)
    spread = np.sqrt(np.einsum("ni,ij,nj->n", numeric, root @ root.T, numeric)) / law(start).error(x, t)
    assert np.log(hi / lo) / 2 == pytest.approx(2.085963 * spread, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-latency-ms", "5"], "--max-latency-ms needs --latency FILE"),
        (["--latency", "x.json"], "--latency has no meaning without"),
        (["--max-memory-gb", "1", "--serve", "mode=eager"], "mode in --serve has no meaning without --latency"),
        (["--max-memory-gb", "1", "--choose", "2"], "--choose has no meaning"),
        (["--max-memory-gb", "1"], "a limit of use needs laws"),
        (["--max-memory-gb", "1", "--serve", "size=3"], "write KEY=VALUE"),
        (["--max-latency-ms", "5", "--latency", "/nowhere/x.json"], "is not there"),
    ],
)
def test_a_mistake_is_one_sentence(run, arguments, sentence):
    published = ["--exponents", "width=0.22,depth=0.45,mlp=0.6", "--origin", "608x10x928", "--t0", "3.5e9"]
    code, _, err = run(*published, "--factor", "10", *arguments)
    assert code == 2 and sentence in err


def test_far_beyond_what_was_measured_nothing_is_said_unless_forced(run, joint_dir, use):
    path, _ = use
    asked = (*ASKED, "--joint", joint_dir, "--max-latency-ms", 1e6, "--latency", path, "--serve", "batch=64")
    code, _, err = run(*asked)
    assert code == 2 and "batch_size is 8 times beyond" in err and "measure such shapes" in err
    code, out, _ = run(*asked, "--force")
    assert code == 0 and json.loads(out)["constraint"]["extrapolation"]["factor"] >= 8
    assert not math.isnan(json.loads(out)["constraint"]["best"]["latency_ms"])
