"""Cells that train nothing, for the tests of the local runner: what one does is written in its overrides.

Every start is noted in ``starts`` beside the run directories, so a test can count them. Imported by the test, by runners
started as processes of their own (``python fake_cells.py ROOT WORKERS [host=far] [lease=S] NAME=DEED ...``), and by the
cells.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_rank
from claimants import pose
from sovit import claims, records
from sovit.launch import processes
from sovit.launch.local.runner import run_sweep
from sovit.launch.plan import Cell, Plan
from sovit.schema import ModelConfig, RunConfig
from sovit.shape import Shape

TARGET = "fake_cells:run"
PRELOAD = ["sovit.launch.local.runner"]


def config_of(root: Path, tag: str) -> RunConfig:
    model = ModelConfig(num_heads=1, patch_size=16)
    return RunConfig(name="fake", runs_dir=str(root), tag=tag, model=model)


def plan(
    root: Path,
    deeds: dict[str, str],
    workers: int = 2,
    config_hash: str = "abc",
    accelerator: str = "cpu",
    devices: Sequence[int] = (),
) -> Plan:
    """A plan of one cell for each name; the first is expected to take longest. ``devices`` of each, 1 unless given."""
    cells = [
        Cell(
            overrides=[str(root), name, deed, config_hash],
            config=config_of(root, name),
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
            devices=devices[number] if devices else 1,
        )
        for number, (name, deed) in enumerate(deeds.items())
    ]
    return Plan("fake", root, cells, workers, "nothing")


def go(made: Plan, **options: Any) -> int:
    return run_sweep(made, **{"target": TARGET, "preload": PRELOAD, **options})


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


def directory_of(root: Path, name: str, retry: dict[str, str]) -> Path:
    """Of a cell of `plan`, or of its retry, which has overrides of its own."""
    if not retry:
        return root / "fake" / f"fake-{name}"
    return records.run_dir(config_of(root, retry["tag"]))


def run(overrides: list[str]) -> int:
    """The cell. Deeds: done, slow, gate, fail, crash, diverge, steep, die, die_once, meet, hang, stubborn, lie.

    memory: out of device memory in the first two starts; starved: in every one; orphan: in the first start another process
    of the cell died; ranks: two processes that wait for ever.
    """
    root, name, deed, config_hash = Path(overrides[0]), *overrides[1:4]
    retry = dict(item.split("=") for item in overrides[4:])
    directory = directory_of(root, name, retry)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    try:
        with claims.hold(directory, beat=0.05) as claim:
            found = records.read_run(directory)
            if found is not None and found["status"] == "done" and "evals_bytes" not in found:
                return 0
            with (root / "starts").open("a") as file:
                file.write(f"{directory.name.removeprefix('fake-')}\n")
            print(f"{name} speaks")
            os.system("echo a child of the cell speaks")
            rate = float(retry.get("optim.lr", RunConfig().optim.lr))
            return _do(root, name, deed, config_hash, directory, rate, claim, stopped)
    except claims.Held:
        return 76


def _do(
    root: Path,
    name: str,
    deed: str,
    config_hash: str,
    directory: Path,
    rate: float,
    claim: claims.Claim,
    stopped: list[int],
) -> int:
    tries = starts(root).count(name)
    record = {"status": "running", "reason": None, "config_hash": config_hash, "steps_trained": 10, "images_per_s": 5.0}

    def end(status: str, reason: str | None = None) -> None:
        claim.check()
        records.write_json(directory / records.RUN, {**record, "status": status, "reason": reason})

    end("running")
    (directory / "pid").write_text(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
    if deed == "crash":
        raise RuntimeError("the cell crashed")
    if deed == "fail":
        end("failed", "ValueError: no such data")
        return 1
    if deed == "diverge" or (deed == "steep" and rate > 0.0003):
        end("diverged", "training loss is nan at step 7")
        return 3
    if deed == "die" or (deed == "die_once" and tries == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "starved" or (deed == "memory" and tries < 3):
        return 77
    if deed == "orphan" and tries == 1:
        end("failed", "RuntimeError: connection closed by peer")
        return 128 + signal.SIGKILL
    if deed == "ranks":
        return processes.start([str(root), "stubborn"], devices=2, target=(fake_rank.__file__,))
    if deed == "lie":
        return 0
    if deed == "slow":
        time.sleep(0.3)
    if deed == "meet":  # do not end before another cell runs
        assert wait_until(lambda: len(starts(root)) > 1)
    while (
        deed == "stubborn"
        or (deed == "hang" and not stopped)
        or (deed == "gate" and not stopped and not (root / "open").exists())
    ):
        time.sleep(0.02)
    if stopped:
        (directory / "checkpoint").touch()
        end("running", "stopped by a signal")
        return 75
    end("done")
    return 0


def run_far(overrides: list[str]) -> int:
    """The cell, as if on another machine."""
    pose("far")
    return run(overrides)


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[3:])
    options: dict[str, Any] = {"lease": float(given.pop("lease", claims.LEASE_S))}
    if given.pop("host", ""):
        pose("far")
        options["target"] = "fake_cells:run_far"
    if "preload" in given:
        options["preload"] = [given.pop("preload")]
    try:
        sys.exit(go(plan(Path(sys.argv[1]), given, workers=int(sys.argv[2])), **options))
    except ValueError as error:  # as sovit.cli.main does
        print(error)
        sys.exit(2)
