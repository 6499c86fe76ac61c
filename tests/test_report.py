"""The report of a fit: what it says, that untrusted text stays text, and that missing pieces leave it readable."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sovit.analysis.fit import Noise, fit_law
from sovit.analysis.grid import fit_grid
from sovit.analysis.intervals import index_runs
from sovit.analysis.law import Law
from sovit.analysis.points import Point, load_points
from sovit.analysis.report import drawing, figures, linear, maps, misfit, summary
from sovit.analysis.report import page as report
from sovit.analysis.report.contents import contents
from sovit.analysis.star import fit_star
from sovit.flops import forward_gflops, num_params
from sovit.shape import Shape

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "star_tiny.ipynb"

# Errors of a tiny star at t = 17, 33, 67, 133 and 267 GFLOPs: sizes x durations, one seed, 4096 test images.
STAR: dict[str, dict[int, list[float]]] = {
    "width": {
        16: [0.567, 0.487, 0.423, 0.389],
        24: [0.560, 0.468, 0.370, 0.301, 0.268],
        48: [0.633, 0.556, 0.442, 0.326, 0.260],
        64: [0.659, 0.581, 0.497, 0.389, 0.293],
        96: [0.775, 0.621, 0.551, 0.460, 0.358],
    },
    "depth": {
        1: [0.469, 0.417, 0.373, 0.348],
        2: [0.500, 0.415, 0.342, 0.290, 0.252],
        6: [0.672, 0.569, 0.461, 0.350, 0.271],
        8: [0.746, 0.633, 0.509, 0.376, 0.281],
        12: [0.823, 0.722, 0.596, 0.456, 0.335],
    },
    "mlp_dim": {
        16: [0.511, 0.443, 0.368, 0.323],
        32: [0.531, 0.442, 0.359, 0.324],
        64: [0.550, 0.442, 0.349, 0.284, 0.249],
        256: [0.673, 0.573, 0.448, 0.335, 0.263],
        512: [0.708, 0.639, 0.539, 0.412, 0.316],
    },
}
CENTER = {"width": 32, "depth": 4, "mlp_dim": 128}
CENTER_ERRORS = [0.605, 0.493, 0.381, 0.296, 0.251]
TIMES = [5e10 / 3e9 * 2**k for k in range(5)]


def star_cells() -> list[tuple[str | None, dict[str, int], list[float]]]:
    """(arm, shape, errors) of the center and of every point."""
    cells: list[tuple[str | None, dict[str, int], list[float]]] = [(None, CENTER, CENTER_ERRORS)]
    return cells + [(arm, CENTER | {arm: x}, errors) for arm, sizes in STAR.items() for x, errors in sizes.items()]


def name_of(size: dict[str, int]) -> str:
    width, depth, mlp_dim = size.values()
    return f"star_tiny-w{width:04d}-d{depth:02d}-m{mlp_dim:04d}-h{width // 8:02d}-p08-s0"


def write_star(directory: Path) -> None:
    """The records of the star as runs leave them: run.json and evals.jsonl of 16 runs."""
    for _, size, errors in star_cells():
        shape = Shape(**size, num_heads=size["width"] // 8, patch_size=8)
        geometry: dict[str, Any] = {"image_size": 16, "channels": 1, "pool": "avg", "num_classes": 256}
        gflops = forward_gflops(shape, **geometry)
        run_id = name_of(size)
        record = {
            "schema": 1,
            "run_id": run_id,
            "sweep": "star_tiny",
            "status": "done",
            "reason": None,
            **shape.as_dict(),
            "seed": 0,
            "num_params": sum(num_params(shape, **geometry).values()),
            "forward_gflops": gflops,
            "config_hash": "0f1e2d3c4b5a6978",
            "code_version": "0.1.0+0123456789ab",
            "lock_sha256": "ab" * 32,
            "data_fingerprint": "fractals-5f0c7d3a",
            "torch_version": "2.12.1",
            "wall_s": round(20 + 40 * len(errors) / (1 + gflops * 1e3), 1),
            "config": {
                "name": "star_tiny",
                "seed": 0,
                "model": {"width": shape.width, "depth": shape.depth, "mlp_dim": shape.mlp_dim, "head_dim": 8},
                "data": {"name": "fractals", "num_classes": 256, "rotation": 1.57},
                "optim": {"name": "adamw", "lr": 0.005, "weight_decay": 0.05},
                "trainer": {"global_batch_size": 128},
            },
            "baselines": {
                "fractals": {"chance": 63 / 64, "pixels": {"10": 0.647}},
                "digits": {"chance": 0.9, "pixels": {"10": 0.1385}},
            },
            "steps_trained": round(TIMES[len(errors) - 1] / gflops / 128),
            "images_per_s": round(3e3 / (0.2 + gflops * 1e3), 1),
        }
        run = directory / run_id
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps(record))
        rows = []
        for step, duration, t, error in [(0, "init", 0.0, 0.92)] + [
            (round(t / gflops / 128), f"{t:.4g} gflops", round(t / gflops / 128) * 128 * gflops, error)
            for t, error in zip(TIMES, errors, strict=False)
        ]:
            for draw in range(3):
                wobble = 0.002 * (draw - 1)
                rows.append(
                    {
                        "schema": 1, "run_id": run_id, "sweep": "star_tiny", **shape.as_dict(), "image_size": 16,
                        "seed": 0, "step": step, "examples_seen": step * 128, "forward_gflops": gflops, "t_gflops": t,
                        "duration": duration, "weights": "ema", "dataset": "fractals", "shots": 10, "draw": draw,
                        "l2_reg": 12.3, "error": error + wobble, "stderr": math.sqrt(error * (1 - error) / 4096),
                    }
                )  # fmt: skip
        (run / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "star_tiny"
    write_star(directory)
    return directory


@pytest.fixture(scope="module")
def _fitted(sweep: Path) -> dict[str, Any]:
    points, exclusions = load_points(sweep, "fractals", 10)
    found = fit_star(points, sweep="star_tiny", dataset="fractals", shots=10, exclusions=exclusions)
    return json.loads(json.dumps(found.as_dict(), allow_nan=False))


@pytest.fixture
def fit(_fitted: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(_fitted)


@pytest.fixture
def runs(sweep: Path) -> list[dict[str, Any]]:
    return report.read_runs(sweep)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def page_of(fit: dict[str, Any], runs: list[dict[str, Any]]) -> Page:
    """The page without its figures, which take most of the time."""
    return Page(report.page(contents(fit, runs), {}))


def test_text_gives_every_exponent_with_its_interval_and_fits_a_terminal(fit: dict, runs: list) -> None:
    text = report.text(fit, runs)
    lines = text.splitlines()
    for arm, entry in fit["arms"].items():
        row = next(line for line in lines if line.startswith(arm))
        s = entry["s"]
        assert row.split()[1] == f"{s['estimate']:.2f}"
        assert f"[{s['lo']:.2f}, {s['hi']:.2f}]" in row
        assert row.split(" of 5 ")[0].endswith(str(round(5 * entry["interior_share"])))
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "0.251 ± 0.007" in text  # the center as measured
    assert "chance 0.984, random initialisation 0.920, ridge on pixels 0.647" in text
    assert "12 points of 8 runs: error above the cut-off 0.6" in text


def test_an_arm_that_is_not_identified_shows_its_reason_and_no_number(fit: dict, runs: list) -> None:
    entry = fit["arms"]["width"]
    entry |= {"identified": False, "why": "the minimum sits at an edge in 4 of 5 slices", "parabola": None}
    text = report.text(fit, runs)
    row = next(line for line in text.splitlines() if line.startswith("width"))
    assert row == "width  not identified: the minimum sits at an edge in 4 of 5 slices"
    page = page_of(fit, runs)
    assert "not identified: the minimum sits at an edge in 4 of 5 slices" in page.text
    shown = f"{entry['s']['estimate']:.2f}"
    assert shown not in page.text.split("At 10x compute")[0] and shown not in row


def test_the_verdict_names_each_thing_that_speaks_against_an_exponent(fit: dict) -> None:
    entry = fit["arms"]["depth"]
    entry |= {"cutoff_range": [0.3, 0.4], "parabola": {"slope": 0.4, "lo": 0.3, "hi": 0.5}}
    entry |= {"s": {"estimate": 0.35, "lo": 0.25, "hi": 0.5}, "jackknife": {"lo": 0.25, "hi": 0.5}}
    entry |= {"flags": ["xi=0"], "warnings": []}
    assert summary.verdict(entry) == "holds"
    assert summary.verdict(entry | {"warnings": ["a", "b"]}, num_failed=1) == "2 warnings; 1 check in doubt"
    assert summary.verdict(entry | {"s": entry["s"] | {"lo": 0.08}, "jackknife": None}) == "interval spans 6x"
    assert summary.verdict(entry | {"flags": ["a at its lower bound"]}) == "a at its lower bound"
    assert summary.verdict(entry | {"cutoff_range": [0.2, 0.4]}) == "moves 2.0x with the cut-off"
    assert summary.verdict(entry | {"parabola": {"slope": 0.1, "lo": 0.0, "hi": 0.2}}) == "parabola disagrees"
    assert summary.verdict(entry | {"s": entry["s"] | {"hi": None}}) == "open on one side"
    assert summary.verdict(entry | {"jackknife": {"lo": 0.125, "hi": 1.0}}) == "jackknife 3x as wide"
    entry["center_check"][2] |= {"predicted": 0.5, "measured": 0.4}
    assert summary.verdict(entry) == "misses the center by 25%"
    entry["center_check"][2]["used_range"] = False
    assert summary.verdict(entry) == "holds"


def test_control_characters_in_records_do_not_reach_the_terminal(fit: dict, runs: list) -> None:
    fit["excluded"] = [{"run_id": "x", "reason": "\x1b[31mred\x07\u202e"}]
    text = report.text(fit, runs)
    assert "red" in text
    assert all(character.isprintable() for line in text.split("\n") for character in line)


def test_a_figure_drawn_twice_is_the_same_figure(fit: dict) -> None:
    assert figures.svg(figures.optimum_by_compute(fit)) == figures.svg(figures.optimum_by_compute(fit))


def _without_arm(fit: dict, runs: list) -> str:
    del fit["arms"]["depth"]
    fit["points"] = [point for point in fit["points"] if point["arm"] != "depth"]
    return "the sweep has no runs of this arm"


def _nothing_identified(fit: dict, runs: list) -> str:
    empty: dict[str, Any] = dict.fromkeys(
        ("s", "law", "parabola", "jackknife", "cutoff_range", "log_se", "objective", "converged", "spread")
    )
    for entry in fit["arms"].values():
        entry |= empty | {"identified": False, "why": "2 sizes are too few", "sigma": None, "tau": None}
        entry |= {"minima": [], "interior_share": None, "cutoffs": [], "late": [], "center_check": []}
    return "2 sizes are too few"


def _no_baselines(fit: dict, runs: list) -> str:
    for run in runs:
        del run["baselines"], run["init"]
    return "exponent"


def _only_failed_runs(fit: dict, runs: list) -> str:
    _nothing_identified(fit, runs)
    for run in runs:
        for key in ("baselines", "images_per_s", "steps_trained"):
            del run[key]
        run |= {"status": "failed", "reason": "OutOfMemoryError: too large"}
    fit |= {"points": [], "excluded": [{"run_id": run["run_id"], "reason": "failed: too large"} for run in runs]}
    return "OutOfMemoryError: too large"


def _nothing_at_all(fit: dict, runs: list) -> str:
    _only_failed_runs(fit, runs)
    runs.clear()
    fit |= {"arms": {}, "center": None, "excluded": [], "fit": {}}
    return "No records of runs were given"


def _open_intervals(fit: dict, runs: list) -> str:
    fit["arms"]["width"]["s"] |= {"lo": None, "hi": 0.4}
    fit["arms"]["depth"]["s"] |= {"hi": None}
    fit["arms"]["mlp_dim"]["parabola"] |= {"lo": None, "hi": None}
    fit["arms"]["mlp_dim"]["law"]["alpha"] = 0.0
    return "below 0.40"


@pytest.mark.parametrize(
    "damage", [_without_arm, _nothing_identified, _no_baselines, _only_failed_runs, _nothing_at_all, _open_intervals]
)
def test_missing_pieces_leave_a_readable_report(damage: Any, fit: dict, runs: list, tmp_path: Path) -> None:
    phrase = damage(fit, runs)
    text = report.text(fit, runs)
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    drawn = damage is not _no_baselines  # which takes nothing from most figures
    page = Page(report.write_report(fit, runs, tmp_path).read_text()) if drawn else page_of(fit, runs)
    assert phrase in page.text
    assert "None" not in page.text and "nan" not in page.text.split()


def test_the_note_on_the_embedded_task_appears_only_for_it(fit: dict, runs: list) -> None:
    flat = " ".join(report.text(fit, runs).split())
    assert summary.EMBEDDED["star"] in flat
    for run in runs:
        run["config"]["data"]["name"] = "imagenet"
    assert "chosen so that" not in report.text(fit, runs)


def test_runs_of_two_versions_are_pointed_out(fit: dict, runs: list) -> None:
    assert "not the same for all runs" not in page_of(fit, runs).text
    runs[3]["code_version"] = "0.1.0+fedcba987654+"
    page = page_of(fit, runs)
    assert "0.1.0+0123456789ab, 0.1.0+fedcba987654+ (not the same for all runs)" in page.text


def test_config_keys_are_split_into_common_and_differing(runs: list) -> None:
    runs[0]["config"]["optim"]["lr"] = 0.01
    config = summary.common_config(runs)
    assert ("optim.weight_decay", "0.05") in config["common"]
    assert {key for key, _ in config["differing"]} == {"model.width", "model.depth", "model.mlp_dim", "optim.lr"}
    assert dict(config["differing"])["optim.lr"] == "0.01, 0.005"


def test_the_drawn_law_is_the_law_and_its_triangle_the_bottom_of_the_curve(fit: dict) -> None:
    """Oracle: Eq. 2 written out here, and the lowest of the points of each drawn curve."""
    panel = figures.error_by_dimension(fit).axes[1]
    law = fit["arms"]["depth"]["law"]
    t = figures.slices(fit)[-1]

    def error(x: np.ndarray) -> np.ndarray:
        cost = (law["beta"] * x ** law["b"] + law["xi"]) * t ** -law["c"]
        return law["alpha"] * x ** -law["a"] + cost + law["eps"]

    curves = [line for line in panel.lines if len(line.get_xdata()) == 200 and np.isfinite(line.get_ydata()).all()]
    lowest = min(curves, key=lambda line: min(line.get_ydata()))
    x, y = np.asarray(lowest.get_xdata()), np.asarray(lowest.get_ydata())
    np.testing.assert_allclose(y, error(x), rtol=1e-9)
    triangles = [line for line in panel.lines if line.get_marker() == "v"]
    assert len(triangles) == len(TIMES)
    nearest = min(triangles, key=lambda line: line.get_ydata()[0])
    assert nearest.get_xdata()[0] == pytest.approx(x[np.argmin(y)], rel=0.02)


def test_the_center_is_drawn_hollow_and_unused_points_faint(fit: dict) -> None:
    panel = figures.error_by_dimension(fit).axes[0]
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert sum(len(line.get_ydata()) for line in dots) == sum(map(len, STAR["width"].values())) + len(CENTER_ERRORS)
    hollow = [error for line in dots if line.get_markerfacecolor() == drawing.BACK for error in line.get_ydata()]
    assert sorted(hollow) == pytest.approx(sorted(CENTER_ERRORS))
    faint = {round(float(error), 9) for line in dots if line.get_alpha() < 0.5 for error in line.get_ydata()}
    assert faint == {error for errors in STAR["width"].values() for error in errors if error >= 0.6}


def test_axes_are_logarithmic_with_plain_numbers(fit: dict) -> None:
    panel = figures.error_by_dimension(fit).axes[2]
    panel.figure.canvas.draw()
    assert panel.get_xscale() == panel.get_yscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["16", "32", "64", "128", "256", "512"]
    errors = [label.get_text() for label in figures.error_by_dimension(fit).axes[0].get_yticklabels()]
    assert {"0.3", "0.4", "0.5"} <= set(errors)


def test_steps_rounded_to_different_compute_still_make_one_slice(fit: dict) -> None:
    for index, point in enumerate(fit["points"]):
        point["t_gflops"] *= 1 + 0.003 * (index % 5)
    for entry in fit["arms"].values():
        entry["minima"] = []
    assert figures.slices(fit) == pytest.approx(TIMES, rel=0.02)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2514, "0.251"), (266.67, "267"), (12345.6, "12,346"), (0.000207, "0.000207"), (0, "0"), (None, "-")],
)  # fmt: skip
def test_numbers_are_plain(value: float | None, text: str) -> None:
    assert figures.number(value) == text


def test_the_random_initialisation_is_averaged_over_runs_for_the_metric_only(fit: dict, runs: list) -> None:
    runs[0]["init"] = [{"step": 0, "dataset": "fractals", "shots": 10, "error": 0.84}]
    runs[1]["init"] = [{"step": 0, "dataset": "digits", "shots": 10, "error": 0.1}]
    others = {row["error"] for run in runs[2:] for row in run["init"]}
    known = summary.baselines(fit, runs)
    mean = (0.84 + 3 * 14 * 0.92) / (1 + 3 * 14)  # three draws of each of the other runs
    assert others == {0.918, 0.92, 0.922} and known["random initialisation"] == pytest.approx(mean)


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    script = (
        "import sys, sovit.analysis.report.page; print(sorted({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_points_that_differ_only_in_their_error_are_left_out_for_one_reason(fit: dict) -> None:
    reasons = [why for why, _, _ in summary.left_out(fit)]
    assert reasons == ["error above the cut-off 0.6", "center: held out"]
    fit["points"][0] |= {"used": False, "why_not": "diverged: the error rose from 0.2 to 0.9"}
    assert ("diverged: the error rose", 1, fit["points"][0]["run_id"]) in summary.left_out(fit)


def test_exponents_of_single_seeds_are_listed_when_there_are_several(fit: dict, runs: list) -> None:
    assert summary.by_seed(fit) == ""
    fit["by_seed"] = {"0": {"width": {"estimate": 0.14, "lo": 0.1, "hi": 0.2}}, "1": {"width": None}}
    assert "seed 0: width 0.14; seed 1: width -" in page_of(fit, runs).text


def grid_points(best: int) -> list[Point]:
    """A grid of 27 shapes at three computes whose error is least where every size has the index ``best``."""
    sizes = {"width": (16, 24, 32), "depth": (1, 2, 3), "mlp_dim": (32, 64, 96)}
    points = []
    for index in np.ndindex(3, 3, 3):
        shape = {name: values[i] for (name, values), i in zip(sizes.items(), index, strict=True)}
        far = sum((i - best) ** 2 * (1 + 0.1 * k) for k, i in enumerate(index))
        for t in (24.0, 48.0, 96.0):
            error = 0.3 * (24 / t) ** 0.3 * (1 + 0.1 * far)
            points.append(
                Point(name_of(shape), **shape, seed=0, t_gflops=t, duration=f"{t:g} gflops", error=error, stderr=0.007,
                      num_draws=3)
            )  # fmt: skip
    return points


def test_a_grid_reports_its_origin_and_its_best_shape_at_each_compute(runs: list, tmp_path: Path) -> None:
    fit = fit_grid(grid_points(best=1), sweep="grid_tiny", dataset="fractals", shots=10).as_dict()
    text = report.text(fit, runs)
    assert "Origin: 24x2x64, the best shape from t0 = 24.0 to 96.0 GFLOPs (3 computes)" in text
    assert max(map(len, text.splitlines())) <= 100
    page = Page(report.write_report(fit, runs, tmp_path).read_text())
    assert "Origin: 24x2x64" in page.text and "svg" in page.tags
    assert summary.EMBEDDED["grid"] in page.text and "exponent" not in page.text


def test_a_grid_whose_best_shape_is_a_corner_says_where_to_extend_it(runs: list, tmp_path: Path) -> None:
    fit = fit_grid(grid_points(best=2), sweep="grid_tiny", dataset="fractals", shots=10).as_dict()
    for said in (report.text(fit, runs), Page(report.write_report(fit, runs, tmp_path).read_text()).text):
        said = " ".join(said.split())
        assert "No origin: no shape strictly inside the grid" in said
        assert "extend the grid above depth 3" in said


def test_the_map_of_a_grid_shows_the_error_of_each_shape_and_frames_the_least() -> None:
    fit = fit_grid(grid_points(best=1)).as_dict()
    panels = maps.grid_errors(fit).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["depth 1", "depth 2", "depth 3"]
    shown = {text.get_position(): float(text.get_text()) for text in panels[1].texts}
    expected = {
        ((16, 24, 32).index(p["width"]), (32, 64, 96).index(p["mlp_dim"])): round(p["error"], 3)
        for p in fit["points"]
        if p["depth"] == 2 and p["t_gflops"] == 24
    }
    assert shown == expected
    frames = [[patch for patch in panel.patches if patch.get_width() < 1] for panel in panels]
    assert [len(found) for found in frames] == [0, 2, 0]  # the best, and the origin, which is the same shape here
    for frame in frames[1]:
        x, y = frame.get_xy()
        assert (x + frame.get_width() / 2, y + frame.get_height() / 2) == pytest.approx((1, 1))


def test_the_table_of_choices_keeps_exponents_under_their_own_choice(fit: dict) -> None:
    """An arm with fewer dropped durations than another must not shift its numbers."""
    fit["arms"]["width"]["late"] = [{"num_dropped": 2, "s": 0.777, "num_points": 9}]
    table = summary.choices(fit["arms"])
    rows = {name: dict(zip(table["header"], values, strict=True)) for name, values in table["rows"]}
    assert rows["width"]["from duration 3"] == 0.777 and rows["width"]["from duration 2"] is None
    assert rows["depth"]["error ≤ 0.6"] == fit["arms"]["depth"]["s"]["estimate"]


def test_one_percent_more_error_on_a_size_moves_s_as_a_refit_says(fit: dict) -> None:
    """Oracle: the errors of that size's runs raised by 1%, and the law fitted again with the same noise."""
    for arm, entry in fit["arms"].items():
        used = [point for point in fit["points"] if point["arm"] == arm and point["used"]]
        x, t, error = (np.array([point[key] for point in used], float) for key in (arm, "t_gflops", "error"))
        ratio = entry["tau"] / entry["sigma"]
        noise = Noise(index_runs([point["run_id"] for point in used]), ratio, np.ones(len(x)))
        before = fit_law(x, t, error, noise=noise).law.exponent
        found = linear.pull(arm, entry, fit["points"])
        assert sorted(found) == sorted(set(x))
        refits = {size: fit_law(x, t, np.where(x == size, 1.01 * error, error), noise=noise) for size in found}
        for size, refit in refits.items():
            assert found[size] == pytest.approx(refit.law.exponent - before, rel=0.25, abs=0.001 * before)
        assert max(map(abs, found.values())) > 0.01 * before  # or the comparison would be empty


