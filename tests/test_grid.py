"""The winner of a grid, and when there is none."""

import itertools
import json
import math

import pytest

from sovit.analysis.grid import fit_grid, sweep_kind
from sovit.analysis.points import Dimensions, Point
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
