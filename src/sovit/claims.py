"""Who runs a cell: a file in its run directory, for processes on one machine or on many that share a file system.

A claim is a file ``.claim.<generation>`` made with O_CREAT | O_EXCL, which is atomic on local disks and on NFS since version
3; flock is neither on many network file systems. The owner is the highest generation. Generations are never used twice: a
released claim stays, marked so, until the next one replaces it. Otherwise somebody who slept after judging generation 3
could make a generation 4 that outranks a younger owner who had begun at 1 again.

Whether an owner lives is asked of the kernel where it is the same kernel: the process either is there, stopped or not, or
it is dead. Of another machine only the claim's content is seen, which its owner rewrites every few seconds: it is dead once
the content has not changed for a lease on the observer's own monotonic clock. No wall clock is read, no two machines'
clocks are compared, and no host name is trusted to tell a rebooted machine from its twin.

What this cannot do: hold back a process that is frozen between its `Claim.check` and its write for longer than a lease.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = ".claim."
BEAT_S = 5.0
LEASE_S = 60.0
SIZE = 512  # bytes of a claim: one sector, rewritten in place by one write
_CLAIM = re.compile(rf"{re.escape(PREFIX)}[1-9][0-9]*")
PATIENCE_S = 1.0  # before a person is told that this waits


class Held(RuntimeError):
    """Another process runs this cell; the message says who."""


class Lost(RuntimeError):
    """The run was taken over by another process, so this one must not write any more."""


@dataclass(frozen=True)
class Holder:
    """Whose claim it is. ``since`` is the wall clock of that machine, for the eye only; ``local``: this kernel can tell."""

    host: str
    pid: int
    since: float
    local: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else self.host


@dataclass(frozen=True)
class Sight:
    """What a look has told: the highest generation, its holder (None: free), and whether the holder surely lives."""

    generation: int
    holder: Holder | None
    certain: bool
    silent: bool = False  # free only because nothing was heard for a lease


UNREADABLE = Holder("an unknown machine", 0, 0.0, local=False)


class Watch:
    """What one observer sees of the claims of a run, look by look."""

    def __init__(self, directory: Path, lease: float = LEASE_S) -> None:
        self.directory, self.lease = directory, lease
        self._content: tuple[int, bytes] | None = None
        self._since = 0.0
        self._moved = False

    def look(self) -> Sight:
        """Who holds the run, as far as this observer can tell by now."""
        generation, content = _highest(self.directory)
        if not generation:
            self._content = None
            return Sight(0, None, certain=True)
        if (generation, content) != self._content:
            self._moved = self._content is not None
            self._content, self._since = (generation, content), time.monotonic()
        claim = _parse(content)
        holder = UNREADABLE
        if claim is not None:
            if claim["released"]:
                return Sight(generation, None, certain=True)
            here = _here()
            local = bool(here["boot"]) and all(claim[key] == here[key] for key in here)
            holder = Holder(claim["host"], claim["pid"], claim["since"], local)
            alive = _is_alive(claim["pid"], claim["start"]) if local else None
            if alive is not None:
                return Sight(generation, holder if alive else None, certain=True)
        if time.monotonic() - self._since >= self.lease:
            return Sight(generation, None, certain=False, silent=True)
        return Sight(generation, holder, certain=self._moved and claim is not None)

    def evict(self) -> None:
        """Void the claim of an owner that this observer has found silent, so that nobody waits for it a second time."""
        seen = self.look()
        if seen.silent:
            _create(self.directory, seen.generation + 1, _content(_self(), released=True))


def holder(directory: Path) -> Holder | None:
    """Who holds a run at first sight; one look cannot tell whether an owner on another machine still lives."""
    return Watch(directory).look().holder


class Claim:
    """A run that is this process's own. Made by `hold`."""

    def __init__(self, directory: Path, generation: int, content: dict[str, Any], lease: float, beat: float) -> None:
        self.directory, self.generation, self.lease = directory, generation, lease
        self._own, self._beat_s, self._count = content, beat, 0
        self._lost = ""
        self._heard = time.monotonic()  # when the last beat that was written began
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name=f"claim {directory.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Lost if another process has taken the run over. To be called before every write."""
        with self._turn:
            if not self._lost and time.monotonic() - self._heard >= self.lease:
                try:
                    self._write()  # others may call this claim dead by now: say something first, then look
                except OSError as error:
                    self._lost = f"its claim could not be renewed for {self.lease:g} s ({error.strerror or error})"
            if not self._lost:
                with suppress(OSError):  # cannot look, but has been heard within the lease: nobody can have taken it
                    self._look()
        if self._lost:
            raise Lost(f"{self.directory.name} is not this process's any more: {self._lost}.")

    def release(self) -> None:
        """Let the run go; never raises, for whoever follows can tell a dead process anyway."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._look()
            if not self._lost:
                _rewrite(self._path, _content(self._own, self._count, released=True))

    @property
    def _path(self) -> Path:
        return self.directory / f"{PREFIX}{self.generation}"

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_s) and not self._lost:
            with self._turn, suppress(OSError):  # a full disk, a network that pauses: the next beat may come through
                self._write()

    def _write(self) -> None:
        began = time.monotonic()
        self._look()
        if not self._lost:
            self._count += 1
            _rewrite(self._path, _content(self._own, self._count))
            self._heard = began

    def _look(self) -> None:
        """Note in ``_lost`` who has the run, if it is somebody else."""
        highest = max(_generations(self.directory), default=0)
        try:
            claim = _parse(self._path.read_bytes())
        except FileNotFoundError:
            claim = None
        if highest > self.generation or claim is None or claim["nonce"] != self._own["nonce"]:
            other = holder(self.directory)
            self._lost = f"{other} has taken it over" if other else "its claim was voided"


@contextmanager
def hold(
    directory: Path, *, lease: float = LEASE_S, beat: float = BEAT_S, say: Callable[[str], None] = print
) -> Iterator[Claim]:
    """Hold a run for this process. Raises Held if another live process has it, OSError if the claim cannot be written.

    An owner on this machine is judged at once. For one on another machine this waits, up to ``lease`` seconds, for a sign of
    life; an owner here gives one every ``beat`` seconds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    watch, began, told, pause = Watch(directory, lease), time.monotonic(), False, 0.002
    while True:
        seen = watch.look()
        if seen.holder is None:
            own = _self()
            if _create(directory, seen.generation + 1, _content(own)):
                break
            continue  # somebody was quicker
        if seen.certain:
            raise Held(f"{directory.name} is being run by {seen.holder}.")
        if not told and time.monotonic() - began > min(PATIENCE_S, lease / 2):
            told = True
            say(
                f"{directory.name} is claimed by {seen.holder}; waiting up to {lease:g} s for a sign of life from there."
            )
        time.sleep(pause)
        pause = min(2 * pause, beat / 5)
    claim = Claim(directory, seen.generation + 1, own, lease, beat)
    try:
        yield claim
    finally:
        claim.release()


