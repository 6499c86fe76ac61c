"""Every row in a process of its own, forked from one that has loaded torch: the most memory of one row says nothing of
another's, and a row that the system kills for its memory takes no other with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sovit import records
from sovit.bench.settings import Setting, Subject, described
from sovit.inference import gb
from sovit.launch.pay.hardware import hardware

SCHEMA = 1
KIND = "bench"
PRELOAD = "sovit.bench.row"
ROOM = 0.9  # of a CPU's free memory: beyond it the system kills a process of its own choice
Work = tuple[Subject, Setting]


def measure_all(
    work: Iterable[Work], *, seconds: float, against_timm: bool = True, out: Path | None = None
) -> Iterator[dict[str, Any]]:
    """The records of all rows, each appended to ``out`` as soon as it is there; none fails for another's sake."""
    machine: dict[str, dict[str, Any]] = {}
    for subject, setting in work:
        kind = "gpu" if setting.device == "cuda" else "cpu"
        machine.setdefault(kind, hardware(kind))
        record = {
            "schema": SCHEMA,
            "kind": KIND,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine[kind],
            **described(subject, setting),
            **_row(subject, setting, seconds, against_timm),
        }
        if out is not None:
            append(out, record)
        yield record


def append(path: Path, record: dict[str, Any]) -> None:
    """One record more; a line that a kill cut off is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    records.append_lines(path, [record])


def same(record: dict[str, Any], subject: Subject, setting: Setting, machine: dict[str, Any]) -> bool:
    """Whether a record is a measurement of this row on this machine."""
    wanted = described(subject, setting) | {"machine": machine, "status": "measured"}
    return all(record.get(name) == value for name, value in wanted.items() if name != "load")


def _row(subject: Subject, setting: Setting, seconds: float, against_timm: bool) -> dict[str, Any]:
    """``status``, ``why`` and the figures of a row."""
    why = _too_large(subject, setting)
    if why is None:
        found = _in_process(subject, setting, seconds, against_timm)
        if isinstance(found, dict):
            return {"status": "measured", "why": None, **found}
        why = found
    return {"status": "not measured", "why": why}


def _too_large(subject: Subject, setting: Setting) -> str | None:
    """On a CPU, what does not fit is not begun: Linux promises memory that it does not have, and kills later."""
    free = free_memory() if setting.device == "cpu" else None
    needed = sum(described(subject, setting)["memory_estimate"].values())
    if free is None or needed <= ROOM * free:
        return None
    return f"out of memory: about {gb(needed)} are needed, {gb(free)} are free"


def free_memory() -> int | None:
    """Bytes that Linux could give without swapping, None where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _in_process(subject: Subject, setting: Setting, seconds: float, against_timm: bool) -> dict[str, Any] | str:
    """The figures, or a clause that says why there are none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, subject, setting, seconds, against_timm), daemon=True)
    process.start()
    theirs.close()
    try:
        wait([ours, process.sentinel])
        answer: dict[str, Any] | str | None = None
        with contextlib.suppress(EOFError):
            answer = ours.recv() if ours.poll() else None
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()
    return _gone(process.exitcode) if answer is None else answer


def _gone(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"


def _child(answer: Connection, subject: Subject, setting: Setting, seconds: float, against_timm: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, let it be this process
    from sovit.bench.row import NotMeasured, measure

    told: dict[str, Any] | str
    try:
        told = measure(subject, setting, seconds=seconds, against_timm=against_timm)
    except NotMeasured as error:
        told = str(error)
    except Exception as error:
        lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
        answer.send(told)
