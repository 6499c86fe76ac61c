"""Simulated sweeps: the truths against brute force, the noise against its theory, the records against trained ones."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from sovit import cli, records
from sovit.analysis.points import DIMENSIONS, Dimensions, load_points
from sovit.analysis.simulation import truth
from sovit.analysis.simulation.simulate import TINY, Disturbance, cells_at, draw, draw_errors, star_shapes, truth_for
from sovit.analysis.star import fit_star
from sovit.cli import simulate as command
from sovit.config import compose
from sovit.flops import forward_gflops
from sovit.launch.local.runner import refuse_changed
from sovit.launch.plan import plan
from sovit.launch.sweep import SweepError, load_sweep
from sovit.shape import Shape

ROOT = Path(__file__).parents[1]
SWEEPS = ROOT / "sweeps"
STAR = str(SWEEPS / "star_tiny.yaml")
CENTER = Dimensions(32, 4, 128)
ARMS = {"width": [16, 24, 40, 64, 128], "depth": [1, 2, 3, 6, 16], "mlp_dim": [16, 32, 64, 256, 512]}
COMPUTE = [45, 64, 91, 128, 181, 256]
SEPARABLE = truth.Separable((10, 0.05, 0.3), (1.7, 0.8, 0.5), (0.004, 0.2, 0.05), (1.2, 0.6, 0.5), 0.2, 0.65, 0.15)
FLOPS = truth.Flops((30, 0.05, 0.1), (1.8, 0.8, 0.3), 80.0, 0.65, 0.15, TINY)
TRUTHS = pytest.mark.parametrize("law", [SEPARABLE, FLOPS], ids=["separable", "flops"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a sweep file of three cells and three durations."""
    path = tmp_path_factory.mktemp("sweeps") / "small.yaml"
    document = yaml.safe_load((SWEEPS / "star_smoke.yaml").read_text())
    document["parameters"] |= {"name": {"value": "small"}, "shape": {"values": ["32x4x128", "16x4x128", "32x2x128"]}}
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.fixture(scope="module")
def written(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory that the command has filled once; copy it to change it."""
    runs = tmp_path_factory.mktemp("runs")
    assert sovit(small, "--seed", 5, "--runs-dir", runs) == 0
    return runs


def star(compute=COMPUTE, seeds=(0,)):
    return cells_at(star_shapes(CENTER, ARMS), compute, seeds=seeds)


def gflops(width, depth, mlp_dim):
    """By the closed form of sovit.flops, not by the polynomial that a law is solved with."""
    return forward_gflops(Shape(width, depth, mlp_dim, 1, 8), 16, channels=1, pool="avg", num_classes=256)


def written_out(law, shape, t):
    """The two equations, term by term."""
    terms = [law.alpha[k] * shape[k] ** -law.a[k] for k in range(3)]
    if law is SEPARABLE:
        terms += [law.beta[k] * shape[k] ** law.b[k] * t**-law.c for k in range(3)] + [law.xi * t**-law.c]
    else:
        terms.append(law.beta * (t / gflops(*shape)) ** -law.c)
    return sum(terms) + law.eps


@TRUTHS
def test_without_noise_every_point_is_the_truth(law):
    points = draw(law, star(), Disturbance(), np.random.default_rng(0), num_draws=3)
    assert len(points) == 16 * 6 and points[6].duration == "45 gflops" and points[-1].num_draws == 3
    for point in points:
        expected = written_out(law, (point.width, point.depth, point.mlp_dim), point.t_gflops)
        assert point.error == pytest.approx(expected, rel=1e-12)
        assert point.stderr == pytest.approx(0, abs=1e-15)


@TRUTHS
def test_the_stated_optimum_and_growth_are_those_of_a_brute_force_search(law):
    """Alone: the least of a fine scan of one dimension. Together: no step away from it in any direction is better."""

    def error(sizes, t):
        return law.error(sizes, t)

    found = {}
    for t in (60.0, 70.0):
        for k in range(3):
            scan = np.tile(np.array(CENTER, float), (200_001, 1))
            scan[:, k] *= np.exp(np.linspace(-2, 2, len(scan)))
            found[t, k] = scan[np.argmin(error(scan, t)), k]
        assert law.arm_optimum(t, CENTER) == pytest.approx([found[t, k] for k in range(3)], rel=1e-4)
        best = law.optimum(t)
        steps = np.exp(0.02 * np.random.default_rng(0).normal(size=(2000, 3)))
        assert np.all(error(best * steps, t) > law.frontier(t))
    assert law.growth(65.0) == pytest.approx(
        np.log(law.optimum(65.1) / law.optimum(64.9)) / np.log(65.1 / 64.9), rel=1e-4
    )
    scanned = [math.log(found[70.0, k] / found[60.0, k]) / math.log(70 / 60) for k in range(3)]
    assert law.arm_growth(math.sqrt(60 * 70), CENTER) == pytest.approx(scanned, rel=2e-3)


def test_an_arm_of_the_joint_law_is_the_law_of_one_dimension():
    """Eq. 3 with the others at the center is Eq. 2; without this a star could not be compared with its truth."""
    for name in DIMENSIONS:
        law = SEPARABLE.arm(name, CENTER)
        for size in ARMS[name]:
            shape = CENTER._replace(**{name: size})
            assert float(law.error(size, 77.0)) == pytest.approx(written_out(SEPARABLE, shape, 77.0), rel=1e-12)


PAPER = star_shapes(
    Dimensions(1968, 40, 6144),
    {"width": [608, 928, 1328], "depth": [8, 12, 20], "mlp_dim": [1088, 1728, 2592]},
)
GRID = [Dimensions(w, d, m) for w in (16, 24, 48) for d in (1, 2, 4) for m in (32, 64, 128)]


@pytest.mark.parametrize("law", ["separable", "flops"])
@pytest.mark.parametrize(
    ("shapes", "compute"), [(star_shapes(CENTER, ARMS), COMPUTE), (PAPER, [1e10, 5e10, 2e11]), (GRID, [16, 32, 64])]
)
def test_a_default_truth_has_its_optimum_in_the_middle_of_the_sweep(law, shapes, compute):
    """And the published exponents, and errors a fit can use: else a simulated sweep shows nothing."""
    cells = cells_at(shapes, compute)
    made = truth_for(law, cells)
    middle = [math.exp(np.mean(np.log(np.unique(sizes)))) for sizes in zip(*shapes, strict=True)]
    t = math.exp(np.mean(np.log(compute)))
    center = shapes[0] if shapes is not GRID else middle
    assert made.arm_optimum(t, center) == pytest.approx(middle, rel=1e-6)
    assert made.arm_growth(t, center) == pytest.approx([0.22, 0.45, 0.60], rel=1e-4)
    if shapes is GRID:
        assert made.optimum(t) == pytest.approx(middle, rel=1e-6)
    errors = [point.error for point in draw(made, cells, Disturbance(), np.random.default_rng(0))]
    assert min(errors) > 0.15 and max(errors) == pytest.approx(0.58) and max(errors) / min(errors) > 1.5


def many_runs(noise, num_draws=1, num_runs=4000):
    """Log errors over the truth (runs, evaluations) and the log compute of each evaluation, from its mean."""
    cells = cells_at([CENTER], COMPUTE, seeds=range(num_runs))
    drawn = draw_errors(SEPARABLE, cells, noise, np.random.default_rng(1), num_draws=num_draws)
    exact = np.array([written_out(SEPARABLE, CENTER, t) for t in COMPUTE])
    log_t = np.log(COMPUTE)
    return np.log(drawn.errors.mean(1).reshape(num_runs, -1) / exact), log_t - log_t.mean()


@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_spread_within_and_between_runs_is_as_asked(num_draws):
    """Covariance over runs: tau^2 + slope^2 u_i u_j, and sigma^2 on the diagonal, however many draws make a point."""
    sigma, tau, slope = 0.01, 0.02, 0.015
    logs, u = many_runs(Disturbance(sigma=sigma, tau=tau, tau_slope=slope), num_draws)
    expected = tau**2 + slope**2 * np.outer(u, u) + sigma**2 * np.eye(len(u))
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.abs(np.cov(logs.T) - expected).max() < 4 * scale.max() / math.sqrt(len(logs))
    assert np.abs(np.cov(logs.T) - expected - slope**2 * np.outer(u, u)).max() > 4 * scale.max() / math.sqrt(len(logs))
    assert np.abs(logs.mean(0)).max() < 5 * 0.03 / math.sqrt(len(logs))


def test_a_test_set_gives_binomial_counts():
    num_images, sigma = 500, 0.01
    logs, _ = many_runs(Disturbance(sigma=sigma, test_images=num_images), num_draws=3)
    for column, t in zip(logs.T, COMPUTE, strict=True):
        exact = written_out(SEPARABLE, CENTER, t)
        errors = exact * np.exp(column)
        counts = errors * num_images
        assert np.abs(counts - np.round(counts)).max() < 1e-9
        assert errors.mean() == pytest.approx(exact, abs=5 * math.sqrt(exact / num_images / len(errors)))
        assert errors.var() == pytest.approx(exact * (1 - exact) / num_images + (sigma * exact) ** 2, rel=0.1)


def test_the_standard_error_of_a_point_is_that_of_its_noise():
    """Root mean square over many points: of the test set where there is one, else of the draws, else sigma itself."""
    cells = cells_at([CENTER], [128], seeds=range(4000))
    exact = written_out(SEPARABLE, CENTER, 128)
    for noise, num_draws, expected in [
        (Disturbance(sigma=0.02, tau=0.05), 3, 0.02 * exact),
        (Disturbance(sigma=0.02), 1, 0.02 * exact),
        (Disturbance(test_images=1000), 1, math.sqrt(exact * (1 - exact) / 1000)),
    ]:
        points = draw(SEPARABLE, cells, noise, np.random.default_rng(0), num_draws=num_draws)
        rms = math.sqrt(np.mean([point.stderr**2 for point in points]))
        assert rms == pytest.approx(expected, rel=0.05)


def test_outliers_are_as_many_and_as_large_as_asked():
    cells = star()
    noise = Disturbance(outlier_points=(0.05, 0.1), outlier_runs=(2, -0.02))
    drawn = draw_errors(SEPARABLE, cells, noise, np.random.default_rng(0))
    plain = draw_errors(SEPARABLE, cells, Disturbance(), np.random.default_rng(0)).errors[:, 0]
    ratio = drawn.errors[:, 0] / plain
    moved = np.isin([cells[i].run_id for i in drawn.run], drawn.outlier_runs)
    raised = ratio > 1.05
    assert len(drawn.outlier_runs) == 2 and moved.sum() == 12
    assert raised.sum() == round(0.05 * 96)
    assert ratio == pytest.approx(np.where(moved, 0.98, 1.0) * np.where(raised, 1.1, 1.0))


def test_runs_that_fail_leave_no_points_and_are_never_the_outliers():
    cells = star()
    for seed in range(20):
        noise = Disturbance(fail=0.75, outlier_runs=(4, 0.1))
        drawn = draw_errors(SEPARABLE, cells, noise, np.random.default_rng(seed))
        failed = {cells[i].run_id for i in drawn.ends}
        assert len(failed) == 12 and not failed & set(drawn.outlier_runs)
        assert {end.status for end in drawn.ends.values()} == {"failed", "diverged"}
        points = draw(SEPARABLE, cells, noise, np.random.default_rng(seed))
        assert {point.run_id for point in points} == {cell.run_id for cell in cells} - failed


def test_a_small_share_is_at_least_one():
    drawn = draw_errors(SEPARABLE, star(), Disturbance(fail=1e-6), np.random.default_rng(0))
    assert len(drawn.ends) == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sigma": -0.1}, "sigma=-0.1 is not a relative spread"),
        ({"tau": 2.0}, "write 0.01 for 1%"),
        ({"tau_slope": math.nan}, "tau_slope=nan"),
        ({"test_images": 0}, "test_images=0 is no test set"),
        ({"fail": 1.0}, "fail=1.0 is not a share"),
        ({"outlier_points": (0.0, 0.1)}, "0.0 is not a share of the points"),
        ({"outlier_points": (0.1, 0.0)}, "an error cannot change by +0"),
        ({"outlier_runs": (1, -1.0)}, "an error cannot change by -1"),
        ({"outlier_runs": (0, 0.1)}, "0 is not a number of runs"),
        ({"outlier_runs": (17, 0.1)}, "17 runs cannot be outliers, only 16"),
    ],
)
def test_impossible_noise_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        draw_errors(SEPARABLE, star(), Disturbance(**wrong), np.random.default_rng(0))


@TRUTHS
def test_a_truth_survives_its_text_form(law):
    text = yaml.safe_dump(json.loads(json.dumps(truth.as_dict(law))))
    assert truth.from_dict(yaml.safe_load(text), TINY) == law


# The command.


def sovit(*arguments: object) -> int:
    return cli.main(["simulate", *map(str, arguments)])


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_records_load_and_the_fit_finds_the_truth_within_its_intervals(tmp_path, capsys):
    noise = ("--sigma", 0.003, "--tau", 0.003, "--seed", 3)
    assert sovit(STAR, *noise, "--runs-dir", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "17 runs simulated" in printed and re.search(r"depth +0\.45 +3\.63 +1 to 16", printed)
    points, exclusions = load_points(tmp_path / "star_tiny", "fractals", 10)
    assert len(points) == 17 * 6 and not exclusions
    fit = fit_star(points)
    for name, s in zip(DIMENSIONS, (0.22, 0.45, 0.60), strict=True):
        found = fit.arms[name].s
        assert found is not None and found.lo < s < found.hi and found.hi < 3 * found.lo
        assert 0.0015 < fit.arms[name].sigma < 0.006


def test_records_hold_what_the_pure_functions_draw(small, tmp_path):
    """One truth and one noise for power studies and for files, or a study would not be about the command."""
    arguments = ("--sigma", 0.02, "--test-images", 4096, "--fail", 0.2, "--law", "flops", "--runs-dir", tmp_path)
    assert sovit(small, *arguments) == 0
    points, exclusions = load_points(tmp_path / "small", "fractals", 10)
    assert [exclusion.reason for exclusion in exclusions] == ["failed: RuntimeError: simulated failure"]
    made = plan(load_sweep(small, [f"runs_dir={tmp_path}"]))
    cells = [command._cell(cell, 128) for cell in made.cells]
    law = truth_for("flops", cells)
    noise = Disturbance(sigma=0.02, tau=0.01, test_images=4096, fail=0.2)
    drawn = draw(law, cells, noise, command._generator(0, cells), num_draws=3)
    assert len(points) == len(drawn) == 2 * 3
    for found, expected in zip(points, sorted(drawn, key=lambda p: (p.run_id, p.t_gflops)), strict=True):
        assert dataclasses.replace(found, error=0, stderr=0) == dataclasses.replace(expected, error=0, stderr=0)
        assert (found.error, found.stderr) == pytest.approx((expected.error, expected.stderr), rel=1e-12)


def test_records_have_the_keys_of_trained_ones(small, tmp_path):
    """evals.jsonl: those of the line that docs/design.md shows. run.json: those of `sovit.lit.engine`, and its mark."""
    assert sovit(small, "--fail", 0.6, "--runs-dir", tmp_path) == 0
    document = (ROOT / "docs" / "design.md").read_text()
    example = re.search(r'^ {4}(\{"schema": 1, .*?\})$', document, re.S | re.M)
    assert example is not None
    keys = list(json.loads(example[1]))
    always = {"schema", "run_id", "sweep", "status", "reason", "width", "depth", "mlp_dim", "num_heads", "patch_size",
              "seed", "num_params", "forward_gflops", "config_hash", "code_version", "lock_sha256", "data_fingerprint",
              "torch_version", "wall_s", "config"}  # fmt: skip
    statuses = []
    for directory in (tmp_path / "small").iterdir():
        run = records.read_run(directory)
        assert run is not None
        statuses.append(run["status"])
        ended = {"baselines", "steps_trained", "images_per_s"} if run["status"] == "done" else set()
        assert set(run) == always | ended | {"simulated"}
        assert (run["reason"] is None) == (run["status"] == "done")
        assert records.parse_run_id(run["run_id"])[3] == run["simulated"]["seed"] == 0
        rows = records.read_lines(directory / records.EVALS)
        assert all(list(row) == keys for row in rows)
        assert all(row["t_gflops"] == row["examples_seen"] * row["forward_gflops"] for row in rows)
        assert len(rows) == 3 * 3 or run["status"] != "done"
    assert sorted(statuses) == ["diverged", "done", "failed"]


def test_the_same_command_writes_the_same_bytes_and_another_seed_others(small, written, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(written, runs)
    first = files(runs)
    assert sovit(small, "--seed", 6, "--runs-dir", runs) == 0
    evals = [name for name in first if name.endswith(records.EVALS)]
    assert len(evals) == 3 and all(files(runs)[name] != first[name] for name in evals)
    for run in (runs / "small").iterdir():  # the configuration of a run names its directory
        (run / records.RUN).write_text((run / records.RUN).read_text().replace(str(runs), str(written)))
    assert sovit(small, "--seed", 5, "--runs-dir", written) == 0
    assert files(written) == first


def test_a_second_training_seed_has_its_own_luck(small, tmp_path):
    """Both are drawn with --seed 0; the same luck twice would make two runs count as two that are one."""
    for seed in (0, 1):
        assert sovit(small, f"seed={seed}", "--runs-dir", tmp_path, "--sigma", 0) == 0
    points, _ = load_points(tmp_path / "small", "fractals", 10)
    by_seed = [{p.run_id[:-1] + p.duration: p.error for p in points if p.seed == seed} for seed in (0, 1)]
    assert by_seed[0].keys() == by_seed[1].keys() and len(by_seed[0]) == 9
    assert all(abs(math.log(by_seed[0][key] / by_seed[1][key])) > 1e-5 for key in by_seed[0])


@pytest.mark.parametrize("kind", ["trained", "unfinished", "elsewhere"])
def test_a_trained_run_is_never_overwritten_or_mixed_with(kind, small, written, tmp_path, capsys):
    shutil.copytree(written / "small", tmp_path / "small")
    run_dir = sorted((tmp_path / "small").iterdir())[0]
    run = records.read_run(run_dir)
    assert run is not None
    del run["simulated"]
    if kind == "unfinished":
        (run_dir / records.RUN).unlink()
    elif kind == "elsewhere":  # a cell that this command would not write
        run_dir = run_dir.with_name("small-w0016-d04-m0128-h04-p08-s7")
        run_dir.mkdir()
    if kind != "unfinished":
        records.write_json(run_dir / records.RUN, run)
    before = files(tmp_path)
    assert sovit(small, "--seed", 1, "--runs-dir", tmp_path) == 2
    assert f"{run_dir} holds a run that was not simulated" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_runs_of_two_truths_are_not_mixed_and_one_can_be_taken_over(small, written, tmp_path, capsys):
    shutil.copytree(written / "small", tmp_path / "small")
    assert sovit(small, "seed=1", "--law", "flops", "--runs-dir", tmp_path) == 2
    message = capsys.readouterr().err
    assert "was simulated from another law" in message
    found = re.search(r"--law (\S+run\.json)", message)
    assert found is not None
    assert sovit(small, "seed=1", "shape=32x4x64", "--law", found[1], "--runs-dir", tmp_path) == 0
    one = records.read_run(tmp_path / "small" / "small-w0032-d04-m0064-h04-p08-s1")
    other = records.read_run(Path(found[1]).parent)
    assert one is not None and other is not None and one["simulated"]["law"] == other["simulated"]["law"]


def test_training_does_not_take_a_simulated_cell_for_one_that_is_done(small, written):
    with pytest.raises(SweepError, match="holds a run of another configuration"):
        refuse_changed(plan(load_sweep(small, [f"runs_dir={written}"])))


def read_law(text: str, path: Path) -> truth.Truth:
    path.write_text(text)
    return command._read_truth(str(path), star(), TINY)


def test_a_law_of_ones_own_is_drawn_from(tmp_path):
    """Written as people write numbers: YAML takes 4e-3 for a text."""
    text = yaml.safe_dump(truth.as_dict(SEPARABLE)).replace("0.004", "4e-3")
    assert "4e-3" in text and read_law(text, tmp_path / "law.yaml") == SEPARABLE


def bad_law(**changes: object) -> str:
    return json.dumps({**truth.as_dict(SEPARABLE), **changes})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("law: seperable", "law is 'seperable'; write law: separable or law: flops"),
        ("- 1", "law is None"),
        ("law: [separable", "cannot be read as YAML"),
        (bad_law(c=0), "c=0.0 of the truth is not a finite number above 0"),
        (bad_law(xi="much"), "xi is 'much', which is not a number"),
        (bad_law(gamma=1), "'gamma' is no part of a separable law"),
        (bad_law(alpha={"width": 1, "depth": 1}), "alpha lacks mlp_dim"),
        (bad_law(a={"width": 1, "depth": 1, "mlp_dim": 1, "mlp": 1}), "did you mean 'mlp_dim'?"),
        (bad_law(b=0.5), "b is 0.5; give width, depth, mlp_dim"),
        (bad_law()[:-1] + ', "c": 0.5}', "'c' is given twice"),
        (json.dumps({"run_id": "x", "status": "done"}), "this run was trained"),
        (json.dumps({"law": "flops"}), "a flops law lacks alpha, a, beta, c, eps"),
    ],
)
def test_a_wrong_law_file_gets_one_sentence(text, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_law(text, tmp_path / "law.yaml")
    assert str(caught.value).startswith(str(tmp_path / "law.yaml")) and "\n" not in str(caught.value)


def test_a_law_without_errors_or_optimum_on_the_sweep_is_refused_before_anything_is_written(small, tmp_path, capsys):
    for law, sentence in [
        (bad_law(eps=2), "which is not between 0 and 1; give it other coefficients"),
        (json.dumps({**truth.as_dict(FLOPS), "beta": 1e-80}), "absurdly far from the sweep"),
    ]:
        (tmp_path / "law.yaml").write_text(law)
        assert sovit(small, "shape=32x4x128", "--law", tmp_path / "law.yaml", "--runs-dir", tmp_path / "runs") == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.yaml"], "no such file or directory"),
        (["SMALL", "sead=1"], "did you mean 'seed'?"),
        (["SMALL", "shape=32x4x128", "--law", "seperable"], "--law 'seperable' is neither separable nor flops, nor a"),
        (["SMALL", "--seed", "-1"], "--seed -1 is negative"),
        (["SMALL", "--sigma", "1"], "write 0.01 for 1%"),
        (["SMALL", "--outlier-runs", "2%"], "--outlier-runs '2%' is not N:SIZE such as 1:0.02"),
        (["SMALL", "--outlier-points", "0.1"], "--outlier-points '0.1' is not SHARE:SIZE"),
        (["SMALL", "--fail", "-0.1"], "fail=-0.1 is not a share"),
        (["SMALL", "shape=32x4x128", "--outlier-runs", "2:0.1"], "2 runs cannot be outliers"),
        (["SMALL", "runs_dir=here"], "runs_dir=here and --runs-dir"),
    ],
)
def test_a_wrong_option_gets_one_sentence(arguments, sentence, small, tmp_path, capsys):
    arguments = [small if argument == "SMALL" else argument for argument in arguments]
    assert sovit(*arguments, "--runs-dir", tmp_path / "runs") == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_cells_of_two_image_sizes_are_refused(small, tmp_path, capsys):
    """Their errors follow different laws."""
    document = yaml.safe_load(Path(small).read_text())
    document["parameters"] |= {"model.image_size": {"values": [16, 24]}, "shape": {"value": "32x4x128"}}
    document["parameters"]["tag"] = {"value": "px"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(document))
    assert sovit(tmp_path / "two.yaml", "--runs-dir", tmp_path) == 2
    assert "two cells have the run id" in capsys.readouterr().err
    configs = [compose(cell) for cell in load_sweep(tmp_path / "two.yaml").cells]
    with pytest.raises(ValueError, match="simulate cells of one model"):
        command._shared(configs)
