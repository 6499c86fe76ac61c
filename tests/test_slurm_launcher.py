"""What is asked of Slurm, without one: sbatch, squeue and srun are scripts that note what they are given."""

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sovit import claims, records
from sovit.cli import main
from sovit.config import CONF_DIR
from sovit.launch.plan import plan
from sovit.launch.slurm import runner as slurm
from sovit.launch.slurm.config import Launcher, load_launcher
from sovit.launch.sweep import load_sweep
from sovit.strict import ConfigError

FILE = """\
program: sovit.train
command: ["${env}", "${interpreter}", "-m", "${program}", "${args_no_hyphens}"]
method: grid
metric: {name: eval/fractals_5shot/error, goal: minimize}
parameters:
  name: {value: array}
  shape: {values: [64x4x64, 16x1x16]}
  seed: {values: [0, 1]}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a Slurm of scripts: sbatch keeps its file and answers 77, the queue is a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {
        "sbatch": f"cp $1 {tmp_path}/submitted; echo x >> {tmp_path}/count; echo Submitted batch job 77",
        "squeue": f"cat {tmp_path}/queue 2> /dev/null; exit 0",
        "srun": "exit 1",
    }
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(FILE)
    return tmp_path


def run(*options: str, detach: bool = True) -> int:
    return main(
        ["run", "sweep.yaml", "logger=none", *options, "--launcher", "slurm", *(["--detach"] if detach else [])]
    )


def submissions(place: Path) -> int:
    return len((place / "count").read_text().split()) if (place / "count").exists() else 0


def options_of(script: str) -> dict[str, str]:
    """Of a job's script, quotes left out."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


def queue_all(place: Path, state: str = "PENDING|Resources") -> None:
    """Let squeue list the tasks of the array as it was submitted."""
    name = options_of((place / "submitted").read_text())["job-name"]
    (place / "queue").write_text("".join(f"{name}|77|{index}|{state}\n" for index in range(4)))


def test_the_array_asks_for_what_the_configuration_says(place: Path) -> None:
    told = ("partition=low", "hours=1.5", "memory_gb=12.5", "signal_delay_s=90", "cells_at_once=3", "qos=q")
    lists = ("launcher.setup=[module load cuda, ulimit -n 4096]", "launcher.sbatch=[--mail-type=FAIL, --exclusive]")
    assert run(*(f"launcher.{text}" for text in told), *lists, "trainer=gpu") == 0
    script = (place / "submitted").read_text()
    assert options_of(script) | {
        "partition": "low",
        "qos": "q",
        "time": "90",
        "mem": "12800M",
        "signal": "USR2@90",
        "array": "0-3%3",
        "nodes": "1",
        "ntasks-per-node": "1",
        "gpus-per-node": "1",  # trainer.accelerator=gpu
        "cpus-per-task": "8",  # trainer.num_threads
        "mail-type": "FAIL",
        "exclusive": "",
        "requeue": "",
        "open-mode": "append",
    } == options_of(script)
    assert "wckey" not in options_of(script) and "account" not in options_of(script)
    assert script.index("module load cuda\nulimit -n 4096\n") < script.index("srun ")
    assert re.search(r"^srun .*--cpus-per-task=8 ", script, re.MULTILINE)


def test_cells_on_a_cpu_ask_for_no_gpu_and_for_their_threads(place: Path) -> None:
    assert run("trainer.num_threads=3") == 0
    options = options_of((place / "submitted").read_text())
    assert "gpus-per-node" not in options and options["cpus-per-task"] == "3"
    assert options["array"] == "0-3%4"


