"""`sovit check` from directories to its table: what is tested, what is said, and that it is said in JSON too."""

import argparse
import json
import math

import numpy as np
import pytest

from sovit import records
from sovit.analysis.checks import doubts
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Dimensions, Point
from sovit.cli import check

CENTER = Dimensions(32, 4, 128)
ARMS = {"width": (16, 24, 40, 64, 128, 256), "depth": (1, 2, 3, 6, 16), "mlp_dim": (16, 32, 64, 256, 512)}
EXPONENTS = {"width": (1.3, 0.7), "depth": (0.85, 0.6), "mlp_dim": (0.55, 0.5)}
TIMES = [45.0, 64.0, 91.0, 128.0, 181.0, 256.0]


def star(seed=0, noise=0.005, *, effect=None, arms=ARMS, prefix="star", seeds=(0,)):
    """The tiny star drawn from a law for each arm. ``effect``: (dimension, size, t) -> added to the log error."""
    rng, points = np.random.default_rng(seed), []
    shapes = [(name, CENTER._replace(**{name: size})) for name, sizes in arms.items() for size in sizes]
    for run_seed in seeds:
        for name, shape in [*shapes, ("width", CENTER)]:
            (a, b), middle, c, size = EXPONENTS[name], getattr(CENTER, name), 0.65, getattr(shape, name)
            law = Law(0.06 * b / a * middle**a, a, 0.06 * middle**-b * 107**c, b, 0.05 * 107**c, c, 0.15)
            luck = noise * rng.normal()
            for t in TIMES:
                extra = effect(name, size, t) if effect else 0.0
                error = float(law.error(size, t)) * math.exp(luck + noise * rng.normal() + extra)
                run = f"{prefix}-w{shape.width:04d}-d{shape.depth:02d}-m{shape.mlp_dim:04d}-s{run_seed}"
                points.append(Point(run, *shape, run_seed, t, f"{t:g} gflops", error, 0.005, 4))
    return points


def rows(found, name):
    return {row["subject"]: row for row in found["rows"] if row["check"] == name}


@pytest.fixture(scope="module")
def clean():
    other = [Point(**(vars(point) | {"error": 0.7 * point.error})) for point in star(1)]
    metric = ("fractals", 10)
    by_metric = {metric: star(), ("fractals", 25): other, ("digits", 10): other}
    return doubts.check_star(star(), metric=metric, by_metric=by_metric, others={"other": star(2)}, draws=99)


def test_every_check_has_a_row_for_every_arm(clean):
    names = ["quasiconvex", "center", "star other", "shots", "data sets", "held out", "held-out best", "influence"]
    names += ["laws: budgets", "laws: sizes"]
    assert list(dict.fromkeys(row["check"] for row in clean["rows"])) == names
    for name in names:
        assert list(rows(clean, name)) == list(DIMENSIONS)
    for row in clean["rows"]:
        assert row["verdict"] in (doubts.QUIET, doubts.DOUBT, doubts.UNTESTED)
        assert row["text"].endswith(".")
        assert row["verdict"] != doubts.UNTESTED or row["p"] is None


def test_the_result_is_json_without_nan_and_counts_its_tests(clean):
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean
    tested = [row["p"] for row in clean["rows"] if row["p"] is not None]
    assert clean["num_tests"] == len(tested)
    assert clean["expected_by_chance"] == pytest.approx(0.05 * len(tested))
    assert clean["num_doubts"] == sum(row["verdict"] == doubts.DOUBT for row in clean["rows"])
    assert clean["smallest_p_of_all"] == pytest.approx(min(1.0, len(tested) * min(tested)))


def test_a_clean_star_raises_few_doubts(clean):
    """24 tests and 6 comparisons of laws: more than 5 doubts would happen once in 300 stars."""
    assert clean["num_doubts"] <= 5


def test_the_table_says_every_sentence(clean):
    page = " ".join(doubts.text(clean).split())
    for row in clean["rows"]:
        assert " ".join(row["text"].split()) in page
    assert f"Of {clean['num_tests']} tests at 5%" in page
    assert max(len(line) for line in doubts.text(clean).splitlines() if line.startswith("    ")) <= doubts.COLUMNS


def test_each_trouble_is_found_by_its_check():
    """A second dip in width, and errors of depth that bend away."""

    def effect(name, size, t):
        dip = 0.25 * (name == "width" and size == 40)
        return dip + 0.08 * (name == "depth") * max(0.0, math.log(t / 107))

    found = doubts.check_star(star(effect=effect, seeds=(0, 1)), draws=99)
    assert rows(found, "quasiconvex")["width"]["verdict"] == doubts.DOUBT
    assert "width 40" in rows(found, "quasiconvex")["width"]["text"]
    assert rows(found, "held out")["depth"]["verdict"] == doubts.DOUBT
    assert rows(found, "held out")["depth"]["statistic"].startswith("+")
    assert rows(found, "quasiconvex")["mlp_dim"]["verdict"] == doubts.QUIET


