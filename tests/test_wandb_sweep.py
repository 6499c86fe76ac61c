"""Sweeps by the real ``wandb sweep`` and ``wandb agent`` against a stand-in server: nothing of ours stands in between.

A cell of an agent is a program of its own, so what makes it wait in the middle comes to it through the environment.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sovit import claims, records
from sovit.launch.plan import Cell, plan
from sovit.launch.sweep import load_sweep
from sovit.launch.wandb.sweep import SWEEPS, document_of
from test_wandb import assert_whole, server, until  # noqa: F401  (a fixture)
from wandb_server import ENTITY, PROJECT, Server, grid

FILE = """
program: sovit.train
command: ["${env}", "${interpreter}", "-m", "${program}", "${args_no_hyphens}"]
method: grid
metric: {name: eval/fractals_5shot/error, goal: minimize}
parameters:
  name: {value: pair}
  runs_dir: {value: RUNS}
  center: {value: 16x1x16}
  shape: {values: [16x1x16, 24x1x16]}
  seed: {values: [0]}
  data.num_classes: {value: 8}
  data.num_heldout: {value: 4}
  durations.first: {value: 8 steps}
  durations.last: {value: 32 steps}
  durations.num: {value: 2}
  trainer.global_batch_size: {value: 16}
  trainer.log_every_n_steps: {value: 4}
  trainer.checkpoint_every_s: {value: 1.0e-9}
  schedule.warmup_steps: {value: 4}
"""

# A cell under this waits before its third training row until there is a file, which only the test makes.
PAUSE = """
import os, sys, time
rows = iter(range(1, 10**9))
def wait(event, args):
    if event == "open" and str(args[0]).endswith("/metrics.jsonl") and args[2] & os.O_RDWR and next(rows) == 3:
        open(os.environ["GO_ON_IF"] + ".waits", "w").close()
        while not os.path.exists(os.environ["GO_ON_IF"]):
            time.sleep(0.02)
