"""The Slurm launcher on a real Slurm of two fake nodes: nothing is lost, nothing runs twice, whoever requeues.

What does not need a cluster is in test_slurm_launcher.py and test_slurm_task.py.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slurm_cells
import slurm_cluster
from slurm_cluster import Cluster, wait_for
from sovit import records
from sovit.launch.plan import Cell, plan
from sovit.launch.sweep import load_sweep
from sovit.lit import engine

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

FILE = """\
program: sovit.train
command: ["${{env}}", "${{interpreter}}", "-m", "${{program}}", "${{args_no_hyphens}}"]
method: grid
metric: {{name: eval/fractals_5shot/error, goal: minimize}}
parameters:
  name: {{value: {name}}}
  runs_dir: {{value: {runs_dir}}}
  shape: {{values: {shapes}}}
  seed: {{values: {seeds}}}
  data.num_classes: {{value: 8}}
  data.num_heldout: {{value: 4}}
  durations.first: {{value: 30 steps}}
  durations.last: {{value: 90 steps}}
  durations.num: {{value: 2}}
  schedule.warmup_steps: {{value: 4}}
  eval.num_draws: {{value: 1}}
  trainer.global_batch_size: {{value: 16}}
  trainer.log_every_n_steps: {{value: 5}}
  trainer.checkpoint_every_s: {{value: 2}}
"""
LAUNCHER = ("launcher.hours=0.2", "launcher.signal_delay_s=60")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with slurm_cluster.running_cluster(tmp_path_factory.mktemp("slurm")) as made:
            yield made
    except slurm_cluster.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    cluster.clear()
    for node in slurm_cluster.NODES:
        cluster.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)


def sweep(root: Path, name: str, shapes: str = "[16x1x16]", seeds: str = "[0]") -> tuple[Path, list[Cell]]:
    """A sweep file below ``root`` and its cells."""
    file = root / f"{name}.yaml"
    file.write_text(FILE.format(name=name, runs_dir=root / "runs", shapes=shapes, seeds=seeds))
    return file, plan(load_sweep(file, ["logger=none"])).cells


def runner(cluster: Cluster, file: Path, *flags: str, options: tuple[str, ...] = LAUNCHER) -> "subprocess.Popen[str]":
    arguments = [sys.executable, slurm_cells.__file__, "run", str(file), *options, "--", *flags]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=cluster.environment,
        cwd=file.parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )


def end(process: "subprocess.Popen[str]", seconds: float = 300) -> str:
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert "Traceback" not in out, out
    return out


def task_of(cluster: Cluster, cell: Cell) -> str:
    """The job id of a cell's task, from the first line of its log."""
    return log(cell).split("Slurm job ")[-1].split(",")[0]


def log(cell: Cell) -> str:
    file = cell.run_dir / records.LOG
    return file.read_text() if file.exists() else ""


def starts_of(cell: Cell) -> list[str]:
    """The node of each start."""
    return [line.split("node ")[1].rstrip(".") for line in log(cell).splitlines() if line.startswith("Slurm job")]


def in_the_middle(*cells: Cell) -> None:
    """Wait until the cells are training, and neither at their beginning nor at their end."""
    wait_for(
        lambda: all((records.read_progress(cell.run_dir) or {"step": 0})["step"] >= 10 for cell in cells),
        "cells to train",
        180,
    )


def assert_as_undisturbed(cells: list[Cell], root: Path) -> None:
    """Every record equals that of the same cell trained here, alone and in one go."""
    for cell in cells:
        overrides = [*cell.overrides, f"runs_dir={root / 'undisturbed'}"]
        overrides = [text for text in overrides if text != f"runs_dir={root / 'runs'}"]
        assert engine.run_cell(overrides) == 0
        alone = root / "undisturbed" / cell.config.name / cell.run_id
        for name in (records.EVALS, records.METRICS):
            ours, theirs = (records.read_lines(place / name) for place in (cell.run_dir, alone))
            for row in [*ours, *theirs]:
                for key in [key for key in row if key.startswith("perf/")]:
                    del row[key]
            assert ours == theirs and ours
        assert (cell.run_dir / records.EVALS).read_bytes() == (alone / records.EVALS).read_bytes()
        assert (records.read_run(cell.run_dir) or {})["status"] == "done"


def test_a_cell_requeued_in_the_middle_of_a_sweep_ends_with_the_undisturbed_record(
    empty: Cluster, tmp_path: Path
) -> None:
    file, cells = sweep(tmp_path, "requeued", shapes="[16x1x16, 24x1x16]", seeds="[0, 1]")
    process = runner(empty, file, "real")
    in_the_middle(*cells)
    empty.call("scontrol", "requeue", task_of(empty, cells[1]))
    out = end(process)
    assert process.returncode == 0 and "all 4 cells are done" in out, out
    assert [len(starts_of(cell)) for cell in cells] == [1, 2, 1, 1]
    assert "Going on from step" in log(cells[1]) and "requeued by its own task" not in log(cells[1])  # Slurm did it
    assert_as_undisturbed(cells, tmp_path)


