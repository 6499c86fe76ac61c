"""A star from records to fit.json: what is fitted, what is held out, and when no exponent is given."""

import dataclasses
import functools
import json
import math
from itertools import pairwise

import numpy as np
import pytest

from sovit import records
from sovit.analysis import diagnostics
from sovit.analysis.fit import Prior
from sovit.analysis.grid import sweep_kind
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Dimensions, Exclusion, Point, load_points
from sovit.analysis.star import find_center, fit_star
from sovit.shape import Shape

CENTER = Dimensions(32, 4, 128)
# 10-shot error of 16 small transformers at training compute 5e10, 1e11, ... 8e11 FLOPs (three times the forward FLOPs).
TRAIN_FLOPS = (5e10, 1e11, 2e11, 4e11, 8e11)
TINY = {
    (32, 4, 128): (0.605, 0.493, 0.381, 0.296, 0.251),
    (16, 4, 128): (0.567, 0.487, 0.423, 0.389),
    (24, 4, 128): (0.560, 0.468, 0.370, 0.301, 0.268),
    (48, 4, 128): (0.633, 0.556, 0.442, 0.326, 0.260),
    (64, 4, 128): (0.659, 0.581, 0.497, 0.389, 0.293),
    (96, 4, 128): (0.775, 0.621, 0.551, 0.460, 0.358),
    (32, 1, 128): (0.469, 0.417, 0.373, 0.348),
    (32, 2, 128): (0.500, 0.415, 0.342, 0.290, 0.252),
    (32, 6, 128): (0.672, 0.569, 0.461, 0.350, 0.271),
    (32, 8, 128): (0.746, 0.633, 0.509, 0.376, 0.281),
    (32, 12, 128): (0.823, 0.722, 0.596, 0.456, 0.335),
    (32, 4, 16): (0.511, 0.443, 0.368, 0.323),
    (32, 4, 32): (0.531, 0.442, 0.359, 0.324),
    (32, 4, 64): (0.550, 0.442, 0.349, 0.284, 0.249),
    (32, 4, 256): (0.673, 0.573, 0.448, 0.335, 0.263),
    (32, 4, 512): (0.708, 0.639, 0.539, 0.412, 0.316),
}


def point(shape, t, error, *, seed=0, duration=None, stderr=0.005):
    run_id = f"star-w{shape[0]:04d}-d{shape[1]:02d}-m{shape[2]:04d}-s{seed}"
    return Point(run_id, *shape, seed, float(t), duration or f"{t:.0f} gflops", float(error), stderr, 4)


def tiny_star():
    return [
        point(shape, flops / 3e9, error)
        for shape, errors in TINY.items()
        for flops, error in zip(TRAIN_FLOPS, errors, strict=False)
    ]


@functools.cache
def tiny_fit():
    return fit_star(tiny_star())


# One law for each arm, its optimum inside the arm, and one value for all of them at the center.
LAWS = {"width": (1.1, 0.49), "depth": (0.9, 0.5), "mlp_dim": (0.6, 0.4)}
FACTORS = (0.25, 0.4, 0.63, 1.6, 2.5, 4.0)


def arm_law(name):
    a, b = LAWS[name]
    middle = getattr(Dimensions(256, 40, 1024), name)
    alpha, c = 0.06 * b / a, 0.35
    return Law(alpha * middle**a, a, 0.06 * middle**-b * 1000**c, b, 0.03 * 1000**c, c, 0.12)


def made_star(sigma=0.002, tau=0.002, seeds=(0, 1), num_durations=7, laws=arm_law, rng=None):
    center = Dimensions(256, 40, 1024)
    shapes = [center, *(center._replace(**{n: round(getattr(center, n) * f)}) for n in DIMENSIONS for f in FACTORS)]
    rng = rng or np.random.default_rng(0)
    points = []
    for shape in shapes:
        name = next(iter(shape.differs(center)), "width")
        for seed in seeds:
            offset = tau * rng.normal()
            for t in 1000 * 32 ** np.linspace(-0.5, 0.5, num_durations):
                error = float(laws(name).error(getattr(shape, name), t)) * math.exp(offset + sigma * rng.normal())
                points.append(point(shape, t, error, seed=seed))
    return points


