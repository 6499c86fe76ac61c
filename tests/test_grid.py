"""The winner of a grid, and when there is none."""

import itertools
import json
import math

import numpy as np
import pytest

from sovit import records
from sovit.analysis.diagnostics import isocompute
from sovit.analysis.frontier import frontier, surfaces
from sovit.analysis.grid import fit_grid, load_shots, sweep_kind
from sovit.analysis.points import Dimensions, Point, dimensions
from sovit.shape import Shape

WIDTHS, DEPTHS, MLPS = (16, 24, 32, 48), (1, 2, 4, 8), (32, 64, 128)
COMPUTE = (10.0, 20.0, 40.0, 80.0, 160.0)


def bowl(shape, t, best):
    """Error with its minimum over shapes at ``best``, falling with compute."""
    distance = sum(math.log(here / there) ** 2 for here, there in zip(shape, best, strict=True))
    return 0.5 * (t / 10) ** -0.2 * (1 + 0.05 * distance)


def grid_points(best_at, seeds=(0,), noise=None, shapes=None):
    points = []
    for shape in shapes or itertools.product(WIDTHS, DEPTHS, MLPS):
        for seed, t in itertools.product(seeds, COMPUTE):
            error = bowl(shape, t, best_at(t)) + (noise(shape, seed) if noise else 0.0)
            run_id = f"grid-w{shape[0]:04d}-d{shape[1]:02d}-m{shape[2]:04d}-s{seed}"
            points.append(Point(run_id, *shape, seed, t, f"{t:g} gflops", error, 0.004, 4))
    return points


def test_origin_is_the_interior_shape_best_over_a_range_and_t0_its_smallest_compute():
    best = {10.0: (16, 1, 32), 20.0: (24, 2, 64), 40.0: (24, 2, 64), 80.0: (24, 2, 64), 160.0: (48, 8, 128)}
    fit = fit_grid(grid_points(best.get))
    origin = fit.origin
    assert (origin.width, origin.depth, origin.mlp_dim) == (24, 2, 64)
    assert (origin.t0_gflops, origin.t_hi_gflops, origin.num_slices) == (pytest.approx(20), pytest.approx(80), 3)
    assert fit.why is None and fit.extend == ()
    assert [tuple(winner.best.values()) for winner in fit.winners] == [best[t] for t in COMPUTE]
    assert fit.winners[0].interior == {"width": False, "depth": False, "mlp_dim": False}
    assert all(fit.winners[1].interior.values())


def test_of_two_interior_shapes_the_one_best_over_the_wider_range_is_the_origin():
    best = {10.0: (24, 2, 64), 20.0: (24, 2, 64), 40.0: (32, 4, 64), 80.0: (32, 4, 64), 160.0: (32, 4, 64)}
    assert fit_grid(grid_points(best.get)).origin.width == 32


def test_a_winner_at_the_side_asks_for_a_larger_grid_there():
    fit = fit_grid(grid_points(lambda t: (24, 8, 32 if t > 100 else 64)))
    assert fit.origin is None
    assert fit.why is not None
    assert fit.extend == (
        "extend the grid above depth 8: the best shape has the largest depth at 5 of 5 computes",
        "extend the grid below mlp_dim 32: the best shape has the smallest mlp_dim at 1 of 5 computes",
    )


def test_a_shape_best_at_one_compute_only_is_no_origin():
    best = dict(zip(COMPUTE, ((24, 2, 64), (32, 2, 64), (24, 4, 64), (32, 4, 64), (24, 2, 64)), strict=True))
    assert fit_grid(grid_points(best.get)).origin is None


def test_difference_to_the_runner_up_and_its_standard_error():
    """Seeds differ by a known amount at the best shape only; the runner-up's two seeds agree."""

    def noise(shape, seed):
        return (0.01 if seed else -0.01) if shape == (24, 2, 64) else 0.0

    fit = fit_grid(grid_points(lambda t: (24, 2, 64), seeds=(0, 1), noise=noise))
    errors = sorted(bowl(shape, 10.0, (24, 2, 64)) for shape in itertools.product(WIDTHS, DEPTHS, MLPS))
    winner = fit.winners[0]
    assert winner.difference == pytest.approx(errors[1] - errors[0])
    assert winner.difference_se == pytest.approx(0.01)  # sd 0.01 sqrt2 over sqrt2 seeds
    assert "less than a standard error at 5 of 5" in fit.warnings[0]
    one_seed = fit_grid(grid_points(lambda t: (24, 2, 64))).winners[0]
    assert one_seed.difference_se == pytest.approx(math.hypot(0.004, 0.004))


