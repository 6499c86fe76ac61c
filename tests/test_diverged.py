"""Divergence is a result: found within a bound, at the same step however often a run was stopped, and listed."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from small_cells import content, small, stop_at
from sovit import records
from sovit.analysis.points import load_points
from sovit.config import ConfigError, RunConfig
from sovit.lit import checkpoints, engine
from sovit.lit.callbacks import WATCH_EVERY
from sovit.lit.module import LitClassifier

LONG = ("durations.values=[60 steps]", "eval.shots=[1]", "eval.num_draws=1", "trainer.log_every_n_steps=1000")


def record_of(cfg: RunConfig) -> dict[str, Any]:
    record = records.read_run(records.run_dir(cfg))
    assert record is not None
    return record


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let the loss of a step, and of every step after it, be changed by a function."""

    def arrange(step: int, change: Any, only: bool = False) -> None:
        original = LitClassifier.loss_of

        def loss_of(self: Any, *batch: Any) -> Any:
            loss, now = original(self, *batch), self.global_step + 1
            return change(loss) if now == step or (now > step and not only) else loss

        monkeypatch.setattr(LitClassifier, "loss_of", loss_of)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("clip", ["1.0", "null"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda loss: loss * math.nan, "training loss is nan"),
        (lambda loss: loss + math.inf, "training loss is inf"),
        (lambda loss: loss + 1e3, "training loss is "),
    ],
)
def test_a_bad_loss_ends_a_run_within_a_fixed_number_of_steps_whatever_is_logged(
    tmp_path: Path, spoil: Any, change: Any, words: str, clip: str
) -> None:
    spoil(27, change)
    for every in (1, 1000):
        cfg = small(tmp_path / str(every), *LONG, f"optim.clip_norm={clip}", f"trainer.log_every_n_steps={every}")
        assert engine.run(cfg) == engine.DIVERGED
        record = record_of(cfg)
        assert record["status"] == records.DIVERGED and record["diverged_step"] == 50
        assert words in record["reason"] and "at step 50" in record["reason"]
        assert WATCH_EVERY == 25


