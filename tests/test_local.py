"""The local runner: every cell once, verdicts kept, and no process left behind, however the runner ends."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fake_cells
import fake_rank
from fake_cells import go, plan, starts, wait_until
from sovit import records
from sovit.launch.local import runner as local
from sovit.launch.local.outcome import judge
from sovit.launch.local.slots import Slots
from sovit.launch.state import CellState, state_on_disk
from sovit.launch.sweep import SweepError

RUNNERS: list["subprocess.Popen[str]"] = []


def runner(root: Path, workers: int, **deeds: str) -> "subprocess.Popen[str]":
    """A runner in a process of its own, in a process group of its own; host="far" poses as another machine."""
    arguments = [sys.executable, fake_cells.__file__, str(root), str(workers), *(f"{k}={v}" for k, v in deeds.items())]
    RUNNERS.append(
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    )
    return RUNNERS[-1]


@pytest.fixture(autouse=True)
def no_runner_left() -> Iterator[None]:
    yield
    while RUNNERS:
        process = RUNNERS.pop()
        process.kill()
        process.communicate()


def lines_until(process: "subprocess.Popen[str]", text: str) -> list[str]:
    """What a runner says up to the line with a text in it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never said:\n{''.join(lines)}")


def pids(root: Path) -> list[int]:
    return [int(text.split()[0]) for path in root.glob("fake/*/pid") if (text := path.read_text())]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_a_second_invocation_finds_everything_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, {"a": "done", "b": "done"})
    assert go(made) == 0
    assert "all 2 cells are done. Next: sovit fit" in capsys.readouterr().out
    assert go(made) == 0
    assert capsys.readouterr().out.count("\n") == 1  # one line says so
    assert sorted(starts(tmp_path)) == ["a", "b"]


def test_a_failed_cell_is_a_result_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, {"a": "fail", "b": "diverge", "c": "crash", "d": "done"}, workers=1)
    assert go(made) == 1
    out = capsys.readouterr().out
    assert "ValueError: no such data" in out and "training loss is nan at step 7" in out
    assert "RuntimeError: the cell crashed" in out  # from the log, because the cell could not write a verdict
    assert "3 of 4 cells failed or diverged" in out and "--retry-failed" in out
    assert starts(tmp_path) == ["a", "b", "c", "d"]


def test_verdicts_are_kept_until_a_retry_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, {"a": "fail", "b": "diverge", "c": "done"}, workers=1)
    assert [go(made), go(made)] == [1, 1]
    assert starts(tmp_path) == ["a", "b", "c"]
    assert "tries them again" in capsys.readouterr().out
    assert go(made, retry_failed=True) == 1
    assert starts(tmp_path) == ["a", "b", "c", "a", "b"]


def test_a_killed_cell_is_tried_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(plan(tmp_path, {"a": "die_once"})) == 0
    assert starts(tmp_path) == ["a", "a"]
    assert "killed by SIGKILL" in capsys.readouterr().out


def test_a_cell_that_always_dies_does_not_loop_and_is_tried_at_the_next_invocation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(tmp_path, {"a": "die", "b": "done"}, workers=1)
    assert go(made) == 1
    assert starts(tmp_path) == ["a", "b", "a"]
    assert "1 of 2 cells died twice" in capsys.readouterr().out
    assert go(made) == 1
    assert starts(tmp_path) == ["a", "b", "a", "a", "a"]


def test_exit_code_zero_without_a_verdict_is_not_success(tmp_path: Path) -> None:
    """Lightning ends with exit code 0 after a signal: only the run's record says done."""
    assert go(plan(tmp_path, {"a": "lie"})) == 1


def test_longest_cells_start_first(tmp_path: Path) -> None:
    made = plan(tmp_path, {"a": "done", "b": "done", "c": "done"}, workers=1)
    made.cells.reverse()
    assert go(made) == 0
    assert starts(tmp_path) == ["a", "b", "c"]


