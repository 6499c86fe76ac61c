"""Designs against brute force, plain designs and the planner; the commands that print and write them."""

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sovit import records
from sovit.analysis.planning.design import (
    LEAST_STEPS,
    Step,
    Task,
    best_design,
    friendly_sizes,
    longer_pays,
    measured_arms,
    next_steps,
    planned_run,
    uniform_designs,
    worth_running,
)
from sovit.analysis.planning.exchange import Run, make_pool, search, shifted
from sovit.analysis.planning.information import ASSUMED, Spread, arm, assumed_law, expect
from sovit.analysis.points import Dimensions
from sovit.analysis.star import fit_star
from sovit.cli import design
from sovit.cli.expected import parse_noise, plan_text, spreads
from sovit.config import compose
from sovit.derived import eval_steps
from sovit.launch.plan import plan
from sovit.launch.sweep import load_sweep
from sovit.schema import DurationsConfig

SWEEPS = Path(__file__).parents[1] / "sweeps"
CENTER = Dimensions(32, 4, 128)
TINY = compose([])
NOISE = Spread(0.01, 0.01)


def task(budget=40_000.0, target=20_000.0, middle=120.0, cfg=TINY, **options):
    laws = {name: assumed_law(name, getattr(CENTER, name), middle) for name in ASSUMED}
    return Task(CENTER, cfg, laws, dict.fromkeys(laws, NOISE), budget, target, middle, **options)


def sovit(*arguments: str) -> int:
    """One of the module's commands, as the command line would call it."""
    parser = argparse.ArgumentParser()
    design.add(parser.add_subparsers(dest="name"))
    parsed = parser.parse_args(arguments)
    return parsed.command(parsed)


def test_the_search_finds_what_trying_everything_finds():
    """One arm of 7 candidate sizes, 8 runs of at most 3 seeds on at least 5 sizes: all 3,640 designs or so, one by one."""
    law, sizes = assumed_law("depth", 4, 120), [1, 2, 3, 4, 6, 10, 16]
    run = Run(tuple(np.geomspace(20, 600, 8)), 1800.0, 500)
    pool = make_pool("depth", law, NOISE, sizes, [run] * 7, 20_000.0)
    found = search([pool], 8 * run.train_gflops, 8)
    assert found is not None and found[0].sum() == 8
    best = min(
        float(pool.errors(pool.total(np.array(counts))))
        for counts in itertools.product(range(4), repeat=7)
        if sum(counts) == 8 and np.count_nonzero(counts) >= 5
    )
    assert float(pool.errors(pool.total(found[0]))) == pytest.approx(best, rel=0.01)


def test_a_pool_promises_what_the_information_of_its_points_promises():
    """The mean over three placements of the optimum, each by the ordinary route over points."""
    law, sizes, counts = assumed_law("depth", 4, 120), [1, 2, 4, 8, 16], np.array([2, 1, 2, 1, 2])
    run = Run(tuple(np.geomspace(20, 600, 8)), 1800.0, 500)
    pool = make_pool("depth", law, NOISE, sizes, [run] * 5, 20_000.0)
    each = np.repeat(sizes, counts).astype(float)
    x, t, index = np.repeat(each, 8), np.tile(run.t, 8), np.repeat(np.arange(8), 8)
    variances = [
        expect(arm("depth", shifted(law, factor), NOISE, x, t, index), 20_000.0).log_se_best ** 2
        for factor in (0.6, 1.0, 1.7)
    ]
    assert float(pool.errors(pool.total(counts))) == pytest.approx(np.mean(variances), rel=1e-6)


def test_the_design_beats_plain_stars_within_its_budget():
    found = best_design(task(budget=20_000.0))
    rivals = uniform_designs(task(budget=20_000.0), found)
    assert len(rivals) >= 2
    assert found.train_gflops <= 20_000
    for name, rival in rivals.items():
        assert rival.train_gflops > 0.95 * 20_000, name
        assert found.error < 0.95 * rival.error, name
    for name, sizes in found.seeds.items():
        assert len(sizes) >= 5 and max(sizes.values()) <= 3
        assert getattr(CENTER, name) not in sizes
    assert min(planned_run(found.cfg, CENTER._replace(width=size)).first_steps for size in found.seeds["width"]) >= 100
    assert best_design(task(budget=20_000.0)).seeds == found.seeds  # no chance in it


