"""The job array of a sweep: what it asks for, how it is submitted, and which of its tasks are in Slurm's queue.

What is remembered, ``runs/<name>/.slurm/jobs.json``, is written before an array is submitted, so that a submission cut
short is found again by its name. Accounting (sacct), which not every cluster has, is not asked.
"""

from __future__ import annotations

import functools
import io
import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import claims, records
from sovit.launch.plan import Cell, Plan
from sovit.launch.slurm.config import Launcher
from sovit.launch.slurm.task import COMMAND, Task, run_task
from sovit.launch.sweep import SweepError

FOLDER, JOBS = ".slurm", "jobs.json"


@dataclass(frozen=True)
class Queued:
    """A task that is in Slurm's queue, running ones included. ``reason``: why it waits, in Slurm's word."""

    job: str
    state: str
    reason: str


class NoAnswer(RuntimeError):
    """The controller does not say what is in the queue."""


def check(plan: Plan, launcher: Launcher) -> None:
    """Raise SweepError if this is no place to submit from, or if the cells could not use what is asked for."""
    missing = [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]
    if missing:
        raise SweepError(
            f"{missing[0]} was not found: --launcher slurm submits from a login node of a Slurm cluster; "
            "use --launcher local to run on this machine."
        )
    for cell in plan.cells:
        _check_devices(cell, launcher)


def _check_devices(cell: Cell, launcher: Launcher) -> None:
    parallel, gpus = cell.config.parallel, launcher.gpus_per_cell
    if launcher.nodes not in (None, cell.nodes):
        raise SweepError(
            f"launcher.nodes={launcher.nodes}, but a cell trains on {cell.nodes}; write null, and parallel=fsdp "
            f"parallel.nodes={launcher.nodes} if that is meant."
        )
    if gpus == 0 and not launcher.asks_for_gpus and _wants_gpu(cell):
        raise SweepError("launcher.gpus_per_cell=0, but the cells have trainer.accelerator=gpu; write null.")
    if parallel.kind != "single" and parallel.devices is None and not (gpus and _wants_gpu(cell)):
        raise SweepError(
            f"parallel={parallel.kind}, but how many processes a cell is to have on a node cannot be seen from here; give "
            "parallel.devices=N."
        )
    if gpus and _wants_gpu(cell) and gpus != _devices(cell, launcher):
        raise SweepError(
            f"launcher.gpus_per_cell={gpus}, but a cell trains on {_devices(cell, launcher)} of a node; write null, and "
            f"parallel=fsdp parallel.devices={gpus} if that is meant."
        )


def _wants_gpu(cell: Cell) -> bool:
    return cell.config.trainer.accelerator == "gpu"


def _devices(cell: Cell, launcher: Launcher) -> int:
    """Processes on a node: those of the plan, unless that left them to the node's GPUs, which this machine need not have."""
    parallel = cell.config.parallel
    return launcher.gpus_per_cell or 1 if parallel.kind != "single" and parallel.devices is None else cell.devices


def parameters(launcher: Launcher, cells: Sequence[Cell], name: str, at_once: int) -> dict[str, Any]:
    """What submitit's SlurmExecutor is told of cells with as many nodes and processes each; None means not told.

    A cell is one task for Slurm, on its first node. The task itself starts the processes, on the other nodes by srun.
    """
    nodes, devices = cells[0].nodes, _devices(cells[0], launcher)
    gpus = launcher.gpus_per_cell
    if gpus is None and not launcher.asks_for_gpus:
        gpus = devices if any(_wants_gpu(cell) for cell in cells) else 0
    each = max(cell.num_threads + cell.config.data.num_workers for cell in cells)
    cpus = launcher.cpus_per_cell or devices * each
    told: dict[str, Any] = {
        "job_name": name,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "time": launcher.minutes,
        "array_parallelism": at_once,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": gpus or None,
        "cpus_per_task": cpus,
        "mem": None if launcher.memory_gb is None else f"{round(1024 * launcher.memory_gb)}M",
        "signal_delay_s": launcher.signal_delay_s,
        "setup": launcher.setup or None,
        # A job must outlive its node whatever the cluster's default (JobRequeue) is.
        "additional_parameters": {"requeue": True, **launcher.options},
        "srun_args": [
            f"--cpus-per-task={cpus}",  # since Slurm 22.05 srun does not take it from sbatch
            *(["--nodes=1", "--ntasks=1", "--relative=0"] if nodes > 1 else []),
        ],
    }
    return {key: value for key, value in told.items() if value is not None} | {"wckey": None}  # submitit would set one


