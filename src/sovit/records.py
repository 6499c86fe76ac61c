"""The files of a run: where they are, how they are written, and how they are read back.

``run.json`` is the one record of the run and, once its status is ``done``, the success marker. ``evals.jsonl`` and
``metrics.jsonl`` only grow; a resume cuts them back to the lengths its checkpoint remembers. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sovit import __version__
from sovit.config import REPOSITORY, RunConfig, shape_of
from sovit.shape import Shape

SCHEMA = 1
RUN, EVALS, METRICS, PROGRESS, LOG, LOCK = (
    "run.json",
    "evals.jsonl",
    "metrics.jsonl",
    "progress.json",
    "log.txt",
    ".lock",
)
RUNNING, DONE, FAILED, DIVERGED = "running", "done", "failed", "diverged"

_RUN_ID = re.compile(
    r"(?P<name>[^-]+)-w(?P<width>\d+)-d(?P<depth>\d+)-m(?P<mlp_dim>\d+)-h(?P<num_heads>\d+)-p(?P<patch_size>\d+)"
    r"(-(?P<tag>[^-]+))?-s(?P<seed>\d+)"
)

# Keys that change where or how comfortably a run happens, but not one number of it.
_NOT_IDENTITY = {
    "runs_dir": None,
    "center": None,
    "retry_of": None,
    "logger": None,
    "data": ("num_workers",),
    "trainer": ("log_every_n_steps", "checkpoint_every_s", "keep_checkpoint"),
}


class Locked(RuntimeError):
    """Another process runs this cell."""


def run_id(cfg: RunConfig) -> str:
    """Sortable name of a run that `parse_run_id` reads back, such as star_tiny-w0032-d04-m0128-h04-p08-s0."""
    s = shape_of(cfg)
    tag = f"-{cfg.tag}" if cfg.tag else ""
    return (
        f"{cfg.name}-w{s.width:04d}-d{s.depth:02d}-m{s.mlp_dim:04d}-h{s.num_heads:02d}-p{s.patch_size:02d}"
        f"{tag}-s{cfg.seed}"
    )


def parse_run_id(text: str) -> tuple[str, Shape, str, int]:
    """(name, shape, tag, seed) of a run id. Raises ValueError if it is none."""
    match = _RUN_ID.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a run id such as star_tiny-w0032-d04-m0128-h04-p08-s0.")
    shape = Shape(*(int(match[key]) for key in ("width", "depth", "mlp_dim", "num_heads", "patch_size")))
    return match["name"], shape, match["tag"] or "", int(match["seed"])


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
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def read_run(directory: Path) -> dict[str, Any] | None:
    """The run's record, or None if there is none yet. Raises ValueError if it cannot be read."""
    return _read_json(directory / RUN)


def read_progress(directory: Path) -> dict[str, Any] | None:
    """{"step", "total_steps", "images_per_s"} as last written by a running cell, or None."""
    return _read_json(directory / PROGRESS)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON; delete it and run the cell again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; delete it and run the cell again.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step: a reader sees the old content or the new, never half."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows as JSON lines with one write."""
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lengths(directory: Path) -> dict[str, int]:
    """Sizes in bytes of the growing files, for a checkpoint to remember."""
    return {name: (directory / name).stat().st_size if (directory / name).exists() else 0 for name in (EVALS, METRICS)}


def cut_back(directory: Path, remembered: dict[str, int]) -> None:
    """Cut the growing files back to the lengths a checkpoint remembers. Raises ValueError if one is shorter."""
    for name, length in remembered.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise ValueError(f"{path} holds {size} bytes, fewer than its checkpoint's {length}; delete {directory}.")
        if size > length:
            os.truncate(path, length)


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the run for this process; the kernel lets go when the process dies, however it dies. Raises Locked."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        for wait in (0.05, 0.1, 0.2, 0.0):  # whoever asks for the state of a run holds the lock for an instant
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise Locked(f"{directory.name} is being run by another process.") from None
                time.sleep(wait)
        yield


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
