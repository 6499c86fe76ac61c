"""What a task of the array does about signals, requeues and changed configurations; squeue and scontrol are scripts here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import slurm_cells
from slurm_cluster import wait_for
from sovit import claims, records
from sovit.config import compose

OVERRIDES = ["shape=16x1x16", "logger=none"]
RUN = "import json, sys; from sovit.launch.slurm.task import Task, run_task; run_task(Task(**json.load(sys.stdin)))"


def slurm(folder: Path, state: str) -> None:
    """A squeue that says the job's state, and a scontrol that notes what it was asked."""
    folder.mkdir()
    for name, text in {"squeue": f"echo {state}", "scontrol": f'echo "$@" >> {folder}/asked'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def asked(root: Path) -> list[str]:
    file = root / "bin" / "asked"
    return file.read_text().splitlines() if file.exists() else []


def begin(root: Path, deed: str, *overrides: str, state: str = "RUNNING", **changes: object) -> "subprocess.Popen[str]":
    """A task in a process of its own, as the third of array 12."""
    if not (root / "bin").exists():
        slurm(root / "bin", state)
    cfg = compose([*OVERRIDES, f"runs_dir={root}", *overrides])
    content = {
        "overrides": [*OVERRIDES, f"runs_dir={root}", *overrides],
        "run_id": records.run_id(cfg),
        "run_dir": str(records.run_dir(cfg)),
        "config_hash": records.config_hash(cfg),
        "notes": str(root),
        "limit_s": 3600.0,
        "signal_delay_s": 60,
        "max_requeues": 1,
        "command": slurm_cells.deed_command(deed),
        **changes,
    }
    environment = {
        **os.environ,
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "12",  # of the last task of an array: the array's own number
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURMD_NODENAME": "n7",
    }
    process = subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, env=environment, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(content))
    process.stdin.close()
    return process


def directory(root: Path, *overrides: str) -> Path:
    return records.run_dir(compose([*OVERRIDES, f"runs_dir={root}", *overrides]))


def starts(root: Path, *overrides: str) -> int:
    file = directory(root, *overrides) / "starts"
    return len(file.read_text().split()) if file.exists() else 0


def log(root: Path, *overrides: str) -> str:
    return (directory(root, *overrides) / records.LOG).read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_becomes_a_checkpoint_and_one_requeue_of_this_task_alone(tmp_path: Path, number: int) -> None:
    """`scontrol requeue 12` would requeue the whole array."""
    process = begin(tmp_path, "wait")
    wait_for(lambda: starts(tmp_path), "the cell")
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(60) == 75
    assert asked(tmp_path) == ["requeue 12_3"]
    assert "Slurm job 12_3, start 1, node n7." in log(tmp_path)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "''"])
def test_what_slurm_has_decided_already_is_left_to_it(tmp_path: Path, state: str) -> None:
    """After scancel a requeue would raise the dead; after Slurm's own it would be the second."""
    process = begin(tmp_path, "wait", state=state)
    wait_for(lambda: starts(tmp_path), "the cell")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert asked(tmp_path) == []
    assert "not requeued from here" in log(tmp_path)


def test_a_warning_during_the_start_is_not_lost(tmp_path: Path) -> None:
    """Importing torch from a shared file system takes long; the engine's own handlers come after it."""
    process = begin(tmp_path, "wait")
    wait_for(lambda: (directory(tmp_path) / records.LOG).exists(), "the task")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 75
    assert asked(tmp_path) == ["requeue 12_3"]


def test_starts_that_get_no_further_are_counted_and_those_that_do_are_not(tmp_path: Path) -> None:
    """A cell that no time limit of this length can finish must not turn for ever."""

    def time_out(*overrides: str) -> None:
        before = starts(tmp_path, *overrides)
        process = begin(tmp_path, "wait", *overrides, limit_s=0.0)
        wait_for(lambda: starts(tmp_path, *overrides) > before, "the cell")
        process.send_signal(signal.SIGUSR2)
        assert process.wait(60) == 75

    for _ in range(3):
        time_out("tag=stuck")
    assert len(asked(tmp_path)) == 1  # max_requeues
    assert "reached the time limit and got no further than step 0" in log(tmp_path, "tag=stuck")
    for _ in range(4):
        time_out("tag=further")
    assert len(asked(tmp_path)) == 1 + 4


def test_preemptions_are_not_counted_as_time_outs(tmp_path: Path) -> None:
    for count in range(1, 4):
        process = begin(tmp_path, "wait")
        wait_for(lambda count=count: starts(tmp_path) == count, "the cell")
        process.send_signal(signal.SIGUSR2)
        assert process.wait(60) == 75
    assert len(asked(tmp_path)) == 3


