"""A process of a cell that trains nothing, for the tests of sovit.launch.processes: ``python fake_rank.py FOLDER DEED``.

Every start is a line in FOLDER/starts: the process's rank, its id, and what it sees. With ``start`` as the first word it is
the one that starts the processes: ``python fake_rank.py start DEVICES FOLDER DEED``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sovit.launch import processes

SEEN = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


def starts(folder: Path) -> list[list[str]]:
    """Rank, process id and `SEEN` of every start so far, whole lines only."""
    file = folder / "starts"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def main(folder: Path, deed: str) -> int:
    """Deeds: done; CODE@RANK (that process ends so, killed if negative, while the others wait for ever); stop (wait for
    TERM); stubborn (wait for ever); memory@N (exit code 77 until the Nth time); port (78 at first)."""
    processes.follow_parent()
    rank = os.environ["RANK"]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    with (folder / "starts").open("a") as file:
        file.write(" ".join([rank, str(os.getpid()), *(os.environ.get(name, "-") for name in SEEN)]) + "\n")
    print(f"process {rank} speaks")
    deed, _, which = deed.partition("@")
    if deed in ("memory", "port"):
        times = len([line for line in starts(folder) if line[0] == rank])
        if times < int(which):
            if int(rank) == int(os.environ["WORLD_SIZE"]) - 1 or deed == "port":
                return 77 if deed == "memory" else 78
            time.sleep(600)
        return 0
    if deed == "stop":
        while not stopped:
            time.sleep(0.02)
        (folder / f"checkpoint{rank}").touch()
        return 75
    if deed == "stubborn" or (deed != "done" and rank != which):
        time.sleep(600)
        return 0
    if deed == "done":
        return 0
    print("a traceback", file=sys.stderr, flush=True)
    if int(deed) < 0:
        os.kill(os.getpid(), -int(deed))
    return int(deed)


if __name__ == "__main__":
    if sys.argv[1] == "start":
        target = (__file__,)
        sys.exit(processes.start(sys.argv[3:], devices=int(sys.argv[2]), target=target))
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
