"""Several runners on one ``runs/``: every cell started once in total, and what a dead runner leaves is taken over."""

import os
import signal
from pathlib import Path

import pytest

from fake_cells import go, plan, starts, wait_until
from sovit import claims, records
from sovit.launch.local.others import Others, take_verdict
from sovit.launch.state import CUT, CellState, progress, state_on_disk
from test_local import lines_until, no_runner_left, pids, runner  # noqa: F401  # a fixture

CELLS = {name: "slow" for name in "abcdef"}


def test_two_runners_start_every_cell_once(tmp_path: Path) -> None:
    runners = [runner(tmp_path, 2, **CELLS) for _ in range(2)]
    answers = [process.communicate(timeout=100)[0] for process in runners]
    assert [process.returncode for process in runners] == [0, 0], answers
    assert sorted(starts(tmp_path)) == sorted(CELLS)
    assert all("all 6 cells are done" in answer for answer in answers)


@pytest.mark.parametrize("machine", [{}, {"host": "far"}])
def test_a_runner_takes_over_what_a_killed_one_left(tmp_path: Path, machine: dict[str, str]) -> None:
    """Every cell is begun once, and those of the dead runner once more; none a third time, and none by two at once."""
    first = runner(tmp_path, 2, **machine, **dict.fromkeys("abc", "gate"))
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    second = runner(tmp_path, 2, lease="2", **dict.fromkeys("abc", "gate"))
    before = lines_until(second, "start     c")
    assert sum("busy" in line and "run by process" in line for line in before) == 2
    first.kill()
    first.communicate(timeout=60)
    assert wait_until(lambda: len(starts(tmp_path)) == 4)  # one slot is c's
    (tmp_path / "open").touch()
    out, _ = second.communicate(timeout=100)
    assert second.returncode == 0, out
    assert sorted(starts(tmp_path)) == ["a", "a", "b", "b", "c"]
    assert out.count("is silent" if machine else "has left it") == 2


def test_a_runner_waits_for_the_cells_of_another_and_says_so_once(tmp_path: Path) -> None:
    first = runner(tmp_path, 2, host="far", a="gate", b="gate")
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    second = runner(tmp_path, 2, a="gate", b="gate", c="done", lease="5")
    lines_until(second, "waiting for 2 cells that far runs")
    assert starts(tmp_path)[2:] == ["c"]
    (tmp_path / "open").touch()
    out, _ = second.communicate(timeout=100)
    first.communicate(timeout=100)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting" not in out and out.count("by another runner") == 2 and "all 3 cells are done" in out
    assert sorted(starts(tmp_path)) == ["a", "b", "c"]


def test_ctrl_c_while_waiting_for_another_runner_stops_cleanly(tmp_path: Path) -> None:
    first = runner(tmp_path, 1, a="gate")
    assert wait_until(lambda: pids(tmp_path))
    second = runner(tmp_path, 1, a="gate")
    lines_until(second, "waiting for 1 cell that a runner on this machine runs")
    second.send_signal(signal.SIGINT)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and "Traceback" not in out and "0 of 1 cells are done" in out
    (tmp_path / "open").touch()
    first.communicate(timeout=60)
    assert first.returncode == 0 and starts(tmp_path) == ["a"]


def test_a_cell_that_another_runner_ended_meanwhile_is_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdicts arrive after the runner has looked at all cells, and before their turn comes."""
    for status, code in (("done", 0), ("failed", 1), ("diverged", 1)):
        root = tmp_path / status
        made = plan(root, {"a": "meanwhile", "b": "slow"}, workers=1)
        (root / "fake" / "fake-b").mkdir(parents=True)
        made.cells[0].overrides.append(f"status={status}")
        assert go(made, target="test_runners:meanwhile") == code
        assert starts(root) == ["a"]
        assert not (root / "fake" / "fake-b" / records.LOG).exists()
    assert "by another runner" in capsys.readouterr().out


def test_a_cell_that_ended_while_the_libraries_were_imported_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(tmp_path, {"a": "done"})
    record = {"status": "done", "config_hash": "abc", "steps_trained": 1, "images_per_s": 1.0}
    code = f"""
