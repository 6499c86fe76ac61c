"""Second dips: the geometry against linear programming, the test against sweeps with and without a bump."""

import collections
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom

from sovit.analysis.checks import quasiconvexity
from sovit.analysis.checks.quasiconvexity import Bump, grid_bumps, star_bumps
from sovit.analysis.law import Law
from sovit.analysis.points import Point

EXPONENTS = {"width": (1.1, 0.49), "depth": (0.45, 0.328), "mlp_dim": (0.3, 0.283)}
SIZES = [round(1000 * 5**place) for place in (-0.5, -1 / 3, -1 / 6, 1 / 6, 1 / 3, 0.5)]
TIMES = 1000 * 32 ** np.linspace(-0.5, 0.5, 8)


def made_point(sizes, seed, t, error, duration=None):
    run = "-".join(f"{size:05d}" for size in sizes) + f"-s{seed}"
    return Point(run, *sizes, seed, float(t), duration or f"{t:.0f} gflops", float(error), 0.005, 4)


def star(rng, noise=0.005, bump=0.0, seeds=1, sizes=SIZES, times=TIMES, at=SIZES[3]):
    """Three arms without their center; in the depth arm the size ``at`` lies ``bump`` above the law."""
    arms = {}
    for place, (name, (a, b)) in enumerate(EXPONENTS.items()):
        law = Law(0.07 * b / a * 1000**a, a, 0.07 * 1000**-b * 1000**0.35, b, 0.03 * 1000**0.35, 0.35, 0.15)
        arms[name] = []
        for seed, x in itertools.product(range(seeds), sizes):
            luck = noise * rng.normal() + bump * (name == "depth" and x == at)
            shape = [1000, 1000, 1000]
            shape[place] = x
            for t in times:
                error = law.error(x, t) * math.exp(luck + noise * rng.normal())
                arms[name].append(made_point(shape, seed, t, error))
    return arms


def in_hull(point, corners):
    """Whether a point is a convex combination of others, by linear programming."""
    corners = np.array(corners, float)
    if len(corners) == 0:
        return False
    equal = np.vstack((corners.T, np.ones(len(corners))))
    return linprog(np.zeros(len(corners)), A_eq=equal, b_eq=np.append(point, 1.0), bounds=(0, None)).status == 0


@pytest.mark.parametrize("missing", [(), (5,), (0, 6, 9)])
def test_a_shape_is_a_bump_exactly_if_lower_ones_surround_it(missing):
    """On a 4 x 4 grid of log sizes: the rise over the best set around a shape, against the lowest level whose shapes
    have it in their hull."""
    sizes = [size for n, size in enumerate(itertools.product((16, 24, 32, 48), (1, 2, 3, 5))) if n not in missing]
    places = np.log(np.array(sizes, float))
    around = quasiconvexity._around(sizes)
    levels = np.random.default_rng(0).permutation(len(sizes)).astype(float)
    for one, sets in enumerate(around):
        near = (
            np.abs(np.searchsorted((16, 24, 32, 48), [s[0] for s in sizes]) - (16, 24, 32, 48).index(sizes[one][0]))
            <= 2
        )
        near &= np.abs(np.searchsorted((1, 2, 3, 5), [s[1] for s in sizes]) - (1, 2, 3, 5).index(sizes[one][1])) <= 2
        near[one] = False
        lowest = math.inf
        for level in np.sort(levels[near]):
            if in_hull(places[one], places[near & (levels <= level)]):
                lowest = level
                break
        assert min((max(levels[list(corners)]) for corners in sets), default=math.inf) == lowest


