"""The files of a run: where they are, how they are written, and how they are read back.

``run.json`` is the one record of the run and, once its status is ``done``, the success marker. ``evals.jsonl`` and
``metrics.jsonl`` only grow; a resume cuts them back to the marks its resume point remembers. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sovit import __version__
from sovit.config import REPOSITORY, RunConfig
from sovit.derived import shape_of
from sovit.families import FAMILIES, family_of
from sovit.schema import KEYS_OF_DECODER, KEYS_OF_FILES, KEYS_OF_LOSS, KEYS_OF_PAIRS, TextConfig
from sovit.shape import AnyShape

SCHEMA = 1
RUN, EVALS, METRICS, PROGRESS, LOG = "run.json", "evals.jsonl", "metrics.jsonl", "progress.json", "log.txt"
PERF = "perf.jsonl"  # speed between two rows of METRICS; a resumed run adds rows, none is ever cut
RUNNING, DONE, FAILED, DIVERGED = "running", "done", "failed", "diverged"

_RUN_IDS = {  # by family
    name: re.compile(rf"(?P<name>[^-]+)-{family.pattern}(-(?P<tag>[^-]+))?-s(?P<seed>\d+)")
    for name, family in FAMILIES.items()
}

# Keys that change where or how comfortably a run happens, but not one number of it.
_NOT_IDENTITY = {
    "runs_dir": None,
    "center": None,
    "retry_of": None,
    "logger": None,
    "parallel": None,
    "data": ("num_workers",),
    "optim": ("diverged_above",),  # a run that is not stopped trains the same
    "trainer": ("log_every_n_steps", "checkpoint_every_s", "keep_checkpoint"),
}

# Keys that did not exist when the first runs were recorded: at their default they stay out of the hash, so that those
# runs are still the ones that their configuration asks for.
_YOUNGER = {
    "data": (*KEYS_OF_FILES, *KEYS_OF_PAIRS),
    "model": ("block", "qk_norm", "qkv_bias", "norm", "family", "token_dim", "stages", "window"),
    "optim": tuple(KEYS_OF_LOSS),
    "eval": ("multitask", *KEYS_OF_DECODER),
    "text": tuple(vars(TextConfig())),
}


def run_id(cfg: RunConfig) -> str:
    """Sortable name of a run that `parse_run_id` reads back, such as star_tiny-w0032-d04-m0128-h04-p08-s0."""
    shape = shape_of(cfg)
    tag = f"-{cfg.tag}" if cfg.tag else ""
    return f"{cfg.name}-{family_of(shape).id_form.format(**shape.as_dict())}{tag}-s{cfg.seed}"


def parse_run_id(text: str) -> tuple[str, AnyShape, str, int]:
    """(name, shape, tag, seed) of a run id. Raises ValueError if it is none."""
    for family, pattern in _RUN_IDS.items():
        match = pattern.fullmatch(text)
        if match:
            found = match.groupdict()
            name, tag, seed = found.pop("name"), found.pop("tag") or "", int(found.pop("seed"))
            return name, FAMILIES[family].shape(**{key: int(value) for key, value in found.items()}), tag, seed
    raise ValueError(f"{text!r} is not a run id such as star_tiny-w0032-d04-m0128-h04-p08-s0.")


def run_dir(cfg: RunConfig) -> Path:
    return Path(cfg.runs_dir) / cfg.name / run_id(cfg)


def config_hash(cfg: RunConfig) -> str:
    """Sixteen hex digits over every key that can change a number of the run."""
    tree = dataclasses.asdict(cfg)
    for key, inner in _NOT_IDENTITY.items():
        if inner is None:
            del tree[key]
        else:
            for leaf in inner:
                del tree[key][leaf]
    for key, leaf, value in _younger():
        if tree[key][leaf] == value:
            del tree[key][leaf]
    if not tree["text"]:  # a group that did not exist either
        del tree["text"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _younger() -> Iterator[tuple[str, str, Any]]:
    default = dataclasses.asdict(RunConfig())
    for key, younger in _YOUNGER.items():
        for leaf in younger:
            yield key, leaf, default[key][leaf]


def younger_defaults() -> dict[str, Any]:
    """Dotted key -> what a run meant whose configuration was recorded before the key existed."""
    return {f"{key}.{leaf}": value for key, leaf, value in _younger()}


def with_younger(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the keys that did not exist then, at what the run meant."""
    filled = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for key, leaf, value in _younger():
        filled.setdefault(key, {}).setdefault(leaf, value)
    return filled


def read_run(directory: Path) -> dict[str, Any] | None:
    """The run's record, or None if there is none yet. Raises ValueError if it cannot be read."""
    return read_object(directory / RUN)


