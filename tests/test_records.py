"""Records are found by their run id, cut back exactly, locked against a second process, and written in one step."""

import json
import multiprocessing
from pathlib import Path

import pytest

from sovit import records
from sovit.config import compose, shape_of


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
    for override in ("seed=1", "optim.lr=0.004", "trainer.num_threads=2", "shape=32x4x64", "eval.shots=[1]"):
        assert hashed(override) != hashed()


def test_a_resume_cuts_the_files_back_to_what_the_checkpoint_remembers(tmp_path: Path) -> None:
    path = tmp_path / records.EVALS
    records.append_lines(path, [{"step": 1}])
    remembered = records.lengths(tmp_path)
    records.append_lines(path, [{"step": 2}])
    with path.open("a") as file:
        file.write('{"step": 3, "err')  # a kill in the middle of a line
    assert [row["step"] for row in records.read_lines(path)] == [1, 2]
    records.cut_back(tmp_path, remembered)
    assert records.read_lines(path) == [{"step": 1}]
    path.write_text("")
    with pytest.raises(ValueError, match="fewer than its checkpoint's"):
        records.cut_back(tmp_path, remembered)


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.write_json(path, {"a": 1})
    records.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        records.read_run(tmp_path)


def _try_lock(directory: str, queue: "multiprocessing.Queue[str]") -> None:
    try:
        with records.lock(Path(directory)):
            queue.put("got it")
    except records.Locked as error:
        queue.put(str(error))


def test_a_second_process_cannot_hold_the_same_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[str] = context.Queue()
    answers = []
    for held in (True, False):
        process = context.Process(target=_try_lock, args=(str(tmp_path), queue))
        if held:
            with records.lock(tmp_path):
                process.start()
                answers.append(queue.get(timeout=60))
                process.join()
        else:
            process.start()
            answers.append(queue.get(timeout=60))
            process.join()
    assert answers == [f"{tmp_path.name} is being run by another process.", "got it"]
