"""Processes that claim a run directory, for tests/test_claims.py: ``python claimants.py DEED DIRECTORY [key=value ...]``.

Deeds: ``keep`` claims and checks its claim until it is lost; ``race`` claims many times, each in a process of its own. With
``host=NAME`` a process passes for one of another machine.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from sovit import claims


def pose(host: str) -> None:
    """Pass for a process of another machine."""
    claims._here = lambda: {"host": host, "boot": f"boot of {host}", "pids": "pid:[1]"}


def keep(directory: Path, lease: float, beat: float) -> None:
    try:
        with claims.hold(directory, lease=lease, beat=beat, say=lambda line: None) as claim:
            print("held", flush=True)
            while True:
                claim.check()
                time.sleep(0.01)
    except (claims.Held, claims.Lost) as error:
        print(f"{type(error).__name__}: {error}", flush=True)


def race(directory: Path, times: int, seed: int) -> None:
    """Claim, note begin and end in a file, and die in every third claim without letting go."""
    draw = random.Random(seed)
    for number in range(times):
        pause, dies = draw.uniform(0.0, 0.002), draw.random() < 1 / 3
        child = os.fork()
        if child == 0:
            _claim_once(directory, f"{seed}.{number}", pause, dies)
        os.waitpid(child, 0)


def _claim_once(directory: Path, name: str, pause: float, dies: bool) -> None:
    marks = os.open(directory.parent / "marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        try:
            with claims.hold(directory) as claim:
                os.write(marks, f"begin {name}\n".encode())
                time.sleep(pause)
                claim.check()
                os.write(marks, f"end {name}\n".encode())
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        except claims.Held:
            time.sleep(0.001)


if __name__ == "__main__":
    deed, directory = sys.argv[1], Path(sys.argv[2])
    options = dict(argument.split("=") for argument in sys.argv[3:])
    if "host" in options:
        pose(options["host"])
    if deed == "race":
        race(directory, int(options["times"]), int(options["seed"]))
    else:
        keep(directory, float(options.get("lease", claims.LEASE_S)), float(options.get("beat", claims.BEAT_S)))
