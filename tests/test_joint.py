"""The law that knows its FLOPs: its optimum against brute force, its derivatives numerically, its fit against truths."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from sovit import records
from sovit.analysis.forecast.joint import (
    FlopsLaw,
    Form,
    Geometry,
    estimate_from,
    excess,
    fit_flops,
    fit_joint,
    read_geometry,
    wald,
)
from sovit.analysis.points import DIMENSIONS, Dimensions, Point
from sovit.flops import POOLS, forward_gflops
from sovit.shape import Shape

TINY = Geometry(image_size=16, patch_size=8, num_heads=4, channels=1, pool="avg", num_classes=256)
PAPER = Geometry(image_size=224, patch_size=14, num_heads=16, pool="map", num_classes=1000)
HERE = np.array([32.0, 4.0, 128.0])
FORMS = [Form(), Form((("width", "depth", "mlp_dim"),)), Form((("depth", "images"), ("width", "mlp_dim")))]


def law_of(
    form=FORMS[0], geometry=TINY, here=HERE, images=4e5, scale=0.03, a=(1.1, 0.6, 0.5), c=0.5, q=(0.1, 0.2, 0.05)
):
    """A law whose optimum is not far from ``here`` at the compute of that many images; every term has a say."""
    coefficients = np.full(len(form.coefficients), scale / 3)
    coefficients[:3], coefficients[3], coefficients[-1] = scale, 2 * scale, scale
    return FlopsLaw(form, coefficients, np.array([*a, c]), np.append(np.log(here), math.log(images)), geometry)


def star_and_grid(t=(45.0, 64.0, 91.0, 128.0, 181.0, 256.0)):
    """(sizes, compute) of a tiny star and a coarse grid at equal compute."""
    arms = [[16, 24, 48, 64, 128], [1, 2, 8, 16], [16, 32, 64, 256, 512]]
    shapes = [tuple(HERE)]
    shapes += [tuple(np.where(np.arange(3) == k, value, HERE)) for k in range(3) for value in arms[k]]
    shapes += list(itertools.product((20.0, 40.0), (2.0, 3.0, 5.0), (48.0, 96.0, 192.0)))
    return np.repeat(np.array(shapes), len(t), axis=0), np.tile(t, len(shapes))


def runs_of(x):
    return np.array(["x".join(map(str, row)) for row in x])


def draw(law, x, t, sigma, tau, rng):
    run = np.unique(runs_of(x), return_inverse=True)[1]
    return law.error(x, t) * np.exp(tau * rng.normal(size=run.max() + 1)[run] + sigma * rng.normal(size=len(t)))


def as_points(x, t, error, sweep="star"):
    return [
        Point(f"{sweep}-{name}", *map(int, size), 0, float(time), f"{time:.0f} gflops", float(value), 0.005, 3)
        for name, size, time, value in zip(runs_of(x), x, t, error, strict=True)
    ]


@pytest.mark.parametrize("pool", POOLS)
def test_cost_of_any_shape_is_the_closed_form(pool):
    """Exactly, on shapes that the polynomial was not read off."""
    rng = np.random.default_rng(0)
    for geometry in (dataclasses.replace(TINY, pool=pool), dataclasses.replace(PAPER, pool=pool)):
        for w, d, m in rng.integers(1, 3000, (20, 3)):
            shape = Shape(int(w), int(d), int(m), 1, geometry.patch_size)
            options = {"channels": geometry.channels, "pool": pool, "num_classes": geometry.num_classes}
            exact = forward_gflops(shape, geometry.image_size, **options)
            assert float(geometry.forward_gflops([w, d, m])) == pytest.approx(exact, rel=1e-13)


def test_gradient_and_hessian_of_the_cost():
    for log_x in np.log([[24.0, 2.0, 64.0], [600.0, 10.0, 900.0]]):
        _, slope, bend = PAPER.log_cost(log_x)
        steps = 1e-4 * np.eye(3)
        numeric = [(PAPER.log_cost(log_x + h)[0] - PAPER.log_cost(log_x - h)[0]) / 2e-4 for h in steps]
        np.testing.assert_allclose(slope, numeric, rtol=1e-6)
        numeric = [(PAPER.log_cost(log_x + h)[1] - PAPER.log_cost(log_x - h)[1]) / 2e-4 for h in steps]
        np.testing.assert_allclose(bend, numeric, rtol=1e-5, atol=1e-9)


def test_the_law_is_the_formula():
    """f = sum alpha_k x_k^-a_k + beta n^-c + eps with n = t / F(x), from the raw parameters, against the same by hand."""
    law, x, t = law_of(), np.array([[40.0, 3.0, 100.0], [16.0, 8.0, 512.0]]), np.array([50.0, 200.0])
    p = law.parameters()
    for row, time, error in zip(x, t, law.error(x, t), strict=True):
        shape = Shape(*map(int, row), 4, 8)
        images = time / forward_gflops(shape, 16, channels=1, pool="avg", num_classes=256)
        sizes = sum(p[f"alpha_{name}"] * value ** -p[f"a_{name}"] for name, value in zip(DIMENSIONS, row, strict=True))
        assert error == pytest.approx(sizes + p["beta"] * images ** -p["c"] + p["eps"], rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [20.0, 2e4])
def test_the_optimum_is_the_least_of_a_brute_force_grid_and_of_every_descent(form, t):
    """Uniqueness: a general optimiser from twelve starts over four decades of each size ends there too."""
    law = law_of(form)
    best = law.optimum(t)
    least = law.frontier(t)
    steps = np.exp(np.linspace(-2.5, 2.5, 31))
    cube = best * np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
    errors = law.error(cube, t)
    assert np.unravel_index(errors.argmin(), errors.shape) == (15, 15, 15)
    rng = np.random.default_rng(1)
    for start in np.log(HERE) + rng.uniform(-4.6, 4.6, (12, 3)):
        end = minimize(lambda y: math.log(law.error(np.exp(y), t)), start, method="BFGS", options={"gtol": 1e-9})
        assert math.exp(end.fun) >= least * (1 - 1e-12)
        np.testing.assert_allclose(end.x, np.log(best), atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_growth_and_sensitivity_are_numeric_derivatives_of_the_optimum(form):
    law, t, step = law_of(form), 300.0, 1e-4

    def log_best(law=law, t=t):
        return np.log(law.optimum(t))

    numeric = (log_best(t=t * math.exp(step)) - log_best(t=t * math.exp(-step))) / (2 * step)
    np.testing.assert_allclose(law.growth(t), numeric, rtol=1e-5, atol=1e-9)
    columns = []
    for name in ("coefficients", "exponents"):
        values = getattr(law, name)
        for one, value in zip(np.eye(len(values)), values, strict=True):
            ends = [dataclasses.replace(law, **{name: values + sign * step * value * one}) for sign in (1, -1)]
            columns.append((log_best(ends[0]) - log_best(ends[1])) / (2 * step * value))
    np.testing.assert_allclose(law.sensitivity(t), np.array(columns).T, rtol=1e-4, atol=1e-6)


def test_with_one_cost_exponent_the_growth_is_known_in_closed_form():
    """Without embeddings, head and attention products F is nearly depth x width x (2 width + mlp_dim). If also the MLP
    dominates, F = prod x_k, and the first-order conditions alpha_k a_k x_k^-a_k = c beta n^-c give x_k ~ t^(sigma / a_k),
    sigma = c / (1 + c sum 1 / a_j)."""
    a, c = np.array([0.9, 0.6, 0.4]), 0.5
    law = law_of(geometry=PAPER, here=np.array([600.0, 40.0, 6e6]), a=tuple(a), c=c)
    np.testing.assert_allclose(law.growth(1e9), c / (1 + c * (1 / a).sum()) / a, rtol=0.02)


@pytest.mark.parametrize("form", FORMS)
def test_noiseless_errors_give_the_law_back(form):
    law, (x, t) = law_of(form), star_and_grid()
    fit = fit_flops(x, t, law.error(x, t), runs_of(x), TINY, form=form)
    np.testing.assert_allclose(list(fit.law.parameters().values()), list(law.parameters().values()), rtol=2e-3)
    np.testing.assert_allclose(fit.law.optimum(1e4), law.optimum(1e4), rtol=1e-4)
    assert fit.flags == () and fit.solution.converged > 0.5


def test_points_of_one_star_are_enough_for_nine_parameters():
    law, (x, t) = law_of(), star_and_grid()
    star = (x != HERE).sum(1) <= 1
    fit = fit_flops(x[star], t[star], law.error(x, t)[star], runs_of(x)[star], TINY)
    np.testing.assert_allclose(fit.law.optimum(1e4), law.optimum(1e4), rtol=1e-3)


def test_intervals_of_the_best_shape_cover_under_run_effects():
    """80 sweeps at sigma = tau = 1%: each dimension's 95% interval at ten times the compute, and of its growth, holds the
    truth in at least 68 (99.9% of the time if the coverage is 95%); points treated as independent are too sure."""
    law, (x, t), rng = law_of(), star_and_grid(), np.random.default_rng(3)
    goal = np.concatenate((np.log(law.optimum(2560.0)), np.log(law.growth(2560.0))))
    hits, naive = np.zeros(6), np.zeros(6)
    for _ in range(80):
        error = draw(law, x, t, 0.01, 0.01, rng)
        for count, options in ((hits, {}), (naive, {"ratio": 0.0})):
            estimate = fit_flops(x, t, error, runs_of(x), TINY, **options).estimate
            shape, growth = estimate.log_shape(2560.0), estimate.log_growth(2560.0)
            values, spreads = (np.concatenate(pair) for pair in zip(shape, growth, strict=True))
            found = [wald(value, se, estimate.degrees, 0.95) for value, se in zip(values, spreads, strict=True)]
            count += [one.lo <= math.exp(true) <= one.hi for one, true in zip(found, goal, strict=True)]
    assert hits.min() >= 68
    assert naive.min() < 68


def test_a_dimension_that_gains_nothing_is_flagged_and_has_no_best_shape():
    law, (x, t) = law_of(), star_and_grid()
    flat = dataclasses.replace(law, coefficients=law.coefficients * [1, 1, 0, 1, 1])
    fit = fit_joint({"star": as_points(x, t, flat.error(x, t))}, TINY)
    assert "alpha_mlp_dim=0" in fit.flags
    assert fit.exponents == {} and fit.optimum == () and fit.jackknife is None
    assert fit.why == f"not identified: the best law has no optimum ({', '.join(fit.flags)})"
    with pytest.raises(ValueError, match="no best shape"):
        flat.optimum(100.0)


def test_a_missing_floor_and_exponents_at_their_bounds_are_flagged():
    law, (x, t) = law_of(), star_and_grid()
    bare = dataclasses.replace(law, coefficients=law.coefficients * [1, 1, 1, 1, 0])
    assert "eps=0" in fit_flops(x, t, bare.error(x, t), runs_of(x), TINY).flags
    steep = dataclasses.replace(law, exponents=np.array([9.0, 0.6, 0.5, 0.5]))
    assert "a_width at its upper bound" in fit_flops(x, t, steep.error(x, t), runs_of(x), TINY).flags


def test_an_interval_wider_than_ten_each_way_is_open():
    assert wald(math.log(3.0), 0.5, 50, 0.95).is_open is False
    for closed in (
        wald(math.log(3.0), 1.5, 50, 0.95),
        wald(math.log(3.0), 1e-3, 0, 0.95),
        wald(0.0, math.inf, 9, 0.95),
    ):
        assert (closed.lo, closed.hi) == (0.0, math.inf)


def test_largest_budgets_are_held_out_and_a_wrong_law_is_seen_there():
    """Exact on its own truth; where the images' exponent halves at late compute, 181 and 256 GFLOPs are missed."""
    law, (x, t) = law_of(), star_and_grid()
    held = fit_joint({"star": as_points(x, t, law.error(x, t))}, TINY).held_out
    assert held["rms"] < 1e-6 and held["fitted_up_to"] == 128.0 and held["t_gflops"] == [181.0, 256.0]
    late = law.error(x, t) * np.where(t > 140, 1.1, 1.0)
    broken = fit_joint({"star": as_points(x, t, late)}, TINY).held_out
    assert broken["bias"] == pytest.approx(math.log(1.1), rel=0.01)