def test_the_band_of_the_optimum_is_as_wide_as_refits_of_simulated_runs_scatter() -> None:
    """Oracle: 150 sweeps drawn from a law with an offset per run, each fitted; half the width is t(G - 3) times the
    spread of log x*. A band of points that ignores the run is a third as wide here."""
    law = Law(0.9, 0.8, 0.002, 0.9, 0.3, 0.5, 0.1)
    rng = np.random.default_rng(3)
    sizes, times = np.array([8, 16, 32, 64, 128, 256, 512.0]), np.geomspace(30, 900, 8)
    x, t = (values.ravel() for values in np.meshgrid(sizes, times, indexing="ij"))
    run, sigma, tau = np.repeat(np.arange(7), 8), 0.003, 0.006
    noise = Noise(run, tau / sigma, np.ones(len(x)))
    found = []
    for _ in range(150):
        offsets = tau * rng.standard_normal(7)[run] + sigma * rng.standard_normal(len(x))
        refit = fit_law(x, t, law.error(x, t) * np.exp(offsets), noise=noise, starts=[(law.a, law.b, law.c)])
        found.append(np.log(refit.law.optimum([30.0, 900.0])))
    rows = [
        {"arm": "width", "used": True, "run_id": str(k), "width": size, "t_gflops": time}
        for k, size, time in zip(run, x, t, strict=True)
    ]
    entry = {"law": law.as_dict(), "sigma": sigma, "tau": tau}
    band = linear.optimum_band("width", entry, rows, [30.0, 900.0])
    assert band is not None
    half = (np.log(band[1]) - np.log(band[0])) / 2
    np.testing.assert_allclose(half, 2.776 * np.std(found, axis=0), rtol=0.2)  # t(4) at 97.5%
    assert np.sqrt(band[0] * band[1]) == pytest.approx(law.optimum([30.0, 900.0]))


