"""The processes of one cell: told who they are, ended together, never left behind; and what cannot be is one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fake_rank
from fake_cells import wait_until
from sovit.config import ConfigError, RunConfig, compose
from sovit.launch import processes
from sovit.launch.processes import Place, place, settled, wanted

TARGET = (fake_rank.__file__,)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here needs long to end."""
    monkeypatch.setattr(processes, "GRACE_S", {0: 5.0, 75: 5.0, 77: 0.3, 78: 0.3})
    monkeypatch.setattr(processes, "GRACE_AFTER_FAILURE_S", 0.3)


def start(folder: Path, deed: str, devices: int = 2, gpus: list[str] | None = None) -> int:
    return processes.start([str(folder), deed], devices=devices, gpus=gpus, target=TARGET)


def started(folder: Path, deed: str, devices: int = 2) -> subprocess.Popen[str]:
    """`processes.start` in a process of its own, in a group of its own as in a terminal."""
    arguments = [sys.executable, fake_rank.__file__, "start", str(devices), str(folder), deed]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert wait_until(lambda: len(fake_rank.starts(folder)) == devices)
    return process


def pids(folder: Path) -> list[int]:
    return [int(line[1]) for line in fake_rank.starts(folder)]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_each_process_learns_its_rank_and_sees_all_gpus_of_the_cell(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """GPUs hidden from each other cannot exchange directly; the local rank picks one."""
    assert start(tmp_path, "done", devices=3, gpus=["4", "6", "7"]) == 0
    seen = sorted(fake_rank.starts(tmp_path))
    [port] = {line[6] for line in seen}
    assert [[line[0], *line[2:]] for line in seen] == [
        [str(rank), str(rank), "3", "3", "127.0.0.1", port, "4,6,7"] for rank in range(3)
    ]
    assert capfd.readouterr().out == "process 0 speaks\n"


@pytest.mark.parametrize(
    ("deed", "code"), [("1@0", 1), ("1@1", 1), ("3@0", 3), ("2@1", 2), ("-9@1", 137), ("-9@0", 137), ("-11@1", 139)]
)
def test_a_process_that_fails_ends_the_others_which_wait_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], deed: str, code: int
) -> None:
    """An exchange with a dead process may never return. Killed is no verdict: 128 + the signal, tried once more.

    That is said: a cell that the kernel kills for its memory would end without a word.
    """
    assert start(tmp_path, deed) == code
    assert not any(map(alive, pids(tmp_path)))
    how, _, number = deed.partition("@")
    killed = {"-9": "SIGKILL (out of memory?)", "-11": "SIGSEGV"}.get(how)
    said = [f"Process {number} was killed by {killed}; the same command goes on."] if killed else []
    said.append("a traceback" if number == "0" else "[process 1] a traceback")
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(said)


def test_nothing_is_left_when_the_starter_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path, "stubborn", devices=3)
    process.kill()
    process.wait()
    try:
        assert wait_until(lambda: not any(map(alive, pids(tmp_path))), seconds=10)
    finally:
        for pid in filter(alive, pids(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()  # the pipe is theirs too


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: int) -> None:
    process = started(tmp_path, "stop")
    os.killpg(process.pid, number)  # Ctrl-C goes to the foreground group; a second one would end a process at once
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint0", "checkpoint1"]


def test_a_second_ctrl_c_kills_what_does_not_end(tmp_path: Path) -> None:
    process = started(tmp_path, "stubborn")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 75 and not any(map(alive, pids(tmp_path)))


def test_out_of_memory_starts_all_again_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, "memory@3") == 0
    assert len(fake_rank.starts(tmp_path)) == 2 * 3
    assert capfd.readouterr().out.count("smaller micro-batch") == 2
    monkeypatch.setattr(processes, "RESTARTS", 2)
    assert start(tmp_path, "memory@99") == 1
    assert len(fake_rank.starts(tmp_path)) == 2 * (3 + 3)
    assert capfd.readouterr().out.endswith("Out of device memory 3 times in a row; not started again.\n")


def test_a_lost_race_for_the_port_is_run_again_with_another(tmp_path: Path) -> None:
    assert start(tmp_path, "port@2") == 0
    ports = [line[6] for line in fake_rank.starts(tmp_path)]
    assert len(ports) == 4 and len(set(ports)) == 2