def test_a_cell_of_several_processes_is_one_task_that_starts_them(place: Path) -> None:
    """Tasks of Slurm with a GPU each would not see each other's GPUs; one task a node sees them all."""
    several = ("trainer=gpu", "parallel=fsdp", "parallel.devices=4", "data.num_workers=2")
    assert run(*several) == 0
    script = (place / "submitted").read_text()
    expected = {"gpus-per-node": "4", "ntasks-per-node": "1", "nodes": "1", "cpus-per-task": "40"}  # 4 x (8 + 2)
    assert options_of(script) | expected == options_of(script)
    assert "--relative" not in script
    assert run(*several, "parallel.nodes=2", "name=two") == 0
    script = (place / "submitted").read_text()
    assert options_of(script) | {**expected, "nodes": "2"} == options_of(script)
    assert re.search(r"^srun .*--nodes=1 --ntasks=1 --relative=0 ", script, re.MULTILINE)


def test_the_gpus_of_a_cell_say_how_many_processes_it_has(place: Path) -> None:
    """The login node need not have the GPUs that parallel.devices=null means."""
    assert run("trainer=gpu", "parallel=ddp", "launcher.gpus_per_cell=2") == 0
    assert options_of((place / "submitted").read_text())["gpus-per-node"] == "2"
    [folder] = (place / "runs/array/.slurm").glob("array-*")
    task = pickle.loads(next(folder.glob("*_submitted.pkl")).read_bytes()).function.args[0]  # our own file
    assert task.overrides[-1] == "parallel.devices=2" and task.nodes == 1


def test_cells_that_take_differently_many_gpus_are_arrays_of_their_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(load_sweep(place / "sweep.yaml", ["logger=none", "trainer=gpu", "parallel=ddp", "parallel.devices=2"]))
    large = [dataclasses.replace(cell, devices=4) if cell.shape.width == 64 else cell for cell in made.cells]
    assert slurm.run_on_slurm(dataclasses.replace(made, cells=large), load_launcher("slurm"), detach=True) == 0
    assert submissions(place) == 2
    jobs = json.loads((place / "runs/array/.slurm/jobs.json").read_text()).values()
    assert [{name.split("-")[1] for name in job["cells"]} for job in jobs] == [{"w0016"}, {"w0064"}]
    assert "arrays 77, 77 of 4 cells" in capsys.readouterr().out


def test_the_longest_cells_come_first(place: Path) -> None:
    assert run() == 0
    [job] = json.loads((place / "runs/array/.slurm/jobs.json").read_text()).values()
    assert job["id"] == "77"  # of one compute, the smallest shape takes the most steps
    assert [name.split("-")[1] for name in job["cells"]] == ["w0016", "w0016", "w0064", "w0064"]


def test_what_is_in_the_queue_is_not_submitted_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    queue_all(place)
    assert run() == 0
    assert submissions(place) == 1
    assert "4 cells in the queue already (77)" in capsys.readouterr().out
    (place / "queue").write_text((place / "queue").read_text().splitlines(keepends=True)[1])
    assert run() == 0  # three of them have left it without a verdict
    assert submissions(place) == 2
    assert options_of((place / "submitted").read_text())["array"] == "0-2%3"