def test_a_law_without_an_optimum_has_no_band_and_no_pull(fit: dict) -> None:
    entry = fit["arms"]["depth"]
    entry["law"]["beta"] = 0.0
    assert linear.optimum_band("depth", entry, fit["points"], [100.0]) is None
    assert linear.pull("depth", entry, fit["points"]) == {}


def test_residuals_are_drawn_where_the_error_over_the_law_says(fit: dict) -> None:
    axis = misfit.residuals_by_run(fit, ("depth",)).axes[0]
    dots = [y for line in axis.lines if line.get_marker() == "o" for y in line.get_ydata()]
    law = Law(**fit["arms"]["depth"]["law"])
    used = [point for point in fit["points"] if point["arm"] == "depth" and point["used"]]
    off = [100 * (point["error"] / float(law.error(point["depth"], point["t_gflops"])) - 1) for point in used]
    assert sorted(dots) == pytest.approx(sorted(off))


def test_an_open_or_clipped_end_is_an_arrow_and_not_a_short_line(fit: dict) -> None:
    """An interval that the data leave open must not look like one that ends at the edge of the figure."""
    fit["arms"]["depth"]["s"]["hi"] = None
    fit["arms"]["width"]["s"] |= {"lo": 0, "hi": 40.0}
    axis = figures.exponents(fit).axes[0]
    arrows = [(line.get_marker(), round(float(line.get_ydata()[0]), 2)) for line in axis.lines]
    assert (">", -0.76) in arrows and (">", 0.24) in arrows and ("<", 0.24) in arrows
    assert ("<", -0.76) not in arrows
    assert axis.get_xlim()[1] < 4