def cell(*overrides: str) -> RunConfig:
    return compose(["logger=none", *overrides])


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def test_the_words_of_torchrun_and_of_slurm() -> None:
    assert place({}) is None
    assert place(TORCHRUN) == Place(5, 1, 8, 4, "torchrun") and place(SLURM) == Place(5, 1, 8, 4, "Slurm")
    assert place(SLURM | TORCHRUN) == place(TORCHRUN)  # whoever starts processes inside a Slurm job knows better
    here = place(SLURM)
    assert here is not None and here.nodes == 2
    words = dict(SLURM, MASTER_ADDR="n7")
    processes.rendezvous(here, words)
    assert place({name: words[name] for name in words if "SLURM" not in name}) == Place(5, 1, 8, 4, "torchrun")
    assert words["GROUP_RANK"] == words["NODE_RANK"] == "1"  # of which Lightning makes its own idea of who is first
    assert words["MASTER_ADDR"] == "n7" and 15_000 <= int(words["MASTER_PORT"]) < 30_000


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},  # a cell of sovit run
        {"SLURM_STEP_ID": ""},  # a batch script, which has a SLURM_PROCID too
        {"SLURM_STEP_ID": "4294967290"},  # an interactive shell of salloc
    ],
)
def test_slurm_words_that_tell_of_no_tasks_of_the_cell(changes: dict[str, str]) -> None:
    assert place(SLURM | changes) is None


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"RANK": "0"}, "RANK=0 is set in the environment, but LOCAL_RANK is not: start by torchrun"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE='x' in the environment is no number"),
        ({**TORCHRUN, "RANK": "8"}, "process 8 of 8"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5,3"}, "Slurm started 5,3 tasks on the nodes"),
    ],
)
def test_an_environment_that_cannot_be_is_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        place(environ)


def test_who_starts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert wanted(cell(), {}) == 0
    assert wanted(cell("parallel=fsdp", "parallel.devices=2"), {}) == 2
    assert wanted(cell("parallel=ddp", "trainer.accelerator=gpu"), {}) == 4  # all GPUs that are visible
    assert wanted(cell("parallel=ddp", "parallel.devices=1"), {}) == 1
    assert wanted(cell("parallel=ddp"), TORCHRUN) == wanted(cell("parallel=ddp"), SLURM) == 0
    two_nodes = cell("parallel=ddp", "parallel.devices=4", "parallel.nodes=2")
    assert wanted(two_nodes, SLURM) == wanted(two_nodes, TORCHRUN) == 0
    one_each = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    one_each["SLURM_STEP_TASKS_PER_NODE"] = "1(x2)"
    assert wanted(two_nodes, one_each) == 4  # srun started one process a node, which starts those of its node
    spread = settled(cell("parallel=fsdp"), place(SLURM))
    assert (spread.devices, spread.nodes) == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "environ", "sentence"),
    [
        (["parallel=fsdp"], {}, "parallel=fsdp needs a process group: give parallel.devices=N, or start by torchrun"),
        (["parallel=ddp", "parallel.devices=4"], {**TORCHRUN, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"},
         "parallel.devices=4 makes 4 processes, but torchrun started 2"),
        (["parallel=ddp", "parallel.devices=4"], TORCHRUN, "parallel.devices=4 makes 4 processes, but torchrun started 8"),
        (["parallel=ddp", "parallel.nodes=2", "parallel.devices=4"], {}, "type on each of them torchrun --nnodes 2 "
         "--nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 -m sovit.train"),
        ([], TORCHRUN, "parallel=single is one process, but torchrun started 8"),
        (["parallel=ddp", "trainer.global_batch_size=12"], TORCHRUN, "12 does not divide among 8 processes"),
        (["parallel=ddp", "trainer=gpu", "parallel.devices=4"], {}, "parallel.devices=4, but 2 GPUs are visible here"),
        (["parallel=ddp", "trainer=gpu", "trainer.global_batch_size=9"], {}, "9 does not divide among 2 processes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], environ: dict[str, str], sentence: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError) as error:
        wanted(cell(*overrides), environ)
    assert sentence in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_no_process_is_started_after_a_signal_between_two_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "free_port", lambda: os.kill(os.getpid(), signal.SIGTERM) or 29_999)
    assert start(tmp_path, "done") == 75
    assert fake_rank.starts(tmp_path) == []