def test_jackknife_over_runs_agrees_with_the_interval_where_the_noise_is_as_assumed():
    law, (x, t) = law_of(), star_and_grid()
    error = draw(law, x, t, 0.01, 0.01, np.random.default_rng(4))
    fit = fit_joint({"both": as_points(x, t, error)}, TINY)
    assert all(0.5 < ratio < 2 for ratio in fit.jackknife.values())
    assert not any("trust the wider" in text for text in fit.warnings)


def test_the_dict_is_json_and_gives_the_estimate_back():
    law, (x, t) = law_of(FORMS[2]), star_and_grid()
    star = as_points(x[:60], t[:60], law.error(x, t)[:60])
    grid = as_points(x[60:], t[60:], draw(law, x, t, 0.01, 0.01, np.random.default_rng(5))[60:], "grid")
    fit = fit_joint({"star": star, "grid": grid}, TINY, form=FORMS[1], dataset="fractals", shots=10)
    read = json.loads(json.dumps(fit.as_dict(), allow_nan=False))
    assert (read["schema"], read["kind"], read["law"], read["sweeps"]) == (1, "joint", "flops", ["star", "grid"])
    assert read["geometry"]["image_size"] == 16 and len(read["points"]) == len(t)
    estimate = estimate_from(read)
    for row in read["optimum"]:
        found = wald(*(float(value[1]) for value in estimate.log_shape(row["t_gflops"])), estimate.degrees, 0.95)
        assert row["depth"] == pytest.approx(found.estimate)
        assert row["intervals"]["depth"]["lo"] == pytest.approx(found.lo)
        sizes = [row[name] for name in DIMENSIONS]
        assert row["examples_seen"] == pytest.approx(row["t_gflops"] / float(TINY.forward_gflops(sizes)))
    assert read["exponents"]["depth"]["estimate"] == pytest.approx(estimate.law.growth(256.0)[1])
    with pytest.raises(ValueError, match="kind 'star'"):
        estimate_from(read | {"kind": "star"})