def test_a_bump_is_as_high_as_it_rises_above_the_lower_side():
    """By hand: 3 lies 0.1 above 2 and 0.3 above 4 and 5, so its height is 0.1; edges are never bumps."""
    levels = {1: 0.9, 2: 0.5, 3: 0.6, 4: 0.3, 5: 0.3, 6: 0.7}
    points = [made_point((x, 1, 1), 0, t, math.exp(level)) for x, level in levels.items() for t in (1.0, 2.0, 4.0)]
    family = quasiconvexity._family("width", ("width",), (), points, 0, len(points))
    heights = family.heights(np.log([[point.error] for point in points]))[:, 0]
    assert heights[2] == pytest.approx(0.1)
    assert heights[[0, 5]].tolist() == [-math.inf, -math.inf]
    assert max(heights[[1, 3, 4]]) <= 1e-12


def test_a_bump_at_late_durations_only_is_not_averaged_away():
    def level(x, t):
        return {1: 0.5, 2: 0.5 - 0.3 * (t <= 4) + 0.2 * (t > 4), 3: 0.4}[x]

    points = [made_point((x, 1, 1), 0, t, math.exp(level(x, t))) for x in (1, 2, 3) for t in (1, 2, 3, 4, 5, 6, 7, 8)]
    family = quasiconvexity._family("width", ("width",), (), points, 0, len(points))
    assert family.heights(np.log([[point.error] for point in points]))[1, 0] == pytest.approx(0.2)


def test_durations_in_images_are_compared_at_equal_compute():
    """Each size is measured at computes of its own; interpolated in log t, a power law is exact at the common ones."""
    points = [
        made_point((x, 1, 1), 0, t, math.exp(x / 10) * t**-0.5, duration=f"{n} images")
        for x in (1, 2, 3, 4)
        for n, t in enumerate(x * 2.0 ** np.arange(6))
    ]
    table, measured = quasiconvexity._table(points, [p.width - 1 for p in points], 4, 0, len(points))
    values = (table @ np.log([p.error for p in points])).reshape(measured.shape)
    times = np.log(np.geomspace(1, 4 * 32, measured.shape[1]))
    for x in range(4):
        assert values[x][measured[x]] == pytest.approx((x + 1) / 10 - 0.5 * times[measured[x]])
    assert measured.sum(0).min() == 1
    assert measured.sum(0).max() == 4


def test_studentised_bumps_are_those_of_a_dense_mixed_model():
    """Against textbook generalised least squares and the restricted likelihood with full covariance matrices."""
    rng = np.random.default_rng(1)
    run = np.repeat(np.arange(6), 5)
    basis = np.linalg.qr(rng.normal(size=(30, 3)))[0]
    column = (run == 2).astype(float)
    errors = rng.normal(size=30) + 2 * rng.normal(size=6)[run]
    law = quasiconvexity._Linear(errors, errors, basis, run, np.ones(30))
    ratio, _, t, spread = quasiconvexity._studentised(law, column[:, None], errors[:, None])

    def restricted(design, rho):
        covariance = np.eye(30) + rho**2 * (run[:, None] == run)
        inverse = np.linalg.inv(covariance)
        information = design.T @ inverse @ design
        found = np.linalg.solve(information, design.T @ inverse @ errors)
        left = errors - design @ found
        free = 30 - design.shape[1]
        sigma2 = left @ inverse @ left / free
        criterion = free * math.log(sigma2) + np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
        return criterion, found[-1], math.sqrt(sigma2 * np.linalg.inv(information)[-1, -1])

    ratios = quasiconvexity.RATIOS
    assert ratio[0] == pytest.approx(min(ratios, key=lambda rho: restricted(basis, rho)[0]))
    _, found, error = min(restricted(np.column_stack((basis, column)), rho) for rho in ratios)
    assert spread[0, 0] == pytest.approx(error, rel=1e-6)
    assert t[0, 0] == pytest.approx(found / error, rel=1e-6)


