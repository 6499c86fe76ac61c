"""Cells for the tests of the Slurm launcher, and a runner that submits them. As a command of a task:

    python slurm_cells.py slow SECONDS OVERRIDES...    the real training, every step at least so long
    python slurm_cells.py DEED OVERRIDES...            no training: done, fail, wait (for TERM), deaf (to TERM), die, held,
                                                       memory (code 77 in the first three starts),
                                                       twice (wait in the first start, done in the second),
                                                       group (`group`), preempted (the same, waits in the first start),
                                                       dies (the same, one of the processes dies in the first start)

and ``python slurm_cells.py run SWEEP LAUNCHER_OVERRIDES -- RUNNER_FLAGS`` for the runner in a process of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sovit import claims, records
from sovit.config import compose
from sovit.launch import processes

SLOW = (sys.executable, __file__, "slow", "0.15")


def deed_command(deed: str) -> tuple[str, ...]:
    return (sys.executable, __file__, deed)


def slow(seconds: float, overrides: list[str]) -> int:
    from sovit.lit import engine
    from sovit.lit.module import LitClassifier

    original = LitClassifier.training_step

    def step(*arguments: object) -> object:
        time.sleep(seconds)
        return original(*arguments)  # type: ignore[arg-type]

    LitClassifier.training_step = step  # type: ignore[assignment,method-assign]
    return engine.run_cell(overrides)


def pretend(deed: str, overrides: list[str]) -> int:
    """A cell that trains nothing. Every start is noted in ``starts`` in its directory."""
    stopped: list[int] = []
    if deed in ("wait", "deaf", "twice"):
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    cfg = compose(overrides)
    directory = records.run_dir(cfg)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    record = {
        "schema": 0,
        "status": "running",
        "reason": None,
        "config_hash": records.config_hash(cfg),
        "steps_trained": 10,
    }
    if deed == "held" and claims.holder(directory) is not None:
        return 76
    if deed == "twice" and len((directory / "starts").read_text().split()) == 1:
        deed = "wait"
    while deed == "deaf" or (deed == "wait" and not stopped):
        time.sleep(0.05)
    if deed == "memory" and len((directory / "starts").read_text().split()) < 4:
        return 77
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if stopped:
        steps = len((directory / "starts").read_text().split())
        if "further" in cfg.tag:  # each start gets beyond the one before
            records.write_json(directory / records.PROGRESS, {"step": steps, "total_steps": 10, "images_per_s": 1.0})
        return 75
    record |= {"status": "failed" if deed == "fail" else "done", "images_per_s": 1.0}
    records.write_json(directory / records.RUN, record)
    return 1 if deed == "fail" else 0


def group(deed: str, overrides: list[str]) -> int:
    """A cell of several processes, started as ``python -m sovit.train`` does it: they exchange a number and note it."""
    processes.follow_parent()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    cfg = compose(overrides)
    if devices := processes.wanted(cfg):
        return processes.start([deed, *overrides], devices=devices, target=(__file__,))
    if here := processes.place():
        processes.rendezvous(here)
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    directory = records.run_dir(cfg)
    note = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME")}
    first = not list(directory.glob("rank*"))
    dist.barrier()
    number = len(list(directory.glob(f"rank{note['RANK']}.*")))
    records.write_json(directory / f"rank{note['RANK']}.{number}.json", {**note, "total": total.item()})
    while deed == "preempted" and first and not stopped:
        time.sleep(0.05)
    if deed == "dies" and note["RANK"] == "1" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()  # if one has died, the others may hang here for ever
    except RuntimeError:
        return 1
    if note["RANK"] == "0" and not stopped:
        record = {"schema": 0, "status": "done", "reason": None, "config_hash": records.config_hash(cfg)}
        records.write_json(directory / records.RUN, record | {"steps_trained": 10, "images_per_s": 1.0})
    return 75 if stopped else 0


def run(arguments: list[str]) -> int:
    from sovit.launch.plan import plan
    from sovit.launch.slurm import runner as slurm
    from sovit.launch.slurm.config import load_launcher
    from sovit.launch.slurm.task import COMMAND
    from sovit.launch.sweep import load_sweep

    slurm.ASK_EVERY_S, slurm.GONE_PATIENCE_S, slurm.POLL_S = 1.0, 3.0, 0.5
    file, *rest = arguments
    options, flags = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    sweep = load_sweep(Path(file), ["logger=none", *(flag for flag in flags if "=" in flag)])
    command = SLOW if "real" in flags else COMMAND if "train" in flags else deed_command(flags[-1])
    return slurm.run_on_slurm(
        plan(sweep, workers=4),
        load_launcher("slurm", options),
        sweep=sweep,
        detach="--detach" in flags,
        metric=("fractals", 5),
        command=command,
    )


if __name__ == "__main__":
    first, *others = sys.argv[1:]
    if first == "run":
        sys.exit(run(others))
    if first in ("group", "preempted", "dies"):
        sys.exit(group(first, others))
    sys.exit(slow(float(others[0]), others[1:]) if first == "slow" else pretend(first, others))
