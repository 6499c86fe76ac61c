"""A sweep whose cells W&B hands out: registers the file, starts agents, and lets the local runner finish what they leave.

The agents are those of W&B (``wandb agent``), here or on any number of machines: nothing here is needed for them. What this
adds is that the same command goes on with the same sweep, and that a cell whose agent died is not lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sovit import claims, records
from sovit.launch.devices import visible_gpus
from sovit.launch.local.slots import Slots
from sovit.launch.plan import Plan
from sovit.launch.signals import collected
from sovit.launch.state import DONE, state_on_disk, summary
from sovit.launch.sweep import Sweep
from sovit.launch.wandb import run as wandb_run

SWEEPS = "wandb_sweep.json"
AGENTS = ".agents"  # beside the runs; the point keeps it from being taken for one
POLL_S = 1.0
GRACE_S = 45.0  # for the cells to write their checkpoints, and for the agents to see them end


def document_of(sweep: Sweep, overrides: Sequence[str]) -> dict[str, Any]:
    """The sweep file as W&B is given it: unchanged, but for parameters that are set on the command line."""
    document = yaml.safe_load(sweep.path.read_text(encoding="utf-8"))  # load_sweep has checked it
    for override in overrides:
        key, _, text = override.partition("=")
        value = yaml.safe_load(text)
        document["parameters"][key] = {
            "value": value if str(value) == text else text
        }  # numbers as numbers, no text altered
    return document


@dataclass(frozen=True)
class Registered:
    """A sweep at W&B: ENTITY/PROJECT/ID. ``new``: it was registered just now."""

    path: str
    new: bool


def register(document: dict[str, Any], plan: Plan) -> Registered:
    """The sweep at W&B that runs this document, from ``wandb_sweep.json`` beside the runs, or a new one noted there.

    Raises ValueError if W&B cannot be reached.
    """
    from sovit.launch.wandb.records import connect

    file = plan.runs_dir / plan.name / SWEEPS
    known = _read(file)
    key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    if key in known:
        return Registered(known[key], new=False)
    api = connect()
    import wandb

    logger = plan.cells[0].config.logger
    entity = os.environ.get("WANDB_ENTITY") or document.get("entity") or logger.entity or api.default_entity
    project = os.environ.get("WANDB_PROJECT") or document.get("project") or logger.project
    try:
        sweep = wandb.sweep(document, entity=entity, project=project)
    except Exception as error:
        raise ValueError(f"W&B did not take the sweep: {wandb_run.reason(error)}; try again later.") from None
    path = f"{entity}/{project}/{sweep}"
    file.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(file, known | {key: path})
    return Registered(path, new=True)


def _read(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not valid JSON; delete it to register the sweep again.")
    return content


def run_agents(path: str, plan: Plan) -> int:
    """Run as many agents of a sweep as the plan has workers until they end; 0, or the number of the signal that stopped
    them.

    A signal is passed on once: the cells write their checkpoints and W&B hands them out again.
    """
    folder = plan.runs_dir.absolute() / plan.name
    (folder / AGENTS).mkdir(parents=True, exist_ok=True)
    slots = Slots(plan, visible_gpus() if plan.cells[0].accelerator == "gpu" else [])
    most = max(cell.devices for cell in plan.cells)  # an agent may be handed any of them
    received: list[int] = []
    with collected(received):
        agents = [_agent(path, folder, k, slots.take(most)) for k in range(plan.workers)]
        told = ""
        while any(agent.poll() is None for agent in agents) and not received:
            told = _tell(plan, told)
            _pause(agents)
        if received:
            print(f"{plan.name}: stopping the agents; the cells write their checkpoints.")
            _stop(agents, received)
    _tell(plan, told)
    return received[0] if received else 0


def _agent(path: str, folder: Path, number: int, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        # The agent starts `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "WANDB_DIR": str(folder / AGENTS),
        "WANDB_AGENT_DISABLE_FLAPPING": "true",  # failed and diverged cells are results, not a reason to give up
        "WANDB_AGENT_MAX_INITIAL_FAILURES": str(10**9),
    }
    environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", path]
    with (folder / AGENTS / f"agent-{number}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _pause(agents: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait a moment, or until one of the agents ends."""
    running = next((agent for agent in agents if agent.poll() is None), None)
    if running is not None:
        try:
            running.wait(POLL_S)
        except subprocess.TimeoutExpired:
            return


def _stop(agents: Sequence[subprocess.Popen[bytes]], received: list[int]) -> None:
    """End the agents and their cells; at the second signal, or after a grace, without asking."""
    for agent in agents:
        if agent.poll() is None:
            agent.send_signal(signal.SIGTERM)
    deadline, signals = time.monotonic() + GRACE_S, len(received)
    while any(agent.poll() is None for agent in agents) and time.monotonic() < deadline and len(received) == signals:
        _pause(agents)
    for agent in agents:
        if agent.poll() is None:
            agent.kill()
        agent.wait()


def adopt(path: str, plan: Plan) -> None:
    """Note that the cells nobody has begun belong to the sweep, so that whoever runs them does so as a part of it."""
    entity, project, sweep = path.split("/")
    for cell in plan.cells:
        if state_on_disk(cell.run_dir)[0] != DONE:
            with suppress(claims.Held), claims.hold(cell.run_dir):
                if wandb_run.read_note(cell.run_dir) is None:
                    run = f"{cell.run_id}-{cell.config_hash}"
                    wandb_run.note(cell.run_dir, wandb_run.Identity(run, entity, project, sweep))


def _tell(plan: Plan, told: str) -> str:
    states = summary([state_on_disk(cell.run_dir)[0] for cell in plan.cells])
    if states != told:
        print(f"{time.strftime('%H:%M:%S')}  {plan.name}: {states}", flush=True)
    return states


def all_done(plan: Plan) -> bool:
    """Whether every cell of the plan is done."""
    return all(state_on_disk(cell.run_dir)[0] == DONE for cell in plan.cells)