def read_progress(directory: Path) -> dict[str, Any] | None:
    """{"step", "total_steps", "images_per_s", "wall_s"} as last written by a running cell, or None.

    An unreadable file counts as none: it is for display, and a power cut may leave it empty.
    """
    try:
        return read_object(directory / PROGRESS)
    except ValueError:
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no file. Raises ValueError if it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON; delete it and run the cell again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; delete it and run the cell again.")
    return content


def write_json(path: Path, content: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replace a JSON file in one step: a reader sees the old content or the new, never half.

    ``durable``: a power cut sees one of the two as well. Raises OSError with the file's name, and leaves no scratch.
    """
    scratch = scratch_of(path)
    try:
        with scratch.open("w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise named(error, path) from None


def scratch_of(path: Path) -> Path:
    """Where a file is written before it is moved into its place: always the same, so that a resume can remove it."""
    return path.with_name(f".{path.name}.tmp")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def named(error: OSError, path: Path) -> OSError:
    """The error with the name of the file it is about; writing to an open file gives none."""
    error.filename = str(path)
    return error


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows as JSON lines with one write."""
    with path.open("a") as file:
        file.write(as_lines(rows))


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# What is remembered of a growing file: its length in bytes and their CRC-32.
Mark = tuple[int, int]
GROWING = (EVALS, METRICS)


def unlike(directory: Path, marks: Mapping[str, Mark]) -> str | None:
    """Why the growing files do not begin with what the marks remember, or None if they do."""
    for name, (length, checksum) in marks.items():
        found = _beginning(directory / name, length)
        if len(found) < length:
            return f"{name} holds {len(found)} bytes of the {length} it remembers"
        if zlib.crc32(found) != checksum:
            return f"the first {length} bytes of {name} are not those it remembers"
    return None


def _beginning(path: Path, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(length)
    except FileNotFoundError:
        return b""


class GrowingFiles:
    """``evals.jsonl`` and ``metrics.jsonl`` as one process writes them, cut back to the marks it begins from.

    Rows go to where this process's own rows end, not to the end of the file. So a process that lost its claim between
    the check and the write, asleep perhaps, repeats bytes that are there already (a row is a function of the
    configuration and the step) instead of doubling a row. ``check`` is called before every write.
    """

    def __init__(self, directory: Path, marks: Mapping[str, Mark] | None, check: Callable[[], None]) -> None:
        self.directory, self.check = directory, check
        self.marks: dict[str, Mark] = {name: (0, 0) for name in GROWING} | dict(marks or {})
        for name, (length, _) in self.marks.items():
            check()
            path = directory / name
            path.touch()
            os.truncate(path, length)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows with one write. Raises OSError with the file's name, the file cut back to whole rows."""
        data, path = as_lines(rows).encode(), self.directory / name
        length, checksum = self.marks[name]
        self.check()
        try:
            with path.open("r+b") as file:
                file.seek(length)
                file.write(data)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, length)
            raise named(error, path) from None
        self.marks[name] = (length + len(data), zlib.crc32(data, checksum))

    def sync(self) -> None:
        """Make the rows survive a power cut: before a resume point that remembers them."""
        for name in self.marks:
            path = self.directory / name
            try:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise named(error, path) from None

    def foreign(self) -> str | None:
        """Why the files are not what this process wrote, to the last byte, or None."""
        for name, (length, _) in self.marks.items():
            if (self.directory / name).stat().st_size > length:
                return f"{name} has grown beyond the {length} bytes that this process wrote"
        return unlike(self.directory, self.marks)


def seal(directory: Path) -> dict[str, Any]:
    """What run.json remembers of the evaluations of a finished run: ``evals_bytes`` and ``evals_sha256``."""
    data = (directory / EVALS).read_bytes()
    return {"evals_bytes": len(data), "evals_sha256": hashlib.sha256(data).hexdigest()}


def broken_seal(directory: Path, record: Mapping[str, Any]) -> str | None:
    """Why ``evals.jsonl`` is not the one a run was finished with, or None. A record without a seal is believed."""
    if "evals_bytes" not in record:
        return None
    try:
        found = seal(directory)
    except FileNotFoundError:
        return f"{EVALS} is missing"
    if found["evals_bytes"] != record["evals_bytes"]:
        return f"{EVALS} holds {found['evals_bytes']} bytes, not the {record['evals_bytes']} the run was finished with"
    if found["evals_sha256"] != record.get("evals_sha256"):
        return f"{EVALS} was changed after the run was finished"
    return None


def code_version() -> str:
    """Package version and, in a clone, the commit (with + for uncommitted changes)."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+{commit.stdout.strip()}{'+' if dirty.stdout.strip() else ''}"


def lock_hash() -> str | None:
    """SHA-256 of the requirements lock, or None outside a clone."""
    path = REPOSITORY / "requirements.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
