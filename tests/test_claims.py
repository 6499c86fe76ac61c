"""Claims: one owner at a time, among processes that race, die, stop, sleep, and live on other machines."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import claimants
from fake_cells import wait_until
from sovit import claims

LONG = 1000.0  # a lease that no test outlives: whatever is told under it is told at once
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a claimant of tmp_path/run; all are killed at the end."""
    processes = []

    def begin(deed: str = "keep", **options: object) -> "subprocess.Popen[str]":
        arguments = [sys.executable, claimants.__file__, deed, str(tmp_path / "run")]
        arguments += [f"{key}={value}" for key, value in options.items()]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def write(directory: Path, generation: int = 1, **changed: Any) -> Path:
    """A claim like one of this process, but for what is changed."""
    directory.mkdir(exist_ok=True)
    path = directory / f".claim.{generation}"
    path.write_bytes(claims._content({**claims._self(), **changed}))
    return path


def test_of_eight_processes_exactly_one_holds_at_a_time(tmp_path: Path, start: Start) -> None:
    """200 claims, every third of which ends by SIGKILL and has to be taken over."""
    (tmp_path / "run").mkdir()
    processes = [start("race", times=25, seed=seed) for seed in range(8)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 8
    marks = (tmp_path / "marks").read_text().splitlines()
    assert len(marks) == 400
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        assert begin.split()[0] == "begin" and end == begin.replace("begin", "end")
    assert len(names(tmp_path / "run")) == 1  # nothing piles up


def test_a_killed_owner_is_followed_by_exactly_one(tmp_path: Path, start: Start) -> None:
    owner = start()
    assert said(owner) == "held"
    with (
        pytest.raises(claims.Held, match=f"run is being run by process {owner.pid} on "),
        claims.hold(tmp_path / "run"),
    ):
        pass
    owner.kill()  # and not waited for: a zombie is dead
    answers = [said(process) for process in [start() for _ in range(4)]]
    assert answers.count("held") == 1 and sum(answer.startswith("Held: run is being run by") for answer in answers) == 3


def test_a_stopped_owner_of_this_machine_is_alive(tmp_path: Path, start: Start) -> None:
    owner = start(beat=0.02)
    assert said(owner) == "held"
    owner.send_signal(signal.SIGSTOP)
    watch = claims.Watch(tmp_path / "run", lease=0.1)
    before = watch.look()
    time.sleep(0.3)
    assert watch.look() == before and before.certain and before.holder is not None and before.holder.pid == owner.pid
    with pytest.raises(claims.Held), claims.hold(tmp_path / "run", lease=0.1):
        pass


def test_an_owner_of_another_machine_is_respected_while_it_beats(tmp_path: Path, start: Start) -> None:
    assert said(start(host="far", beat=0.02)) == "held"
    with pytest.raises(claims.Held, match="on far"), claims.hold(tmp_path / "run", lease=LONG):
        pass


def test_a_silent_owner_of_another_machine_expires_and_learns_that_it_lost(tmp_path: Path, start: Start) -> None:
    owner = start(host="far", beat=0.02, lease=0.5)
    assert said(owner) == "held"
    owner.send_signal(signal.SIGSTOP)
    lines: list[str] = []
    with claims.hold(tmp_path / "run", lease=0.5, say=lines.append) as claim:
        owner.send_signal(signal.SIGCONT)
        assert said(owner).startswith("Lost: run is not this process's any more: process")
        owner.wait(timeout=60)
        claim.check()
        assert names(tmp_path / "run") == [".claim.2"]
    assert len(lines) == 1 and "waiting up to 0.5 s for a sign of life" in lines[0]


def test_a_silent_owner_of_another_machine_is_followed_by_exactly_one(tmp_path: Path, start: Start) -> None:
    owner = start(host="far")
    assert said(owner) == "held"
    owner.kill()
    owner.wait()
    answers = [said(process) for process in [start(lease=2, beat=0.05, host=f"near{n}") for n in range(4)]]
    assert answers.count("held") == 1


@pytest.mark.parametrize("days", [-400, 400])
def test_a_wall_clock_that_jumps_changes_nothing(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Neither this machine's, nor another's, nor the file server's."""
    owner = start(host="far", beat=0.02)
    assert said(owner) == "held"
    now = time.time() + days * 86400
    monkeypatch.setattr(time, "time", lambda: now)
    with pytest.raises(claims.Held), claims.hold(tmp_path / "run", lease=LONG):
        pass
    owner.kill()
    owner.wait()
    os.utime(tmp_path / "run" / ".claim.1", (now, now))
    watch = claims.Watch(tmp_path / "run", lease=LONG)
    watch.look()
    assert watch.look().holder is not None
    with claims.hold(tmp_path / "run", lease=0.1, beat=LONG) as claim:
        now += 2 * days * 86400
        claim.check()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"pid": 1}', b"[" * 100_000, b"\xff\x00", b'{"host": 3, "pid": true}']
)
def test_an_unreadable_claim_is_one_that_never_beats(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".claim.3").write_bytes(content)
    watch = claims.Watch(tmp_path, lease=LONG)
    assert watch.look().holder is not None and watch.look().holder is not None
    with claims.hold(tmp_path, lease=0.1, say=[].append) as claim:
        assert claim.generation == 4 and names(tmp_path) == [".claim.4"]