def submit(
    plan: Plan, launcher: Launcher, chosen: Sequence[Cell], folder: Path, command: Sequence[str] = COMMAND
) -> list[str]:
    """Submit arrays of these cells in their order, remember them in ``folder``; returns their job ids. Raises SweepError.

    One array for each number of nodes and processes a cell; one for all, most often. To be called inside `submitting`.
    """
    alike: dict[tuple[int, int], list[Cell]] = {}
    for cell in chosen:
        alike.setdefault((cell.nodes, _devices(cell, launcher)), []).append(cell)
    return [_submit_noted(plan, launcher, cells, folder, command) for cells in alike.values()]


def _submit_noted(plan: Plan, launcher: Launcher, chosen: Sequence[Cell], folder: Path, command: Sequence[str]) -> str:
    name = f"{plan.name}-{secrets.token_hex(3)}"
    jobs = read_jobs(folder)
    jobs[name] = {"id": None, "cells": [cell.run_id for cell in chosen]}
    records.write_json(folder / JOBS, jobs)
    job = _submit(folder / name, parameters(launcher, chosen, name, plan.workers), launcher, chosen, command)
    jobs[name]["id"] = job
    records.write_json(folder / JOBS, jobs)
    return job


def _submit(
    folder: Path, told: dict[str, Any], launcher: Launcher, chosen: Sequence[Cell], command: Sequence[str]
) -> str:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    tasks = [
        Task(
            overrides=_overrides(cell, launcher),
            run_id=cell.run_id,
            run_dir=str(cell.run_dir.absolute()),
            config_hash=cell.config_hash,
            notes=str(folder.parent.absolute()),
            limit_s=60.0 * launcher.minutes,
            signal_delay_s=launcher.signal_delay_s,
            max_requeues=launcher.max_requeues,
            command=tuple(command),
            nodes=cell.nodes,
        )
        for cell in chosen
    ]
    executor = SlurmExecutor(folder)
    executor.update_parameters(**told)
    try:
        with redirect_stderr(io.StringIO()):  # where submitit repeats what its error says
            jobs = executor.submit_array([functools.partial(run_task, task) for task in tasks])
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        lines = [line for line in str(error).splitlines() if "error:" in line]
        why = lines[0].partition("error:")[2].strip() if lines else " ".join(str(error).split())
        raise SweepError(f"Slurm refuses the array: {why}; mend conf/launcher or launcher.KEY=VALUE.") from None
    return str(jobs[0].job_id).partition("_")[0]


def _overrides(cell: Cell, launcher: Launcher) -> list[str]:
    """With the number of processes that the plan has left to the node."""
    left = cell.config.parallel.kind != "single" and cell.config.parallel.devices is None
    return [*cell.overrides, *([f"parallel.devices={_devices(cell, launcher)}"] if left else [])]


@contextmanager
def submitting(folder: Path) -> Iterator[None]:
    """Keep every other `sovit run` from submitting cells of this sweep. Raises SweepError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claims.hold(folder):
            yield
    except claims.Held as error:
        raise SweepError(
            f"{folder.parent} is being submitted from elsewhere ({error}); try again in a minute."
        ) from None
    except OSError as error:
        raise SweepError(
            f"{folder} cannot be written ({(error.strerror or str(error)).lower()}); give a directory that the nodes share "
            "with runs_dir=DIR."
        ) from None


def read_jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Job name -> {"id": of the array, None if not known, "cells": run ids by index}. Raises SweepError."""
    path = folder / JOBS
    try:
        found = json.loads(path.read_text())
        if all(isinstance(job["cells"], list) for job in found.values()):
            return found
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise SweepError(f"{path} cannot be read; if squeue shows no job of this sweep, delete it.")


def queue(jobs: dict[str, dict[str, Any]]) -> dict[str, Queued]:
    """Run id -> its task, for the cells that are in Slurm's queue. Raises NoAnswer."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--array", f"--name={','.join(jobs)}", "--format=%j|%F|%K|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(str(error)) from None
    if done.returncode:
        raise NoAnswer(" ".join(done.stderr.split()))
    found = {}
    for line in done.stdout.splitlines():
        name, job, index, state, reason = line.strip().split("|", 4)
        cells = jobs[name]["cells"]
        number = int(index) if index.isdecimal() else 0  # one cell makes no array
        found[cells[number]] = Queued(job if len(cells) == 1 else f"{job}_{number}", state, reason)
    return found
