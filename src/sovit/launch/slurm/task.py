"""What a task of the array does on its node: run the cell, and see to it that the cell goes on elsewhere if it must stop.

The cell is a process of its own, ``python -m sovit.train``, on several nodes one on each, started by srun; it starts the
other processes of its node itself. This one, on the first node, watches it and talks to Slurm. Who requeues: Slurm,
when a node fails or when it has evicted the job already; this process, when Slurm has warned of the time limit or of a
preemption and still counts the job as running once the checkpoint is written; nobody after scancel.

What it cannot do: get a signal to a cell that Slurm kills without a warning. Such a cell loses what came after its last
checkpoint, no more.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sovit import claims, records
from sovit.launch.processes import FIRST_EXIT, OUT_OF_MEMORY, RESTARTS, STOPPED
from sovit.launch.state import DONE, state_on_disk

COMMAND = (sys.executable, "-m", "sovit.train")
# Slurm warns with the signal that submitit names to it (USR2, or USR1 by its environment), evicts and cancels with TERM.
WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
VERDICTS = (0, 1, 2, 3)  # exit codes of a cell that end it; 76: another process runs it
HELD = 76
ATTEMPTS = 2  # of a cell that dies without a word, as in the local runner
HELD_PATIENCE_S = 300.0  # a node that Slurm has given up may still be at work, and may still be found dead
POLL_S = 0.2
OTHERS_S = 120  # for the processes of the other nodes to end after those of one have
EARLY_S = (
    120.0  # Slurm warns of the time limit up to a minute before it was asked to; the other minute is for the prolog
)


@dataclass(frozen=True)
class Task:
    """A cell as it was planned. ``notes``: the directory where its requeues are counted."""

    overrides: list[str]
    run_id: str
    run_dir: str
    config_hash: str
    notes: str
    limit_s: float  # time limit of one start
    signal_delay_s: int
    max_requeues: int
    command: tuple[str, ...] = COMMAND
    nodes: int = 1


def run_task(task: Task) -> None:
    """Run a cell inside its job, output into its log; ends this process with the cell's exit code."""
    received: list[int] = []
    began = time.monotonic()

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in WARNINGS:  # in place of submitit's, which would requeue without asking what became of the job
        signal.signal(number, note)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before TERM; submitit would remark on it in the log
    directory = Path(task.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    file = os.open(directory / records.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    _say(f"Slurm job {job_id()}, start {start}, node {os.environ.get('SLURMD_NODENAME', 'unknown')}.")
    sys.exit(_run(task, received, began))


def job_id() -> str:
    """Of this task. The number alone (SLURM_JOB_ID) would mean the whole array where it is that of the last task."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def _run(task: Task, received: list[int], began: float) -> int:
    """The exit code of the cell, after a requeue if there has to be one."""
    if state_on_disk(Path(task.run_dir))[0] == DONE:
        _say(f"{task.run_id} is done already.")
        return 0
    if (changed := _changed(task)) is not None:
        _say(changed)
        return 2
    deadline = time.monotonic() + HELD_PATIENCE_S
    deaths = restarts = 0
    while not received:
        code = _cell(task, received)
        if received or code in VERDICTS or code == STOPPED:
            break
        if code == HELD:
            if time.monotonic() > deadline:
                break
            _wait_while_held(task, received, deadline)
        elif code == OUT_OF_MEMORY and restarts < RESTARTS:
            restarts += 1
            _say(f"{task.run_id} ran out of device memory; started again with a smaller micro-batch.")
        else:
            deaths += 1
            _say(f"{task.run_id} ended with exit code {code} and no verdict.")
            if deaths == ATTEMPTS:
                break
    else:
        code = STOPPED  # warned before the cell had begun
    if received and code not in VERDICTS:
        timed_out = time.monotonic() - began > task.limit_s - task.signal_delay_s - EARLY_S
        _requeue(task, code, timed_out)
        return STOPPED
    assert code is not None  # None, still running, only after a warning
    return code if code >= 0 else 128 - code


def _changed(task: Task) -> str | None:
    """Why the cell is not the one that was submitted any more: conf/ is read when it starts, perhaps days later."""
    from sovit.config import ConfigError, compose

    try:
        found = records.config_hash(compose(task.overrides))
    except ConfigError as error:
        return str(error)
    if found != task.config_hash:
        return (
            f"{task.run_id}: conf/ has changed since this cell was submitted (it gives {found}, not {task.config_hash}); "
            "undo that, or cancel the array and submit the sweep again."
        )
    return None


def _cell(task: Task, received: list[int]) -> int | None:
    """Run the cell's process; its exit code, or None if it is still there shortly before Slurm kills it after a warning."""
    first_exit = Path(task.notes) / f"{task.run_id}.exit"
    first_exit.unlink(missing_ok=True)
    process = subprocess.Popen(
        [*_on_every_node(task), *task.command, *task.overrides],
        stdin=subprocess.DEVNULL,
        preexec_fn=_deaf,
        env={**_environment(), FIRST_EXIT: str(first_exit)} if task.nodes > 1 else None,
    )
    told: float | None = None
    while (code := process.poll()) is None:
        if received and told is None:
            told = time.monotonic()
            process.send_signal(signal.SIGTERM)
        if told is not None and time.monotonic() - told > 0.8 * task.signal_delay_s:
            _say(f"{task.run_id} has not ended {0.8 * task.signal_delay_s:g} s after the signal.")
            return None
        time.sleep(POLL_S)
    if code and task.nodes > 1:  # srun returns the largest exit code, which may be that of a process it has killed
        with suppress(OSError, ValueError):
            return int(first_exit.read_text())
    return code


def _on_every_node(task: Task) -> list[str]:
    """The words before the command of a cell that has one process on each of several nodes, to start the others there."""
    if task.nodes == 1:
        return []
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    return [
        *(
            "srun",
            "--overlap",
            f"--nodes={task.nodes}",
            f"--ntasks={task.nodes}",
            "--ntasks-per-node=1",
            "--unbuffered",
        ),
        f"--wait={OTHERS_S}",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
    ]


def _environment() -> dict[str, str]:
    """Without what Slurm has said of the step of this task, which would hold for the step of the cell too."""
    own = ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_STEP", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_DISTRIBUTION")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(own)}
    return {**kept, "MASTER_ADDR": socket.gethostname()}  # this is the first node


