"""Every cell is done once, and its records are those of an undisturbed run to the last byte, whatever is killed and when."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import chaos_cells
from chaos_cells import EARLY, LATE, go, kills, made, note
from fake_cells import wait_until
from sovit import claims, records
from sovit.launch.local.runner import run_sweep

COUNTS = {"before the first step": 1, "half-way through a claim": 1, "after a claim": 1}


def arrange(root: Path, num_cells: int, rounds: int) -> None:
    """A schedule of deaths for each cell: every early moment so many times, shuffled, then the late ones."""
    draw = random.Random(0)
    (root / "schedule").mkdir()
    (root / "kills").touch()
    for planned in made(root, num_cells, 2).cells:
        moments = [(moment, COUNTS.get(moment, draw.randint(1, 2))) for moment in EARLY * rounds]
        draw.shuffle(moments)
        lines = [f"{moment}\t{count}\n" for moment, count in [*moments, *((moment, 1) for moment in LATE)]]
        (root / "schedule" / planned.run_id).write_text("".join(lines))


@contextlib.contextmanager
def killer(root: Path, num_cells: int, most: int, pause: float) -> Iterator[None]:
    """Kills a random cell at random times, ``most`` in all."""
    ended, draw = threading.Event(), random.Random(1)
    directories = [planned.run_dir for planned in made(root, num_cells, 2).cells]

    def work() -> None:
        for _ in range(most):
            while not ended.wait(draw.uniform(0, 2 * pause)):
                directory = draw.choice(directories)
                holder = claims.holder(directory)
                if holder is not None and holder.local:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(holder.pid, signal.SIGKILL)
                        note(root, directory.name, "from outside")
                    break

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def compare(root: Path, num_cells: int) -> tuple[int, int]:
    """(files, rows) found equal to those of the undisturbed runs."""
    files = rows = 0
    plans = [made(root, num_cells, 2, folder).cells for folder in ("runs", "undisturbed")]
    for ours, theirs in zip(*plans, strict=True):
        for name in records.GROWING:
            content = (ours.run_dir / name).read_bytes()
            assert content == (theirs.run_dir / name).read_bytes(), (ours.run_id, name)
            files, rows = files + 1, rows + content.count(b"\n")
        steps = [json.loads(line)["step"] for line in (ours.run_dir / records.EVALS).read_text().splitlines()]
        assert Counter(steps) == dict.fromkeys([0, *ours.evaluations], 3), (
            "three draws of one data set at one count of shots"
        )
        done, undisturbed = (records.read_run(cell.run_dir) for cell in (ours, theirs))
        assert done and undisturbed and done["status"] == records.DONE
        for key in set(undisturbed) - {"wall_s", "images_per_s", "config", "code_version"}:
            assert done[key] == undisturbed[key], key
        assert 0 < done["wall_s"] < 3600
        left = {path.name for path in ours.run_dir.iterdir() if not path.name.startswith(claims.PREFIX)}
        points = {name for name in left if name.endswith(".ckpt")}  # those of a kill between done mark and tidying up
        expected = {records.RUN, *records.GROWING, records.PROGRESS, records.PERF, records.LOG}
        assert left - points <= expected, left - expected
        starts = (ours.run_dir / records.LOG).read_text()
        assert starts.count(": done\n") <= 1 and "Traceback" not in starts
    return files, rows


def undisturbed(root: Path, num_cells: int) -> None:
    assert run_sweep(made(root, num_cells, 2, "undisturbed"), metric=("digits", 1)) == 0


def until_done(root: Path, num_cells: int) -> int:
    """Invocations of the same command until it says that every cell is done."""
    most = max(len(path.read_text().splitlines()) for path in (root / "schedule").iterdir()) + 40
    for invocation in range(1, most):
        if go(root, num_cells, workers=2) == 0:
            return invocation
    raise AssertionError(f"not done after {most} invocations")


def test_twenty_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed(tmp_path, 2)
    arrange(tmp_path, 2, rounds=1)
    with killer(tmp_path, 2, most=4, pause=1.0):
        invocations = until_done(tmp_path, 2)
    found = Counter(moment for _, moment in kills(tmp_path))
    assert set(found) >= {*EARLY, *LATE}
    assert sum(found.values()) >= 20
    say(capsys, found, invocations, 0, compare(tmp_path, 2))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_cells_and_of_runners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_cells, runners_killed = 6, 0
    undisturbed(tmp_path, num_cells)
    arrange(tmp_path, num_cells, rounds=2)
    command = [sys.executable, chaos_cells.__file__, str(tmp_path), str(num_cells)]
    with killer(tmp_path, num_cells, most=30, pause=0.7):
        runners: list[subprocess.Popen[bytes]] = []
        try:  # two runners on one runs/, of which one is killed with its cells, then the other
            with (tmp_path / "runners.txt").open("w") as log:
                runners = [subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) for _ in range(2)]
            for runner, goal in zip(runners, (10, 20), strict=True):
                assert wait_until(lambda goal=goal: len(kills(tmp_path)) >= goal, seconds=900)
                assert runner.poll() is None, (tmp_path / "runners.txt").read_text()
                runner.kill()
                runners_killed += 1
        finally:
            for runner in runners:
                runner.kill()
                runner.wait()
        invocations = until_done(tmp_path, num_cells)
    found = Counter(moment for _, moment in kills(tmp_path))
    assert sum(found.values()) >= 100
    assert all(found[moment] >= 10 for moment in {*EARLY, "before the done mark"}), found
    say(capsys, found, invocations, runners_killed, compare(tmp_path, num_cells))


def say(
    capsys: pytest.CaptureFixture[str], found: Counter[str], invocations: int, runners: int, equal: tuple[int, int]
) -> None:
    with capsys.disabled():
        print(
            f"\nchaos: {sum(found.values())} cells killed by SIGKILL ({', '.join(f'{n} {m}' for m, n in found.items())}), "
            f"{runners} runners killed, {invocations} invocations; {equal[1]} rows in {equal[0]} files equal to the "
            "undisturbed ones byte for byte"
        )
