"""A process that times cells, so that planning itself loads no torch, and the other end of its pipe (`Timer`).

    python -m sovit.launch.pay.timing TARGET [MODULE]

imports MODULE once, answers ``{"ready": true}``, then reads one JSON request a line from standard input: a cell as
lists of overrides, one list for each copy that runs at the same time. Every copy is a fork that really runs the cell;
only the end of each update is noted, by a hook that torch calls. The answer is one JSON line: for every copy its exit
code, the last line it printed, and how many seconds had passed, on the clock and in this process, when each update ended
and when all was over.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

TARGET, PRELOAD = "sovit.lit.engine:run_cell", "sovit.launch.preload"  # as launch.local.runner starts cells
POLL_S = 0.2
IMPORT_LIMIT_S = 300.0
GRACE_S = 10.0  # for a cell to stop by itself once it is told to
LOG, TIMES = "log.txt", "times.json"


def serve(target: str, preload: list[str]) -> None:
    """Answer requests until standard input ends or the parent is gone."""
    parent = os.getppid()
    for name in preload:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        answer = time_cell(target, parent=parent, **json.loads(line))
        print(json.dumps({"copies": answer}), file=answers, flush=True)


def time_cell(
    target: str,
    *,
    parent: int,
    copies: list[list[str]],
    gpus: list[str | None],
    scratch: str,
    block: int,
    limit_s: float,
) -> list[dict[str, Any]]:
    """Run the copies of a cell at the same time; one that is not done after ``limit_s`` seconds is stopped."""
    context = multiprocessing.get_context("fork")
    directories = [Path(scratch) / str(number) for number in range(len(copies))]
    processes: list[ForkProcess] = []
    for directory, overrides, gpu in zip(directories, copies, gpus, strict=True):
        directory.mkdir(parents=True)
        arguments = (target, overrides, gpu, block, str(directory), time.perf_counter())
        processes.append(context.Process(target=_copy, args=arguments))
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit_s
    while any(process.is_alive() for process in processes):
        wait([process.sentinel for process in processes if process.is_alive()], timeout=POLL_S)
        if os.getppid() != parent:
            for process in processes:
                process.kill()
            sys.exit(1)
        if time.monotonic() > deadline + GRACE_S:
            for process in processes:
                process.kill()
        elif time.monotonic() > deadline:
            for process in processes:
                process.terminate()
    return [_answer(process, directory) for process, directory in zip(processes, directories, strict=True)]


def _answer(process: ForkProcess, directory: Path) -> dict[str, Any]:
    process.join()
    said = (directory / LOG).read_text(errors="replace").splitlines() if (directory / LOG).exists() else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    times = directory / TIMES
    noted = json.loads(times.read_text()) if times.exists() else {"end": None, "updates": []}
    return {"code": process.exitcode, "last": last, **noted}


def _copy(target: str, overrides: list[str], gpu: str | None, block: int, directory: str, begun: float) -> None:
    """Run the cell as a worker of a sweep would, and note when its updates end."""
    file = os.open(Path(directory) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from torch.optim.optimizer import register_optimizer_step_post_hook

    updates: list[tuple[float, float]] = []

    def note(*_: Any) -> None:
        if gpu is not None and (len(updates) + 1) % block == 0:  # else the launch of the kernels is timed
            import torch

            torch.cuda.synchronize()
        updates.append((time.perf_counter() - begun, time.process_time()))

    register_optimizer_step_post_hook(note)
    module, _, function = target.partition(":")
    code = 1
    try:
        code = getattr(importlib.import_module(module), function)(overrides)
    finally:
        noted = {"end": (time.perf_counter() - begun, time.process_time()), "updates": updates}
        whole = Path(directory) / f"{TIMES}.new"  # a cell that is told to stop may be killed while it writes
        whole.write_text(json.dumps(noted))
        whole.replace(Path(directory) / TIMES)
    sys.exit(code)


class TimingError(RuntimeError):
    """Nothing could be timed; the message is a clause that says why."""


class Timer:
    """The process that times cells, for as long as the context is open. ``startup_s``: until it had imported everything."""

    def __init__(self, scratch: Path, target: str = TARGET, preload: Sequence[str] | None = None) -> None:
        self.scratch, self.target = scratch, target
        self.preload = [PRELOAD] if preload is None else list(preload)
        self.startup_s = 0.0

    def __enter__(self) -> Timer:
        began = time.monotonic()
        self._said = (self.scratch / "server.txt").open("w")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "sovit.launch.pay.timing",
                self.target,
                *self.preload,
            ],  # -P: not from the folder here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process alone, which then ends that one
        )
        try:
            self._answer(IMPORT_LIMIT_S)
        except BaseException:
            self.__exit__()
            raise
        self.startup_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its cells too: what they write is scratch
        self._process.communicate()
        self._said.close()

    def time(
        self, copies: list[list[str]], gpus: Sequence[str | None], folder: Path, block: int, limit_s: float
    ) -> list[dict[str, Any]]:
        """What each copy of a cell noted; the copies run at the same time. Raises TimingError."""
        self.begin(copies, gpus, folder, block, limit_s)
        answer: list[dict[str, Any]] = self._answer(limit_s + 2 * GRACE_S)["copies"]
        return answer

    def begin(
        self, copies: list[list[str]], gpus: Sequence[str | None], folder: Path, block: int, limit_s: float
    ) -> None:
        """Have the copies started. Raises TimingError if the process is gone."""
        request = {"copies": copies, "gpus": list(gpus), "scratch": str(folder), "block": block, "limit_s": limit_s}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise TimingError(self._last_words()) from None

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            raise TimingError(f"nothing came back within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise TimingError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._process.wait(GRACE_S)
        lines = [line.strip() for line in (self.scratch / "server.txt").read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), f"it ended with exit code {self._process.returncode}")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