def test_more_compute_is_a_surer_shape():
    small, large = (best_design(task(budget=budget)) for budget in (10_000.0, 40_000.0))
    assert large.error < 0.8 * small.error
    assert large.wasted < small.wasted


@pytest.mark.parametrize("weights", ["ema", "cooled"])
def test_a_run_costs_what_the_planner_says(weights, tmp_path):
    """Three times the longest duration with averaged weights; branches come on top."""
    overrides = [f"eval.weights={weights}", "durations.first=20 gflops", "durations.last=160 gflops", "durations.num=4"]
    cfg = compose(overrides)
    sweep = load_sweep(
        SWEEPS / "star_smoke.yaml", ["experiment=star_tiny", "shape=32x4x128", f"eval.weights={weights}"]
    )
    cell = plan(sweep).cells[0]
    run = planned_run(dataclasses.replace(cfg, durations=compose(["experiment=star_tiny"]).durations), CENTER)
    assert run.train_gflops == pytest.approx(cell.train_gflops, rel=1e-12)
    assert run.first_steps == min(cell.evaluations)
    short = planned_run(cfg, CENTER)
    extra = 0.2 * (20 + 40 + 80) if weights == "cooled" else 0.0  # the last branch is part of the longest duration
    assert short.train_gflops == pytest.approx(3 * (160 + extra), rel=0.01)
    assert short.t == pytest.approx((20, 40, 80, 160), rel=0.01)


def test_sizes_are_multiples_that_hardware_likes():
    vit = compose(["model=vit"])
    for size in friendly_sizes("width", 500, 8000, vit):
        assert size % 16 == 0 and size % (64 if size >= 512 else 16) == 0
    for size in friendly_sizes("mlp_dim", 1500, 24_000, vit):
        assert size % 128 == 0
    assert friendly_sizes("depth", 1, 4, TINY) == [1, 2, 3, 4]
    assert all(
        size % 24 == 0 for size in friendly_sizes("width", 100, 1000, compose(["model.num_heads=12", "shape=48x4x128"]))
    )


def test_durations_that_the_configuration_lists_are_kept():
    found = best_design(task(cfg=compose(["experiment=star_tiny"]), budget=30_000.0))
    assert found.cfg.durations.values == compose(["experiment=star_tiny"]).durations.values
    assert found.train_gflops <= 30_000


def test_a_budget_too_small_is_named():
    with pytest.raises(ValueError, match=r"--budget 50 trains no 5 sizes an arm for at least 100 steps"):
        best_design(task(budget=50.0, middle=0.2))


def test_the_written_sweep_plans_and_trains_the_star_that_was_promised(tmp_path, capsys):
    """The command plans the files it wrote and prints what they cost; their cells are those of the design."""
    file = tmp_path / "my_star.yaml"
    arguments = ["design", "--budget", "10000", "--target", "5000", "--noise", "sigma=0.015,tau=0.02"]
    assert sovit(*arguments, "--write", str(file), f"runs_dir={tmp_path}") == 0
    out = capsys.readouterr().out
    sweeps = [load_sweep(one) for one in sorted(tmp_path.glob("my_star*.yaml"))]
    cells = [dict(item.split("=", 1) for item in cell) for sweep in sweeps for cell in sweep.cells]
    assert out.startswith(f"{len(cells)} runs for ")
    assert len({(cell["shape"], cell["seed"]) for cell in cells}) == len(cells)
    assert {sweep.name for sweep in sweeps} == {"my_star"}  # one directory of runs, one fit
    assert [cell["shape"] for cell in cells].count("32x4x128") == 1
    shapes = [Dimensions(*map(int, cell["shape"].split("x"))) for cell in cells]
    for name in ASSUMED:
        assert len({getattr(shape, name) for shape in shapes}) >= 6
    durations = {tuple(cell[f"durations.{key}"] for key in ("first", "last", "num")) for cell in cells}
    assert len(durations) == 1  # one duration is one slice
    first, last, num = durations.pop()
    cfg = dataclasses.replace(TINY, durations=DurationsConfig(first=first, last=last, num=int(num)))
    assert 0.95 * 10_000 < sum(planned_run(cfg, shape).train_gflops for shape in shapes) <= 10_000
    for sweep in sweeps:
        assert f"sovit run {sweep.path}    # {len(sweep.cells)} cells, " in out
    with pytest.raises(ValueError, match="exists already"):
        sovit(*arguments, "--write", str(file), f"runs_dir={tmp_path}")


