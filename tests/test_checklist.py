"""The (Mis)Fitting checklist fills itself in from the records, and says where they are silent."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sovit.analysis.grid import fit_grid
from sovit.analysis.points import load_points
from sovit.analysis.report import page as report
from sovit.analysis.report.checklist import NOT_RECORDED, checklist
from sovit.analysis.star import fit_star
from test_report import grid_points, star_cells, write_star

# What arXiv 2502.18969 asks of a paper on scaling laws, by the words an answer's name must hold.
DEMANDED = (
    "law", "transforms", "bounds", "shared parameters", "loss and reduction", "weights", "optimiser", "tolerances", "starts",
    "converged", "spread of the best", "run ids", "shapes", "compute t", "seeds", "cooled", "left out", "schedule",
    "learning rate across shapes", "batch", "decay", "augmentation", "passes", "fingerprint", "code", "lock", "split",
    "shots", "draws", "l2", "layer", "resolution", "test images", "resampling unit", "replicates", "interval", "budget",
    "extrapolation factor", "held-out error", "regret",
)  # fmt: skip


@pytest.fixture(scope="module")
def _star(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("runs") / "star_tiny"
    write_star(directory)
    points, exclusions = load_points(directory, "fractals", 10)
    found = fit_star(points, sweep="star_tiny", dataset="fractals", shots=10, exclusions=exclusions)
    return json.loads(json.dumps(found.as_dict(), allow_nan=False)), report.read_runs(directory)


@pytest.fixture
def star(_star: tuple[dict[str, Any], list[dict[str, Any]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return copy.deepcopy(_star)


def answers(fit: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, str]:
    return {item.name: item.answer for item in checklist(fit, runs)}


@pytest.mark.parametrize("kind", ["star", "grid", "joint", "diagonal"])
def test_every_item_that_is_demanded_is_there_for_every_kind_of_fit(kind: str, star: tuple) -> None:
    """A kind of fit that lacks a block must say so, not shorten the list."""
    fits = {
        "star": star[0],
        "grid": fit_grid(grid_points(best=1), sweep="grid_tiny", dataset="fractals", shots=10).as_dict(),
        "joint": star[0] | {"kind": "joint", "arms": {}, "sigma": 0.01, "tau": 0.02, "exponents": {}},
        "diagonal": star[0] | {"kind": "diagonal", "arms": {}, "arm": star[0]["arms"]["depth"]},
    }
    names = list(answers(fits[kind], star[1]))
    assert len(names) == len(set(names))
    for word in DEMANDED:
        if kind == "grid" and word in ("replicates", "interval"):  # shares of draws and leads take their place
            word = {"replicates": "how sure the best shape is", "interval": "lead of the best shape"}[word]
        assert any(word in name for name in names), word


def test_the_answers_are_those_of_the_records(star: tuple) -> None:
    """Oracle: the numbers the records were written with."""
    found = answers(*star)
    used = sum(error <= 0.6 for arm, _, errors in star_cells() if arm for error in errors)
    assert found["run ids"].startswith(f"{used} points of 15 runs")
    assert (
        found["shapes"]
        == "16; width 16, 24, 32, 48, 64, 96; depth 1, 2, 4, 6, 8, 12; MLP dimension 16, 32, 64, 128, 256, 512"
    )
    assert found["compute t"].startswith("16.6 to 267 GFLOPs") and "multiply-add" in found["compute t"]
    assert found["seeds"] == "0" and found["shots"] == "10" and found["draws of the support"] == "3"
    assert found["cooled or not"].startswith("not cooled: weights averaged")
    assert found["test images"].startswith("4,096; binomial ± 0.0068 at 0.249")
    assert found["resolution"] == "16 pixels a side"
    assert found["batch"] == "global_batch_size 128" and found["weight decay"] == "weight_decay 0.05"
    assert found["code"] == "0.1.0+0123456789ab" and found["lock (SHA-256)"] == "ab" * 32
    assert found["weights"] == "equal" and found["resampling unit"] == "run"
    assert found["converged"].count("% of the starts") == 3
    assert re.search(r"12 points: error above the cut-off 0.6; 5 points: center", found["left out"])
    assert found["budget"] == "does not apply: this fit makes no forecast"


def test_what_the_records_do_not_hold_is_said_to_be_missing(star: tuple) -> None:
    """The fixture's configuration has no schedule, evaluation or pool: those must not be filled in from today's code."""
    found = answers(*star)
    for name in ("schedule", "l2", "layer", "split", "precision"):
        assert found[name] == NOT_RECORDED, name
    fit, _ = star
    bare = answers(fit | {"fit": {}}, [])
    for name in (
        "loss and reduction",
        "tolerances",
        "starts",
        "code",
        "data fingerprint",
        "batch",
        "test images",
        "cooled or not",
    ):
        assert bare[name] == NOT_RECORDED, name
    assert bare["seeds"] == "0" and bare["data set"] == "fractals"


def test_runs_that_differ_in_the_recipe_are_not_summed_up_by_one_of_them(star: tuple) -> None:
    fit, runs = star
    runs[0]["config"]["optim"]["lr"] = 0.01
    runs[1]["data_fingerprint"] = "other"
    found = answers(fit, runs)
    assert "lr differs: 0.005, 0.01" in found["learning rate across shapes"]
    assert found["data fingerprint"] == "differs: fractals-5f0c7d3a, other"


def test_images_of_other_data_sets_are_not_said_to_be_drawn_anew(star: tuple) -> None:
    fit, runs = star
    assert "drawn anew" in answers(fit, runs)["passes over the data"]
    for run in runs:
        run["config"]["data"]["name"] = "imagenet"
    found = answers(fit, runs)
    assert found["passes over the data"] == found["augmentation"] == NOT_RECORDED


@pytest.mark.parametrize(
    ("weights", "words"), [("cooled", "cooled: each duration"), ("trunk", "not cooled: the weights as they stood")]
)
def test_cooled_runs_are_told_from_others(weights: str, words: str, star: tuple) -> None:
    fit, runs = star
    for run in runs:
        for row in run["metrics"]:
            row["weights"] = [weights]
    assert answers(fit, runs)["cooled or not"].startswith(words)


def test_the_forecast_fills_its_part(star: tuple) -> None:
    fit, runs = star
    fit["forecast"] = {
        "t_gflops": 2560.0, "budget": "ten times", "extrapolation": {"factor": 9.6}, "regret_by": "by the laws",
        "candidates": [{"regret": 0.045}],
    }  # fmt: skip
    found = answers(fit, runs)
    assert found["budget"] == "2,560 GFLOPs, ten times"
    assert found["extrapolation factor"] == "9.60 times the data"
    assert found["regret of rounding"] == "4.5% of the compute, by the laws"
    assert found["held-out error"].startswith("of the center, at most: width")


def test_the_number_of_test_images_comes_from_the_recorded_standard_errors(tmp_path: Path) -> None:
    write_star(tmp_path)
    path = min(tmp_path.glob("*/evals.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for k, row in enumerate(rows):
        error = (0.11, 0.52, 0.0, 1.0)[k % 4]
        row |= {"error": error, "stderr": (error * (1 - error) / 1797) ** 0.5, "l2_reg": 2.0 ** (k % 3)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {run["run_id"]: run["metrics"][0] for run in report.read_runs(tmp_path)}
    metrics = found.pop(path.parent.name)
    assert metrics["num_test"] == 1797 and metrics["l2_reg"] == [1.0, 4.0] and metrics["draws"] == 3
    assert {other["num_test"] for other in found.values()} <= {4095, 4096, 4097}


def test_the_report_counts_what_is_answered(star: tuple, tmp_path: Path) -> None:
    from sovit.analysis.report.contents import contents
    from sovit.analysis.report.document import as_json

    found = as_json(contents(*star))["sections"]["checklist"]
    rows = found["tables"]["checklist"]["rows"]
    known = sum(row["answer"] != NOT_RECORDED for row in rows)
    assert f"{known} of {len(rows)} items are answered" in found["text"][0] and 0 < known < len(rows)
    assert {row["group"] for row in rows} == {"Fit", "Points", "Training", "Metric", "Uncertainty", "Forecast"}
