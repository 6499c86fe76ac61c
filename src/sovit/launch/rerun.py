"""Run a cell again from its ``run.json`` alone, and compare what comes out with what is there, byte for byte.

The resolved configuration in the record decides; neither ``conf/`` nor the sweep file is read, and W&B stays off, where
the run would write over the original. One process of its own, in another runs folder; like any cell it can be stopped and
goes on with the same command.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

from sovit import records
from sovit.config import ConfigError, RunConfig, from_mapping
from sovit.launch.tables import duration_text
from sovit.strict import keys_of

COMPARED = (records.EVALS, records.METRICS)
ABOUT = ("code_version", "torch_version", "data_fingerprint", "lock_sha256", "machine", "environment")
DONE, DIVERGED, REFUSED, STOPPED, HELD = 0, 3, 2, 75, 76  # exit codes of a cell
POLL_S = 0.25


def read_original(directory: Path) -> dict[str, Any]:
    """The record of a run that was trained here. Raises ConfigError for any other."""
    path = directory / records.RUN
    try:
        record = records.read_run(directory)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read, so nothing tells what to run: {error}") from None
    if record is None:
        raise ConfigError(f"{directory} holds no {records.RUN}; give the directory of one run, such as runs/NAME/CELL.")
    if record.get("schema") != records.SCHEMA:
        raise ConfigError(f"{path} has schema {record.get('schema')!r}, this version reads {records.SCHEMA}.")
    for kind in ("simulated", "imported"):
        if kind in record:
            raise ConfigError(f"{directory.name} was {kind}, not trained; there is nothing to run again.")
    if not isinstance(record.get("config"), Mapping):
        raise ConfigError(f"{path} holds no configuration; there is nothing to run again.")
    return record


def recorded_config(path: Path, runs_dir: str) -> RunConfig:
    """The configuration in a run.json, for another runs folder and without W&B.

    Keys that are missing, for an older version wrote the file, take their defaults where that changes no number. Raises
    ConfigError if the configuration is not one of this version, or not the one that the run's hash was taken of.
    """
    record = read_original(path.parent)
    by_version = f"{path} was written by sovit {record.get('code_version')}"
    missing: list[str] = []
    content = _filled(record["config"], dataclasses.asdict(RunConfig()), missing)
    try:
        cfg = from_mapping(content)
    except ConfigError as error:
        raise ConfigError(f"{by_version} and its configuration is not one of this version: {error}") from None
    if records.config_hash(cfg) != record.get("config_hash"):
        why = (
            f"it lacks {', '.join(missing)}" if missing else "either the file or what the hash covers has changed since"
        )
        raise ConfigError(f"{by_version} and its configuration does not have the hash it records; {why}.")
    if records.run_id(cfg) != record.get("run_id"):
        raise ConfigError(f"{path} calls itself {record.get('run_id')}, its configuration {records.run_id(cfg)}.")
    return dataclasses.replace(cfg, runs_dir=runs_dir, logger=dataclasses.replace(cfg.logger, name="none"))


def _filled(content: Mapping[str, Any], defaults: Mapping[str, Any], missing: list[str], prefix: str = "") -> Any:
    """The content with every key that is missing from it set to its default; notes them."""
    found = dict(content)
    nodes = {key for key, hint in keys_of(RunConfig).items() if dataclasses.is_dataclass(hint)}
    for name, value in defaults.items():
        if name not in content:
            missing.append(prefix + name)
            found[name] = value
        elif prefix + name in nodes and isinstance(content[name], Mapping):
            found[name] = _filled(content[name], value, missing, f"{prefix}{name}.")
    return found


def rerun(directory: Path, out: Path) -> int:
    """Run a cell again below ``out`` and say how it compares: 0 if equal, 1 if not, 128 + the signal that stopped it.

    Raises ConfigError if the record cannot be run.
    """
    original = read_original(directory)
    cfg = recorded_config(directory / records.RUN, str(out))
    again = records.run_dir(cfg)
    if again.resolve() == directory.resolve():
        raise ConfigError(f"{again} is the original; give --out another folder.")
    if (records.read_run(again) or {}).get("status") == records.DONE:
        print(f"{again} is a finished rerun already; delete it to run the cell once more.")
    else:
        print(f"Running {original['run_id']} again in {again}, from {directory / records.RUN} alone, without W&B.")
        code = _train(directory / records.RUN, out, again)
        if code not in (DONE, DIVERGED):
            return code
    same, lines = compare(directory, again)
    print("\n".join(lines))
    return 0 if same else 1


def _train(file: Path, out: Path, again: Path) -> int:
    """Train in a process of its own; 0 or 3 if it came to a verdict, else the exit code of the command."""
    again.mkdir(parents=True, exist_ok=True)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.terminate() if len(received) == 1 else process.kill()

    with (again / records.LOG).open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sovit.train", "--rerun", str(file), f"runs_dir={out}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes on SIGTERM
            env={**os.environ, "SOVIT_QUIET": "1"},  # no progress in the log, whose last line is read
        )
    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    begun = time.monotonic()
    try:
        with Console(highlight=False).status("importing the libraries") as shown:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL_S)
                    break
                shown.update(Text(_progress(again, time.monotonic() - begun)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        print("Stopped; the same command goes on from there.")
        return 128 + received[0]
    if code in (DONE, DIVERGED):
        return code
    said = _last_line(again / records.LOG)
    if code == REFUSED:
        raise ConfigError(said.removeprefix("sovit.train: "))
    if code in (STOPPED, HELD):
        print(f"{said}; the same command goes on from there.")
    else:
        print(f"The rerun failed (exit code {code}): {said}; see {again / records.LOG}.")
    return 1


def _progress(directory: Path, seconds: float) -> str:
    note = records.read_progress(directory) or {}
    step, total = note.get("step"), note.get("total_steps")
    return f"step {step:,} of {total:,}, {duration_text(seconds)}" if step and total else "importing the libraries"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "it said nothing"


def compare(directory: Path, again: Path) -> tuple[bool, list[str]]:
    """(whether a rerun reproduces a run, sentences that say so or where they part and what differs around them)."""
    then, now = records.read_run(directory) or {}, records.read_run(again) or {}
    finished = then.get("status") in (records.DONE, records.DIVERGED)
    lines = []
    if not finished:
        reason = f" ({then['reason']})" if then.get("reason") else ""
        lines.append(f"The original is not finished: {then.get('status')}{reason}. What it has is compared.")
    elif then["status"] != now.get("status"):
        lines.append(f"The original is {then['status']}{_why(then)}, the rerun {now.get('status')}{_why(now)}.")
    elif then["status"] == records.DIVERGED:
        lines.append(f"Both diverged: {then.get('reason')}; the rerun: {now.get('reason')}.")
    seal = records.broken_seal(directory, then) if then.get("status") == records.DONE else None
    if seal:
        lines.append(f"The original is not as its run left it: {seal}.")
    same = not (finished and then["status"] != now.get("status"))
    for name in COMPARED:
        equal, told = _compare_file(directory / name, again / name, whole=finished)
        same = same and equal
        lines.append(told)
    lines.insert(0, "The rerun reproduces the run." if same else "The rerun does not reproduce the run.")
    if not same:
        lines += around(then, now) or ["Nothing that the records note about code, libraries and machine differs."]
    return same, lines


def _why(record: Mapping[str, Any]) -> str:
    return f" ({record['reason']})" if record.get("reason") else ""


def _compare_file(there: Path, here: Path, *, whole: bool) -> tuple[bool, str]:
    """Whether two files are equal, or without ``whole`` one begins with the other; and a sentence about it."""
    name = there.name
    if not there.exists():
        return not whole, f"{name}: the original has none."
    old, new = there.read_bytes(), here.read_bytes() if here.exists() else b""
    if not whole:
        old = old[: old.rfind(b"\n") + 1]  # a kill may have cut the last line
    rows = old.count(b"\n")
    if old == new:
        return True, f"{name}: equal, {rows:,} rows, {len(old):,} bytes."
    if not whole and new.startswith(old):
        return True, f"{name}: equal as far as the original goes, {rows:,} of {len(new.splitlines()):,} rows."
    before, after = old.split(b"\n"), new.split(b"\n")
    line = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    if line is None:
        return False, f"{name}: {len(old):,} bytes, but {len(new):,} in the rerun; equal up to where the shorter ends."
    return False, f"{name}: differs first in line {line + 1}{_difference(before[line], after[line])}."


def _difference(before: bytes, after: bytes) -> str:
    """Which keys of a row differ, and by how much."""
    try:
        old, new = json.loads(before), json.loads(after)
    except ValueError:
        return ", which is not a row in both" if before and after else ", where one of them ends"
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return ", which is not a row in both"
    told = [f"{key} was {old.get(key)} and is {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
    where = ", ".join(f"{key} {old[key]}" for key in ("step", "dataset", "shots", "draw") if key in old)
    return f" ({where}): " + (", ".join(told[:3]) if told else "in how it is written, not in a value")


def around(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for everything noted about code, libraries, data and machine that differs between two records."""
    old, new = _flat({key: then.get(key) for key in ABOUT}), _flat({key: now.get(key) for key in ABOUT})
    return [
        f"{key}: {old.get(key)} then, {new.get(key)} now." for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