def test_excess_is_over_the_best_of_no_more_compute():
    t, error = [10.0, 10.05, 20.0, 20.0, 40.0], [0.4, 0.5, 0.3, 0.6, 0.45]
    np.testing.assert_allclose(excess(t, error), [1.0, 1.25, 1.0, 2.0, 1.5])


def test_shapes_far_above_the_frontier_do_not_pull_at_the_optimum():
    """Large shapes that lag behind the law at small compute, as if too few steps were taken: listed, and harmless."""
    law, (x, t) = law_of(), star_and_grid()
    lag = np.where((x[:, 0] >= 64) & (t < 100), 2.0, 1.0)
    fit = fit_joint({"star": as_points(x, t, law.error(x, t) * lag)}, TINY, max_error=0.9)
    assert fit.exponents["width"].estimate == pytest.approx(law.growth(256.0)[0], rel=1e-4)
    reasons = [row["why_not"] for row, factor in zip(fit.points, lag, strict=True) if factor > 1]
    assert len(reasons) == 6 and set(reasons) == {"more than 1.5 times the best error of its compute"}
    everything = fit_joint({"star": as_points(x, t, law.error(x, t) * lag)}, TINY, max_error=0.9, near=math.inf)
    assert everything.exponents["width"].estimate != pytest.approx(law.growth(256.0)[0], rel=0.05)
    assert any("off the law (tau)" in text for text in everything.warnings)
    by_factor = {row["near"]: row["width"] for row in everything.nearness}
    assert by_factor[1.5] == pytest.approx(law.growth(256.0)[0], rel=1e-3)
    assert abs(by_factor[math.inf] / by_factor[1.5] - 1) > 0.05


