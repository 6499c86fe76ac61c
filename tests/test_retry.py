"""A diverged cell again at a lower rate: another cell, announced, found again, and never more than twice."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fake_cells import go, plan, starts
from sovit import records
from sovit.config import compose
from sovit.launch.local.retry import retry_cell
from sovit.launch.plan import plan as plan_sweep
from sovit.launch.state import state_on_disk
from sovit.launch.sweep import SweepError, load_sweep

SWEEPS = Path(__file__).parents[1] / "sweeps"
FIRST, SECOND = (f"w0032-d04-m0128-h01-p16-a+lr{rate}-s0" for rate in ("0.0005", "0.00025"))


def test_a_retry_is_the_same_cell_at_a_lower_rate_under_another_id() -> None:
    cell = plan_sweep(load_sweep(SWEEPS / "star_tiny.yaml", ["shape=24x4x128"])).cells[0]
    before = cell.config.optim.lr
    retries = [retry_cell(cell, 0.3, number) for number in (1, 2)]
    for number, retry in enumerate(retries, start=1):
        composed = compose(retry.overrides)  # what its process will do
        assert composed == retry.config
        assert (records.run_id(composed), records.config_hash(composed)) == (retry.run_id, retry.config_hash)
        assert records.run_dir(composed) == retry.run_dir
        assert composed.optim.lr == pytest.approx(before * 0.3**number, rel=1e-5)
        _, shape, tag, seed = records.parse_run_id(retry.run_id)
        assert (shape, seed) == (cell.shape, cell.seed) and float(tag.removeprefix("lr")) == composed.optim.lr
        same = replace(composed, tag="", retry_of="", optim=replace(composed.optim, lr=before))
        assert records.config_hash(same) == cell.config_hash  # nothing else has changed
    assert [retry.config.retry_of for retry in retries] == [cell.run_id, retries[0].run_id]
    assert len({cell.run_id, *(retry.run_id for retry in retries)}) == 3


def test_a_retry_of_a_tagged_cell_keeps_its_tag_and_small_rates_have_no_minus_sign() -> None:
    cell = plan_sweep(load_sweep(SWEEPS / "star_tiny.yaml", ["shape=24x4x128", "tag=warm", "optim.lr=0.000003"])).cells[
        0
    ]
    retry = retry_cell(cell, 0.5, 1)
    assert records.parse_run_id(retry.run_id)[2] == "warm+lr0.0000015"
    assert compose(retry.overrides) == retry.config and retry.config.optim.lr == 1.5e-6
    assert sorted(item.split("=")[0] for item in retry.overrides).count("optim.lr") == 1


def test_a_cell_is_repeated_at_lower_rates_until_one_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(tmp_path, {"a": "steep", "b": "done"}, workers=1)
    assert go(made, retry_diverged=0.5) == 0
    assert starts(tmp_path) == ["a", "b", FIRST, SECOND]
    out = capsys.readouterr().out
    assert len(re.findall(r"  retry .* repeats a, which diverged at optim.lr 0.001, at 0.0005\n", out)) == 1
    assert len(re.findall(r"  retry .* repeats .*, which diverged at optim.lr 0.0005, at 0.00025\n", out)) == 1
    assert f"fake: fake-a diverged; fake-{SECOND}, at optim.lr 0.00025, is done and takes its place.\n" in out
    assert "fake: all 2 cells are done" in out
    assert state_on_disk(tmp_path / "fake" / "fake-a")[0] == "diverged"  # it stays
    assert go(made, retry_diverged=0.5) == 0  # found again
    assert len(starts(tmp_path)) == 4
    again = capsys.readouterr().out
    assert "takes its place" in again and "retry " not in again
    assert go(made) == 1  # not asked for: the cell as planned has diverged
    assert "--retry-diverged 0.5 repeats what diverged" in capsys.readouterr().out


def test_without_being_asked_nothing_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, {"a": "steep"}, workers=1)
    assert go(made) == 1
    assert starts(tmp_path) == ["a"] and "retry " not in capsys.readouterr().out
    assert go(made, retry_diverged=0.25) == 0  # that of an earlier invocation
    assert starts(tmp_path) == ["a", SECOND]


def test_what_diverges_at_every_rate_is_tried_three_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, {"a": "diverge", "b": "fail"}, workers=2)
    for _ in range(2):
        assert go(made, retry_diverged=0.5) == 1
        assert sorted(starts(tmp_path)) == ["a", "b", SECOND, FIRST]
        out = capsys.readouterr().out
        assert "2 of 2 cells failed or diverged (1 at lower rates too)" in out and "--retry-diverged" not in out


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.5, 2.0, float("nan"), float("inf")])
def test_a_factor_that_does_not_lower_the_rate_is_refused(tmp_path: Path, factor: float) -> None:
    with pytest.raises(SweepError, match=rf"--retry-diverged {factor:g} would not lower"):
        go(plan(tmp_path, {"a": "done"}), retry_diverged=factor)
    assert starts(tmp_path) == []
