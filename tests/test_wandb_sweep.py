"""Sweeps by the real ``wandb sweep`` and ``wandb agent`` against a stand-in server: nothing of ours stands in between."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sovit import claims, records
from sovit.launch.plan import plan
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
  shape: {values: [SHAPES]}
  seed: {values: [0]}
  data.num_classes: {value: 8}
  data.num_heldout: {value: 4}
  durations.first: {value: 8 steps}
  durations.last: {value: LAST steps}
  durations.num: {value: 3}
  trainer.global_batch_size: {value: 16}
  trainer.log_every_n_steps: {value: 4}
  trainer.checkpoint_every_s: {value: 0.5}
  schedule.warmup_steps: {value: 4}
"""


def sweep_file(tmp_path: Path, shapes: str, last: int = 24) -> Path:
    text = FILE.replace("RUNS", str(tmp_path / "runs")).replace("SHAPES", shapes).replace("LAST", str(last))
    path = tmp_path / "pair.yaml"
    path.write_text(text)
    return path


def start(server: Server, tmp_path: Path, *command: str) -> "subprocess.Popen[str]":  # noqa: F811
    """A command as a user has it: the environment's programs first in PATH."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | server.environment
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "false",
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2",
    }
    return subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def said(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=600)
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
    code = "import sys, sovit.cli as c, sovit.cli.wandb as w; c.COMMANDS = {*c.COMMANDS, w}; sys.exit(c.main())"
    return [sys.executable, "-c", code, *arguments]


def cell_process(directory: Path) -> int:
    until(lambda: claims.holder(directory), "a process has the cell")
    holder = claims.holder(directory)
    assert holder is not None
    return holder.pid


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wandbs_own_commands_run_a_shipped_kind_of_file_and_a_preempted_cell_goes_on(
    server: Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    """wandb sweep, wandb agent; the first cell gets SIGTERM in the middle and is handed out again; then pulled back."""
    file = sweep_file(tmp_path, "16x1x16, 24x1x16", last=600)
    cells = plan(load_sweep(file)).cells
    created = said(start(server, tmp_path, "wandb", "sweep", str(file)))
    found = re.search(rf"wandb agent ({ENTITY}/{PROJECT}/sweep1)", created)
    assert found, created
    agent = start(server, tmp_path, "wandb", "agent", found[1])
    with ends(agent, tmp_path / "runs"):
        until(lambda: "r1" in server.runs and server.runs["r1"]["history"], "the first cell trains")
        first = next(cell for cell in cells if str(cell.shape) == server.runs["r1"]["args"]["shape"])
        os.kill(cell_process(first.run_dir), signal.SIGTERM)
        until(lambda: server.runs["r1"]["state"] == "preempted" or server.runs["r1"]["issued"] == 2, "it is preempted")
        said(agent)
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
    to = tmp_path / "pulled"
    pulled = said(start(server, tmp_path, *sovit("wandb", "pull", found[1], "--runs-dir", str(to))))
    assert "2 runs pulled" in pulled
    for cell in cells:
        for file_name in (records.RUN, records.EVALS):
            copy = to / "pair" / cell.run_id / file_name
            assert copy.read_bytes() == (cell.run_dir / file_name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cell_whose_agent_is_killed_is_finished_as_the_same_run(server: Server, tmp_path: Path) -> None:  # noqa: F811
    """sovit wandb sweep: two agents, one killed with its cell; the local runner goes on with it. The same records."""
    file = sweep_file(tmp_path, "16x1x16, 24x1x16, 16x2x16", last=600)
    made = plan(load_sweep(file))
    process = start(server, tmp_path, *sovit("wandb", "sweep", str(file), "--workers", "2"))
    with ends(process, tmp_path / "runs"):
        until(lambda: any(run["history"] for run in server.runs.values()), "a cell trains")
        name = next(name for name, run in server.runs.items() if run["history"])
        cell = next(cell for cell in made.cells if str(cell.shape) == server.runs[name]["args"]["shape"])
        worker = cell_process(cell.run_dir)
        agent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(agent, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        output = said(process)
    assert "all 3 cells are done" in output
    assert len(server.runs) == 3 and {run["state"] for run in server.runs.values()} == {"finished"}
    for name, run in server.runs.items():
        cell = next(cell for cell in made.cells if str(cell.shape) == run["args"]["shape"])
        assert_whole(server, name, cell.run_dir)
    assert list(json.loads((tmp_path / "runs" / "pair" / SWEEPS).read_text()).values()) == [
        f"{ENTITY}/{PROJECT}/sweep1"
    ]
    again = said(start(server, tmp_path, *sovit("wandb", "sweep", str(file))))
    assert "done already" in again and len(server.sweeps) == 1

    undisturbed = said(start(server, tmp_path, *sovit("run", str(file), f"runs_dir={tmp_path / 'b'}", "logger=none")))
    assert "all 3 cells are done" in undisturbed
    for cell in made.cells:
        other = tmp_path / "b" / "pair" / cell.run_id / records.EVALS
        assert other.read_bytes() == (cell.run_dir / records.EVALS).read_bytes()


def test_a_file_is_registered_unchanged_but_for_what_the_command_line_sets(tmp_path: Path) -> None:
    """And what W&B's grid makes of it are the cells of the plan."""
    file = sweep_file(tmp_path, "16x1x16, 24x1x16")
    overrides = ["seed=1", "trainer.log_every_n_steps=010", "data.rotation=0.50"]
    for given in ([], overrides):
        sweep = load_sweep(file, given)
        document = document_of(sweep, given)
        assert sorted(sorted(f"{key}={value}" for key, value in cell.items()) for cell in grid(document)) == sorted(
            sorted(cell) for cell in sweep.cells
        )
    import yaml

    assert document_of(load_sweep(file), []) == yaml.safe_load(file.read_text())