def test_a_cell_that_does_not_stop_in_time_is_requeued_all_the_same(tmp_path: Path) -> None:
    """It goes on from its last checkpoint; waiting for it until Slurm kills both would end its job for good."""
    process = begin(tmp_path, "deaf", signal_delay_s=1)
    wait_for(lambda: starts(tmp_path), "the cell")
    process.send_signal(signal.SIGUSR2)
    try:
        assert process.wait(60) == 75
        assert asked(tmp_path) == ["requeue 12_3"]
    finally:
        os.kill(int((directory(tmp_path) / "starts").read_text()), signal.SIGKILL)


def test_a_changed_configuration_is_refused_before_it_trains(tmp_path: Path) -> None:
    """conf/ is read when a task starts: an edit while the array waits must not end up in half of the cells."""
    assert begin(tmp_path, "done", config_hash="0123456789abcdef").wait(60) == 2
    assert starts(tmp_path) == 0
    assert "conf/ has changed since this cell was submitted" in log(tmp_path)


def test_a_done_cell_is_not_started_again(tmp_path: Path) -> None:
    assert [begin(tmp_path, "done").wait(60), begin(tmp_path, "done").wait(60)] == [0, 0]
    assert starts(tmp_path) == 1 and "is done already" in log(tmp_path)


def test_a_cell_that_dies_is_tried_once_more_and_a_failed_one_is_not(tmp_path: Path) -> None:
    assert begin(tmp_path, "die").wait(60) == 128 + signal.SIGKILL
    assert starts(tmp_path) == 2
    assert begin(tmp_path, "fail", "tag=f").wait(60) == 1
    assert starts(tmp_path, "tag=f") == 1
    assert asked(tmp_path) == []


def test_out_of_device_memory_is_started_again_at_once_and_no_death(tmp_path: Path) -> None:
    assert begin(tmp_path, "memory").wait(60) == 0
    assert starts(tmp_path) == 4 and log(tmp_path).count("started again with a smaller micro-batch") == 3


SRUN = """\
echo "$@" >> {root}/bin/steps
echo "$MASTER_ADDR $SLURM_STEP_ID-" >> {root}/bin/words
while [ "${{1#--}}" != "$1" ] || [ "$1" = srun ]; do shift; done
"$@"
code=$?
[ $code = 0 ] || echo $code > "$SOVIT_FIRST_EXIT"
exit ${{1:+143}}
"""


def test_a_cell_on_two_nodes_is_a_step_of_one_process_on_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun returns its largest exit code, here that of a process it ended itself; what counts is who failed first."""
    slurm(tmp_path / "bin", "RUNNING")
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n" + SRUN.format(root=tmp_path))
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert begin(tmp_path, "fail", nodes=2).wait(60) == 1
    assert starts(tmp_path) == 1
    [step] = (tmp_path / "bin" / "steps").read_text().splitlines()
    assert step.startswith("--overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 ") and "--cpus-per-task=6 " in step
    assert (
        tmp_path / "bin" / "words"
    ).read_text() == f"{socket.gethostname()} -\n"  # the step of the task is not its own
    process = begin(tmp_path, "wait", "tag=t", nodes=2)
    wait_for(lambda: starts(tmp_path, "tag=t"), "the cell")
    os.kill(int((directory(tmp_path, "tag=t") / "starts").read_text()), signal.SIGTERM)  # as a real srun passes it on
    assert process.wait(60) == 75


def test_slurm_signals_do_not_reach_the_processes_of_a_cell(tmp_path: Path) -> None:
    """Slurm sends USR2 to every process of a job; a loader that dies of it would fail the cell."""
    process = begin(tmp_path, "wait")
    wait_for(lambda: starts(tmp_path), "the cell")
    cell = int((directory(tmp_path) / "starts").read_text())
    os.kill(cell, signal.SIGUSR2)
    os.kill(cell, signal.SIGUSR1)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_a_cell_held_elsewhere_is_waited_for(tmp_path: Path) -> None:
    """A node that Slurm has given up may be at work still; its successor neither trains beside it nor gives up at once."""
    with claims.hold(directory(tmp_path)):
        process = begin(tmp_path, "held")
        wait_for(lambda: starts(tmp_path) == 1, "the cell")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert starts(tmp_path) == 1  # waiting costs no start
    assert process.wait(60) == 0
    assert starts(tmp_path) == 2