def test_false_alarms_are_rare_and_a_bump_of_four_percent_is_seen():
    """25 stars each, tau = sigma = 0.5%: alarms within the upper 99.9% bound of 5%, power at least 80%."""
    rng = np.random.default_rng(2)
    quiet = [found.p <= 0.05 for seed in range(25) for found in star_bumps(star(rng), draws=99, seed=seed).values()]
    assert sum(quiet) <= binom.ppf(0.999, len(quiet), 0.05)
    seen = [star_bumps(star(rng, bump=0.04), draws=99, seed=seed)["depth"] for seed in range(25)]
    assert np.mean([found.p <= 0.05 for found in seen]) >= 0.8
    assert all(found.at == (SIZES[3],) for found in seen if found.p <= 0.05)


def test_the_bump_said_to_be_detectable_is_detected():
    """The height promised four times in five is seen in 60 to 97% of 30 stars, at the size it was promised for."""
    rng = np.random.default_rng(3)
    promised = [star_bumps(star(rng), draws=99, seed=seed)["depth"] for seed in range(8)]
    (at,) = collections.Counter(found.detectable_at for found in promised).most_common(1)[0][0]
    height = math.log1p(np.median([found.detectable for found in promised if found.detectable_at == (at,)]))
    found = [star_bumps(star(rng, bump=height, at=at), draws=99, seed=seed)["depth"] for seed in range(30)]
    assert 0.6 <= np.mean([one.p <= 0.05 for one in found]) <= 0.97


def test_more_seeds_lower_the_bump_that_can_be_seen():
    rng = np.random.default_rng(4)
    one, three = (star_bumps(star(rng, seeds=seeds), draws=99)["depth"].detectable for seeds in (1, 3))
    assert three < one


def test_a_curve_that_only_falls_has_no_bump():
    arms = {
        "width": [made_point((x, 1, 1), 0, t, 0.1 + 0.3 / x**0.3 + 1 / t) for x in range(1, 7) for t in (10, 20, 40)]
    }
    found = star_bumps(arms, draws=19)["width"]
    assert found.at is None
    assert found.p == 1.0
    assert found.height == 0.0


def test_three_sizes_are_too_few_for_a_second_dip():
    arms = star(np.random.default_rng(5), sizes=SIZES[2:5])
    assert all("3 sizes are too few" in found for found in star_bumps(arms).values())


def grid(rng, noise=0.005, bump=0.0, values=(500, 700, 1000, 1400, 2000)):
    points = []
    for width, depth in itertools.product(values, values):
        luck = noise * rng.normal() + bump * (width == depth == 1000)
        for t in 1000 * 16 ** np.linspace(-0.5, 0.5, 4):
            u, v = math.log(width / 1000), math.log(depth / 1000)
            cost = 0.06 * math.exp(0.6 * u + 0.5 * v) * (t / 1000) ** -0.5
            error = 0.03 * math.exp(-0.9 * u) + 0.04 * math.exp(-0.7 * v) + cost + 0.1
            points.append(made_point((width, depth, 800), 0, t, error * math.exp(luck + noise * rng.normal())))
    return points


def test_a_bump_inside_a_grid_is_seen_in_its_pair():
    rng = np.random.default_rng(6)
    clean = [grid_bumps(grid(rng), draws=49, seed=seed)["width x depth"].p <= 0.05 for seed in range(6)]
    assert sum(clean) <= 2
    found = grid_bumps(grid(rng, bump=0.06), draws=99)
    assert list(found) == ["width x depth"]
    bump = found["width x depth"]
    assert isinstance(bump, Bump)
    assert bump.at == (1000, 1000, 800)
    assert bump.p <= 0.05


def test_a_small_grid_says_so():
    points = [
        point for point in grid(np.random.default_rng(7)) if point.width in (700, 1000, 1400) and point.depth > 700
    ]
    assert "shapes are too few" in grid_bumps(points)["width x depth"]
    assert (
        "no shape lies between" in grid_bumps([p for p in points if p.width > 700 and p.depth > 1000])["width x depth"]
    )
    assert "fewer than two dimensions" in grid_bumps([p for p in points if p.depth == 1000])["grid"]