from pathlib import Path
from sovit import records
directory = Path({str(made.cells[0].run_dir)!r})
records.write_json(directory / records.RUN, {record})
"""
    (tmp_path / "slow_import.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = runner(tmp_path, 1, preload="slow_import", a="done")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "by another runner" in out and starts(tmp_path) == []


def test_a_signal_to_the_whole_group_while_the_libraries_are_imported_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As schedulers send it: the fork server dies of it, the runner does not."""
    (tmp_path / "slow_import.py").write_text(f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = runner(tmp_path, 1, preload="slow_import", a="done")
    assert wait_until((tmp_path / "begun").exists)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in out and "0 of 1 cells are done" in out


def test_a_fork_server_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_import.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = runner(tmp_path, 1, preload="slow_import", a="done")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in out
    assert out.splitlines()[-1] == (
        "the process that imports the libraries died (out of memory?); the same command goes on."
    )


def test_a_cell_that_another_runner_began_meanwhile_is_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is watched, and begun once the other is found dead."""
    made = plan(tmp_path, {"a": "meanwhile", "b": "done"}, workers=1)
    made.cells[1].run_dir.mkdir(parents=True)
    made.cells[0].overrides.append("status=held")
    assert go(made, target="test_runners:meanwhile", lease=1.0) == 0
    out = capsys.readouterr().out
    assert out.index("busy      b  run by process") < out.index("free      b") < out.index("start     b\n")
    assert out.count("start     b\n") == 1 and starts(tmp_path) == ["a", "b"]


def test_what_diverged_under_another_runner_is_repeated_here_if_asked(tmp_path: Path) -> None:
    made = plan(tmp_path, {"a": "meanwhile", "b": "done"}, workers=1)
    made.cells[1].run_dir.mkdir(parents=True)
    made.cells[0].overrides.append("status=diverged")
    assert go(made, target="test_runners:meanwhile", retry_diverged=0.5) == 0
    assert starts(tmp_path) == ["a", "w0032-d04-m0128-h01-p16-b+lr0.0005-s0"]


def meanwhile(overrides: list[str]) -> int:
    """A cell while which the other one is begun or ended elsewhere."""
    import fake_cells

    if overrides[1] == "a":
        status = overrides.pop().split("=")[1]
        other = Path(overrides[0]) / "fake" / "fake-b"
        if status == "held":
            (other / ".claim.1").write_bytes(claims._content({**claims._self(), "host": "far", "boot": "x"}))
        else:
            record = {"status": status, "config_hash": "abc", "reason": "", "steps_trained": 1, "images_per_s": 1.0}
            records.write_json(other / records.RUN, record)
        overrides[2] = "done"
    return fake_cells.run(overrides)


def test_a_failed_cell_is_tried_again_by_one_of_two_runners(tmp_path: Path) -> None:
    """Asked to retry, both have it in their queue; the second finds a verdict that is newer than its question."""
    made = plan(tmp_path, {"a": "fail", "b": "fail"}, workers=1)
    assert go(made) == 1
    made.cells[1].overrides[2] = "done"
    record = records.read_run(made.cells[1].run_dir)
    assert record is not None
    state = CellState(made.cells[1], before=record)
    assert not take_verdict(state, held=False)  # the verdict it was asked to retry
    records.write_json(made.cells[1].run_dir / records.RUN, {**record, "wall_s": 3.0})
    assert not take_verdict(state, held=True)  # whoever holds it may be about to try again
    assert take_verdict(state, held=False) and state.state == "failed"


def test_a_lost_race_for_a_cell_is_no_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three times somebody else is quicker, twice the cell dies: the second death is its second attempt, not its fifth."""
    assert go(plan(tmp_path, {"a": "done"}), target="test_runners:refused") == 1
    assert starts(tmp_path) == ["refused"] * 3 + ["died"] * 2
    assert "died twice" in capsys.readouterr().out


def refused(overrides: list[str]) -> int:
    root = Path(overrides[0])
    number = len(starts(root))
    with (root / "starts").open("a") as file:
        file.write("refused\n" if number < 3 else "died\n")
    return 76 if number < 3 else 99


def test_a_foreign_claim_seen_silent_is_voided_so_that_its_cell_starts_at_once(tmp_path: Path) -> None:
    made = plan(tmp_path, {"a": "done"})
    directory = made.cells[0].run_dir
    directory.mkdir(parents=True)
    (directory / ".claim.4").write_bytes(claims._content({**claims._self(), "host": "far", "boot": "x"}))
    others, state = Others(lease=0.1), CellState(made.cells[0])
    others.add(state)
    gone: list[CellState] = []
    assert wait_until(lambda: gone.extend(others.look()) or gone)
    assert gone == [state] and state.state == "waiting" and "on far is silent" in state.reason
    with claims.hold(directory, lease=1000) as claim:
        assert claim.generation == 6


def test_waiting_is_said_again_only_for_somebody_new(tmp_path: Path) -> None:
    made = plan(tmp_path, dict.fromkeys("abc", "done"))
    others = Others()
    for cell, host in zip(made.cells, ("far", "far", "farther"), strict=True):
        cell.run_dir.mkdir(parents=True)
        claim = claims._content({**claims._self(), "host": host, "boot": "x"})
        (cell.run_dir / ".claim.1").write_bytes(claim)
    said = []
    for cell in made.cells:
        others.add(CellState(cell))
        said.append(others.waiting_for())
    assert said == ["waiting for 1 cell that far runs", "", "waiting for 3 cells that far and farther run"]


def finished(directory: Path, evals: str, **record: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / records.EVALS).write_text(evals)
    content = {"status": "done", "config_hash": "abc", "steps_trained": 10, "images_per_s": 5.0, **record}
    records.write_json(directory / records.RUN, content)


def test_a_finished_run_whose_records_were_cut_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, {"a": "done", "b": "done", "c": "done"})
    for cell, size in zip(made.cells, (4, 3, 5), strict=True):
        finished(cell.run_dir, "1234", evals_bytes=size)
    assert [state_on_disk(cell.run_dir) for cell in made.cells] == [("done", ""), ("stopped", CUT), ("stopped", CUT)]
    (made.cells[0].run_dir / records.EVALS).unlink()
    assert state_on_disk(made.cells[0].run_dir) == ("stopped", CUT)
    finished(made.cells[0].run_dir, "1234", evals_bytes=4)
    assert go(made) == 0
    assert sorted(starts(tmp_path)) == ["b", "c"]
    assert capsys.readouterr().out.count(CUT) == 2
    finished(made.cells[0].run_dir, "12")  # an older record does not say
    assert state_on_disk(made.cells[0].run_dir) == ("done", "")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("", "is not valid JSON"), ("{", "is not valid JSON"), ("[]", "holds no JSON object"), ("{}", "not the record")],
)
def test_an_unreadable_record_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    made = plan(tmp_path, {"a": "done", "b": "done"})
    made.cells[0].run_dir.mkdir(parents=True)
    (made.cells[0].run_dir / records.RUN).write_text(content)
    with pytest.raises(ValueError, match=rf"run.json.*{sentence}.*; delete it"):
        go(made)
    assert progress(made.cells[0].run_dir) == (0, 0, 0.0)
    assert starts(tmp_path) == []


