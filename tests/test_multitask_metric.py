"""metric=multitask: the rows of a decoder beside the few-shot rows, from the hook of a run to the words of a report."""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rank_cells import run_ranks
from small_cells import content, overrides, pretend_stop, small
from sovit import cli, metric, records
from sovit.analysis.points import load_points, metrics, read_rows
from sovit.analysis.report import page
from sovit.analysis.report.checklist import NOT_RECORDED, checklist
from sovit.analysis.scale import ERROR, log_perplexity, scale_of
from sovit.analysis.star import fit_star
from sovit.config import ConfigError, compose
from sovit.launch.plan import plan
from sovit.launch.sweep import SweepError, load_sweep, metric_of
from sovit.launch.wandb.run import metrics_of
from sovit.lit import engine
from sovit.lit.evaluation import extract
from sovit.lit.fit import build_model
from sovit.lit.multitask import Multitask, patches, tokens
from two_metrics import write

FEW = (
    *("metric=multitask", "eval.train_scenes=12", "eval.test_scenes=6", "eval.decoder_steps=8", "eval.decoder_width=16"),
    *("eval.decoder_batch_size=4", "eval.decoder_depth=1", "eval.datasets=[fractals]", "eval.shots=[1]"),
    *("eval.num_draws=1", "durations.values=[8 steps,16 steps]"),
)  # fmt: skip
NAMES = ["multitask", "multitask.caption", "multitask.vqa", "multitask.ocr_vqa", "multitask.gqa"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cfg = small(tmp_path_factory.mktemp("runs"), *FEW)
    assert engine.run(cfg) == engine.OK
    return cfg


def rows_of(cfg: Any) -> list[dict[str, Any]]:
    return read_rows(records.run_dir(cfg) / records.EVALS)


def test_every_evaluation_has_a_row_for_the_mean_and_each_task_of_each_decoder(run: Any) -> None:
    rows = [row for row in rows_of(run) if row.get("metric") == metric.LOG_PERPLEXITY]
    assert {(row["step"], row["dataset"], row["draw"]) for row in rows} == {
        (step, name, draw) for step in (0, 8, 16) for name in NAMES for draw in (0, 1)
    }
    assert len(rows) == 3 * 5 * 2 and all(row["shots"] == 0 and row["l2_reg"] is None and row["stderr"] for row in rows)
    for mean in (row for row in rows if row["dataset"] == "multitask"):
        at = (mean["step"], mean["draw"])
        tasks = [row["error"] for row in rows if (row["step"], row["draw"]) == at and row["dataset"] != "multitask"]
        assert mean["error"] == pytest.approx(sum(tasks) / 4)
    # An untrained decoder would say log 486; the seeds differ, and so do encoders of 8 and 16 steps.
    assert len({row["error"] for row in rows}) == len(rows) and all(row["error"] < math.log(486) for row in rows)


def test_a_decoder_changes_nothing_of_the_training_beside_it(run: Any, tmp_path: Path) -> None:
    """Drawing weights or leaving gradients behind in an evaluation would show in every later loss."""
    plain = small(
        tmp_path, *(text for text in FEW if "decoder" not in text and "scenes" not in text and "metric" not in text)
    )
    assert engine.run(plain) == engine.OK
    assert content(plain)[1] == content(run)[1]
    few_shot = [{**row, "run_id": "", "sweep": ""} for row in rows_of(run) if "metric" not in row]
    assert few_shot == [{**row, "run_id": "", "sweep": ""} for row in rows_of(plain)]


def test_a_stopped_run_goes_on_to_the_same_bytes(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = small(tmp_path, *FEW)
    with monkeypatch.context() as patch:
        pretend_stop(patch, 11)
        assert engine.run(again) == engine.STOPPED
    assert engine.run(again) == engine.OK
    assert content(again) == content(run)


def test_the_levels_to_beat_do_not_know_the_encoder(run: Any, tmp_path: Path) -> None:
    """Computed once for all cells of a sweep, so a level that hung on the width would be the first cell's."""
    wider = small(tmp_path, *FEW, "shape=24x2x16", "durations.values=[8 steps]")
    assert engine.run(wider) == engine.OK
    found = [(records.read_run(records.run_dir(cfg)) or {})["baselines"] for cfg in (run, wider)]
    assert found[0] == found[1] and set(found[0]) == {"fractals", *NAMES}
    for name in NAMES:
        assert found[0][name]["chance"] > 0 and set(found[0][name]["pixels"]) == {"0"}


def test_a_blind_decoder_sees_none_of_the_tokens(tmp_path: Path) -> None:
    made = Multitask(small(tmp_path, *FEW, "eval.decoder_draws=1"))
    drawn = [torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    blind = [made.scores(some, some[:6], blind=True) for some in drawn]
    seen = [made.scores(some, some[:6]) for some in drawn]
    assert blind[0] == blind[1] and seen[0] != seen[1] and seen[0] != blind[0]


def test_tokens_are_all_places_and_not_pooled() -> None:
    """An average over places would hide where things are. The mean of the tokens is the pooled feature (pool=avg)."""
    torch.manual_seed(0)
    model = build_model(compose(["shape=16x2x16"])).eval()
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        found = tokens(model, images)
    assert found.shape == (3, 4, 16)
    torch.testing.assert_close(found.mean(1), extract(model, images))
    torch.testing.assert_close(extract(model, images, of=tokens), found)


def test_a_patch_of_pixels_is_that_corner_of_the_image() -> None:
    images = torch.arange(2 * 1 * 4 * 4.0).reshape(2, 1, 4, 4)
    found = patches(images, 2)
    assert found.shape == (2, 4, 4) and torch.equal(found[1, 2], images[1, 0, 2:4, 0:2].flatten())


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_share_the_scenes(run: Any, tmp_path: Path, parallel: str) -> None:
    """13 scenes of two processes: the last share is padded, and the padding must not reach the decoder."""
    given = ("eval.train_scenes=13", "eval.test_scenes=7", "trainer.precision=64-true")
    alone, both = (small(tmp_path / name, *FEW, *given) for name in ("a", "b"))
    assert engine.run(alone) == engine.OK
    text = overrides(tmp_path / "b", *FEW, *given, f"parallel={parallel}")
    assert run_ranks(text, 2, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    for here, there in zip(rows_of(alone), rows_of(both), strict=True):
        assert here["dataset"] == there["dataset"] and here["error"] == pytest.approx(there["error"], rel=1e-5)


# ----------------------------------------------------------------------------------------------- configuration, sweeps


def test_runs_recorded_before_the_metric_are_still_the_ones_that_are_asked_for() -> None:
    """The hash of the default configuration, as the version before the keys had it."""
    assert records.config_hash(compose([])) == "412264f7f3a9d38a"
    assert records.config_hash(compose(["metric=multitask"])) != "412264f7f3a9d38a"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["eval.decoder_width=32"], "no effect without a decoder; write metric=multitask"),
        (["metric=multitask", "eval.datasets=[pictures/multitask]"], "rename the folder"),
        (["metric=multitask", "eval.test_scenes=0"], "must be positive"),
        (["metric=multitask", "eval.decoder_width=30"], "eval.decoder_width=30 is not divisible by the 4 heads"),
        (["metric=multitsk"], "did you mean 'multitask'"),
        (["metric=multitask", "model.image_size=512"], "above 256"),
    ],
)
def test_a_metric_that_cannot_be_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose(given)


def test_names_are_read_back() -> None:
    for one in (("fractals", 10), ("a_b.c-d", 1), ("multitask", 0), ("multitask.ocr_vqa", 0), ("scenes", 0)):
        assert metric.parse_key(metric.key(*one)) == one == metric.parse(metric.label(*one))
    assert metric.key("multitask.ocr_vqa", 0) == "eval/multitask_ocr_vqa/log_perplexity"
    assert metric.parse("fractals") == ("fractals", 10) and metric.words("scenes", 0) == "zero-shot error on scenes"
    assert metric.words("multitask", 10) == "10-shot error on multitask"  # a folder of that name
    for wrong in ("eval/multitask/error", "eval/fractals/log_perplexity", "fractals"):
        with pytest.raises(SweepError, match="is not one that runs log"):
            metric_of(wrong)
    with pytest.raises(ValueError, match="fractals@10"):
        metric.parse("fractals@ten")


def test_a_sweep_may_follow_the_log_perplexity_only_if_cells_train_a_decoder(tmp_path: Path) -> None:
    text = Path("sweeps/star_multitask.yaml").read_text().replace("fractals_10shot/error", "multitask/log_perplexity")
    (tmp_path / "with.yaml").write_text(text)
    (tmp_path / "without.yaml").write_text(text.replace("value: star_multitask", "value: star_quick"))
    one = ["shape=24x3x96"]
    assert metric_of(load_sweep(tmp_path / "with.yaml", one).metric["name"]) == ("multitask", 0)
    assert len(plan(load_sweep(tmp_path / "with.yaml", one)).cells) == 1
    with pytest.raises(SweepError, match="no decoder is trained"):
        plan(load_sweep(tmp_path / "without.yaml", one))


def test_wandb_is_told_of_the_mean_over_the_decoders_by_a_name_without_a_point(run: Any) -> None:
    last = [row for row in rows_of(run) if row["step"] == 16]
    told = metrics_of(last)
    values = [row["error"] for row in last if row["dataset"] == "multitask.gqa"]
    assert told["eval/multitask_gqa/log_perplexity"] == pytest.approx(sum(values) / 2)
    assert {"eval/multitask/log_perplexity", "eval/fractals_1shot/error"} <= set(told)


# -------------------------------------------------------------------------------------------------------- the analysis


def test_points_may_exceed_1_only_where_they_are_log_perplexities(run: Any, tmp_path: Path) -> None:
    directory = records.run_dir(run)
    points, _ = load_points(directory.parent, "multitask", 0)
    assert [point.num_draws for point in points] == [2, 2] and all(point.error > 1 for point in points)
    rows = [row for row in rows_of(run) if row["dataset"] == "multitask" and row["step"] == 16]
    spread = abs(rows[0]["error"] - rows[1]["error"]) / math.sqrt(2) / math.sqrt(2)
    of_test = (rows[0]["stderr"] + rows[1]["stderr"]) / 2
    assert points[-1].stderr == pytest.approx(math.hypot(of_test, spread))
    assert set(metrics(directory.parent)) == {("fractals", 1), *((name, 0) for name in NAMES)}
    wrong = [
        (rows[0] | {"metric": "error"}, "error .* which is not in"),
        (rows[0] | {"shots": 10}, "metric log_perplexity of multitask at 10 shots, which cannot be"),
        (
            {key: value for key, value in rows[0].items() if key != "metric"} | {"error": 0.5},
            "metric error of multitask",
        ),
        (rows[0] | {"metric": "bleu"}, "metric 'bleu', which is not known"),
        (rows[0] | {"error": -0.1}, "which is not a log-perplexity"),
    ]
    for row, said in wrong:
        (tmp_path / "evals.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=said):
            read_rows(tmp_path / "evals.jsonl")


def test_what_a_decoder_reaches_without_an_image_is_the_largest_value_fitted(run: Any) -> None:
    directory = records.run_dir(run).parent
    points, _ = load_points(directory, "multitask", 0)
    blind = (records.read_run(records.run_dir(run)) or {})["baselines"]["multitask"]["chance"]
    found = scale_of(directory, "multitask", 0, points)
    assert found.headline == found.usable == pytest.approx(blind, rel=1e-3) and found == log_perplexity(blind)
    assert scale_of(directory, "fractals", 10, points) is ERROR


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("two") / "star_two")


@pytest.fixture(scope="module")
def fitted(star: Path) -> tuple[Path, str]:
    """The star fitted on the log-perplexity, and what the command said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["fit", str(star), "--dataset", "multitask", "--no-checks"]) == 0
    return star, said.getvalue()


def test_a_fit_of_log_perplexities_says_so_everywhere(fitted: tuple[Path, str]) -> None:
    star, said = fitted
    assert "log-perplexity, multitask, center 32x4x128" in said and "decoder without images 1.6" in said
    html, markdown = ((star / name).read_text() for name in ("report.html", "report.md"))
    for text in (said, html, markdown):
        assert "shot error" not in text and "measured error" not in text
    assert "Log-perplexity against each dimension" in html and "log-perplexity, multitask, nats a token" in html
    fit = json.loads((star / "fit.json").read_text())
    assert fit["metric"] == {"dataset": "multitask", "shots": 0} and fit["fit"]["headline_cutoff"] == 1.6
    above = [point for point in fit["points"] if point["error"] > 1.6]
    assert above and all("no better than without an image" in point["why_not"] for point in above)
    assert any(point["used"] and point["error"] > 0.9 for point in fit["points"])  # the limit of an error
    answered = {item.name: item.answer for item in checklist(fit, page.read_runs(star)) if item.group == "Metric"}
    assert answered["unit"].startswith("nats per token") and answered["to beat"] != NOT_RECORDED


def test_the_checks_hold_domains_and_tasks_against_each_other(star: Path) -> None:
    from sovit.analysis.checks.doubts import _metric_groups

    known = dict.fromkeys(metrics(star))
    assert _metric_groups(("fractals", 10), known) == {
        "domains": {"fractals@10": ("fractals", 10), "multitask": ("multitask", 0)}
    }
    tasks = dict.fromkeys([("multitask", 0), ("multitask.vqa", 0), ("multitask.gqa", 0), ("fractals", 10)])
    assert _metric_groups(("multitask", 0), tasks) == {
        "tasks": {"gqa": ("multitask.gqa", 0), "vqa": ("multitask.vqa", 0)}
    }


def test_plans_are_refused_for_what_is_no_error(
    fitted: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["next", str(fitted[0])]) == 2
    assert "sweeps are planned for errors only" in capsys.readouterr().err
    text = Path("sweeps/star_multitask.yaml").read_text().replace("fractals_10shot/error", "multitask/log_perplexity")
    (tmp_path / "sweep.yaml").write_text(text)
    assert cli.main(["simulate", str(tmp_path / "sweep.yaml"), "--runs-dir", str(tmp_path)]) == 2
    assert "only errors are simulated" in capsys.readouterr().err


def test_a_known_law_is_found_on_the_scale_of_log_perplexities(star: Path) -> None:
    """The exponents of the law that the values were drawn from lie in the intervals, values above 1 or not."""
    points, _ = load_points(star, "multitask", 0)
    made = fit_star(points, scale=scale_of(star, "multitask", 0, points))
    for name, s in (("width", 0.22), ("depth", 0.45), ("mlp_dim", 0.60)):
        found = made.arms[name].s
        assert found is not None and found.lo < s < found.hi, name