def test_points_above_the_cut_off_are_listed():
    law, (x, t) = law_of(), star_and_grid()
    error = law.error(x, t)
    error[3] = 0.7
    fit = fit_joint({"star": as_points(x, t, error)}, TINY)
    [left_out] = [row for row in fit.points if not row["used"] and row["error"] == 0.7]
    assert left_out["why_not"].startswith("diverged") or left_out["why_not"] == "error 0.7 is above the cut-off 0.6"
    assert fit.num_points == sum(row["used"] for row in fit.points)


def test_a_shape_and_seed_trained_in_two_sweeps_is_one_run():
    """A star and a grid of one recipe train some shapes twice, bit for bit: the second adds neither a point nor a run."""
    law, (x, t) = law_of(), star_and_grid()
    error = draw(law, x, t, 0.01, 0.01, np.random.default_rng(6))
    star, shared = as_points(x, t, error), as_points(x[:24], t[:24], error[:24], "grid")
    longer = [dataclasses.replace(shared[5], t_gflops=600.0, duration="600 gflops")]
    alone, both = fit_joint({"star": star}, TINY), fit_joint({"star": star, "grid": shared + longer}, TINY)
    assert (both.num_points, both.num_runs) == (alone.num_points + 1, alone.num_runs)
    repeated = [row for row in both.points if row["sweep"] == "grid" and not row["used"]]
    assert len(repeated) == 24
    assert {row["why_not"] for row in repeated} == {"the same shape and seed was measured in star"}
    unchanged = fit_joint({"star": star, "grid": shared}, TINY)
    assert unchanged.parameters == alone.parameters and unchanged.exponents == alone.exponents