def test_missing_cells_are_told():
    points = [p for p in grid_points(lambda t: (24, 2, 64)) if (p.width, p.t_gflops) != (48, 160.0)]
    fit = fit_grid(points)
    assert [winner.complete for winner in fit.winners] == [True] * 4 + [False]
    assert any("not measured at 1 of 5" in text for text in fit.warnings)
    assert all(shape["t_gflops"] == pytest.approx(80.0) for shape in fit.shapes)
    assert len(fit.shapes) == 48


def test_json_of_a_grid(tmp_path):
    fit = fit_grid(grid_points(lambda t: (24, 2, 64)), sweep="grid", dataset="fractals", shots=10)
    fit.write(tmp_path / "fit.json")
    content = json.loads((tmp_path / "fit.json").read_text())
    assert content == fit.as_dict()
    assert (content["schema"], content["kind"]) == (1, "grid")
    assert content["origin"]["t0_gflops"] == pytest.approx(10)
    assert all(row["used"] for row in content["points"])


def test_shapes_that_share_no_compute_are_refused():
    points = [p for p in grid_points(lambda t: (24, 2, 64)) if p.t_gflops == (10.0 if p.width < 30 else 20.0)]
    few = [p for p in points if (p.depth, p.mlp_dim) == (2, 64) and p.width in (16, 48)]
    with pytest.raises(ValueError, match="no compute is shared"):
        fit_grid(few)


def test_kind_of_a_sweep():
    grid = [Shape(w, d, m, 4, 8) for w, d, m in itertools.product(WIDTHS, DEPTHS, MLPS)]
    assert sweep_kind(grid) == "grid"
    assert sweep_kind(grid[3:]) == "grid"  # failed cells
    assert sweep_kind([Dimensions(w, 4, 128) for w in WIDTHS]) == "star"
    assert (
        sweep_kind([Dimensions(16, 1, 32), Dimensions(32, 1, 32), Dimensions(16, 2, 32), Dimensions(32, 2, 32)])
        == "grid"
    )
    with pytest.raises(ValueError, match="neither a star"):
        sweep_kind([Dimensions(16, 1, 32), Dimensions(32, 2, 64), Dimensions(48, 4, 128)])
    with pytest.raises(ValueError, match="at least two"):
        sweep_kind([Dimensions(16, 1, 32)])


def test_the_frontier_is_every_point_that_no_other_beats_in_error_and_compute():
    """Against the definition, pair by pair, on 60 random points with ties in both."""
    rng = np.random.default_rng(0)
    points = [
        Point(f"run{i}", 16, 1 + i, 32, 0, float(t), f"{t} gflops", error / 20, 0.01, 1)
        for i, (t, error) in enumerate(zip(rng.integers(1, 15, 60), rng.integers(1, 20, 60), strict=True))
    ]
    best = {
        (one.t_gflops, one.error)
        for one in points
        if not any(
            two.t_gflops <= one.t_gflops
            and two.error <= one.error
            and (two.t_gflops, two.error) != (one.t_gflops, one.error)
            for two in points
        )
    }
    rows = frontier(points)
    assert [(round(row["t_gflops"], 9), row["error"]) for row in rows] == sorted(best)


def test_shapes_that_miss_a_duration_by_part_of_a_step_do_not_fill_the_frontier():
    """The same 10 GFLOPs, but for whole steps: only the best of them is on the frontier."""
    ts = (9.99, 9.995, 10.0, 10.004)
    points = [Point(f"r{i}", 16 + i, 1, 32, 0, t, "10 gflops", 0.4 - 0.01 * i, 0.01, 1) for i, t in enumerate(ts)]
    assert [row["width"] for row in frontier(points)] == [19]
    in_images = [Point(f"r{i}", 16 + i, 1, 32, 0, 5.0 + i, "1 images", 0.4 - 0.01 * i, 0.01, 1) for i in range(4)]
    assert len(frontier(in_images)) == 4


def test_the_frontier_averages_the_seeds_of_a_shape():
    points = [Point(f"s{seed}", 16, 1, 32, seed, 10.0, "10 gflops", 0.3 + 0.02 * seed, 0.01, 1) for seed in (0, 1, 2)]
    (row,) = frontier(points)
    assert (row["error"], row["num_runs"]) == (pytest.approx(0.32), 3)
    assert row["stderr"] == pytest.approx(0.02 / math.sqrt(3))