def test_a_record_that_becomes_unreadable_while_its_cell_runs_fails_the_cell_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(plan(tmp_path, {"a": "done", "b": "done"}, workers=1), target="test_runners:spoilt") == 1
    out = capsys.readouterr().out
    assert "run.json is not valid JSON; delete it" in out and "1 of 2 cells failed" in out
    assert state_on_disk(tmp_path / "fake" / "fake-b")[0] == "done"


def spoilt(overrides: list[str]) -> int:
    import fake_cells

    code = fake_cells.run(overrides)
    if overrides[1] == "a":
        (Path(overrides[0]) / "fake" / "fake-a" / records.RUN).write_text("{")
    return code


def test_a_run_directory_that_cannot_be_made_fails_its_cell_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = plan(tmp_path, {"a": "done", "b": "done"})
    made.cells[0].run_dir.parent.mkdir()
    made.cells[0].run_dir.write_text("a file")
    with pytest.raises(NotADirectoryError):  # which the command line says in one sentence
        go(made)
    made.cells[0].run_dir.unlink()
    (made.cells[0].run_dir / records.LOG).mkdir(parents=True)
    assert go(made) == 1
    out, err = capfd.readouterr()
    assert "log.txt: Is a directory" in out and "1 of 2 cells failed" in out and "Traceback" not in out + err
    assert starts(tmp_path) == ["b"]