def test_exponents_of_a_real_star_land_where_careful_analyses_of_it_put_them():
    """Ranges over estimators, cut-offs and bootstraps; the held-out center is predicted to 6% where the law holds."""
    fit = tiny_fit()
    assert fit.center == CENTER._asdict()
    ranges = {"width": (0.10, 0.25), "depth": (0.27, 0.40), "mlp_dim": (0.35, 0.55)}
    for name, (low, high) in ranges.items():
        arm = fit.arms[name]
        assert arm.identified, arm.why
        assert low < arm.s.estimate < high
        assert arm.s.lo < low and arm.s.hi > high  # five runs cannot say more than that
        for row in arm.center_check:
            if row.used_range:
                assert row.predicted == pytest.approx(row.measured, rel=0.06)


def test_known_exponents_of_a_star_come_back():
    fit = fit_star(made_star(sigma=1e-5, tau=1e-5))
    for name in DIMENSIONS:
        law = arm_law(name)
        assert fit.arms[name].s.estimate == pytest.approx(law.exponent, rel=0.02)
        assert fit.arms[name].num_runs == 12
        for row in fit.arms[name].minima:
            assert row.law_x == pytest.approx(float(law.optimum(row.t_gflops)), rel=0.02)


def test_the_center_has_no_influence():
    points = tiny_star()
    perturbed = [
        dataclasses.replace(p, error=0.5 * p.error) if (p.width, p.depth, p.mlp_dim) == CENTER else p for p in points
    ]
    first, second = tiny_fit(), fit_star(perturbed)
    for name in DIMENSIONS:
        before, after = (dataclasses.asdict(fit.arms[name]) for fit in (first, second))
        checks = before.pop("center_check"), after.pop("center_check")
        assert json.dumps(before, sort_keys=True) == json.dumps(after, sort_keys=True)
        assert all(b["measured"] == pytest.approx(0.5 * a["measured"]) for a, b in zip(*checks, strict=True))
    assert {row["why_not"] for row in second.points if row["arm"] is None} == {"center: held out"}


def test_minima_at_the_edge_give_no_exponent_but_keep_the_diagnostics():
    """The smallest size is the best for six of seven durations: cost dominates."""

    def steep(name):
        law = arm_law(name)
        return Law(0.05 * law.alpha, law.a, law.beta, law.b, law.xi, law.c, law.eps)

    fit = fit_star(made_star(laws=steep))
    arm = fit.arms["width"]
    at_smallest = sum(row.x == 64 for row in arm.minima)
    assert at_smallest > 3
    assert not arm.identified
    assert arm.s is None
    assert arm.why == f"not identified: the minimum is at the smallest width for {at_smallest} of 7 durations"
    assert arm.minima and arm.law and arm.cutoffs and arm.interior_share == pytest.approx(1 - at_smallest / 7)


def test_an_arm_of_four_sizes_with_one_run_each_gives_no_exponent():
    keep = (16, 24, 48, 64, 32)
    fit = fit_star([p for p in tiny_star() if p.width in keep])
    assert fit.arms["width"].why == "not identified: 4 runs are too few for an interval; at least 5 are needed"
    assert fit.arms["width"].s is None
    assert fit.arms["depth"].identified


def test_only_points_below_the_headline_are_fitted_and_the_others_are_listed_with_a_reason():
    fit = tiny_fit()
    for row in fit.points:
        assert row["used"] == (row["why_not"] is None)
        if row["arm"] is not None:
            assert row["used"] == (row["error"] <= 0.6)
    assert "above the cut-off 0.6" in next(row["why_not"] for row in fit.points if row["error"] == 0.823)
    for arm in fit.arms.values():
        headline = [row for row in arm.cutoffs if row.headline]
        assert [row.max_error for row in headline] == [0.6]
        assert headline[0].s == pytest.approx(arm.s.estimate, rel=1e-5)
        assert arm.cutoff_range == (min(r.s for r in arm.cutoffs), max(r.s for r in arm.cutoffs))


def test_diverged_points_are_not_fitted():
    points = made_star()
    victim = points[-1].run_id
    group = sorted((p for p in points if p.run_id == victim), key=lambda p: p.t_gflops)
    broken = {id(group[-2]): 0.5, id(group[-1]): 0.95}
    fit = fit_star([dataclasses.replace(p, error=broken.get(id(p), p.error)) for p in points])
    reasons = {r["error"]: r["why_not"] for r in fit.points if r["run_id"] == victim and not r["used"]}
    assert set(reasons) == {0.5, 0.95}
    assert "the error rose" in reasons[0.5]
    assert "diverged" in reasons[0.95]
    assert fit.arms["mlp_dim"].s.estimate == pytest.approx(arm_law("mlp_dim").exponent, rel=0.1)