def _create(directory: Path, generation: int, content: bytes) -> bool:
    """Make a claim unless somebody else makes it, or has made a higher one; older ones are removed."""
    path = directory / f"{PREFIX}{generation}"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        try:
            if os.write(file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(file)  # on NFS this is where a full disk is reported
    except OSError:
        path.unlink(missing_ok=True)
        raise
    generations = _generations(directory)
    if max(generations, default=0) != generation:  # this process slept, others came and went
        path.unlink(missing_ok=True)
        return False
    for older in generations:
        if older < generation:
            (directory / f"{PREFIX}{older}").unlink(missing_ok=True)
    return True


def _rewrite(path: Path, content: bytes) -> None:
    """Write over a claim in place, without making one where there is none."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def _generations(directory: Path) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [int(name.removeprefix(PREFIX)) for name in names if _CLAIM.fullmatch(name)]


def _highest(directory: Path) -> tuple[int, bytes]:
    """The highest generation and its content; 0 if there is none."""
    while generations := _generations(directory):
        try:
            return max(generations), (directory / f"{PREFIX}{max(generations)}").read_bytes()
        except FileNotFoundError:
            continue  # replaced between listing and reading
        except PermissionError:
            return max(generations), b""  # another user's: a beat that never changes
    return 0, b""


def _self() -> dict[str, Any]:
    """Who claims: this process, and a nonce because it may claim more than once. ``since`` is for the eye only."""
    pid = os.getpid()
    return {**_here(), "pid": pid, "start": _start(pid) or "", "nonce": str(uuid.uuid4()), "since": time.time()}


def _content(own: dict[str, Any], count: int = 0, released: bool = False) -> bytes:
    return json.dumps({**own, "beat": count, "released": released}).encode().ljust(SIZE - 1) + b"\n"


def _parse(content: bytes) -> dict[str, Any] | None:
    """A claim's content, or None if it is none: empty, torn, or something else."""
    try:
        claim = json.loads(content)
        kinds = {"host": str, "boot": str, "pids": str, "pid": int, "start": str, "nonce": str, "released": bool}
        if all(isinstance(claim[key], kind) for key, kind in kinds.items()):
            return {**claim, "since": float(claim["since"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def _here() -> dict[str, str]:
    """What tells this kernel and its process numbers from others: containers of one machine number theirs apart.

    A time namespace (Linux 5.6) shifts the starting times of the processes that are read in it.
    """
    boot, pids = _boot_id(), ""
    try:
        pids = os.readlink("/proc/self/ns/pid")
        pids += " " + os.readlink("/proc/self/ns/time")
    except OSError:
        if not pids and _has_proc():  # a sandbox that does not say; macOS has neither
            boot = ""
    return {"host": socket.gethostname(), "boot": boot, "pids": pids}


def _has_proc() -> bool:
    return os.path.exists("/proc/self/stat")


@functools.cache
def _boot_id() -> str:
    """A name of this boot of this kernel, or "" if it has none: then only beats count."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        command = ["sysctl", "-n", "kern.bootsessionuuid"]  # macOS
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def _is_alive(pid: int, start: str) -> bool | None:
    """Whether this very process lives, not a later one of its number; a zombie does not. None: it cannot be told."""
    found = _start(pid)
    return None if "" in (found, start) else found == start


def _start(pid: int) -> str | None:
    """When a process started, as a mark to compare; None if there is no such live process, "" if it cannot be seen."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else rest[18]  # clock ticks since boot
    except OSError:
        pass
    if not _has_proc():
        return _start_by_ps(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        return ""  # /proc hides the processes of other users on many clusters
    return ""


def _start_by_ps(pid: int) -> str | None:
    """As `_start`, where there is no /proc."""
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        )
    except OSError:
        return ""
    state, _, start = answer.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else start.strip()
