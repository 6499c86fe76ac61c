"""Local records to W&B and back: `push` sends what W&B does not have, `pull` rebuilds run directories from a sweep.

What is sent is made from the local records, never from W&B's offline files, which lose the last moments of a killed process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sovit import claims, records
from sovit.families import shape_of_record
from sovit.launch.wandb import run as wandb_run

EXIT_CODES = {records.DONE: 0, records.FAILED: 1, records.DIVERGED: 3}
INIT_TIMEOUT_S = 30.0
SEEN_WITHIN_S = 10.0  # the server takes a moment until it shows what it was sent
MAX_BYTES = 2**28  # of a file that is pulled
NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")


@dataclass
class Sent:
    """Run ids by what became of them; ``left_out`` are (run id, why)."""

    sent: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Pulled:
    """Run directories by what became of them; ``left_out`` are (run id or its name at W&B, why)."""

    new: list[Path] = field(default_factory=list)
    equal: list[Path] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def push(sweep: Path, say: Callable[[str], None] = print) -> Sent:
    """Send the finished runs of runs/NAME that W&B does not have whole, and note in ``wandb.json`` that it has them.

    Raises ValueError if the directory holds no runs, or if W&B cannot be reached.
    """
    wandb_run.quiet()
    directories = sorted(path.parent for path in sweep.glob(f"*/{records.RUN}"))
    if not directories:
        raise ValueError(f"{sweep} holds no runs; give the directory of a sweep, such as runs/star_tiny.")
    outcome = Sent()
    due: list[tuple[Path, dict[str, Any]]] = []
    for directory in directories:
        record = records.read_run(directory)
        assert record is not None
        if record["status"] not in EXIT_CODES:
            outcome.left_out.append((directory.name, "is not finished"))
        elif "config_hash" not in record or "logger" not in record["config"]:
            outcome.left_out.append((directory.name, "was not trained here, but simulated or imported"))
        elif (wandb_run.read_note(directory) or {}).get("sent") == digests(directory):
            outcome.there.append(directory.name)
        else:
            due.append((directory, record))
    api = connect() if due else None
    for directory, record in due:
        try:
            with claims.hold(directory):
                identity = _named(wandb_run.identity_of(directory, record), api)
                if _is_whole(api, identity, directory):
                    outcome.there.append(directory.name)
                else:
                    say(f"sending {directory.name}")
                    _send(identity, record, directory)
                    if not _is_whole(api, identity, directory, within=SEEN_WITHIN_S):
                        outcome.left_out.append((directory.name, "has not arrived whole"))
                        continue
                    outcome.sent.append(directory.name)
                wandb_run.note(directory, identity, sent=digests(directory))
        except claims.Held:
            outcome.left_out.append((directory.name, "is held by another process"))
        except (TimeoutError, OSError) as error:
            outcome.left_out.append((directory.name, wandb_run.reason(error)))
        except Exception as error:  # of wandb, whose errors are of many libraries
            outcome.left_out.append((directory.name, f"W&B: {wandb_run.reason(error)}"))
    return outcome


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the files of a run that W&B is sent."""
    paths = [directory / name for name in wandb_run.FILES if (directory / name).exists()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def connect() -> Any:
    """A ``wandb.Api``. Raises ValueError in one sentence if there is no login or no server."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        raise ValueError(
            f"WANDB_MODE={os.environ['WANDB_MODE']} keeps this machine from W&B; unset it, or go on elsewhere."
        )
    if not wandb_run.logged_in():
        raise ValueError("W&B has no API key here; run `wandb login`, or set WANDB_API_KEY.")
    import wandb

    try:
        api = wandb.Api(timeout=15)
        _ = api.default_entity  # the first question to the server
        return api
    except Exception as error:
        raise ValueError(f"W&B does not answer: {wandb_run.reason(error)}; try again later.") from None


def _named(identity: wandb_run.Identity, api: Any) -> wandb_run.Identity:
    """The identity with the entity and project that W&B would fill in."""
    return replace(
        identity, entity=identity.entity or api.default_entity, project=identity.project or api.settings["project"]
    )


def _is_whole(api: Any, identity: wandb_run.Identity, directory: Path, within: float = 0.0) -> bool:
    """Whether W&B has the last row, the files and the end of a run, asked for up to ``within`` seconds."""
    deadline = time.monotonic() + within
    while True:
        if _has_all(api, identity, directory):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _has_all(api: Any, identity: wandb_run.Identity, directory: Path) -> bool:
    try:
        run = api.run(identity.path)
        run.load(force=True)  # the client remembers what it was told before
    except Exception:  # W&B raises several for a run it does not know; sending it will say what else is wrong
        return False
    sizes = {file.name: file.size for file in run.files(names=list(digests(directory)))}
    return (
        run.state in ("finished", "failed")
        and run.lastHistoryStep >= len(wandb_run.rows(directory)) - 1
        and all(sizes.get(name) == (directory / name).stat().st_size for name in digests(directory))
    )


def _send(identity: wandb_run.Identity, record: dict[str, Any], directory: Path) -> None:
    told = wandb_run.about(record["run_id"], shape_of_record(record), record["forward_gflops"], record["config"])
    live = wandb_run.start(identity, told, directory, mode="online", timeout=INIT_TIMEOUT_S)
    for number, row in enumerate(wandb_run.rows(directory)):
        live.log(number, row)
    live.close(EXIT_CODES[record["status"]])


def pull(path: str, runs_dir: Path, name: str | None = None) -> Pulled:
    """Rebuild the records of the finished runs of ENTITY/PROJECT/SWEEP as <runs_dir>/<sweep's name or ``name``>/<run id>.

    A local record that differs is left as it is. Raises ValueError if the sweep cannot be read.
    """
    if not re.fullmatch(r"[^/]+/[^/]+/[^/]+", path):
        raise ValueError(f"{path!r} is not ENTITY/PROJECT/SWEEP; `wandb sweep` prints it.")
    if name is not None and not NAME.fullmatch(name):
        raise ValueError(f"--name {name!r} would be a directory; use letters, digits, '_', '.', '+', '-'.")
    wandb_run.quiet()
    api = connect()
    outcome = Pulled()
    try:
        runs = list(api.sweep(path).runs)
    except Exception as error:
        raise ValueError(f"W&B did not give the runs of {path}: {wandb_run.reason(error)}; check the path.") from None
    if not runs:
        raise ValueError(f"W&B has no runs in {path}; start an agent with `wandb agent {path}`.")
    runs_dir.mkdir(parents=True, exist_ok=True)
    for run in runs:
        scratch = Path(tempfile.mkdtemp(prefix=".pull-", dir=runs_dir))
        try:
            if run.state != "finished":
                outcome.left_out.append((run.name, f"W&B says {run.state}"))
                continue
            _download(run, scratch)
            run_id, sweep = _checked(scratch)
            target = runs_dir / (name or sweep) / run_id
            wandb_run.note(scratch, _identity(run, path), sent=digests(scratch))
            if target.exists():
                if digests(target) == digests(scratch):
                    outcome.equal.append(target)
                else:
                    outcome.left_out.append((run_id, f"{target} holds other records, which stay as they are"))
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.chmod(0o777 & ~_umask())
            os.rename(scratch, target)  # whole or not at all
            outcome.new.append(target)
        except ValueError as error:
            outcome.left_out.append((str(run.name), str(error)))
        except OSError as error:
            outcome.left_out.append((str(run.name), error.strerror or str(error)))
        except Exception as error:
            outcome.left_out.append((str(run.name), f"W&B: {wandb_run.reason(error)}"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return outcome


def _download(run: Any, folder: Path) -> None:
    """The files of a run, under our own names for them. Raises ValueError if one is missing or huge."""
    found = {file.name: file for file in run.files(names=list(wandb_run.FILES))}
    missing = [name for name in (records.RUN, records.EVALS) if name not in found]
    if missing:
        raise ValueError(f"has no {' and no '.join(missing)}")
    for name in wandb_run.FILES:
        if name in found:
            if found[name].size > MAX_BYTES:
                raise ValueError(f"{name} has {found[name].size} bytes, too many for a record")
            found[name].download(root=str(folder), replace=True).close()


def _checked(folder: Path) -> tuple[str, str]:
    """(run id, name of the sweep) of a downloaded record. Raises ValueError if it is not one of a finished run."""
    record = records.read_run(folder)
    assert record is not None
    run_id, sweep = record.get("run_id"), record.get("sweep")
    for value in (run_id, sweep):
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise ValueError(f"its run.json names {value!r}, which is no name of a run")
    assert isinstance(run_id, str) and isinstance(sweep, str)
    records.parse_run_id(run_id)
    if record.get("status") not in EXIT_CODES:
        raise ValueError(f"its run.json says {record.get('status')!r}")
    content = (folder / records.EVALS).read_bytes()
    promised = record.get("evals_sha256")
    if promised is not None and hashlib.sha256(content).hexdigest() != promised:
        raise ValueError("its evals.jsonl is not the one that run.json was written with")
    try:
        of_runs = {json.loads(line)["run_id"] for line in content.splitlines()}
    except (ValueError, KeyError, TypeError):
        raise ValueError("its evals.jsonl is not one of sovit") from None
    if of_runs - {run_id}:
        raise ValueError("its evals.jsonl belongs to another run than its run.json")
    return run_id, sweep


def _identity(run: Any, path: str) -> wandb_run.Identity:
    entity, project, sweep = path.split("/")
    return wandb_run.Identity(run.id, entity, project, sweep)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