def test_units_of_compute_do_not_change_exponents():
    first = tiny_fit()
    second = fit_star([dataclasses.replace(p, t_gflops=1e9 * p.t_gflops) for p in tiny_star()])
    for name in DIMENSIONS:
        assert second.arms[name].s.estimate == pytest.approx(first.arms[name].s.estimate, rel=1e-4)
        assert second.arms[name].s.hi == pytest.approx(first.arms[name].s.hi, rel=1e-2)


def test_each_seed_is_also_fitted_alone():
    fit = fit_star(made_star(sigma=1e-3, tau=1e-3))
    assert set(fit.by_seed) == {"0", "1"}
    first, second = (fit.by_seed[seed]["width"] for seed in ("0", "1"))
    assert first.estimate != second.estimate
    both = fit.arms["width"].s
    assert math.log(first.hi / first.lo) > math.log(both.hi / both.lo)
    assert first.estimate == pytest.approx(both.estimate, rel=0.2)
    assert tiny_fit().by_seed == {}


def test_a_run_off_by_five_percent_is_named():
    points = made_star(tau=0.001, sigma=0.001)
    bad = "star-w0256-d25-m1024-s0"
    fit = fit_star([dataclasses.replace(p, error=1.05 * p.error) if p.run_id == bad else p for p in points])
    assert [row.run_id for row in fit.arms["depth"].outliers] == [bad]
    assert any(bad in text for text in fit.warnings)
    assert fit.arms["width"].outliers == ()


def test_weights_by_standard_error_are_used():
    """With points of one run declared worthless, its error may be anything."""
    points = made_star(sigma=1e-4, tau=0.0)
    bad = "star-w0640-d40-m1024-s0"
    wrong = [
        dataclasses.replace(p, error=1.03 * p.error, stderr=0.2) if p.run_id == bad else dataclasses.replace(p, stderr=2e-4)
        for p in points
    ]  # fmt: skip
    fit = fit_star(wrong, weights="stderr")
    assert fit.arms["width"].s.estimate == pytest.approx(arm_law("width").exponent, rel=0.02)
    with pytest.raises(ValueError, match="standard errors above 0"):
        fit_star([dataclasses.replace(p, stderr=0.0) for p in points], weights="stderr")


def test_json_holds_numbers_or_null(tmp_path):
    """Python would write Infinity and NaN, which no JSON reader takes."""
    keep = [p for p in tiny_star() if p.mlp_dim == 128]
    fit = fit_star(keep, sweep="tiny", dataset="fractals", shots=10, exclusions=[Exclusion("a", "failed")])
    arm = fit.arms["width"]
    open_end = dataclasses.replace(arm, s=dataclasses.replace(arm.s, hi=math.inf), log_se=math.nan)
    fit = dataclasses.replace(fit, arms=fit.arms | {"width": open_end})
    fit.write(tmp_path / "fit.json")

    def refuse(text):
        raise AssertionError(text)

    content = json.loads((tmp_path / "fit.json").read_text(), parse_constant=refuse)
    assert content == fit.as_dict()
    assert content["arms"]["width"]["s"]["hi"] is None
    assert content["arms"]["width"]["log_se"] is None
    assert (content["schema"], content["kind"], content["sweep"]) == (1, "star", "tiny")
    assert content["metric"] == {"dataset": "fractals", "shots": 10}
    assert content["excluded"] == [{"run_id": "a", "reason": "failed"}]
    assert Law(**content["arms"]["depth"]["law"]) == fit.arms["depth"].law
    assert set(content["arms"]["depth"]["s"]) == {"estimate", "lo", "hi", "method"}


def test_center_is_found_and_shapes_that_are_no_star_are_refused():
    assert find_center([Shape(*s, 4, 8) for s in TINY]) == CENTER
    # The center itself need not have been trained.
    assert find_center([Shape(*s, 4, 8) for s in TINY if s != CENTER]) == CENTER
    with pytest.raises(ValueError, match="48x8x128 differs from the most common values 32x4x128 in width and depth"):
        find_center([Shape(*s, 4, 8) for s in [*TINY, (48, 8, 128)]])
    with pytest.raises(ValueError, match="give the center"):
        find_center([Shape(w, 4, 128, 4, 8) for w in (16, 32, 64)])
    with pytest.raises(ValueError, match="16x4x128 differs from the center 32x8x128 in width and depth"):
        fit_star(tiny_star(), Shape(32, 8, 128, 4, 8))