# A measured star: eight shapes of each arm, errors drawn from laws, as finished runs on disk.


def measured_star(directory: Path, *, seeds=(0,), noise=NOISE, rng_seed=0) -> Path:
    rng = np.random.default_rng(rng_seed)
    cfg = compose(["experiment=star_tiny"])
    grid = {"width": (8, 16, 24, 40, 64, 96), "depth": (1, 2, 3, 6, 8, 16), "mlp_dim": (32, 48, 64, 192, 256, 512)}
    for seed in seeds:
        for shape, name in [(CENTER, "depth"), *((CENTER._replace(**{n: x}), n) for n, s in grid.items() for x in s)]:
            cell = dataclasses.replace(cfg, shape=str(shape), seed=seed, runs_dir=str(directory.parent))
            run = planned_run(cell, shape)
            run_id = records.run_id(cell)
            path = directory / run_id
            path.mkdir(parents=True)
            facts = {"run_id": run_id, "sweep": directory.name, **shape._asdict(), "seed": seed}
            record = facts | {"schema": 1, "status": "done", "num_heads": 4, "patch_size": 8}
            record |= {"steps_trained": max(eval_steps(cell)), "forward_gflops": 3e-4, "wall_s": 60.0}
            records.write_json(path / records.RUN, record | {"config": dataclasses.asdict(cell)})
            offset = noise.tau * rng.normal()
            law = assumed_law(name, getattr(CENTER, name), 120.0)
            rows = []
            for t, (step, duration) in zip(run.t, eval_steps(cell).items(), strict=True):
                error = float(law.error(getattr(shape, name), t)) * math.exp(offset + noise.sigma * rng.normal())
                rows.append(
                    facts
                    | {"schema": 1, "step": step, "t_gflops": t, "duration": duration, "weights": "ema"}
                    | {"dataset": "fractals", "shots": 10, "draw": 0, "error": error, "stderr": 0.008}
                )
            records.append_lines(path / records.EVALS, rows)
    return directory


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    from sovit.analysis.points import load_points

    directory = measured_star(tmp_path_factory.mktemp("runs") / "star_tiny")
    points, exclusions = load_points(directory, "fractals", 10)
    fit = fit_star(points, sweep="star_tiny", dataset="fractals", shots=10, exclusions=exclusions)
    fit.write(directory / "fit.json")
    return directory


def fit_of(star):
    return json.loads((star / "fit.json").read_text())


def test_a_measured_arm_promises_the_error_its_fit_has(star):
    """The information at the fitted law and noise is where the fit's own standard error comes from."""
    fit = fit_of(star)
    noise = {name: Spread(row["sigma"], row["tau"]) for name, row in fit["arms"].items()}
    arms, remarks = measured_arms(fit, noise)
    assert remarks == [] and set(arms) == set(ASSUMED)
    for name, points in arms.items():
        assert expect(points).log_se == pytest.approx(fit["arms"][name]["log_se"], rel=1e-3)


def test_the_next_cell_is_the_one_that_helps_most(star):
    """Against trying each candidate cell alone: adding its points, inverting the whole information again."""
    arms, _ = measured_arms(fit_of(star), dict.fromkeys(ASSUMED, NOISE))
    cfg = compose(["experiment=star_tiny"])
    candidates = {
        name: {x: planned_run(cfg, CENTER._replace(**{name: x})) for x in sizes}
        for name, sizes in {"width": (8, 40, 96), "depth": (1, 3, 16), "mlp_dim": (32, 192, 512)}.items()
    }
    seeds = {("depth", 1): 1, ("mlp_dim", 32): 1}
    step, *more = next_steps(arms, candidates, seeds, 5000.0, 1e9, 3)

    def after(name, size):
        total = 0.0
        for other, points in arms.items():
            x, t, run = points.x, points.t, points.run
            if other == name:
                new = np.array(candidates[name][size].t)
                x, t = np.append(x, np.full(len(new), size)), np.append(t, new)
                run = np.append(run, np.full(len(new), 99))
            total += expect(arm(other, points.law, NOISE, x, t, run), 5000.0).log_se_best ** 2
        return total

    best = min(((name, size) for name in candidates for size in candidates[name]), key=lambda pair: after(*pair))
    assert (step.arm, step.size) == best  # all cells of this sweep cost the same
    assert step.error == pytest.approx(math.sqrt(after(*best) / 3), rel=1e-6)
    assert step.seed == seeds.get(best, 0)
    assert len(more) == 2 and more[1].error < more[0].error < step.error
    assert next_steps(arms, candidates, seeds, 5000.0, 100.0, 3) == []  # nothing so cheap
    assert longer_pays(arms, candidates, 5000.0) > 0