def test_no_more_than_the_workers_run_at_once_and_no_fewer(tmp_path: Path) -> None:
    """Each cell waits until two are running; a third at the same time would be counted."""
    root = tmp_path
    process = runner(root, 2, a="meet", b="meet", c="hang", d="hang", e="hang")
    try:
        assert wait_until(lambda: len(starts(root)) == 4)  # a and b met and ended, c and d took their places
        assert not wait_until(lambda: len(starts(root)) > 4, seconds=1.5)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_what_a_cell_and_its_children_say_is_in_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    go(plan(tmp_path, {"a": "die_once"}))
    log = (tmp_path / "fake" / "fake-a" / records.LOG).read_text()
    assert log.splitlines().count("a speaks") == 2  # appended, not replaced
    assert log.count("a child of the cell speaks") == 2
    assert "speaks" not in capfd.readouterr().out


def test_another_configuration_in_the_run_directory_stops_before_anything_starts(tmp_path: Path) -> None:
    assert go(plan(tmp_path, {"a": "done"})) == 0
    with pytest.raises(SweepError, match="holds a run of another configuration; give the sweep another name"):
        go(plan(tmp_path, {"a": "done", "b": "done"}, config_hash="def"))
    assert starts(tmp_path) == ["a"]


def test_each_gpu_worker_sees_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs on one GPU is the classic mistake; set before CUDA starts, each cell sees a single device."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    made = plan(tmp_path, {"a": "meet", "b": "meet"}, accelerator="gpu")
    assert go(made) == 0
    assert sorted((cell.run_dir / "pid").read_text().split()[1] for cell in made.cells) == ["3", "5"]


def test_a_cell_of_several_processes_has_as_many_gpus_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at once on four GPUs: of the pair and the single ones no two share."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    made = plan(tmp_path, {"a": "meet", "b": "meet", "c": "meet"}, workers=3, accelerator="gpu", devices=[2, 1, 1])
    assert go(dataclasses.replace(made, cells_per_gpu=1)) == 0
    seen = [(cell.run_dir / "pid").read_text().split()[1].split(",") for cell in made.cells]
    assert [len(names) for names in seen] == [2, 1, 1]


def slots(num_gpus: int, workers: int, devices: list[int], cells_per_gpu: int = 1) -> Slots:
    made = plan(Path(), {str(i): "done" for i in range(len(devices))}, workers, accelerator="gpu", devices=devices)
    return Slots(dataclasses.replace(made, cells_per_gpu=cells_per_gpu), [f"g{i}" for i in range(num_gpus)])


def filled(free: Slots, devices: list[int]) -> list[tuple[str, ...]]:
    """What cells get, in this order, until one has to wait."""
    taken = []
    for count in devices:
        if not free.fit(count):
            break
        taken.append(free.take(count))
    return taken


def test_gpus_are_dealt_out_evenly_and_shared_only_when_asked() -> None:
    pairs = slots(4, 2, [2, 2, 2])
    assert filled(pairs, [2, 2, 2]) == [("g0", "g1"), ("g2", "g3")]
    pairs.give(("g0", "g1"))
    assert filled(pairs, [2]) == [("g0", "g1")]
    mixed = slots(4, 3, [2, 1, 1])  # a plan of three workers for up to two GPUs each shares, but not before it must
    assert filled(mixed, [2, 1, 1]) == [("g0", "g1"), ("g2",), ("g3",)]
    assert filled(slots(2, 4, [1] * 5, cells_per_gpu=2), [1] * 5) == [("g0",), ("g1",), ("g0",), ("g1",)]
    assert filled(slots(2, 5, [1] * 6), [1] * 6) == [("g0",), ("g1",), ("g0",), ("g1",), ("g0",)]  # --workers 5
    assert filled(slots(4, 9, [4, 1], cells_per_gpu=1), [4]) == [("g0", "g1", "g2", "g3")]


def test_a_large_cell_is_not_overtaken_for_ever() -> None:
    """It waits for its GPUs, and what comes later waits behind it: the queue is looked at from the front."""
    free = slots(2, 2, [1, 2, 1])
    free.free = {"g0": 1, "g1": 1}
    assert filled(free, [1, 2, 1]) == [("g0",)]


def test_a_cell_this_machine_cannot_hold_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(SweepError, match=r"parallel\.devices=4, but 2 GPUs are visible here; write 2 or fewer\.$"):
        go(plan(tmp_path, {"a": "done"}, accelerator="gpu", devices=[4]))
    [cell] = plan(tmp_path, {"a": "done"}).cells
    made = dataclasses.replace(plan(tmp_path, {}), cells=[dataclasses.replace(cell, nodes=2)])
    with pytest.raises(SweepError, match=r"parallel\.nodes=2, but this is one machine; use --launcher slurm"):
        go(made)
    assert starts(tmp_path) == []