def test_a_single_arm_with_its_center_given_is_fitted():
    points = [p for p in tiny_star() if (p.depth, p.mlp_dim) == (4, 128)]
    fit = fit_star(points, CENTER)
    assert list(fit.arms) == ["width"]
    assert fit.arms["width"].s.estimate == pytest.approx(tiny_fit().arms["width"].s.estimate, rel=1e-6)


def test_parabola_slope_is_exact_for_parabolas():
    """log error = (log x - (0.4 log t + 1))^2 + level(t): minima and slope known."""
    points = []
    for x in (8, 16, 32, 64, 128):
        for t in (10.0, 30.0, 90.0, 270.0):
            log_error = 0.05 * (math.log(x) - (0.4 * math.log(t) + 1.5)) ** 2 - 0.3 * math.log(t) - 0.5
            points.append(point((x, 4, 128), t, math.exp(log_error)))
    size = diagnostics.size_along("width")
    for piece in diagnostics.isocompute(points, size):
        assert diagnostics.parabola_minimum(piece) == pytest.approx(piece.t_gflops**0.4 * math.exp(1.5), rel=1e-9)
    found = diagnostics.parabola_slope(points, size)
    assert found.slope == pytest.approx(0.4, rel=1e-9)
    assert found.lo == pytest.approx(0.4, abs=1e-6) and found.hi == pytest.approx(0.4, abs=1e-6)


def test_slices_of_durations_given_in_images_are_at_equal_compute():
    """Big shapes spend more compute on as many images; error depends on x and t alone, so a slice must be f(., t)."""
    law = arm_law("width")
    points = [
        point((width, 40, 1024), images * width, law.error(width, images * width), duration=f"{images} images")
        for width in (64, 128, 256, 512)
        for images in np.geomspace(0.5, 64, 15)
    ]
    slices = diagnostics.isocompute(points, diagnostics.size_along("width"))
    assert len(slices) > 5
    for piece in slices:
        np.testing.assert_allclose(piece.errors, law.error(np.array(piece.sizes), piece.t_gflops), rtol=3e-3)
        covering = [
            w for w in (64, 128, 256, 512) if 0.5 * w <= piece.t_gflops * 1.0001 and piece.t_gflops <= 64.01 * w
        ]
        assert list(piece.sizes) == covering
    assert all(a.t_gflops < b.t_gflops for a, b in pairwise(slices))


# Records


def write_run(sweep, shape, *, seed=0, status="done", reason=None, tail="", draws=(0.01, -0.01), weights="ema"):
    run_dir = sweep / f"star-w{shape[0]:04d}-d{shape[1]:02d}-m{shape[2]:04d}-h04-p08-s{seed}"
    run_dir.mkdir(parents=True)
    records.write_json(run_dir / records.RUN, {"status": status, "reason": reason})
    rows = []
    for step, (flops, error) in enumerate(zip((0, *TRAIN_FLOPS), (0.98, *TINY[shape]), strict=False)):
        for dataset, shots in (("fractals", 10), ("fractals", 1), ("digits", 10)):
            for draw, offset in enumerate(draws):
                shift = 0.0 if (dataset, shots) == ("fractals", 10) else 0.05
                rows.append(
                    dict(schema=1, run_id=run_dir.name, sweep="star", width=shape[0], depth=shape[1],
                         mlp_dim=shape[2], num_heads=4, patch_size=8, image_size=16, seed=seed, step=step,
                         examples_seen=128 * step, forward_gflops=2e-4, t_gflops=flops / 3e9,
                         duration=f"{flops / 3e9:.0f} gflops", weights=weights, dataset=dataset, shots=shots, draw=draw,
                         l2_reg=1.0, error=error + offset * (error < 0.9) - shift, stderr=0.006)
                )  # fmt: skip
    records.append_lines(run_dir / records.EVALS, rows)
    if tail:
        with (run_dir / records.EVALS).open("a") as file:
            file.write(tail)
    return run_dir


def test_records_come_back_as_points(tmp_path):
    for shape in TINY:
        write_run(tmp_path, shape)
    points, exclusions = load_points(tmp_path, "fractals", 10)
    assert exclusions == []
    expected = {(p.width, p.depth, p.mlp_dim, p.duration): p for p in tiny_star()}
    assert len(points) == len(expected)  # step 0 is no point
    for p in points:
        twin = expected[(p.width, p.depth, p.mlp_dim, p.duration)]
        assert (p.error, p.t_gflops, p.num_draws) == (pytest.approx(twin.error), pytest.approx(twin.t_gflops), 2)
        # 0.01 and -0.01: standard error of the mean of two draws 0.01, beside a binomial 0.006
        assert p.stderr == pytest.approx(math.hypot(0.01, 0.006))
    fit = fit_star(points)
    for name in DIMENSIONS:
        assert fit.arms[name].s.estimate == pytest.approx(tiny_fit().arms[name].s.estimate)