def test_a_loss_that_explodes_is_compared_with_that_of_the_first_step(
    tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ln 8 = 2.08 at first: 30 is above ten times that, and below twenty times."""
    spoil(2, lambda loss: loss * 0 + 30)
    cfg = small(tmp_path / "a", *LONG)
    assert engine.run(cfg) == engine.DIVERGED
    reason = record_of(cfg)["reason"]
    assert reason.startswith("training loss is 30, above 10 times the 2.") and reason.endswith("at step 25")
    for value in ("20", "null"):
        assert engine.run(small(tmp_path / value, *LONG, f"optim.diverged_above={value}")) == engine.OK
    with pytest.raises(ConfigError, match="must be above 1"):
        small(tmp_path, "optim.diverged_above=0.5")


def test_the_limit_may_be_lifted_for_a_run_that_was_judged_too_early(tmp_path: Path, spoil: Any) -> None:
    """It changes no number, so the run goes on from its last resume point under its own id."""
    spoil(2, lambda loss: loss + 30)
    cfg, lifted = (small(tmp_path, *LONG, f"optim.diverged_above={value}") for value in ("10", "null"))
    assert engine.run(cfg) == engine.DIVERGED
    assert records.config_hash(cfg) == records.config_hash(lifted)
    assert engine.run(lifted) == engine.OK
    assert "diverged_step" not in record_of(lifted)


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_gradients_that_are_not_finite_are_seen_though_the_loss_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """Lightning passes them on in silence; the optimiser spreads them over the weights."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.inf

    original = LitClassifier.loss_of

    def loss_of(self: Any, *batch: Any) -> Any:
        loss = original(self, *batch)
        return Poison.apply(loss) if self.global_step == 24 else loss

    monkeypatch.setattr(LitClassifier, "loss_of", loss_of)
    cfg = small(tmp_path, *LONG, f"optim.clip_norm={clip}")
    assert engine.run(cfg) == engine.DIVERGED
    assert record_of(cfg)["diverged_step"] == 25
    assert record_of(cfg)["reason"].startswith("gradient norm is ")


def test_a_weight_that_is_not_finite_is_seen_though_loss_and_gradients_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LitClassifier.loss_of

    def loss_of(self: Any, *batch: Any) -> Any:
        if self.global_step == 10:
            with torch.no_grad():
                self.trained[-1].fill_(math.nan)
        return original(self, *batch) * 0 if self.global_step < 10 else torch.zeros((), requires_grad=True)

    monkeypatch.setattr(LitClassifier, "loss_of", loss_of)
    cfg = small(tmp_path, *LONG)
    assert engine.run(cfg) == engine.DIVERGED
    assert record_of(cfg)["reason"] == "a parameter is not finite at step 25"


@pytest.mark.parametrize("weights", ["ema", "cooled"])
def test_a_resumed_run_diverges_at_the_same_step_with_the_same_records(
    tmp_path: Path, spoil: Any, weights: str
) -> None:
    """Stopped before, in and after the steps that are bad but not yet judged; saving then would make it a lasting state."""
    spoil(38, lambda loss: loss + 1e3)
    given = (
        *LONG, f"eval.weights={weights}", "durations.values=[30 steps,100 steps]", "trainer.log_every_n_steps=3"
    )  # fmt: skip
    undisturbed = small(tmp_path / "undisturbed", *given)
    assert engine.run(undisturbed) == engine.DIVERGED
    assert record_of(undisturbed)["diverged_step"] == 50
    for stop in (3, 32, 41, 47):
        cfg = small(tmp_path / str(stop), *given)
        with stop_at(stop):
            assert engine.run(cfg) == engine.STOPPED
        assert engine.run(cfg) == engine.DIVERGED
        assert [record_of(cfg)[key] for key in ("reason", "diverged_step")] == [
            record_of(undisturbed)[key] for key in ("reason", "diverged_step")
        ]
        assert content(cfg) == content(undisturbed), stop


@pytest.mark.parametrize("change", [lambda loss: loss * math.nan, lambda loss: loss + 1e3])
def test_the_last_resume_point_of_a_diverged_run_is_a_good_one(tmp_path: Path, spoil: Any, change: Any) -> None:
    """Though points are asked for after every step, bad ones among them."""
    spoil(38, change)
    cfg = small(tmp_path, *LONG, "trainer.checkpoint_every_s=1e-9")
    assert engine.run(cfg) == engine.DIVERGED
    directory = records.run_dir(cfg)
    points = checkpoints.resume_points(directory)
    assert [point.step for point in points] == [36, 37]
    state = checkpoints.read(directory / points[-1].name)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_single_bad_step_between_two_looks_is_no_divergence_and_no_resume_point(tmp_path: Path, spoil: Any) -> None:
    """Otherwise whether a run diverges would depend on when a point was due, which depends on the clock."""
    spoil(38, lambda loss: loss + 1e3, only=True)
    often, seldom = (
        small(tmp_path / every, *LONG, f"trainer.checkpoint_every_s={every}") for every in ("1e-9", "1000")
    )
    assert [engine.run(often), engine.run(seldom)] == [engine.OK, engine.OK]
    assert content(often) == content(seldom)


def test_features_that_are_not_finite_are_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sovit.lit import evaluation

    monkeypatch.setattr(evaluation, "features", lambda model, images: torch.full((len(images), 4), math.nan))
    cfg = small(tmp_path)
    assert engine.run(cfg) == engine.DIVERGED
    assert (record_of(cfg)["reason"], record_of(cfg)["diverged_step"]) == ("features are not finite at step 0", 0)


def test_a_real_rate_that_is_far_too_high_diverges(tmp_path: Path) -> None:
    cfg = small(tmp_path, *LONG, "optim.lr=1e4", "optim.clip_norm=null", "schedule.warmup_steps=0")
    assert engine.run(cfg) == engine.DIVERGED
    assert record_of(cfg)["diverged_step"] == 25


def test_metrics_of_a_diverging_run_are_json(tmp_path: Path, spoil: Any) -> None:
    """NaN is no JSON: jq and every other strict reader stops at it."""
    spoil(5, lambda loss: loss * math.nan)
    cfg = small(tmp_path, "durations.values=[60 steps]")
    assert engine.run(cfg) == engine.DIVERGED

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = (records.run_dir(cfg) / records.METRICS).read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[-1]["train/loss"] is None and rows[0]["train/loss"] > 0


def test_the_analysis_lists_diverged_runs_and_those_that_repeat_them(tmp_path: Path, spoil: Any) -> None:
    """A retry is done, but at another rate than the others, so it stays out unless it is asked for."""
    given = (*LONG, "durations.values=[8 steps]", "eval.shots=[1]", "name=s")
    fine = [small(tmp_path, *given, f"shape={width}x1x16") for width in (16, 24)]
    for cfg in fine:
        assert engine.run(cfg) == engine.OK
    broken = small(tmp_path, *given, "shape=32x1x16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitClassifier, "loss_of", lambda self, *_: self.trained[0].sum() * math.nan)
        assert engine.run(broken) == engine.DIVERGED
    name = records.run_id(broken)
    retry = small(tmp_path, *given, "shape=32x1x16", "optim.lr=0.001", "tag=retry1", f"retry_of={name}")
    assert engine.run(retry) == engine.OK

    points, exclusions = load_points(tmp_path / "s", "fractals", 1)
    assert {point.run_id for point in points} == {records.run_id(cfg) for cfg in fine}
    assert {exclusion.run_id: exclusion.reason for exclusion in exclusions} == {
        name: "diverged: training loss is nan at step 8",
        records.run_id(retry): f"trained at a lower learning rate after {name} diverged",
    }
    points, exclusions = load_points(tmp_path / "s", "fractals", 1, retried=True)
    assert {point.run_id for point in points} == {records.run_id(cfg) for cfg in [*fine, retry]}
    assert [exclusion.run_id for exclusion in exclusions] == [name]


def test_a_done_run_with_missing_rows_is_no_part_of_a_fit(tmp_path: Path) -> None:
    """Whole lines that are gone leave a file that reads well, with fewer points."""
    cfg = small(tmp_path, "name=s", "eval.shots=[1]")
    engine.run(cfg)
    path = records.run_dir(cfg) / records.EVALS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-6]))
    points, [exclusion] = load_points(tmp_path / "s", "fractals", 1)
    assert not points and "not the" in exclusion.reason and "trains the run again" in exclusion.reason