def test_a_queue_that_does_not_answer_submits_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taking silence for an empty queue would submit everything twice."""
    assert run() == 0
    (place / "bin" / "squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: Socket timed out >&2; exit 1\n")
    assert run() == 2
    assert submissions(place) == 1
    assert "Socket timed out" in capsys.readouterr().err


def test_a_submission_by_another_process_is_not_raced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claims.hold(place / "runs" / "array" / ".slurm"):
        assert run() == 2
    assert submissions(place) == 0 and "being submitted from elsewhere" in capsys.readouterr().err


def test_done_and_failed_cells_are_not_submitted_unless_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    cells = plan(load_sweep("sweep.yaml", ["logger=none"])).cells
    for cell, status in zip(cells, ("done", "failed", "diverged", "failed"), strict=True):
        record = {"schema": 0, "status": status, "reason": "why", "config_hash": cell.config_hash}
        cell.run_dir.mkdir(parents=True)
        records.write_json(cell.run_dir / records.RUN, record)
    assert run(detach=False) == 1
    assert submissions(place) == 1 and "3 of 4 cells failed or diverged" in capsys.readouterr().out
    assert main(["run", "sweep.yaml", "logger=none", "--launcher", "slurm", "--detach", "--retry-failed"]) == 0
    assert options_of((place / "submitted").read_text())["array"] == "0-2%3"


def test_a_diverged_cell_is_repeated_at_a_lower_rate(place: Path) -> None:
    cell = plan(load_sweep("sweep.yaml", ["logger=none"])).cells[0]
    cell.run_dir.mkdir(parents=True)
    record = {"schema": 0, "status": "diverged", "reason": "why", "config_hash": cell.config_hash}
    records.write_json(cell.run_dir / records.RUN, record)
    command = ["run", "sweep.yaml", "logger=none", "--launcher", "slurm", "--detach", "--retry-diverged", "0.5"]
    assert main(command) == 0
    [job] = json.loads((place / "runs/array/.slurm/jobs.json").read_text()).values()
    assert cell.run_id not in job["cells"] and len(job["cells"]) == 4
    assert sum("+lr" in name or "-lr" in name for name in job["cells"]) == 1


def test_waiting_ends_with_what_the_run_directories_say(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The queue is empty at once, two cells are done, one has failed, one has left without a word."""
    monkeypatch.setattr(slurm, "GONE_PATIENCE_S", 0.2)
    monkeypatch.setattr(slurm, "POLL_S", 0.1)
    submit = slurm.array.submit

    def and_run(made: slurm.Plan, *arguments: object) -> list[str]:
        for cell, status in zip(made.cells, ("done", "done", "failed"), strict=False):
            record = {
                "schema": 0,
                "status": status,
                "reason": "why",
                "config_hash": cell.config_hash,
                "steps_trained": 1,
            }
            cell.run_dir.mkdir(parents=True)
            records.write_json(cell.run_dir / records.RUN, record | {"images_per_s": 1.0})
        return submit(made, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(slurm.array, "submit", and_run)
    assert run(detach=False) == 1
    out = capsys.readouterr().out
    assert "1 of 4 cells failed or diverged" in out and "1 of 4 cells were stopped" in out
    assert "left Slurm's queue; see its log.txt" in out


def test_ctrl_c_detaches_and_says_how_to_cancel(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "_watch", interrupt)
    assert run(detach=False) == 130
    out = capsys.readouterr().out
    assert "detached, the array goes on" in out and "scancel 77 ends it" in out


def no_srun(place: Path) -> None:
    (place / "bin" / "srun").unlink()


def no_folder(place: Path) -> None:
    (place / "runs" / "array").mkdir(parents=True)
    (place / "runs" / "array" / ".slurm").touch()


def refusing(place: Path) -> None:
    (place / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid account >&2; exit 1\n")


@pytest.mark.parametrize(
    ("arrange", "option", "sentence"),
    [
        (no_srun, "seed=0", r"srun was not found: --launcher slurm submits from a login node"),
        (no_folder, "seed=0", r"runs/array/.slurm cannot be written \(file exists\); give a directory"),
        (refusing, "seed=0", r"Slurm refuses the array: invalid account; mend conf/launcher"),
        (None, "launcher.partiton=low", r"'launcher.partiton' is not a key.*; did you mean 'launcher.partition'\?"),
        (
            None,
            "launcher.gpus_per_cell=8 trainer=gpu",
            r"gpus_per_cell=8, but a cell trains on 1 of a node; write null, and "
            r"parallel=fsdp parallel\.devices=8 if",
        ),
        (
            None,
            "launcher.gpus_per_cell=2 trainer=gpu parallel=ddp parallel.devices=4",
            r"but a cell trains on 4 of a node",
        ),
        (
            None,
            "launcher.nodes=2",
            r"launcher.nodes=2, but a cell trains on 1; write null, and parallel=fsdp",
        ),
        (
            None,
            "parallel=fsdp",
            r"parallel=fsdp, but how many processes a cell is to have .* give parallel\.devices=N\.",
        ),
    ],
)
def test_what_cannot_be_submitted_is_one_sentence(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    arrange: Callable[[Path], None] | None,
    option: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}/usr/bin/nowhere{os.pathsep}/bin")
    if arrange is no_srun and Path("/bin/srun").exists():
        monkeypatch.setenv("PATH", str(place / "bin"))
    if arrange:
        arrange(place)
    assert run(*option.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(sentence, error), error
    assert submissions(place) == 0


def test_gpu_cells_without_a_gpu_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trainer=gpu", "launcher.gpus_per_cell=0") == 2
    assert "the cells have trainer.accelerator=gpu; write null" in capsys.readouterr().err
    assert run("trainer=gpu", "launcher.gpus_per_cell=0", "launcher.sbatch=[--gres=gpu:a100:1]") == 0
    assert options_of((place / "submitted").read_text())["gres"] == "gpu:a100:1"


def test_a_cap_holds_before_anything_is_submitted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "sweep.yaml", "logger=none", "--launcher", "slurm", "--detach"]
    assert main([*command, "--max-hours", "1e-6"]) == 2
    assert main([*command, "--max-cost", "1e-9", "--price", "2"]) == 2
    assert main([*command, "--price", "2"]) == 2
    assert submissions(place) == 0 and not (place / "runs").exists()
    assert capsys.readouterr().err.count("above --max-") == 2


def test_launcher_keys_without_a_cluster_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "sweep.yaml", "launcher.partition=low"]) == 2
    assert "add --launcher slurm" in capsys.readouterr().err
    assert main(["run", "sweep.yaml", "--launcher", "slrum"]) == 2
    assert "did you mean 'slurm'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("hours=24:00:00", "is read as the number 86400"),
        ("hours=0.05", "every start would be stopped at once"),
        ("hours=day", "not a number"),
        ("cells_at_once=0", "must be at least 1"),
        ("max_requeues=-1", "must not be negative"),
        ("memory_gb=0", "must be positive"),
        ("setup=module load cuda", "is not a list"),
        ("sbatch=[--array=0-3]", "a key of its own: launcher.cells_at_once"),
        ("sbatch=[--requeue]", "sovit sets itself"),
        ("sbatch=[mail-type=END]", "write options as --name=value"),
        ("sbatch=[--exclusive, --exclusive]", "holds --exclusive twice"),
        ('partition="low\\nrm -rf"', "cannot be printed"),
        ('setup=["a\\nb"]', "cannot be printed"),
        ("partition=", "write text|has no value|null"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(option: str, sentence: str) -> None:
    if option == "partition=":
        assert load_launcher("slurm", ["launcher.partition="]).partition is None  # as an empty value in the file
        return
    with pytest.raises(ConfigError, match=sentence):
        load_launcher("slurm", [f"launcher.{option}"])


def test_every_key_of_the_file_is_needed_and_its_misspelling_found(tmp_path: Path) -> None:
    """A key that a copied file lacks would silently be the default of somebody else."""
    text = (CONF_DIR / "launcher" / "slurm.yaml").read_text()
    (tmp_path / "launcher").mkdir()
    copy = tmp_path / "launcher" / "mine.yaml"
    for key in Launcher.__dataclass_fields__:
        copy.write_text(re.sub(rf"^{key}:", f"{key[:-1]}:", text, flags=re.MULTILINE))
        with pytest.raises(ConfigError, match=f"did you mean .*'launcher.{key}'"):
            load_launcher("mine", conf_dir=tmp_path)
        copy.write_text(re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE))
        with pytest.raises(ConfigError, match=f"launcher.{key} has no value"):
            load_launcher("mine", conf_dir=tmp_path)
    copy.write_text(text)
    assert load_launcher("mine", conf_dir=tmp_path) == load_launcher("slurm")