def test_stop_when_cells_cost_more_than_they_save_or_little_enough_is_lost():
    steps = [Step("depth", 1, 1, 100.0, 0.5, share) for share in (0.20, 0.15, 0.14)]
    # 3 T = 3,000: the first saves 300, the second 150, the third 30 of its 100
    assert worth_running(steps, 0.30, 1000.0, 0.01) == 2
    assert worth_running(steps, 0.30, 100.0, 0.01) == 0  # 30 saved by 100
    assert worth_running(steps, 0.30, 1e6, 0.01) == 3
    assert worth_running(steps, 0.30, 1e6, 0.20) == 1  # enough
    assert worth_running(steps, 0.15, 1e6, 0.20) == 0  # enough before the first


def test_next_says_what_to_run_and_writes_a_sweep_that_plans(star, tmp_path, capsys):
    file = tmp_path / "more.yaml"
    common = ["next", str(star), "--cells", "4", "--file", str(SWEEPS / "star_tiny.yaml")]
    assert sovit(*common, "--target", "1e6", "--write", str(file)) == 0  # a larger target pays for more runs
    out = capsys.readouterr().out
    assert "Worth running: the first 4" in out and "(now)" in out and "no repeated seeds" in out
    cells = [cell for one in sorted(tmp_path.glob("more*.yaml")) for cell in load_sweep(one).cells]
    assert len(cells) == 4
    done = {
        (str(Dimensions(row["width"], row["depth"], row["mlp_dim"])), row["seed"]) for row in fit_of(star)["points"]
    }
    listed = {
        (item["shape"], int(item["seed"])) for item in (dict(text.split("=", 1) for text in cell) for cell in cells)
    }
    assert not done & listed
    # so that their records join the others
    assert all({"experiment=star_tiny", f"runs_dir={star.parent}"} <= set(cell) for cell in cells)
    assert sovit(*common, "--target", "300") == 0
    assert "Stop: these cells cost more training GFLOPs than they save" in capsys.readouterr().out
    assert sovit(*common, "--target", "1e6", "--enough", "0.9") == 0
    assert "no more than the 90.0% allowed" in capsys.readouterr().out


def test_repeated_seeds_tell_the_noise_before_the_fit_does(star, tmp_path, capsys):
    both = measured_star(tmp_path / "star_tiny", seeds=(0, 1), rng_seed=3)
    found = spreads(f"from={both}", fit_of(star), ASSUMED, ("fractals", 10))
    assert "from repeated seeds: 38 runs of 19 shapes, 19 degrees of freedom" in found["depth"].basis
    assert found["depth"].tau == pytest.approx(NOISE.tau, rel=0.4)
    assert found["depth"].sigma == pytest.approx(NOISE.sigma, rel=0.2)
    from_fit = spreads(f"from={star}", None, ASSUMED, ("fractals", 10))
    assert "REML" in from_fit["depth"].basis
    half = spreads(f"from={star},tau=0.03", None, ASSUMED, ("fractals", 10))
    assert half["depth"].tau == 0.03 and half["depth"].sigma == from_fit["depth"].sigma
    assert half["depth"].basis.endswith("tau as given")