FINE = tuple(itertools.product((16, 24, 32, 48), (1, 2, 3, 4), (32, 64, 96, 128)))  # sweeps/grid_tiny.yaml


def noisy_grid(rng, best, tau, sigma, seeds=(0,)):
    """Errors over FINE from a law in which size pays and costs (no quadratic), and the true best at each compute."""
    t_all = (16.0, 23.0, 32.0, 45.0)
    sizes = np.array(FINE, float)
    gain, cost = np.array([0.9, 0.6, 0.5]), np.array([1.6, 1.0, 0.5])
    c = 0.45
    table = {}
    for t in t_all:
        ratio = sizes / (np.array(best) * (t / 27) ** np.array([0.1, 0.15, 0.2]))
        data = np.prod(ratio ** (c * cost), axis=1)
        table[t] = 0.03 + 0.1 * (t / 27) ** -0.3 * (data + (c * cost / gain * ratio**-gain).sum(1))
    points = []
    for i, shape in enumerate(FINE):
        for seed in seeds:
            run = tau * rng.standard_normal()
            for t in t_all:
                error = table[t][i] * math.exp(run + sigma * rng.standard_normal())
                points.append(Point(f"g-{shape}-{seed}", *shape, seed, t, f"{t:g} gflops", error, 0.004, 3))
    return points, {round(t): FINE[int(values.argmin())] for t, values in table.items()}


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_shares_are_as_often_right_as_they_say_and_the_smoothed_best_is_right_more_often(seeds):
    """20 grids whose best shape is known. A share of the measured errors alone would be twice as sure as it is right."""
    rng = np.random.default_rng(1)
    said, right, measured = [], [], []
    for _ in range(20):
        best = (rng.uniform(20, 38), rng.uniform(1.4, 3.2), rng.uniform(45, 100))
        points, truth = noisy_grid(rng, best, tau=0.02, sigma=0.005, seeds=seeds)
        slices = isocompute(points, dimensions)
        smoothed = surfaces(points, slices, num_draws=400)
        for k, piece in enumerate(slices):
            shares = smoothed.shares(k)
            assert sum(shares.values()) == pytest.approx(1.0)
            said.append(shares.get(smoothed.best(k), 0.0))
            right.append(smoothed.best(k) == truth[round(piece.t_gflops)])
            measured.append(piece.sizes[piece.best] == truth[round(piece.t_gflops)])
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.12)
    assert np.mean(right) > np.mean(measured) + 0.15


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_spread_between_runs_is_found_also_with_cells_missing(seeds):
    rng = np.random.default_rng(2)
    found = []
    for _ in range(8):
        points, _ = noisy_grid(rng, (28, 2.2, 64), tau=0.02, sigma=0.01, seeds=seeds)
        kept = [point for point in points if rng.random() > 0.15]
        scatter = surfaces(kept, isocompute(kept, dimensions), num_draws=10).scatter
        found.append((scatter.tau, scatter.sigma))
        assert scatter.basis.startswith("repeated" if len(seeds) > 1 else "the shapes' scatter")
    assert np.mean(found, axis=0) == pytest.approx([0.02, 0.01], rel=0.15)


def test_one_lucky_run_does_not_make_the_origin():
    """A run 6% too good takes the first place at every compute; the surface through all 64 does not believe it."""
    points, truth = noisy_grid(np.random.default_rng(3), (28, 2.2, 64), tau=0.005, sigma=0.002)
    lucky = (32, 3, 64)
    points = [Point(**{**vars(p), "error": 0.94 * p.error}) if dimensions(p) == lucky else p for p in points]
    fit = fit_grid(points)
    assert all(tuple(winner.best.values()) == lucky for winner in fit.winners)
    assert (fit.origin.width, fit.origin.depth, fit.origin.mlp_dim) == (24, 2, 64) == truth[16]
    elected = sum(drawn.share for drawn in fit.origins if (drawn.width, drawn.depth, drawn.mlp_dim) == lucky)
    assert elected < 0.1 < 0.4 < fit.origin.share and all(winner.share < 0.2 for winner in fit.winners)
    assert any("the origin follows the smoothed ones" in text for text in fit.warnings)
    assert fit.origins[0].share <= fit.origin.share + 1e-9
    runner = fit.winners[0].runners[0]
    assert (runner.width, runner.depth, runner.mlp_dim, runner.inside) == (24, 2, 64, True)