def test_out_of_device_memory_starts_again_at_once_and_is_no_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(plan(tmp_path, {"a": "memory", "b": "done"}, workers=1)) == 0
    assert starts(tmp_path) == ["a", "a", "a", "b"]
    assert capsys.readouterr().out.count("out of device memory; again with a smaller micro-batch") == 2


def test_out_of_device_memory_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RESTARTS", 1)
    assert go(plan(tmp_path, {"a": "starved"})) == 1
    assert starts(tmp_path) == ["a"] * (local.RESTARTS + local.ATTEMPTS)


def test_the_failure_of_a_process_left_alone_is_no_verdict(tmp_path: Path) -> None:
    """Another process of the cell was killed; the first one noted that its exchange failed."""
    assert go(plan(tmp_path, {"a": "orphan"})) == 0
    assert starts(tmp_path) == ["a", "a"]


def test_the_processes_of_a_cell_die_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    process = runner(tmp_path, 1, a="ranks")
    (tmp_path / "starts").touch()
    assert wait_until(lambda: sum(len(line) > 2 for line in fake_rank.starts(tmp_path)) == 2)
    ranks = [int(line[1]) for line in fake_rank.starts(tmp_path) if len(line) > 2]
    process.kill()
    assert wait_until(lambda: not any(map(alive, ranks)), seconds=20)


def test_ctrl_c_lets_cells_write_checkpoints_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = runner(tmp_path, 2, a="hang", b="hang", c="done")
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    cells = pids(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "0 of 3 cells are done; the same command goes on" in out and "Traceback" not in out
    assert len(list(tmp_path.glob("fake/*/checkpoint"))) == 2
    assert not any(map(alive, cells))
    assert state_on_disk(tmp_path / "fake" / "fake-a")[0] == "stopped"
    assert go(plan(tmp_path, {"a": "done", "b": "done", "c": "done"})) == 0


def test_a_second_ctrl_c_kills_cells_that_do_not_end(tmp_path: Path) -> None:
    process = runner(tmp_path, 1, a="stubborn")
    assert wait_until(lambda: pids(tmp_path))
    [cell] = pids(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert any("stopping" in line for line in process.stdout)
    assert alive(cell)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and not alive(cell)


def test_cells_die_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    """The fork server lives as long as a cell does, so it must be the runner whose death the cells see."""
    process = runner(tmp_path, 2, a="stubborn", b="stubborn")
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    cells = pids(tmp_path)
    servers = {int(Path(f"/proc/{cell}/stat").read_text().rsplit(")", 1)[1].split()[1]) for cell in cells}
    assert len(servers) == 1 and process.pid not in servers
    process.kill()
    try:
        assert wait_until(lambda: not any(map(alive, [*cells, *servers])), seconds=20)
    finally:
        for cell in filter(alive, cells):
            os.kill(cell, signal.SIGKILL)
        process.communicate(timeout=60)


def test_a_cell_stopped_by_somebody_else_goes_on(tmp_path: Path) -> None:
    process = runner(tmp_path, 1, a="hang")
    assert wait_until(lambda: pids(tmp_path))
    os.kill(pids(tmp_path)[0], signal.SIGTERM)
    assert wait_until(lambda: starts(tmp_path) == ["a", "a"])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("exitcode", "word"),
    [(-9, "SIGKILL (out of memory"), (137, "SIGKILL (out of memory"), (99, "exit code 99"), (-15, "SIGTERM")],
)
def test_the_reason_of_a_death_is_named(tmp_path: Path, exitcode: int, word: str) -> None:
    state = CellState(plan(tmp_path, {"a": "done"}).cells[0])
    verdict, reason = judge(state, exitcode, stopping=False)
    assert verdict == "died" and word in reason


def test_what_a_refused_cell_said_is_the_reason_and_it_is_not_tried_again(tmp_path: Path) -> None:
    state = CellState(plan(tmp_path, {"a": "done"}).cells[0])
    state.cell.run_dir.mkdir(parents=True)
    (state.cell.run_dir / records.LOG).write_text("sovit.train: it needs 3.3 GiB on each device.\n")
    assert judge(state, 2, stopping=False) == ("failed", "sovit.train: it needs 3.3 GiB on each device.")