def test_plan_prints_what_each_arm_will_tell(star):
    made = plan(load_sweep(SWEEPS / "star_tiny.yaml"))
    text = plan_text(made, ("fractals", 10), "sigma=0.005,tau=0.005", None, None)
    run = planned_run(compose(["experiment=star_tiny"]), CENTER)
    sizes = [16, 24, 40, 64, 128, 256]
    law = assumed_law("width", 64, math.sqrt(run.t[0] * run.t[-1]))
    x, t, index = np.repeat(sizes, 6), np.tile(run.t, 6), np.repeat(np.arange(6), 6)
    found = expect(arm("width", law, Spread(0.005, 0.005), x, t, index))
    row = next(line for line in text.splitlines() if line.startswith("width "))
    assert row.split()[-3:] == [f"{found.s * found.log_se:.2g}", f"[{found.lo:.2f},", f"{found.hi:.2f}]"]
    assert "4,608" in row and "x16" in row and "the durations span only x5.7 of compute" in text
    fitted = plan_text(made, ("fractals", 10), None, star / "fit.json", 1e5)
    assert "Law: as fitted in" in fitted and "optimum at T" in fitted and "REML" in fitted


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sigma=0.005", "tau, the spread between runs, matters most"),
        ("sigma=0.005,tua=0.005", "'tua=0.005'; write each of sigma, tau, slope"),
        ("sigma=0.005,sigma=0.01", "at most once"),
        ("sigma=x,tau=0.1", "sigma=x is no number"),
        ("sigma=0,tau=0.1", "sigma above 0"),
        ("from=nowhere", "nowhere is not a directory"),
        ("", "not known"),
    ],
)
def test_bad_noise_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        spreads(text, None, ASSUMED, ("fractals", 10))


def test_noise_is_read_as_written():
    assert parse_noise("sigma=0.005, tau=0.01,from=runs/x") == {"sigma": "0.005", "tau": "0.01", "from": "runs/x"}


GIVEN = ["--noise", "sigma=0.01,tau=0.01", "--budget", "20000", "--target", "5000"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["design", *GIVEN, "shape=32x4x128"],
            r"shape is what the design chooses; leave it out \(the center is --center",
        ),
        (["design", *GIVEN, "durations.last=9 gflops"], "durations.last is what the design chooses"),
        (["design", *GIVEN, "--range", "1"], "--range 1 is not between 2 and 1000"),
        (["design", *GIVEN, "--durations", "2"], "give at least 3"),
        (["design", *GIVEN, "--center", "33x4x128"], "width=33 is not divisible by num_heads=4"),
        (["design", *GIVEN, "--law", "nowhere.json"], "nowhere.json: no such file or directory; run sovit fit first"),
        (["design", "--budget", "20000", "--target", "5000"], "write --noise sigma=0.005,tau=0.005"),
        (["design", *GIVEN, "modle=vit"], "'modle' is not a key"),
        (["next", "nowhere"], "run sovit fit first"),
        (["next", "nowhere", "--enough", "1"], "write 0.01 for 1%"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        sovit(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "is no fit of a star"),
        ('{"kind": "grid", "schema": 1}', "is no fit of a star"),
        ('{"kind": "star", "schema": 99}', "has schema 99, this version reads"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_that_is_no_fit_is_named(content, sentence, tmp_path):
    file = tmp_path / "fit.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        sovit("design", *GIVEN, "--law", str(file))


def test_a_plan_of_one_shape_has_no_exponent_to_expect():
    made = plan(load_sweep(SWEEPS / "star_smoke.yaml", ["shape=32x4x128"]))
    with pytest.raises(ValueError, match="plan the whole star"):
        plan_text(made, ("fractals", 10), "sigma=0.01,tau=0.01", None, None)


def test_arms_without_an_optimum_are_left_out_aloud(star):
    fit = fit_of(star)
    fit["arms"]["depth"]["law"]["beta"] = 0.0
    fit["arms"]["width"]["law"] = None
    arms, remarks = measured_arms(fit, dict.fromkeys(ASSUMED, NOISE))
    assert set(arms) == {"mlp_dim"}
    assert any("depth is left out" in text and "add sizes above the largest" in text for text in remarks)
    assert any("width is left out" in text for text in remarks)
    fit["arms"]["mlp_dim"]["law"] = None
    with pytest.raises(ValueError, match="no arm of this star has a law with an optimum"):
        measured_arms(fit, dict.fromkeys(ASSUMED, NOISE))


def test_least_steps_default_is_the_searchs():
    parser = argparse.ArgumentParser()
    design.add(parser.add_subparsers(dest="name"))
    assert parser.parse_args(["design", "--budget", "1", "--target", "1"]).least_steps == LEAST_STEPS
