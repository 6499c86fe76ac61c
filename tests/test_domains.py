"""Two metrics of one star: equal and unequal paths drawn from laws that are known, and what `sovit compare` says of them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sovit import cli
from sovit.analysis import domains
from sovit.analysis.checks.heterogeneity import across_metrics
from sovit.analysis.domains import Domains, _jackknife, beside
from sovit.analysis.points import Point
from sovit.analysis.report.contents_domains import verdict
from sovit.analysis.scale import log_perplexity
from sovit.analysis.star import StarFit, fit_star
from two_metrics import BLIND, CENTER, SIZES, draw, write


def fits(first: Sequence[Point], second: Sequence[Point]) -> list[tuple[StarFit, Sequence[Point]]]:
    scales = {"first": {}, "second": {"scale": log_perplexity(BLIND)}}
    return [
        (fit_star(points, CENTER, **scales[name]), points) for name, points in (("first", first), ("second", second))
    ]


def depth_only(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if (point.width, point.mlp_dim) == (CENTER.width, CENTER.mlp_dim)]


def of_depth(seed: int, draws: int = 200, **how: object) -> Domains:
    first, second = draw(seed, **how)  # type: ignore[arg-type]
    return beside(*fits(depth_only(first), depth_only(second)), draws=draws, seed=seed)


def test_parallel_paths_apart_are_told_from_one_path_and_from_paths_that_cross() -> None:
    """Twice the width at equal exponents; the depth's exponent 1.5 times; the MLP dimension alike."""
    first, second = draw(1, noise=0.002, faster={"depth": 1.5}, larger={"width": 2.0})
    found = beside(*fits(first, second), draws=300)
    width, depth, mlp = (found.dimensions[name] for name in SIZES)
    assert width.exponents and depth.exponents and mlp.exponents
    assert width.exponents.ratio.lo < 1 < width.exponents.ratio.hi and width.exponents.p > 0.05
    assert (
        depth.exponents.ratio.lo < 1.5 < depth.exponents.ratio.hi and depth.p_holm is not None and depth.p_holm < 0.05
    )
    assert mlp.exponents.ratio.lo < 1 < mlp.exponents.ratio.hi
    for at in width.shapes:
        assert at.tested.ratio.lo < 2 < at.tested.ratio.hi and at.tested.p < 0.05
    for pair, times in ((depth, 1.5), (mlp, 1.0)):  # at the middle compute of the records the sizes are alike
        for at in pair.shapes:
            ratio = (at.t_gflops / 32) ** (0.45 * (times - 1))
            assert at.tested.ratio.lo < ratio < at.tested.ratio.hi
    assert found.parallel_p is not None and found.parallel_p < 0.05
    assert found.same_p is not None and found.same_p < 0.05


def test_paths_that_are_one_are_seldom_called_two() -> None:
    """8 stars of one arm: 3 alarms or more of a test have a chance of 0.6%, and so has an interval that misses thrice."""
    alarms, covered = np.zeros(2, int), np.zeros(2, int)
    for seed in range(8):
        pair = of_depth(seed).dimensions["depth"]
        assert pair.exponents is not None
        for k, one in enumerate((pair.exponents, pair.shapes[1].tested)):
            alarms[k] += one.p <= 0.05
            covered[k] += one.ratio.lo <= 1 <= one.ratio.hi
    assert np.all(alarms <= 2) and np.all(covered >= 6)


def test_a_run_without_which_there_is_no_optimum_leaves_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithm of a best size of 0 was a traceback's words for the whole star."""
    whole = domains.fits_in_common

    def bent(*arguments: Any) -> Any:
        common = whole(*arguments)
        one = common.fits["second"]
        laws = (dataclasses.replace(one.without[0], alpha=0.0), *one.without[1:])
        return dataclasses.replace(common, fits=common.fits | {"second": dataclasses.replace(one, without=laws)})

    monkeypatch.setattr(domains, "fits_in_common", bent)
    assert of_depth(0).dimensions["depth"].why == "without one of the runs the best law has no optimum"


@pytest.mark.full
def test_the_error_rate_the_cover_and_the_power_are_what_is_stated() -> None:
    """100 stars each. Alarms of a nominal 5%: more than 12 have a chance of 0.1%. A ratio drawn at the one that is said to
    be seen four times in five is seen between 60 and 95 times."""
    alarms = covered = 0
    seen = []
    for seed in range(100):
        pair = of_depth(seed, 400).dimensions["depth"]
        assert pair.exponents is not None and pair.exponents.seen[1] is not None
        alarms += pair.exponents.p <= 0.05
        covered += pair.exponents.ratio.lo <= 1 <= pair.exponents.ratio.hi
        seen.append(pair.exponents.seen[1])
    assert alarms <= 12 and covered >= 88
    times = float(np.median(seen))
    found = 0
    for seed in range(100, 200):
        pair = of_depth(seed, 400, faster={"depth": times}).dimensions["depth"]
        found += pair.exponents is not None and pair.exponents.p <= 0.05
    assert 60 <= found <= 95


