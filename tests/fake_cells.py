"""Cells that train nothing, for the tests of the local runner: what one does is written in its overrides.

Every start is noted in ``starts`` beside the run directories, so a test can count them. Imported by the test, by runners
started as processes of their own (``python fake_cells.py ROOT WORKERS NAME=DEED ...``), and by the cells.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sovit import records
from sovit.config import RunConfig
from sovit.launch.local import run_sweep
from sovit.launch.plan import Cell, Plan
from sovit.shape import Shape

TARGET = "fake_cells:run"
PRELOAD = ["sovit.launch.local"]


def plan(
    root: Path, deeds: dict[str, str], workers: int = 2, config_hash: str = "abc", accelerator: str = "cpu"
) -> Plan:
    """A plan of one cell for each name; the first is expected to take longest."""
    cells = [
        Cell(
            overrides=[str(root), name, deed, config_hash],
            config=RunConfig(),
            run_id=f"fake-{name}",
            run_dir=root / "fake" / f"fake-{name}",
            config_hash=config_hash,
            shape=Shape(8, 1, 8, 1, 8),
            seed=0,
            num_params=1,
            forward_gflops=1.0,
            evaluations={10: "10 steps"},
            steps=10,
            images=10,
            train_gflops=30.0,
            seconds=100.0 - number,
            accelerator=accelerator,
            num_threads=1,
        )
        for number, (name, deed) in enumerate(deeds.items())
    ]
    return Plan("fake", root, cells, workers, "nothing")


def go(made: Plan, retry_failed: bool = False) -> int:
    return run_sweep(made, retry_failed=retry_failed, target=TARGET, preload=PRELOAD)


def starts(root: Path) -> list[str]:
    file = root / "starts"
    return file.read_text().split() if file.exists() else []


def wait_until(condition: object, seconds: float = 60.0) -> bool:
    """Whether a callable becomes true in time."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def run(overrides: list[str]) -> int:
    """The cell. Deeds: done, fail, crash, diverge, die, die_once, meet, hang, stubborn, lie."""
    root, name, deed, config_hash = Path(overrides[0]), *overrides[1:]
    directory = root / "fake" / f"fake-{name}"
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    with (root / "starts").open("a") as file:
        file.write(f"{name}\n")
    print(f"{name} speaks")
    os.system("echo a child of the cell speaks")
    tries = starts(root).count(name)
    record = {"status": "running", "reason": None, "config_hash": config_hash, "steps_trained": 10, "images_per_s": 5.0}

    def end(status: str, reason: str | None = None) -> None:
        records.write_json(directory / records.RUN, {**record, "status": status, "reason": reason})

    try:
        with records.lock(directory):
            end("running")
            (directory / "pid").write_text(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
            if deed == "crash":
                raise RuntimeError("the cell crashed")
            if deed == "fail":
                end("failed", "ValueError: no such data")
                return 1
            if deed == "diverge":
                end("diverged", "training loss is nan at step 7")
                return 3
            if deed == "die" or (deed == "die_once" and tries == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            if deed == "lie":
                return 0
            if deed == "meet":  # do not end before another cell runs
                assert wait_until(lambda: len(starts(root)) > 1)
            while deed == "stubborn" or (deed == "hang" and not stopped):
                time.sleep(0.02)
            if stopped:
                (directory / "checkpoint").touch()
                end("running", "stopped by a signal")
                return 75
            end("done")
    except records.Locked:
        return 76
    return 0


if __name__ == "__main__":
    deeds = dict(argument.split("=") for argument in sys.argv[3:])
    sys.exit(go(plan(Path(sys.argv[1]), deeds, workers=int(sys.argv[2]))))