def test_too_little_data_is_said_in_words_and_crashes_nothing():
    tiny = {"width": (16, 64), "depth": (1, 2, 3, 6, 16)}
    found = doubts.check_star(star(arms=tiny), by_metric={}, others={"o": star(arms={"depth": (1, 2, 6)})}, draws=19)
    for row in found["rows"]:
        if row["subject"] == "width":
            assert row["verdict"] == doubts.UNTESTED
            assert "too few" in row["text"]
    assert rows(found, "star o")["depth"]["verdict"] == doubts.UNTESTED
    assert "mlp_dim" not in rows(found, "quasiconvex")


def test_points_of_no_star_are_refused():
    grid = [Point(**(vars(point) | {"depth": depth})) for point in star()[:6] for depth in (1, 2)]
    with pytest.raises(ValueError, match="not on an arm around"):
        doubts.star_arms([*star(), *grid], CENTER)


def test_the_center_and_errors_above_the_cutoff_are_in_no_arm():
    points = star()
    high = [Point(**(vars(point) | {"error": 0.7})) if point.depth == 16 else point for point in points]
    arms = doubts.star_arms(high)
    assert {len({p.run_id for p in group}) for group in arms.values()} == {6, 4, 5}
    assert all(point.error <= 0.6 for group in arms.values() for point in group)


def test_other_metrics_use_the_same_runs_and_durations_only():
    group = [point for point in star() if point.depth == 2]
    other = [Point(**(vars(point) | {"error": 0.95 if point.t_gflops < 50 else 0.3})) for point in star(1)]
    same = doubts._same(group, other)
    assert {point.run_id for point in same} == {group[0].run_id}
    assert len(same) == 5


def test_run_names_cannot_drive_the_terminal():
    evil = [Point(**(vars(point) | {"run_id": f"\x1b[2J{point.run_id}"})) for point in star()]
    found = doubts.check_star(evil, others={"\x1b]0;x\x07": star(2)}, draws=19)
    assert all(character.isprintable() or character == "\n" for character in doubts.text(found))


def write(points, sweep):
    """Records of every point, each evaluation a second time at 25 shots and a fifth less."""
    for point in points:
        directory = sweep / point.run_id
        directory.mkdir(parents=True, exist_ok=True)
        sizes = {name: getattr(point, name) for name in DIMENSIONS}
        head = {"schema": 1, "run_id": point.run_id, "seed": point.seed, **sizes}
        config = {"name": "star", "optim": {"lr": 0.005}}
        records.write_json(directory / records.RUN, head | {"status": "done", "reason": None, "config": config})
        line = head | {"sweep": "star", "step": round(point.t_gflops), "t_gflops": point.t_gflops, "weights": "ema"}
        line |= {"duration": point.duration, "dataset": "fractals", "draw": 0, "stderr": point.stderr}
        lines = [line | {"shots": 10, "error": point.error}, line | {"shots": 25, "error": 0.8 * point.error}]
        records.append_lines(directory / records.EVALS, lines)
    return sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of two stars of the same name."""
    place = tmp_path_factory.mktemp("runs")
    return write(star(1), place / "one" / "star"), write(star(2), place / "two" / "star")


def run(*arguments):
    parser = argparse.ArgumentParser()
    check.add(parser.add_subparsers(dest="name"))
    parsed = parser.parse_args(["check", *map(str, arguments)])
    return parsed.command(parsed)


def test_the_command_reads_stars_metrics_and_another_star(runs, capsys):
    capsys.readouterr()
    assert run(*runs, "--draws", 19, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sweep"] == "star"
    assert found["metric"] == {"dataset": "fractals", "shots": 10}
    assert set(rows(found, "shots")) == set(DIMENSIONS)
    assert set(rows(found, f"star {runs[1]}")) == set(DIMENSIONS)
    assert [row["label"] for row in found["details"]["shots"]["width"]["rows"]] == ["10-shot", "25-shot"]
    assert found["details"]["held out, by share"]["width"][0]["num_held"] == 1
    assert run(runs[0], "--draws", 19) == 0
    page = capsys.readouterr().out
    assert page.startswith("star: 10-shot error on fractals, 17 runs\n\ncheck ")
    assert "In doubt: " in page


def test_the_command_refuses_what_it_cannot_compare(runs, tmp_path):
    with pytest.raises(ValueError, match="is the sweep itself"):
        run(runs[0], runs[0])
    with pytest.raises(ValueError, match="holds no finished run"):
        run(tmp_path)
    with pytest.raises(ValueError, match="'32x4' is no shape"):
        run(runs[0], "--center", "32x4")
    with pytest.raises(ValueError, match="no evaluation of fractals at 3 shots"):
        run(runs[0], "--shots", 3)