def test_a_claim_cut_short_by_a_kill_is_not_taken_for_a_living_one(tmp_path: Path, start: Start) -> None:
    """Claimants of one instant see each other's file before it is written: that is no owner to name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".claim.1").touch()
    watch = claims.Watch(tmp_path / "run", lease=LONG)
    watch.look()
    (tmp_path / "run" / ".claim.2").touch()
    assert not watch.look().certain


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    write(tmp_path, start="12")
    with claims.hold(tmp_path, lease=LONG):
        pass


@pytest.mark.parametrize("key", ["host", "boot", "pids"])
def test_process_numbers_are_compared_within_one_kernel_only(tmp_path: Path, key: str) -> None:
    """The same host name with another boot may be a twin that lives, so it is left its lease."""
    write(tmp_path, **{key: "another", "pid": 2**22 + 1})  # no such process here
    assert claims.Watch(tmp_path, lease=LONG).look().holder is not None
    with claims.hold(tmp_path, lease=0.05):
        pass


def test_a_process_that_cannot_be_seen_is_judged_by_its_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters hide the processes of other users in /proc."""
    write(tmp_path)
    monkeypatch.setattr(claims, "_start", lambda pid: "")
    watch = claims.Watch(tmp_path, lease=LONG)
    watch.look()
    assert not watch.look().certain
    write(tmp_path, nonce="changed")
    assert watch.look().certain
    with claims.hold(tmp_path, lease=0.05):
        pass


def test_another_user_s_process_that_proc_hides_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = 2**22 + 1  # above the largest process number of Linux: not in /proc
    assert claims._is_alive(gone, "12") is False

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert claims._is_alive(gone, "12") is None
    assert claims._is_alive(os.getpid(), "") is None  # whose owner could not see itself


def test_generations_are_never_used_again(tmp_path: Path) -> None:
    """Else one who slept since generation 1 was free would outrank the owner of today, or be outranked by the past."""
    seen = []
    for _ in range(3):
        with claims.hold(tmp_path) as claim:
            seen.append(claim.generation)
    assert seen == [1, 2, 3] and names(tmp_path) == [".claim.3"]
    with claims.hold(tmp_path) as claim:
        assert not claims._create(tmp_path, 2, claims._content(claims._self()))  # the sleeper
        claim.check()
        assert names(tmp_path) == [".claim.4"]


def test_a_released_claim_is_free_and_its_owner_is_not_named(tmp_path: Path) -> None:
    with claims.hold(tmp_path):
        found = claims.holder(tmp_path)
        assert found is not None and found.pid == os.getpid() and found.local
    assert claims.holder(tmp_path) is None


def test_names_that_are_no_claims_are_not_read(tmp_path: Path) -> None:
    for name in (".claim.", ".claim.007", ".claim.-1", ".claim.x", ".claim.9.tmp", ".claim.٣"):
        (tmp_path / name).touch()
    with claims.hold(tmp_path, lease=LONG) as claim:
        assert claim.generation == 1


def removed(directory: Path) -> None:
    (directory / ".claim.1").unlink()


def replaced(directory: Path) -> None:
    write(directory, nonce="another")


def outranked(directory: Path) -> None:
    write(directory, generation=2)


def directory_removed(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("how", [removed, replaced, outranked, directory_removed])
def test_an_owner_whose_claim_is_gone_is_told(tmp_path: Path, how: Callable[[Path], None]) -> None:
    directory = tmp_path / "run"
    with pytest.raises(claims.Lost, match="run is not this process's any more"), claims.hold(directory) as claim:
        claim.check()
        how(directory)
        claim.check()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(claims.Lost):
        claim.check()  # once lost, lost
    assert sorted(tmp_path.rglob("*")) == before


def test_the_loser_neither_beats_nor_releases_what_is_not_its_own(tmp_path: Path) -> None:
    with claims.hold(tmp_path, beat=0.01):
        path = write(tmp_path, nonce="another")
        content = path.read_bytes()
        time.sleep(0.1)
    assert path.read_bytes() == content


def test_an_owner_that_slept_a_lease_says_something_before_it_goes_on(tmp_path: Path) -> None:
    with claims.hold(tmp_path, lease=0.1, beat=LONG) as claim:
        time.sleep(0.2)
        claim.check()
        assert json.loads((tmp_path / ".claim.1").read_bytes())["beat"] == 1


def test_an_owner_that_cannot_beat_for_a_lease_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others hear nothing of it, so they may have begun: a full disk, a network that is cut."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with claims.hold(tmp_path, lease=1, beat=0.01) as claim:
        monkeypatch.setattr(claims, "_rewrite", full)
        claim.check()
        time.sleep(1.2)
        with pytest.raises(claims.Lost, match=r"could not be renewed for 1 s \(No space left on device\)"):
            claim.check()


def test_a_beat_is_seen_by_an_observer(tmp_path: Path) -> None:
    with claims.hold(tmp_path, beat=0.01):
        path = tmp_path / ".claim.1"
        first = path.read_bytes()
        assert wait_until(lambda: path.read_bytes() != first)
        assert len(first) == claims.SIZE == len(path.read_bytes())


def test_a_silent_claim_is_voided_once_for_all(tmp_path: Path) -> None:
    write(tmp_path, host="far")
    watch = claims.Watch(tmp_path, lease=0.1)
    watch.look()
    watch.evict()
    assert names(tmp_path) == [".claim.1"]  # not yet silent for a lease
    time.sleep(0.2)
    assert watch.look().silent
    watch.evict()
    with claims.hold(tmp_path, lease=LONG) as claim:  # does not wait for it again
        assert claim.generation == 3


def test_a_claim_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"), claims.hold(tmp_path):
        pass
    assert names(tmp_path) == []


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps")
def test_without_proc_ps_tells_who_lives(start: Start) -> None:
    owner = start()
    assert said(owner) == "held"
    mark = claims._start_by_ps(owner.pid)
    assert mark and mark == claims._start_by_ps(owner.pid) != claims._start_by_ps(1)
    owner.kill()
    assert wait_until(lambda: claims._start_by_ps(owner.pid) is None)  # a zombie
    owner.wait()
    assert claims._start_by_ps(owner.pid) is None