def _deaf() -> None:
    """Slurm signals every process of the job; what must end the cell at the end of a step is the TERM from here.

    A process that ignores a signal passes that on to those it starts, so neither loaders nor W&B die of it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _wait_while_held(task: Task, received: list[int], deadline: float) -> None:
    """After a node failure the cell's last owner may be alive: wait for its end, or until it is found dead."""
    watch = claims.Watch(Path(task.run_dir))
    time.sleep(1.0)
    while not received and time.monotonic() < deadline and watch.look().holder is not None:
        time.sleep(1.0)


def _requeue(task: Task, code: int | None, timed_out: bool) -> None:
    """Put this job back into the queue if Slurm still counts it as running, and if that may lead anywhere."""
    state = _job_state()
    if state != "RUNNING":  # CANCELLED or COMPLETING after scancel, PENDING or COMPLETING if Slurm has requeued it
        _say(f"{task.run_id}: stopped; not requeued from here, Slurm counts the job as {state or 'unknown'}.")
        return
    path = Path(task.notes) / f"{task.run_id}.json"
    best, idle = _read(path)
    step = (records.read_progress(Path(task.run_dir)) or {}).get("step", 0)
    if code == STOPPED and step > best:  # a checkpoint, and beyond all earlier ones
        idle = 0
    elif timed_out:  # a preemption is nobody's fault, however often it comes
        idle += 1
    if idle > task.max_requeues:
        _say(
            f"{task.run_id}: not requeued, {idle} starts in a row reached the time limit and got no further than step "
            f"{best:,}; the same command goes on, with more launcher.hours."
        )
        return
    records.write_json(path, {"step": max(step, best), "idle": idle})
    done = subprocess.run(["scontrol", "requeue", job_id()], capture_output=True, text=True, check=False)
    if done.returncode:
        _say(f"{task.run_id}: Slurm did not requeue the job ({done.stderr.strip()}); the same command goes on.")
    else:
        _say(f"{task.run_id}: requeued by its own task.")


def _read(note: Path) -> tuple[int, int]:
    """(furthest checkpoint, starts in a row that reached the time limit without getting beyond it)."""
    try:
        content = json.loads(note.read_text())
        return content["step"], content["idle"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


def _job_state() -> str:
    """As squeue has it, in capitals; "" if the controller does not answer."""
    for wait in (1.0, 5.0, 0.0):
        command = ["squeue", "--noheader", f"--jobs={job_id()}", "--format=%T"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
        time.sleep(wait)
    return ""


def _say(text: str) -> None:
    print(text, flush=True)
