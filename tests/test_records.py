"""Records are found by their run id, cut back exactly, and written in one step."""

import json
from pathlib import Path

import pytest

from sovit import records
from sovit.config import compose
from sovit.derived import shape_of


def test_run_ids_parse_back_and_sort_by_shape() -> None:
    cfgs = [compose([f"shape={s}", "name=star_tiny", "seed=3"]) for s in ("8x4x128", "16x4x128", "96x4x128")]
    ids = [records.run_id(cfg) for cfg in cfgs]
    assert ids[1] == "star_tiny-w0016-d04-m0128-h04-p08-s3"
    assert ids == sorted(ids)
    for cfg, text in zip(cfgs, ids, strict=True):
        assert records.parse_run_id(text) == ("star_tiny", shape_of(cfg), "", 3)
    tagged = compose(["tag=lr0.004"])
    assert records.parse_run_id(records.run_id(tagged)) == ("run", shape_of(tagged), "lr0.004", 0)
    with pytest.raises(ValueError, match="is not a run id"):
        records.parse_run_id("star_tiny")


def test_the_hash_sees_what_changes_numbers_and_nothing_else() -> None:
    def hashed(*overrides: str) -> str:
        return records.config_hash(compose(overrides))

    assert hashed("runs_dir=x", "logger=none", "data.num_workers=2", "trainer.checkpoint_every_s=1") == hashed()
    assert hashed("optim.diverged_above=null") == hashed("trainer.keep_checkpoint=true") == hashed()
    for override in ("seed=1", "optim.lr=0.004", "trainer.num_threads=2", "shape=32x4x64", "eval.shots=[1]"):
        assert hashed(override) != hashed()


def nothing() -> None:
    """A claim that is never lost."""


def test_a_resume_cuts_the_files_back_to_what_its_point_remembers(tmp_path: Path) -> None:
    path = tmp_path / records.EVALS
    growing = records.GrowingFiles(tmp_path, None, nothing)
    growing.append(records.EVALS, [{"step": 1}])
    remembered = dict(growing.marks)
    growing.append(records.EVALS, [{"step": 2}])
    with path.open("a") as file:
        file.write('{"step": 3, "err')  # a kill in the middle of a line
    assert [row["step"] for row in records.read_lines(path)] == [1, 2]
    assert records.unlike(tmp_path, remembered) is None
    again = records.GrowingFiles(tmp_path, remembered, nothing)
    assert records.read_lines(path) == [{"step": 1}]
    again.append(records.EVALS, [{"step": 4}])
    assert records.read_lines(path) == [{"step": 1}, {"step": 4}]
    assert again.foreign() is None


@pytest.mark.parametrize("length", range(0, 12, 3))
def test_a_file_that_is_not_what_the_point_remembers_is_told(tmp_path: Path, length: int) -> None:
    """Cut anywhere, or one byte changed: lengths alone would not see the second."""
    path = tmp_path / records.EVALS
    growing = records.GrowingFiles(tmp_path, None, nothing)
    growing.append(records.EVALS, [{"step": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert f"holds {length} bytes of the {len(whole)}" in (records.unlike(tmp_path, growing.marks) or "")
    path.write_bytes(whole[:length] + bytes([whole[length] ^ 1]) + whole[length + 1 :])
    assert "are not those it remembers" in (records.unlike(tmp_path, growing.marks) or "")
    path.unlink()
    assert "holds 0 bytes" in (records.unlike(tmp_path, growing.marks) or "")


def test_two_writers_of_one_run_do_not_double_a_row(tmp_path: Path) -> None:
    """One was asleep between the look at its claim and its write; it writes what is there already."""
    rows = [{"step": step} for step in range(5)]
    asleep = records.GrowingFiles(tmp_path, None, nothing)
    asleep.append(records.EVALS, rows[:2])
    owner = records.GrowingFiles(tmp_path, dict(asleep.marks), nothing)
    owner.append(records.EVALS, rows[2:4])
    asleep.append(records.EVALS, rows[2:3])
    owner.append(records.EVALS, rows[4:])
    assert records.read_lines(tmp_path / records.EVALS) == rows
    assert owner.foreign() is None


def test_nothing_is_written_once_the_claim_is_lost(tmp_path: Path) -> None:
    def lost() -> None:
        raise LookupError

    growing = records.GrowingFiles(tmp_path, None, nothing)
    growing.check = lost
    with pytest.raises(LookupError):
        growing.append(records.EVALS, [{"step": 1}])
    assert (tmp_path / records.EVALS).read_bytes() == b""


def test_what_a_finished_run_was_evaluated_with_is_sealed(tmp_path: Path) -> None:
    growing = records.GrowingFiles(tmp_path, None, nothing)
    growing.append(records.EVALS, [{"error": 0.25}])
    seal = records.seal(tmp_path)
    assert records.broken_seal(tmp_path, seal) is None
    (tmp_path / records.EVALS).write_text('{"error": 0.15}\n')
    assert records.broken_seal(tmp_path, seal) == "evals.jsonl was changed after the run was finished"
    (tmp_path / records.EVALS).write_text("")
    assert "holds 0 bytes, not the 16" in (records.broken_seal(tmp_path, seal) or "")
    (tmp_path / records.EVALS).unlink()
    assert records.broken_seal(tmp_path, seal) == "evals.jsonl is missing"
    assert records.broken_seal(tmp_path, {"status": "done"}) is None, "runs of before are believed"


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.write_json(path, {"a": 1})
    records.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        records.read_run(tmp_path)