@pytest.mark.parametrize(
    ("interactions", "words"),
    [
        ((("width",),), "give two or more of width, depth, mlp_dim, images"),
        ((("width", "heads"),), "not known"),
        ((("width", "depth"), ("depth", "width")), "given twice"),
    ],
)
def test_interactions_that_are_none_are_refused_in_words(interactions, words):
    with pytest.raises(ValueError, match=words):
        Form(interactions)


def test_points_that_cannot_be_fitted_are_refused_in_words():
    x, t = star_and_grid()
    error, run = law_of().error(x, t), runs_of(x)
    for change, words in (
        ({"error": np.where(t == 45.0, np.nan, error)}, "error nan has no logarithm"),
        ({"x": np.where(np.arange(3) == 1, 4.0, x)}, "depth is the same at every point"),
        ({"x": x[:, :2]}, "do not match"),
    ):
        values = {"x": x, "t": t, "error": error, "run": run} | change
        with pytest.raises(ValueError, match=words):
            fit_flops(*values.values(), TINY)
    with pytest.raises(ValueError, match="9 points cannot fit a law of 9 parameters"):
        fit_flops(x[:9], t[:9], error[:9], run[:9], TINY)
    points = {"star": as_points(x, t, error)}
    with pytest.raises(ValueError, match="level=95 is not between 0 and 1"):
        fit_joint(points, TINY, level=95)
    with pytest.raises(ValueError, match=r"near=1\.4 is not among the factors"):
        fit_joint(points, TINY, near=1.4)
    with pytest.raises(ValueError, match="weights='none' is not known"):
        fit_joint(points, TINY, weights="none")


def write_run(directory, name, shape=(32, 4, 128), **changes):
    model = {"image_size": 16, "channels": 1, "pool": "avg"} | changes
    record = Dimensions(*shape)._asdict() | {
        "status": records.DONE, "num_heads": 4, "patch_size": 8, "forward_gflops": float(TINY.forward_gflops(shape)),
        "config": {"name": directory.name, "model": model, "data": {"num_classes": 256}, "durations": {"num": len(name)}},
    }  # fmt: skip
    (directory / name).mkdir(parents=True)
    records.write_json(directory / name / records.RUN, record)


def test_geometry_comes_from_the_records_and_sweeps_of_two_recipes_are_refused(tmp_path):
    star, grid = tmp_path / "star", tmp_path / "grid"
    write_run(star, "one")
    write_run(grid, "other", (24, 2, 64))
    assert read_geometry([star, grid]) == TINY
    write_run(grid, "third", channels=3)
    with pytest.raises(ValueError, match=r"the sweeps differ in model.channels \(one and third\)"):
        read_geometry([star, grid])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no finished run"):
        read_geometry([tmp_path / "empty"])


def test_records_whose_flops_are_not_the_closed_form_are_refused(tmp_path):
    write_run(tmp_path / "star", "one")
    path = tmp_path / "star" / "one" / records.RUN
    records.write_json(path, json.loads(path.read_text()) | {"forward_gflops": 1.0})
    with pytest.raises(ValueError, match="the closed form says"):
        read_geometry([tmp_path / "star"])
