"""`sovit compare`: two stars whose exponents are known, drawn from laws, and what the command says of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2
from scipy.stats import t as student_t

from sovit import cli
from sovit.analysis import diagnostics
from sovit.analysis.comparison import Arm, Difference, _seen, compare_arms, holm, omnibus, steepened
from sovit.analysis.intervals import Interval, exponent_interval, fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.points import Point
from sovit.analysis.report.contents_compare import verdict

SIZES = [16, 28, 48, 84, 147, 256]
COMPUTE = [float(t) for t in np.geomspace(8, 256, 6)]


def law(s: float, *, eps: float = 0.15, beta: float = 0.07) -> Law:
    """A U at every compute, its bottom at 64 for t = 45 and growing as t^s."""
    c = 0.7
    a, b = 0.6 * c / s, 0.4 * c / s
    return Law(beta * b / a * 64**a, a, beta * 64**-b * 45**c, b, 0.03 * 45**c, c, eps)


def arm(truth: Law, noise: float, seed: int) -> Arm:
    rng, points = np.random.default_rng(seed), []
    for x in SIZES:
        luck = noise * rng.normal()
        for t in COMPUTE:
            error = float(truth.error(x, t)) * math.exp(luck + noise * rng.normal())
            points.append(Point(f"run-{x:04d}", 32, x, 128, 0, t, f"{t:.0f} gflops", error, 0.005, 3))
    x, t, error, run = diagnostics.vectors("depth", points)
    whole = fit_with_runs(x, t, error, run)
    interval = exponent_interval(x, t, error, whole)
    assert isinstance(interval, Interval)
    return Arm(interval, points, x, t, whole)


def test_equal_exponents_are_seldom_called_different_and_the_interval_holds_the_ratio() -> None:
    """30 pairs of arms: 4 alarms or more have a chance of 6%, and intervals that hold 30 minus 5 or fewer one of 2%."""
    alarms = covered = 0
    for seed in range(30):
        found = compare_arms(arm(law(0.45), 0.01, 2 * seed), arm(law(0.45, eps=0.25, beta=0.05), 0.01, 2 * seed + 1))
        assert found.ratio and found.change and found.p is not None
        alarms += found.p <= 0.05
        covered += found.ratio.lo <= 1 <= found.ratio.hi
        assert (found.p <= 0.05) == (not found.ratio.lo <= 1 <= found.ratio.hi)
    assert alarms <= 4 and covered >= 25


def test_a_difference_beyond_the_noise_is_seen_and_measured() -> None:
    found = compare_arms(arm(law(0.3), 0.004, 0), arm(law(0.6), 0.004, 1))
    assert found.ratio and found.change and found.p is not None
    assert found.p < 0.02
    assert found.ratio.lo < 2 < found.ratio.hi and found.change.lo < 0.3 < found.change.hi


def test_exchanging_the_stars_inverts_the_ratio() -> None:
    first, second = arm(law(0.3), 0.01, 0), arm(law(0.5), 0.01, 1)
    there, back = compare_arms(first, second), compare_arms(second, first)
    assert there.ratio and back.ratio and there.p is not None
    assert back.ratio.estimate == pytest.approx(1 / there.ratio.estimate)
    assert back.ratio.lo == pytest.approx(1 / there.ratio.hi) and back.ratio.hi == pytest.approx(1 / there.ratio.lo)
    assert back.p == pytest.approx(there.p)


def test_more_noise_takes_a_larger_ratio() -> None:
    seen = [_seen(arm(law(0.45), noise, 0), arm(law(0.45), noise, 1), 1, 0) for noise in (0.003, 0.02)]
    assert seen[0] is not None and 1 < seen[0] < 1.6
    assert seen[1] is None or seen[1] > 1.2 * seen[0]


def test_a_law_with_another_exponent_keeps_its_u_at_the_middle() -> None:
    before = law(0.45)
    place = float(before.optimum(45.0))
    after = steepened(before, 2.0, place, 45.0)
    assert after.exponent == pytest.approx(0.9)
    assert float(after.error(place, 45.0)) == pytest.approx(float(before.error(place, 45.0)))
    assert float(after.optimum(45.0)) == pytest.approx(place)
    assert float(after.optimum(90.0) / after.optimum(45.0)) == pytest.approx(2**0.9)


def test_holm_by_hand() -> None:
    """0.01 x 3; then 0.03 x 2; then 0.04 x 1, which may not be less than the one before."""
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})


def test_welch_by_hand_and_an_open_side() -> None:
    """Intervals of a factor 2 at t(3) = 3.1824: both standard errors 0.2178, together 0.308 on 6 degrees of freedom; the
    ratio 2 is then 2.25 of them away. A side that one star leaves open is open in the ratio, and says nothing there."""
    plain = arm(law(0.45), 0.01, 0)
    first, second = (replace(plain, s=Interval(s, s / 2, s * 2, "")) for s in (0.3, 0.6))
    found = compare_arms(first, second)
    assert found.ratio and (found.t, found.df) == (pytest.approx(2.2502, abs=1e-3), pytest.approx(6.0))
    half = math.exp(2.4469 * math.sqrt(2) * math.log(2) / 3.1824)
    assert (found.ratio.lo, found.ratio.hi) == (pytest.approx(2 / half, rel=1e-3), pytest.approx(2 * half, rel=1e-3))
    assert found.p == pytest.approx(0.0654, abs=1e-3)
    open_below = compare_arms(replace(first, s=Interval(0.3, 0.0, 0.6, "")), second)
    assert open_below.ratio and open_below.ratio.hi == math.inf and open_below.ratio.lo == pytest.approx(found.ratio.lo)
    open_above = compare_arms(replace(first, s=Interval(0.3, 0.15, math.inf, "")), second)
    assert open_above.ratio and open_above.ratio.lo == 0 and open_above.p == 1


def test_the_omnibus_of_one_dimension_is_its_own_test() -> None:
    one = Difference(p=0.0, t=2.3, df=4.0)
    assert omnibus([one]) == pytest.approx(2 * student_t.sf(2.3, 4.0), abs=0.003)
    many = Difference(p=0.0, t=2.3, df=1e6)
    assert omnibus([many, many, many]) == pytest.approx(chi2.sf(3 * 2.3**2, 3), abs=0.003)


def test_a_silence_without_power_says_so() -> None:
    one = {"p": 0.6, "p_holm": 0.6, "ratio": {"estimate": 1.1, "lo": 0.3, "hi": 4.0}, "seen": [None, None]}
    said = verdict({"dimensions": {"width": one}, "omnibus_p": 0.6})
    assert said.startswith("No difference is shown") and "none up to a factor of 30" in said


@pytest.fixture(scope="module")
def stars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with simulated stars: softmax, its twin with a sigmoid, and one in which more differs."""
    home = tmp_path_factory.mktemp("stars")
    for name, *more in (
        ("one",),
        ("two", "optim.loss=sigmoid", "model.head_bias=-5.5"),
        ("three", "optim.loss=sigmoid", "data.rotation=0.7"),
    ):
        file = home / f"{name}.yaml"
        file.write_text(Path("sweeps/star_tiny.yaml").read_text())
        given = [str(file), f"name={name}", *more, "--runs-dir", str(home / "runs"), "--seed", str(len(name))]
        assert cli.main(["simulate", *given, "--sigma", "0.004", "--tau", "0.004"]) == 0
    return home / "runs"


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, and what was printed with its line breaks as spaces."""
    capsys.readouterr()
    code = cli.main(["compare", *map(str, arguments)])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_the_command_says_what_differs_and_how_sure_it_is(stars: Path, capsys: pytest.CaptureFixture) -> None:
    code, said, _ = run(capsys, stars / "one", stars / "two")
    assert code == 0
    assert "objective (model.head_bias 0.0 -> -5.5, optim.loss softmax -> sigmoid)" in said
    assert "things differ" not in said  # the objective is one
    assert "17 of 17 runs have a twin" in said and "training images" in said
    found = json.loads((stars / "one-vs-two" / "comparison.json").read_text())
    for name, s in (("width", 0.22), ("depth", 0.45), ("mlp_dim", 0.6)):
        one = found["dimensions"][name]
        assert one["first"]["estimate"] == pytest.approx(s, rel=0.25)
        assert one["ratio"]["lo"] < 1 < one["ratio"]["hi"] and one["p_holm"] >= one["p"]
        assert (one["seen"][0] or 0) < 1 < (one["seen"][1] or math.inf)
    assert found["omnibus_p"] > 0.01
    page = (stars / "one-vs-two" / "report.html").read_text()
    assert "<svg" in page and "optim.loss" in page and "<script" not in page


def test_two_things_that_differ_are_warned_of(stars: Path, capsys: pytest.CaptureFixture) -> None:
    _, said, _ = run(capsys, stars / "one", stars / "three", "--no-power")
    assert "2 things differ: objective; data" in said
    assert "The few-shot task fractals is itself another one" in said
    assert "was not asked for" in said


def test_what_cannot_be_compared_is_refused_in_a_sentence(stars: Path, capsys: pytest.CaptureFixture) -> None:
    whole, head = Path("sweeps/star_tiny.yaml").read_text(), "    values:\n"
    shapes = [f"      - {w}x{d}x{m}\n" for w in (16, 32) for d in (2, 4) for m in (64, 128)]
    file = stars / "grid.yaml"
    file.write_text(f"{whole.partition(head)[0]}{head}{''.join(shapes)}  seed: {{values: [0]}}\n")
    assert cli.main(["simulate", str(file), "name=grid", "--runs-dir", str(stars)]) == 0
    for other, wanted in (
        (stars / "one", "given twice"),
        (stars / "grid", "is a grid"),
        (stars / "nothing", "is not a directory"),
    ):
        code, _, error = run(capsys, stars / "one", other)
        assert code == 2 and wanted in error and error.count("\n") == 1
    for path in (stars / "three").glob("*/run.json"):  # as if trained, and as Mixers
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key != "simulated"}))
    code, _, error = run(capsys, stars / "one", stars / "three")
    assert code == 2 and "is simulated and the other star is not" in error
    for path in (stars / "three").glob("*/run.json"):
        record = json.loads(path.read_text())
        record["config"]["model"]["family"] = "mixer"
        path.write_text(json.dumps(record))
    code, _, error = run(capsys, stars / "one", stars / "three")
    assert code == 2 and "family vit" in error and "mixer" in error
