"""A cell's run at W&B: which one it is, what it tells of the cell, and its rows as the local records hold them.

The local records are the truth and W&B is their mirror. Row n of a run is a function of its records (`rows`) and is logged
as W&B's step n, so a process that goes on where another was killed, or sends a run afterwards, adds exactly the rows that
are missing. Which run at W&B a cell is stands in ``wandb.json`` of its run directory before the first step and never
changes. Loads neither torch nor, before a run is started, wandb.
"""

from __future__ import annotations

import json
import netrc
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from sovit import metric, records
from sovit.families import family_of
from sovit.shape import AnyShape

WANDB = "wandb.json"
FILES = (records.RUN, records.EVALS, records.METRICS)  # uploaded at the end of a run
IMAGES_PER_S = "images_per_s"  # in the record, and so in the summary
STOPPED, HELD = 75, 76  # exit codes of a cell: stopped by a signal, taken over by another process
FINISH_TIMEOUT_S = 60.0  # how long a finished cell waits for its upload; sovit wandb push sends what is left over
FLUSH_S = 1.0  # a killed process loses this much of its offline file (W&B's default: 15 s)

Row = tuple[int, dict[str, float]]  # the step of the training, and the metrics


@dataclass(frozen=True)
class Identity:
    """Which run at W&B a cell is. ``sweep`` is the sweep's id, or None."""

    id: str
    entity: str | None
    project: str | None
    sweep: str | None = None

    @property
    def path(self) -> str:
        return "/".join(part for part in (self.entity, self.project, self.id) if part)


def identify(directory: Path, default: Identity) -> Identity:
    """The run at W&B of the cell in a directory, noted there if this is its first process.

    The first process under an agent takes the agent's id, any other first process the default. Later ones keep what is
    noted, whatever agent has started them: a cell is one run. Raises ValueError if the note cannot be read.
    """
    found = read_note(directory)
    agent = _of_agent()
    if found is None:
        identity = agent or default
    else:
        identity = _of_note(found)
        if identity.sweep is None and agent:  # begun without an agent: the run joins the sweep
            identity = replace(agent, id=identity.id)
    note(directory, identity)
    return identity


def _of_agent() -> Identity | None:
    """What the agent that started this process has said, or None if there is none."""
    run, sweep = os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_SWEEP_ID")
    if not run or not sweep:
        return None
    return Identity(run, os.environ.get("WANDB_ENTITY"), os.environ.get("WANDB_PROJECT"), sweep)


def identity_of(directory: Path, record: Mapping[str, Any]) -> Identity:
    """The run at W&B of a cell that is not running: the one noted, or the one it would get without an agent."""
    found = read_note(directory)
    if found is not None:
        return _of_note(found)
    logger = record["config"]["logger"]
    return Identity(f"{record['run_id']}-{record['config_hash']}", logger["entity"], logger["project"])


def _of_note(found: Mapping[str, Any]) -> Identity:
    return Identity(found["id"], found.get("entity"), found.get("project"), found.get("sweep"))