sys.addaudithook(wait)
"""


def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "pair.yaml"
    path.write_text(FILE.replace("RUNS", str(tmp_path / "runs")))
    return path


def start(server: Server, tmp_path: Path, *command: str) -> "subprocess.Popen[str]":  # noqa: F811
    """A command as a user has it: the environment's programs first in PATH. Its cells wait for a file ``go``."""
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | server.environment
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")]),
        "GO_ON_IF": str(tmp_path / "go"),
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "false",
    }
    return subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def said(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@contextlib.contextmanager
def ends(process: "subprocess.Popen[str]", runs: Path) -> Iterator[None]:
    """Nothing is left running, whatever a test finds."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for directory in runs.glob("*/*-s0"):  # agents put their cells into process groups of their own
            if holder := claims.holder(directory):
                os.kill(holder.pid, signal.SIGKILL)
        process.communicate()


def sovit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sovit.cli", *arguments]


def waiting(server: Server, tmp_path: Path, cells: list[Cell]) -> tuple[Cell, int]:  # noqa: F811
    """The first cell that is handed out, once it waits in the middle of its training, and its process."""
    until((tmp_path / "go.waits").exists, "the first cell trains")
    cell = next(cell for cell in cells if str(cell.shape) == server.runs["r1"]["args"]["shape"])
    holder = claims.holder(cell.run_dir)
    assert holder is not None
    return cell, holder.pid


def evaluations(runs_dir: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in runs_dir.glob(f"pair/*/{records.EVALS}")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What ``sovit run`` makes of the same file, without W&B."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = sovit("run", str(sweep_file(folder)), "logger=none")
    assert subprocess.run(command, capture_output=True, timeout=400).returncode == 0
    return evaluations(folder / "runs")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_wandbs_own_commands_run_a_sweep_and_a_preempted_cell_goes_on_as_the_same_run(
    server: Server,  # noqa: F811
    tmp_path: Path,
    undisturbed: dict[str, bytes],
) -> None:
    """wandb sweep, wandb agent; SIGTERM to the first cell in the middle of its training."""
    file = sweep_file(tmp_path)
    cells = plan(load_sweep(file)).cells
    created = said(start(server, tmp_path, "wandb", "sweep", str(file)))
    assert f"wandb agent {ENTITY}/{PROJECT}/sweep1" in created
    agent = start(server, tmp_path, "wandb", "agent", f"{ENTITY}/{PROJECT}/sweep1")
    with ends(agent, tmp_path / "runs"):
        _, process = waiting(server, tmp_path, cells)
        os.kill(process, signal.SIGTERM)
        (tmp_path / "go").touch()
        output = said(agent)
    assert "stopped by a signal" in output and "Going on from step" in output
    assert set(server.runs) == {"r1", "r2"} and (server.runs["r1"]["issued"], server.runs["r2"]["issued"]) == (2, 1)
    for name, run in server.runs.items():
        cell = next(cell for cell in cells if str(cell.shape) == run["args"]["shape"])
        assert (run["state"], run["exitcode"], run["sweep"], run["group"]) == ("finished", 0, "sweep1", "pair")
        assert run["jobType"] == ("center" if str(cell.shape) == "16x1x16" else "width")
        config = server.config(name)
        assert (config["width"], config["depth"], config["mlp_dim"]) == (cell.shape.width, 1, 16)
        assert config["shape"] == str(cell.shape) and config["cfg"]["data"]["num_classes"] == 8
        assert run["summary"]["eval/fractals_5shot/error"] == server.history(name)[-1]["eval/fractals_5shot/error"]
        assert_whole(server, name, cell.run_dir)
    assert evaluations(tmp_path / "runs") == undisturbed and len(undisturbed) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_killed_agent_leaves_is_finished_in_the_same_sweep_and_can_be_pulled(
    server: Server,  # noqa: F811
    tmp_path: Path,
    undisturbed: dict[str, bytes],
) -> None:
    """sovit wandb sweep: its one agent and the cell are killed; the local runner goes on with this cell and the other."""
    file = sweep_file(tmp_path)
    made = plan(load_sweep(file))
    process = start(server, tmp_path, *sovit("wandb", "sweep", str(file), "--workers", "1"))
    with ends(process, tmp_path / "runs"):
        cell, worker = waiting(server, tmp_path, made.cells)
        agent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(agent, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        (tmp_path / "go").touch()
        output = said(process)
    assert "all 2 cells are done" in output
    path = f"{ENTITY}/{PROJECT}/sweep1"
    assert list(json.loads((tmp_path / "runs" / "pair" / SWEEPS).read_text()).values()) == [path]
    assert len(server.runs) == 2 and server.runs["r1"]["starts"] == 1
    for name, run in server.runs.items():
        assert (run["state"], run["sweep"]) == ("finished", "sweep1")
        assert_whole(server, name, made.runs_dir / "pair" / run["displayName"])
    assert server.runs["r1"]["displayName"] == cell.run_id
    folders = {path.name for path in (tmp_path / "runs" / "pair").iterdir() if path.is_dir()}
    assert {name for name in folders if name[0] != "."} == {cell.run_id for cell in made.cells}, "taken for a run"
    assert evaluations(tmp_path / "runs") == undisturbed

    again = said(start(server, tmp_path, *sovit("wandb", "sweep", str(file))))
    assert "done already" in again and len(server.sweeps) == 1
    to = tmp_path / "pulled"
    assert "2 runs pulled" in said(start(server, tmp_path, *sovit("wandb", "pull", path, "--runs-dir", str(to))))
    assert evaluations(to) == undisturbed
    for cell in made.cells:
        assert (to / "pair" / cell.run_id / records.RUN).read_bytes() == (cell.run_dir / records.RUN).read_bytes()


def test_a_file_is_registered_unchanged_but_for_what_the_command_line_sets(tmp_path: Path) -> None:
    """And what W&B's grid makes of it are the cells of the plan."""
    file = sweep_file(tmp_path)
    overrides = ["seed=1", "trainer.log_every_n_steps=010", "data.rotation=0.50"]
    for given in ([], overrides):
        sweep = load_sweep(file, given)
        document = document_of(sweep, given)
        assert sorted(sorted(f"{key}={value}" for key, value in cell.items()) for cell in grid(document)) == sorted(
            sorted(cell) for cell in sweep.cells
        )
    import yaml

    assert document_of(load_sweep(file), []) == yaml.safe_load(file.read_text())