def test_a_node_that_dies_costs_no_cell(empty: Cluster, tmp_path: Path) -> None:
    """Daemon, step daemons and processes of a node are killed at once; Slurm finds out and starts the cell elsewhere."""
    file, [cell] = sweep(tmp_path, "node")
    process = runner(empty, file, "real")
    in_the_middle(cell)
    [first] = starts_of(cell)
    assert empty.kill_node(first)
    try:
        out = end(process)
        assert process.returncode == 0, out
        assert len(starts_of(cell)) == 2 and starts_of(cell)[1] != first
        assert "Going on from step" in log(cell)
        assert_as_undisturbed([cell], tmp_path)
    finally:
        empty.start_node(first)


def test_a_preempted_cell_saves_and_goes_on_afterwards(empty: Cluster, tmp_path: Path) -> None:
    file, [cell] = sweep(tmp_path, "preempted")
    process = runner(empty, file, "real", options=(*LAUNCHER, "launcher.partition=low"))
    in_the_middle(cell)
    urgent = ["sbatch", "-p", "high", "-w", "n1,n2", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5"]
    empty.call(*urgent)
    out = end(process)
    assert process.returncode == 0, out
    assert len(starts_of(cell)) == 2
    assert "stopped by a signal at step" in log(cell) and log(cell).count("requeued by its own task") == 1
    assert_as_undisturbed([cell], tmp_path)


def test_a_cell_longer_than_its_time_limit_goes_on_in_another_start(empty: Cluster, tmp_path: Path) -> None:
    """Slurm warns before a time-out but does not requeue after it, so the task must. A minute is the shortest limit, too
    short for the real training on a busy machine; what the real one does with the signal, the preemption shows."""
    file, [cell] = sweep(tmp_path, "timeout")
    process = runner(empty, file, "twice", options=("launcher.hours=0.0166", "launcher.signal_delay_s=20"))
    out = end(process)
    assert process.returncode == 0, out
    assert len(starts_of(cell)) == 2
    assert log(cell).count("requeued by its own task") == 1


GROUP = ("parallel=ddp", "parallel.devices=2")


def ranks(cell: Cell, start: int = 0) -> list[dict[str, object]]:
    """What the processes of a cell noted in a start, by rank."""
    found = [json.loads(path.read_text()) for path in cell.run_dir.glob(f"rank*.{start}.json")]
    return sorted(found, key=lambda note: int(note["RANK"]))


def test_two_processes_of_a_cell_on_one_node(empty: Cluster, tmp_path: Path) -> None:
    file, [cell] = sweep(tmp_path, "pair")
    process = runner(empty, file, *GROUP, "group")
    out = end(process)
    assert process.returncode == 0, out + log(cell)
    assert [(note["RANK"], note["LOCAL_RANK"], note["total"]) for note in ranks(cell)] == [
        ("0", "0", 2.0),
        ("1", "1", 2.0),
    ]


def test_two_processes_on_each_of_two_nodes_are_one_group(empty: Cluster, tmp_path: Path) -> None:
    file, [cell] = sweep(tmp_path, "four")
    process = runner(empty, file, *GROUP, "parallel.nodes=2", "group")
    out = end(process)
    assert process.returncode == 0, out + log(cell)
    seen = [(note["RANK"], note["LOCAL_RANK"], note["WORLD_SIZE"], note["total"]) for note in ranks(cell)]
    assert seen == [("0", "0", "4", 4.0), ("1", "1", "4", 4.0), ("2", "0", "4", 4.0), ("3", "1", "4", 4.0)]
    where = [note["SLURMD_NODENAME"] for note in ranks(cell)]
    assert where[0] == where[1] != where[2] == where[3]


def test_a_cell_is_really_trained_on_two_nodes(empty: Cluster, tmp_path: Path) -> None:
    file, [cell] = sweep(tmp_path, "real")
    process = runner(empty, file, "parallel=ddp", "parallel.devices=1", "parallel.nodes=2", "train")
    out = end(process)
    assert process.returncode == 0, out + log(cell)
    record = records.read_run(cell.run_dir) or {}
    assert (record["config"]["parallel"]["devices"], record["config"]["parallel"]["nodes"]) == (1, 2)
    assert {row["step"] for row in records.read_lines(cell.run_dir / records.EVALS)} == {0, *cell.evaluations}


@pytest.mark.parametrize("each", [1, 2])
def test_srun_by_hand_as_the_documentation_has_it(empty: Cluster, tmp_path: Path, each: int) -> None:
    """A task a process, and a task a node that starts two; both nodes are this host, whatever Slurm calls them."""
    _, [cell] = sweep(tmp_path, "hand")
    overrides = [*cell.overrides, "parallel=ddp", *([*GROUP[1:], "parallel.nodes=2"] if each == 1 else [])]
    cell.run_dir.mkdir(parents=True)
    command = ["srun", "--nodes=2", f"--ntasks-per-node={each}", "--export=ALL,MASTER_ADDR=127.0.0.1"]
    empty.call(*command, sys.executable, slurm_cells.__file__, "group", *overrides)
    assert [note["total"] for note in ranks(cell)] == [4.0] * 4


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_preempted_cell_of_several_processes_stops_and_goes_on(empty: Cluster, tmp_path: Path, nodes: int) -> None:
    """Every process gets one TERM, none dies of Slurm's own warning, and one requeue puts all of them back."""
    file, [cell] = sweep(tmp_path, "preempted4")
    options = (*LAUNCHER, "launcher.partition=low")
    process = runner(empty, file, *GROUP, f"parallel.nodes={nodes}", "preempted", options=options)
    wait_for(lambda: len(ranks(cell)) == 2 * nodes, "the processes", 120)
    urgent = ["sbatch", "-p", "high", "-w", "n1,n2", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5"]
    empty.call(*urgent)
    out = end(process)
    assert process.returncode == 0, out + log(cell)
    assert len(ranks(cell, 1)) == 2 * nodes
    assert len(starts_of(cell)) == 2
    assert log(cell).count("requeued by its own task") == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_process_that_dies_is_replaced_with_all_the_others(empty: Cluster, tmp_path: Path, nodes: int) -> None:
    """Within the same job: nobody is left in an exchange with the dead."""
    file, [cell] = sweep(tmp_path, "dead")
    process = runner(empty, file, *GROUP, f"parallel.nodes={nodes}", "dies")
    out = end(process)
    assert process.returncode == 0, out + log(cell)
    assert len(ranks(cell, 1)) == 2 * nodes
    assert "ended with exit code 137 and no verdict" in log(cell) and len(starts_of(cell)) == 1


def test_a_cancelled_cell_is_not_requeued_and_the_same_command_submits_it_again(empty: Cluster, tmp_path: Path) -> None:
    file, cells = sweep(tmp_path, "cancelled", seeds="[0, 1]")
    process = runner(empty, file, "wait")
    wait_for(lambda: all((cell.run_dir / "starts").exists() for cell in cells), "the cells", 120)
    job = task_of(empty, cells[0]).partition("_")[0]
    empty.call("scancel", job)
    out = end(process)
    assert process.returncode == 1 and "2 of 2 cells were stopped" in out, out
    wait_for(lambda: not empty.queue(), "the end of the array")
    assert all("not requeued from here, Slurm counts the job as C" in log(cell) for cell in cells)
    again = runner(empty, file, "done")
    out = end(again)
    assert again.returncode == 0 and "array" in out, out
    assert [len(starts_of(cell)) for cell in cells] == [2, 2]


def test_what_is_queued_or_running_is_not_submitted_twice(empty: Cluster, tmp_path: Path) -> None:
    file, cells = sweep(tmp_path, "twice", seeds="[0, 1, 2]")
    detached = runner(empty, file, "--detach", "wait")
    out = end(detached)
    assert detached.returncode == 0 and "scancel" in out, out
    before = {line.split()[0] for line in empty.queue()}
    assert len(before) == 3
    second = runner(empty, file, "wait")
    assert second.stdout is not None
    assert any("3 cells in the queue already" in line for line in second.stdout)
    wait_for(lambda: all((cell.run_dir / "starts").exists() for cell in cells), "the cells", 120)
    second.send_signal(signal.SIGINT)
    out = end(second)
    assert second.returncode == 130 and "detached, the array goes on" in out, out
    assert {line.split()[0] for line in empty.queue()} == before


def test_a_submission_cut_short_is_found_again(empty: Cluster, tmp_path: Path) -> None:
    """Killed after sbatch and before its answer was noted: the array is known by its name."""
    file, _ = sweep(tmp_path, "short", seeds="[0, 1]")
    assert end(runner(empty, file, "--detach", "wait"))
    jobs = tmp_path / "runs" / "short" / ".slurm" / "jobs.json"
    jobs.write_text(jobs.read_text().replace(f'"{empty.queue()[0].split("_")[0]}"', "null"))
    assert "2 cells in the queue already" in end(runner(empty, file, "--detach", "wait"))
    assert len(empty.queue()) == 2


def test_what_slurm_refuses_is_one_sentence(empty: Cluster, tmp_path: Path) -> None:
    file, _ = sweep(tmp_path, "refused")
    command = [sys.executable, "-m", "sovit.cli", "run", str(file), "logger=none", "launcher.partition=hihg"]
    done = subprocess.run(
        [*command, "--launcher", "slurm"], capture_output=True, text=True, env=empty.environment, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "Slurm refuses the array: invalid partition specified: hihg" in done.stderr
    assert os.listdir(tmp_path / "runs" / "refused" / ".slurm")  # and nothing of it is taken for a queued array
    assert not empty.queue()