def test_unfinished_and_excluded_runs_are_listed_with_their_reason(tmp_path):
    shapes = list(TINY)
    done = write_run(tmp_path, shapes[0])
    running = write_run(tmp_path, shapes[1], status="running", tail='{"schema": 1, "wid')
    failed = write_run(tmp_path, shapes[2], status="failed", reason="out of memory")
    dropped = write_run(tmp_path, shapes[3])
    bare = tmp_path / "star-w0001-d01-m0001-h01-p08-s0"
    bare.mkdir()
    (tmp_path / "exclusions.csv").write_text(f"run_id,reason\n{dropped.name},wrong learning rate\n")
    points, exclusions = load_points(tmp_path, "fractals", 10)
    assert {p.run_id for p in points} == {done.name}
    assert {e.run_id: e.reason for e in exclusions} == {
        running.name: "running (the last line of evals.jsonl is cut off)",
        failed.name: "failed: out of memory",
        dropped.name: "exclusions.csv: wrong learning rate",
        bare.name: "no run.json",
    }


def test_runs_of_two_recipes_are_not_fitted_together(tmp_path):
    """An exponent from cells at two learning rates would be part learning rate; seeds and loggers may differ."""
    shapes = [(16, 4, 128), (32, 4, 128), (64, 4, 128)]
    for k, shape in enumerate(shapes):
        path = write_run(tmp_path, shape) / "run.json"
        config = {"seed": k, "logger": {"name": str(k)}, "optim": {"lr": 0.005}, "model": {"width": shape[0]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    assert load_points(tmp_path, "fractals", 10)[0]
    config["optim"]["lr"] = 0.01
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    with pytest.raises(ValueError, match=r"mixes runs that differ in optim\.lr"):
        load_points(tmp_path, "fractals", 10)


def test_records_that_cannot_be_trusted_are_refused_in_words(tmp_path):
    shapes = list(TINY)
    with pytest.raises(ValueError, match="is not a directory"):
        load_points(tmp_path / "nowhere", "fractals", 10)
    broken = tmp_path / "broken"
    write_run(broken, shapes[0], tail='{"schema": 1, "wid')
    with pytest.raises(ValueError, match=r"evals\.jsonl, line \d+ is not valid JSON"):
        load_points(broken, "fractals", 10)
    good = tmp_path / "good"
    first = write_run(good, shapes[0])
    with pytest.raises(ValueError, match="it has digits at 10, fractals at 1, fractals at 10"):
        load_points(good, "flowers", 10)
    write_run(good, shapes[1], weights="cooled")
    with pytest.raises(ValueError, match="mixes evaluated weights: cooled"):
        load_points(good, "fractals", 10)
    (good / "exclusions.csv").write_text("run_id,reason\nstar-typo,bad\n")
    with pytest.raises(ValueError, match="star-typo"):
        load_points(good, "fractals", 10)
    (good / "exclusions.csv").write_text(f"run_id,reason\n{first.name},\n")
    with pytest.raises(ValueError, match="no reason"):
        load_points(good, "fractals", 10)


def test_an_evaluation_recorded_twice_is_refused(tmp_path):
    """A resume that repeats an evaluation would count its draws twice."""
    run = write_run(tmp_path, CENTER)
    lines = (run / records.EVALS).read_text()
    (run / records.EVALS).write_text(lines + lines)
    with pytest.raises(ValueError, match="twice"):
        load_points(tmp_path, "fractals", 10)


def test_a_star_is_a_star():
    assert sweep_kind([Shape(*shape, 4, 8) for shape in TINY]) == "star"


def test_shared_parameters_and_priors_reach_the_fit():
    """A prior that contradicts the data moves s; sharing adds a second answer beside the first."""
    points = made_star()
    plain_fit, held = fit_star(points), fit_star(points, priors={"b": Prior(3.0, 1e-3)})
    assert held.arms["width"].law.b == pytest.approx(3.0, rel=0.02)
    assert held.arms["width"].s.estimate < 0.8 * plain_fit.arms["width"].s.estimate
    shared = fit_star(points, share=["c"]).shared
    assert set(shared.s) == set(plain_fit.arms)
    for name, interval in shared.s.items():
        assert interval.lo <= plain_fit.arms[name].s.estimate <= interval.hi