def test_an_exponent_with_a_warning_or_a_failed_check_is_not_said_to_hold(fit: dict) -> None:
    """A green verdict above a warning about the same arm would be the first thing a reader sees."""
    steady = {
        "cutoff_range": None,
        "parabola": None,
        "jackknife": None,
        "center_check": [],
        "flags": [],
        "warnings": [],
    }
    for entry in fit["arms"].values():
        entry |= steady | {"s": {"estimate": 0.3, "lo": 0.2, "hi": 0.45}}
    assert [tone for tone, _ in summary.answer(fit)] == ["good", ""]
    fit["arms"]["depth"]["warnings"] = ["smooth structure is left in the residuals"]
    fit["checks"] = [
        {"check": "influence", "dimension": "mlp_dim", "verdict": "doubt", "sentence": "one run", "p": 0.01}
    ]
    tones = dict(summary.answer(fit))
    assert "width" in tones["good"] and "depth" not in tones["good"] and "MLP" not in tones["good"]
    assert "depth" in tones["doubt"] and "MLP dimension" in tones["doubt"]


def test_an_order_of_growth_is_claimed_only_where_intervals_are_apart(fit: dict) -> None:
    for arm, (low, high) in {"width": (0.1, 0.2), "depth": (0.25, 0.4), "mlp_dim": (0.3, None)}.items():
        fit["arms"][arm] |= {"identified": True, "s": {"estimate": low + 0.05, "lo": low, "hi": high}}
    said = summary.answer(fit)[-1][1]
    assert "Depth grows faster than width and MLP dimension grows faster than width" in said
    assert "not settled" in said and "MLP dimension grows faster than depth" not in said
    fit["arms"]["width"]["s"]["hi"] = 0.5
    assert summary.answer(fit)[-1][1] == "The intervals overlap, so which dimension grows fastest is not settled."