def read_note(directory: Path) -> dict[str, Any] | None:
    """The content of ``wandb.json``, or None. Raises ValueError if it names no run."""
    try:
        found = json.loads((directory / WANDB).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise ValueError(f"{directory / WANDB} names no run at W&B; delete it, or put its id there.")
    return found


def note(directory: Path, identity: Identity, sent: Mapping[str, str] | None = None) -> None:
    """Write ``wandb.json``; ``sent`` are the SHA-256 of the files W&B is known to hold."""
    content = {key: value for key, value in vars(identity).items() if value is not None}
    content |= {"sent": dict(sent)} if sent is not None else {}
    if content != read_note(directory):
        records.write_json(directory / WANDB, content)


def arm(shape: AnyShape, center: str | None) -> str | None:
    """The arm of a star that a shape lies on: "center", the name of a dimension, or "several" if it differs from the
    center in more than one; None without a center. Raises ValueError if the center is no shape.
    """
    if center is None:
        return None
    family = family_of(shape)
    sizes = zip(family.dimensions, family.sizes(center), strict=True)
    differing = [name for name, size in sizes if getattr(shape, name) != size]
    return "several" if len(differing) > 1 else differing[0] if differing else "center"


def about(run_id: str, shape: AnyShape, forward_gflops: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of wandb.init that tell of a cell. ``config``: its resolved configuration as a plain tree."""
    on = arm(shape, config.get("center"))
    told = {
        **shape.as_dict(),
        "shape": str(shape),
        "seed": config["seed"],
        "forward_gflops": forward_gflops,
        **({"arm": on} if on else {}),
        "cfg": dict(config),  # under one key: a sweep locks the keys it sets itself
    }
    tags = [config["name"], f"seed{config['seed']}", *([on] if on else []), *([config["tag"]] if config["tag"] else [])]
    return {"name": run_id, "group": config["name"], "job_type": on, "tags": tags, "config": told}


def parameters() -> dict[str, Any]:
    """The sweep's parameters for this cell, as the agent has left them in a file; the sweep's page shows them by name."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not Path(path).is_file():
        return {}
    content = yaml.safe_load(Path(path).read_text()) or {}
    return {key: item["value"] for key, item in content.items() if isinstance(item, dict) and "value" in item}


@dataclass(frozen=True)
class Live:
    """A run at W&B that this process writes. ``stops`` is not empty once somebody has asked W&B to stop the run."""

    run: Any
    directory: Path
    stops: list[bool]

    def log(self, number: int, row: Row) -> None:
        """Log row ``number`` of the run, unless W&B has it from an earlier process."""
        step, metrics = row
        if number >= self.run.starting_step:
            self.run.log({**metrics, "trainer/global_step": step}, step=number, commit=True)

    def close(self, exit_code: int) -> None:
        """End the run: its final errors, its files, its exit code. Raises TimeoutError if the server does not take it all.

        A cell stopped by a signal is marked as preempted, so that a sweep hands it out again, unless it was W&B that asked.
        """
        if exit_code == STOPPED and not self.stops:
            self.run.mark_preempting()
        if exit_code not in (STOPPED, HELD):
            found = _evaluations(self.directory)
            record = records.read_run(self.directory) or {}
            final = found[-1][1] if found else {}
            known = {key: record[key] for key in ("status", IMAGES_PER_S) if record.get(key)}
            self.run.summary.update({**final, **isocompute(self.directory), **known})
            for path in (self.directory / name for name in FILES):
                if path.exists():
                    self.run.save(str(path), base_path=str(self.directory), policy="now", glob=False)
        self.run.finish(exit_code=exit_code)


def start(identity: Identity, told: Mapping[str, Any], directory: Path, *, mode: str, timeout: float) -> Live:
    """Start or continue a run at W&B. ``timeout``: seconds to wait for the server. Raises whatever wandb does.

    The id and the sweep are given as settings, and taken out of the environment: wandb.init ignores an id, a project and an
    entity of its own while the environment names a sweep.
    """
    quiet()
    config = {**parameters(), **told["config"]}
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RESUME"):
        os.environ.pop(name, None)
    import wandb

    stops: list[bool] = []

    def stop_run() -> None:
        stops.append(True)
        threading.Thread(target=_stop_this_process, daemon=True).start()  # a wait here would hold up all of wandb

    settings: dict[str, Any] = {
        "init_timeout": timeout,
        "finish_timeout": FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": FLUSH_S,
        "x_disable_stats": True,
        "console": "off",
        "silent": True,
        "sweep_id": identity.sweep,
        "stop_fn": stop_run,
    }
    of_user = {key for key in settings if f"WANDB_{key.upper()}" in os.environ}
    run = wandb.init(
        **{**told, "config": config},
        id=identity.id,
        entity=identity.entity,
        project=identity.project,
        dir=directory,
        mode=mode,  # type: ignore[arg-type]
        resume="allow",
        settings=wandb.Settings(**{key: value for key, value in settings.items() if key not in of_user}),
    )
    run.define_metric("trainer/global_step", hidden=True)
    run.define_metric("t_gflops")
    run.define_metric("train/*", step_metric="trainer/global_step")
    run.define_metric("perf/*", step_metric="trainer/global_step")
    run.define_metric("eval/*", step_metric="t_gflops")
    return Live(run, directory, stops)


def _stop_this_process() -> None:
    """What W&B would do with SIGINT, which interrupts a save if it comes after the agent's SIGTERM."""
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # the cell cannot stop in good order yet
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def rows(directory: Path) -> list[Row]:
    """The rows of a run in the order in which a process that was never stopped logs them, rates left out.

    An evaluation follows the training row of its step, or stands before the first row of a later step; a cooldown branch
    runs ahead of the trunk, so steps may go back.
    """
    training = [(row.pop("step"), row) for row in records.read_lines(directory / records.METRICS)]
    merged: list[Row] = []
    at = 0
    for step, metrics in _evaluations(directory):
        own = next((k for k in range(at, len(training)) if training[k][0] == step and step), None)
        later = next((k for k in range(at, len(training)) if training[k][0] > step), len(training))
        stop = later if own is None else own + 1
        merged += [*training[at:stop], (step, metrics)]
        at = stop
    return merged + training[at:]


def _evaluations(directory: Path) -> list[Row]:
    return [(step, metrics_of(found)) for step, found in _by_step(directory).items()]


def _by_step(directory: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in records.read_lines(directory / records.EVALS):
        found.setdefault(row["step"], []).append(row)
    return found


def metrics_of(found: list[dict[str, Any]]) -> dict[str, float]:
    """What W&B is told of one evaluation: compute, images, and per metric its mean over the draws."""
    errors: dict[str, list[float]] = {}
    for row in found:
        errors.setdefault(metric.key(row["dataset"], row["shots"]), []).append(row["error"])
    means = {key: sum(values) / len(values) for key, values in errors.items()}
    return {"t_gflops": found[0]["t_gflops"], "examples_seen": found[0]["examples_seen"], **means}


def slice_key(error: str, duration: str) -> str:
    """The name of an error after a duration in the summary. (A point in a name would open a level at W&B.)"""
    return f"isocompute{error.removeprefix('eval')}/{duration.replace('.', ',')}"


def isocompute(directory: Path) -> dict[str, float]:
    """Every error after every duration: W&B draws a dimension of the shape against nothing but the summary."""
    found: dict[str, float] = {}
    for rows in _by_step(directory).values():
        if rows[0]["step"]:
            errors = (item for item in metrics_of(rows).items() if item[0].startswith("eval/"))
            found |= {slice_key(key, rows[0]["duration"]): value for key, value in errors}
    return found


def quiet() -> None:
    """Keep wandb's notes off the terminal, unless WANDB_SILENT says otherwise. To be called before wandb is imported."""
    os.environ.setdefault("WANDB_SILENT", "true")


def logged_in() -> bool:
    """Whether W&B has an API key, looked up the way its client does but without ever prompting."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reason(error: Exception) -> str:
    """The first line of what wandb raised, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