def test_a_near_tie_with_a_shape_at_the_edge_is_said():
    """The optimum in width lies between 32 and the largest, 48."""
    points, _ = noisy_grid(np.random.default_rng(4), (37, 2.2, 64), tau=0.03, sigma=0.002)
    fit = fit_grid(points)
    assert fit.origin is not None and fit.origin.width == 32
    (text,) = [text for text in fit.warnings if "near-tie at the edge" in text and "width 48" in text]
    assert "extend the grid above width 48" in text


def test_a_grid_cannot_be_extended_below_depth_1():
    fit = fit_grid(grid_points(lambda t: (24, 1, 64)))
    assert fit.extend == (
        "train for longer: the best shape has the smallest depth at 5 of 5 computes, and there is no depth below 1",
    )


def test_a_dimension_with_two_values_has_no_inside():
    shapes = list(itertools.product(WIDTHS, DEPTHS, (64, 128)))
    fit = fit_grid(grid_points(lambda t: (24, 2, 64), shapes=shapes))
    assert fit.origin is None
    assert fit.extend[0] == ("give the grid at least three values of mlp_dim: with 2 no shape lies strictly inside it")


def test_numbers_of_shots_that_disagree_are_told():
    here = grid_points(lambda t: (24, 2, 64))
    there = grid_points(lambda t: (32, 2, 64))
    edge = grid_points(lambda t: (48, 2, 64))
    fit = fit_grid(here, shots=10, by_shots={5: here, 10: here, 25: there, 1: edge})
    assert [(row.shots, row.same, row.num_same, row.num_slices) for row in fit.agreement] == [
        (1, False, 0, 5), (5, True, 5, 5), (25, False, 0, 5)
    ]  # fmt: skip
    assert any("1 shots: none, 5 shots: 24x2x64, 25 shots: 32x2x64" in text for text in fit.warnings)
    alone = fit_grid(here, shots=10, by_shots={5: here, 10: here})
    assert not any("shots" in text for text in alone.warnings)


def test_too_few_shapes_get_no_share():
    shapes = list(itertools.product((16, 24, 32), (2,), (64, 128)))
    fit = fit_grid(grid_points(lambda t: (24, 2, 64), shapes=shapes))
    assert fit.winners[0].share is None and fit.winners[0].runners == () and fit.noise is None
    assert fit.winners[0].smooth == fit.winners[0].best
    assert any("too few to smooth" in text for text in fit.warnings)


def test_durations_in_images_give_shares_too():
    """Compute differs between the shapes, as in the published grid: slices are interpolated, none holds every run."""
    points = []
    for shape in FINE:
        cost = shape[0] * shape[1] * (shape[0] + shape[2]) / 2e4
        for images in (10.0, 20.0, 40.0):
            t = images * cost
            points.append(
                Point(f"g-{shape}", *shape, 0, t, f"{images:g} images", bowl(shape, t, (28, 2.5, 70)), 0.004, 3)
            )
    fit = fit_grid(points)
    told = [winner for winner in fit.winners if winner.share is not None]
    assert len(told) > 3
    assert all(sum(runner.share for runner in winner.runners) <= 1 + 1e-9 for winner in told)


def test_the_points_of_every_number_of_shots_are_loaded(tmp_path):
    for width in (16, 24, 32):
        run_dir = tmp_path / "grid" / f"grid-w{width:04d}-d01-m0032-h04-p08-s0"
        run_dir.mkdir(parents=True)
        records.write_json(run_dir / records.RUN, {"schema": 1, "status": "done", "reason": None, "config": {}})
        shape = {"width": width, "depth": 1, "mlp_dim": 32, "num_heads": 4, "patch_size": 8}
        rows = [
            {**shape, "schema": 1, "run_id": run_dir.name, "sweep": "grid", "seed": 0, "step": step, "draw": 0,
             "examples_seen": step, "t_gflops": float(step), "forward_gflops": 1.0, "duration": f"{step} gflops",
             "weights": "ema", "dataset": "fractals", "shots": shots, "l2_reg": 1.0, "error": 1 / shots, "stderr": 0.01}
            for step, shots in itertools.product((0, 10), (5, 25))
        ]  # fmt: skip
        records.append_lines(run_dir / records.EVALS, rows)
    found = load_shots(tmp_path / "grid", "fractals")
    assert {shots: {point.error for point in points} for shots, points in found.items()} == {5: {0.2}, 25: {0.04}}
    assert [len(points) for points in found.values()] == [3, 3]
