"""The command line and the launchers: what starts several processes, and what is refused before anything is trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rank_cells import run_ranks
from sovit import records
from test_parallel import CELL, DURATIONS


def train(*arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> "subprocess.CompletedProcess[str]":
    command = [*launcher, "-m", "sovit.train", *CELL, DURATIONS, *arguments]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.slow
def test_one_command_starts_its_processes_and_ends_with_their_code(tmp_path: Path) -> None:
    done = train("parallel=fsdp", "parallel.devices=2", f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(": done") and not done.stderr
    [directory] = (tmp_path / "t").glob("t-*")
    record = records.read_run(directory)
    assert record is not None and record["layout"]["processes"] == 2


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_a_cell(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = train("parallel=ddp", f"runs_dir={tmp_path}", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    [directory] = (tmp_path / "t").glob("t-*")
    assert (records.read_run(directory) or {})["status"] == records.DONE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parallel=ddp", "parallel.devices=3"], "trainer.global_batch_size=16 does not divide among 3 processes"),
        (["parallel=fsdp"], "needs a process group: give parallel.devices=N"),
        (["parallel=single", "parallel.devices=2"], "write parallel=ddp or parallel=fsdp"),
        (["parallel=ddp", "parallel.devices=2", "parallel.shard=2"], "has no effect on parallel.kind=ddp"),
        (["parallel=fsdp", "parallel.devices=4", "parallel.shard=3"], "does not divide the 4 processes"),
        (
            ["parallel=ddp", "parallel.devices=2", "parallel.micro_batch=3"],
            "parallel.micro_batch=3 does not divide the 8",
        ),
        (["parallel=ddp", "parallel.devices=2", "parallel.nodes=2"], "torchrun --nnodes 2"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu, but no GPU is visible here; write trainer=cpu"),
        (["parallel=tp"], "tp"),
        (["parallel.checkpointing=some"], "parallel.checkpointing=some is not a choice"),
        (["parallel.microbatch=4"], "parallel.micro_batch"),
    ],
)
def test_what_cannot_be_spread_is_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sovit.train import main

    assert main([*CELL, DURATIONS, f"runs_dir={tmp_path}", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_float16_of_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss scale would have to be agreed on by the processes at every step."""
    from sovit.train import main

    cell = [text for text in CELL if not text.startswith("trainer.precision")]
    assert main([*cell, DURATIONS, "parallel=fsdp", "parallel.devices=2", "trainer.precision=16-mixed"]) == 2
    assert "write trainer.precision=bf16-mixed" in capsys.readouterr().err


def test_a_model_that_fits_nowhere_says_what_would_hold_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sovit.lit import layout
    from sovit.train import main

    monkeypatch.setattr(layout, "free_bytes", lambda cfg: 3 * 2**30)
    cell = [text for text in CELL if not text.startswith(("shape", "trainer.precision"))]
    assert main([*cell, DURATIONS, f"runs_dir={tmp_path}", "shape=2048x8x8192"]) == 2
    said = capsys.readouterr().err
    assert "needs at least" in said and "parallel=fsdp over" in said
    assert not list(tmp_path.glob("*/*/run.json"))


def test_another_launcher_than_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    """As torchrun started two processes and parallel.devices says four: half of the batch would be lost in silence."""
    cell = [*CELL, DURATIONS, f"runs_dir={tmp_path / 'runs'}", "parallel=ddp", "parallel.devices=4"]
    log = tmp_path / "log"
    assert 0 not in run_ranks(cell, 2, log)
    assert "parallel.devices=4 makes 4 processes, but torchrun started 2" in log.read_text()