def test_luck_that_both_metrics_share_cancels() -> None:
    """An error of the difference that took the metrics as independent would not know how alike the luck of a run is."""
    apart, alike = (of_depth(3, alike=rho).dimensions["depth"].exponents for rho in (0.0, 0.98))
    assert apart and alike and apart.seen[1] and alike.seen[1]
    assert math.log(alike.seen[1]) < 0.5 * math.log(apart.seen[1])


def test_of_two_metrics_the_test_is_that_of_their_heterogeneity() -> None:
    """Cochran's Q of two estimates over its mean is the square of their difference over its standard error."""
    first, second = (depth_only(points) for points in draw(5))
    stars = fits(first, second)
    used = {
        label: [p for p, row in zip(points, star.points, strict=True) if row["arm"] == "depth" and row["used"]]
        for label, (star, points) in zip(("first", "second"), stars, strict=True)
    }
    forest = across_metrics("depth", used, draws=300, seed=7)
    assert not isinstance(forest, str)
    found = beside(*stars, draws=300, seed=7).dimensions["depth"]  # the first and only arm: its seed is 7
    assert found.exponents and found.exponents.p == pytest.approx(forest.p)
    assert found.exponents.t**2 == pytest.approx(forest.q / forest.expected)
    assert found.same == pytest.approx([row["estimate"] for row in forest.rows])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0])
    without = np.array([(values.sum() - one) / 3 for one in values])
    assert _jackknife(without) == pytest.approx(values.std(ddof=1) / 2)


def test_exchanging_the_metrics_inverts_the_ratios() -> None:
    first, second = (depth_only(points) for points in draw(2, larger={"depth": 1.4}))
    stars = fits(first, second)
    there, back = (beside(*pair, draws=100).dimensions["depth"] for pair in (stars, stars[::-1]))
    assert there.exponents and back.exponents
    assert back.exponents.ratio.estimate == pytest.approx(1 / there.exponents.ratio.estimate)
    assert back.shapes[1].tested.ratio.estimate == pytest.approx(1 / there.shapes[1].tested.ratio.estimate)


def test_an_exponent_that_one_metric_does_not_identify_is_not_compared() -> None:
    """All errors equal: a metric that every shape answers alike. Nothing of it may look like agreement."""
    first, second = (depth_only(points) for points in draw(0))
    flat = [Point(**{**vars(point), "error": 1.2 + 1e-3 * (point.depth == 1)}) for point in second]
    found = beside(*fits(first, flat), draws=50)
    assert found.dimensions["depth"].exponents is None and found.parallel_p is None
    assert "by the second metric not identified" in str(found.dimensions["depth"].why)


def test_the_command_leaves_one_report_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star = write(tmp_path / "star_two", noise=0.002, larger={"width": 2.0})
    assert cli.main(["compare", str(star), "--metrics", "fractals", "multitask", "--no-power"]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "star_two-fractals-10-vs-multitask"
    found = json.loads((out / "comparison.json").read_text())
    assert verdict(found)[1].startswith(
        "The best shapes are not the same: by multitask, against fractals@10, the best width"
    )
    for line in verdict(found):
        assert line[:60] in " ".join(said.split())
    html, markdown = ((out / name).read_text() for name in ("report.html", "report.md"))
    assert html.count("<svg") == 5 and 'aria-label="Best width against compute by both metrics."' in html
    assert "<script" not in html and "s by multitask" in markdown
    twin = json.loads((out / "report.json").read_text())
    rows = twin["sections"]["paths"]["tables"]["shapes"]["rows"]
    assert len(rows) == 9 and rows[0]["ratio"]["lo"] < 2 < rows[0]["ratio"]["hi"]
    assert found["first"]["to_beat"] == pytest.approx({"chance": 0.98, "ridge on pixels": 0.8})
    assert cli.main(["status", str(tmp_path)]) in (0, 2)  # a report beside the sweep is no run of it


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--metrics", "fractals", "fractals@10"], "fractals@10 is given twice"),
        (["--metrics", "fractals@many", "multitask"], "is no metric; write DATASET@SHOTS"),
        (
            ["--metrics", "digits", "multitask"],
            "holds no evaluation of digits at 10 shots; it has fractals at 10, multitask.",
        ),
        (["--metrics", "fractals", "multitask", "--same-compute"], "--same-compute has no meaning with --metrics"),
        ([], "give the directory of another, or two metrics of it"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    star = write(tmp_path / "star_two")
    assert cli.main(["compare", str(star), *given]) == 2
    assert said in capsys.readouterr().err
