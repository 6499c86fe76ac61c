"""The processes of one cell: how many, which of them this one is, and starting them on this machine.

Whoever starts them says who is who in torchrun's words (RANK, LOCAL_RANK, WORLD_SIZE, ...): torchrun, Slurm in words of its
own, or `start`. Loads no torch and trains nothing. Over several nodes somebody has to start one of us on each: torchrun or
Slurm.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from sovit.config import ConfigError, RunConfig
from sovit.launch.devices import visible_gpus
from sovit.launch.signals import collected
from sovit.requirements import check_parallel
from sovit.schema import ParallelConfig

# Exit codes of a cell that mean more here than that it has ended.
STOPPED, OUT_OF_MEMORY, PORT_TAKEN = 75, 77, 78
TARGET = ("-m", "sovit.train")
RESTARTS = 12  # after 77; each halves the micro-batch
LOST_RACES = 3  # for the port
POLL_S = 0.1
# How long the others may go on once one process has ended, by its exit code. They may write a checkpoint or upload, or wait
# for it in an exchange that never ends.
GRACE_S = {0: 600.0, STOPPED: 120.0, OUT_OF_MEMORY: 5.0, PORT_TAKEN: 5.0}
GRACE_AFTER_FAILURE_S = 20.0
PARENT = "SOVIT_PARENT"  # the process that a rank must not outlive
FIRST_EXIT = "SOVIT_FIRST_EXIT"  # a file that the first node whose processes fail writes its exit code to
WORDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
NODE_WORDS = ("GROUP_RANK", "NODE_RANK")  # of the node, in torchrun's word and in Lightning's
LAST_LINES = 60  # of the standard error of a process that failed


@dataclass(frozen=True)
class Place:
    """Process ``rank`` of ``world``, the ``local_rank``-th of ``local_world`` on its node. ``by``: who says so."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    by: str

    @property
    def nodes(self) -> int:
        return self.world // self.local_world


def place(environ: Mapping[str, str] | None = None) -> Place | None:
    """Which process of several this one is, None if nobody has started several. Raises ConfigError.

    Slurm's words count in a step of several tasks only: a batch script and an interactive shell have them too.
    """
    environ = os.environ if environ is None else environ
    given = [name for name in WORDS if name in environ]
    if environ.get("WORLD_SIZE") == "1" and len(given) < len(WORDS):
        return None
    if "RANK" in given or "WORLD_SIZE" in given:
        for name in WORDS:
            if name not in given:
                raise ConfigError(
                    f"{given[0]}={environ[given[0]]} is set in the environment, but {name} is not: start by torchrun or "
                    f"srun, or unset {' and '.join(given)}."
                )
        rank, local_rank, world = (_number(environ, name) for name in WORDS)
        local_world = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world
        return _checked(Place(rank, local_rank, world, local_world, "torchrun"))
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) > 0xFFFFFFF0 or "SLURM_PROCID" not in environ:  # above: batch, interactive
        return None
    world = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    if world == 1:
        return None
    local_world = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    return _checked(
        Place(_number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID"), world, local_world, "Slurm")
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!a} in the environment is no number of processes; start by torchrun or srun.")
    return int(text)


def _tasks_per_node(text: str) -> int:
    """Of Slurm's list, such as 4(x2) or 4,4."""
    counts = set(re.findall(r"(?:^|,)(\d+)", text))
    if len(counts) != 1:
        raise ConfigError(f"Slurm started {text} tasks on the nodes; ask for as many on each with --ntasks-per-node.")
    return int(counts.pop())


def _checked(found: Place) -> Place:
    inside = found.rank < found.world and found.local_rank < found.local_world <= found.world
    if not inside or found.world % found.local_world:
        raise ConfigError(
            f"process {found.rank} of {found.world} ({found.local_rank} of {found.local_world} on its node) cannot be; "
            "start by torchrun or srun, as many on each node."
        )
    return found


def wanted(cfg: RunConfig, environ: Mapping[str, str] | None = None) -> int:
    """How many processes `start` is to start for this cell, here; 0 if this process trains. Raises ConfigError.

    That is none for parallel=single, and none where torchrun or srun have started them all. Where srun has started one
    process on each node, that one starts those of its node.
    """
    here, parallel = place(environ), cfg.parallel
    if here is not None and not _starts_its_node(parallel, here):
        settled(cfg, here)
        return 0
    if parallel.kind == "single":
        return 0
    if parallel.nodes > 1 and here is None:
        each = parallel.devices or "PROCESSES"
        raise ConfigError(
            f"parallel.nodes={parallel.nodes} needs somebody who starts processes on every node: type on each of them "
            f"torchrun --nnodes {parallel.nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint "
            "FIRST_NODE:29500 -m sovit.train ..., or use srun, or sovit run FILE --launcher slurm."
        )
    devices = devices_of(cfg)
    if devices == 1 and parallel.devices is None and not _on_gpu(cfg):
        raise ConfigError(
            f"parallel={parallel.kind} needs a process group: give parallel.devices=N, or start by torchrun or srun."
        )
    if _on_gpu(cfg) and 0 < (visible := len(visible_gpus())) < devices:
        raise ConfigError(
            f"parallel.devices={devices}, but {visible} GPU{'s are' if visible > 1 else ' is'} visible here; "
            f"write parallel.devices={visible}."
        )
    check_parallel(replace(parallel, devices=devices), cfg.trainer.global_batch_size, cfg.trainer.precision)
    return devices


def settled(cfg: RunConfig, here: Place | None) -> ParallelConfig:
    """``parallel`` with the processes that there are. Raises ConfigError if they are not those asked for."""
    parallel = cfg.parallel
    if here is None:
        return replace(parallel, devices=1, nodes=1)
    asked = "" if parallel.devices is None else f"parallel.devices={parallel.devices}"
    asked = asked if parallel.nodes == 1 else f"{asked or 'parallel'} on parallel.nodes={parallel.nodes}"
    world = (parallel.devices or here.local_world) * parallel.nodes
    if here.world > 1 and parallel.kind == "single":
        raise ConfigError(
            f"parallel=single is one process, but {here.by} started {here.world}; write parallel=ddp or parallel=fsdp."
        )
    alone = parallel.devices is None and parallel.nodes == 1  # nothing asked for: what the launcher started
    if not alone and here.world != world:
        raise ConfigError(
            f"{asked} makes {world} processes, but {here.by} started {here.world}; start as many, or leave "
            "parallel.devices and parallel.nodes out."
        )
    spread = replace(parallel, devices=here.local_world, nodes=here.nodes)
    check_parallel(spread, cfg.trainer.global_batch_size, cfg.trainer.precision)
    return spread


def devices_of(cfg: RunConfig) -> int:
    """Processes of a cell on each node, if nobody has started any: as asked for, or all GPUs, one on a CPU."""
    if cfg.parallel.kind == "single":
        return 1
    return cfg.parallel.devices or (max(1, len(visible_gpus())) if _on_gpu(cfg) else 1)


def _on_gpu(cfg: RunConfig) -> bool:
    accelerator = cfg.trainer.accelerator
    return accelerator == "gpu" or (accelerator == "auto" and bool(visible_gpus()))


def _starts_its_node(parallel: ParallelConfig, here: Place) -> bool:
    """Whether srun has started one process on each of the nodes, of which each is to have more."""
    one_each = here.by == "Slurm" and here.local_world == 1 and here.world == parallel.nodes
    return one_each and parallel.kind != "single" and parallel.devices not in (None, 1)


def rendezvous(here: Place, environ: MutableMapping[str, str] | None = None) -> None:
    """Write torchrun's words into the environment where Slurm has started the processes. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    words = {"RANK": here.rank, "LOCAL_RANK": here.local_rank, "WORLD_SIZE": here.world}
    words["LOCAL_WORLD_SIZE"] = here.local_world
    words |= dict.fromkeys(NODE_WORDS, here.rank // here.local_world)
    environ.update({name: str(value) for name, value in words.items()})
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _first_host(environ)
    if "MASTER_PORT" not in environ:  # the same for all tasks of a step, another for another job on the same node
        job, step = (_number(environ, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        environ["MASTER_PORT"] = str(15_000 + (16 * job + step) % 15_000)


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    with suppress(OSError):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    raise ConfigError(f"the first of Slurm's nodes {nodes!a} is not known; set MASTER_ADDR to its host name.")


def follow_parent(environ: MutableMapping[str, str] | None = None) -> None:
    """End this process, at once and whatever it does, when the one that started it as a rank ends."""
    environ = os.environ if environ is None else environ
    parent = environ.pop(PARENT, "")  # what this process starts has another parent
    if not parent:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os._exit(1)

    if os.getppid() != int(parent):
        os._exit(1)
    threading.Thread(target=watch, name="parent", daemon=True).start()


def start(
    arguments: Sequence[str], *, devices: int, gpus: Sequence[str] | None = None, target: Sequence[str] = TARGET
) -> int:
    """Start the ``devices`` processes of one cell on this node, wait for them, and return the cell's exit code.

    That is what its first process ended with, or the first that failed if that was another; 128 + n if signal n killed it.
    ``gpus``: names for CUDA_VISIBLE_DEVICES. After exit code 77, out of device memory, all are started again at once. A
    SIGTERM, SIGINT or SIGHUP goes to all as SIGTERM; a second SIGINT kills them. None outlives this process. To be called
    in the main thread.
    """
    here = place()
    command = [sys.executable, *target, *arguments]
    received: list[int] = []
    restarts = races = 0
    if here is not None:  # Slurm's warning goes to the task on the first node, which sends a TERM
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    with collected(received):
        while True:
            code = _run(command, _environments(devices, here, gpus), received)
            alone = here is None and not received  # on several nodes all have to start again, which no one node can do
            if alone and code == PORT_TAKEN and races < LOST_RACES:
                races += 1
            elif alone and code == OUT_OF_MEMORY:
                restarts += 1
                if restarts > RESTARTS:
                    print(f"Out of device memory {restarts} times in a row; not started again.", flush=True)
                    return 1
                print("Out of device memory: started again with a smaller micro-batch.", flush=True)
            else:
                return code


def _environments(devices: int, here: Place | None, gpus: Sequence[str] | None) -> list[dict[str, str]]:
    node, nodes = (0, 1) if here is None else (here.rank, here.world)
    common = {name: text for name, text in os.environ.items() if name != FIRST_EXIT}
    if here is not None:
        rendezvous(here, common)
    else:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if sys.platform == "linux":
            common.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not be known to it
    common |= dict.fromkeys(NODE_WORDS, str(node))
    common |= {"WORLD_SIZE": str(devices * nodes), "LOCAL_WORLD_SIZE": str(devices), PARENT: str(os.getpid())}
    if gpus is not None:
        common["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return [{**common, "RANK": str(node * devices + i), "LOCAL_RANK": str(i)} for i in range(devices)]


def free_port() -> int:
    """A port nobody listens on, outside the range that Linux hands out unasked, so that it is likely to stay free."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def _run(command: list[str], environments: list[dict[str, str]], received: list[int]) -> int:
    if received:
        return STOPPED
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in environments[1:]]
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_kill, processes)
        for number, environment in enumerate(environments):
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=None if number == 0 else subprocess.DEVNULL,
                    stderr=None if number == 0 else errors[number - 1],
                    process_group=0,  # Ctrl-C on a terminal goes to this process alone
                )
            )
        first = _wait(processes, received)
        codes = [process.returncode for process in processes]
        code = _verdict(first, codes, received)
        if first is not None and first[1] < 0 and not received:
            why = " (out of memory?)" if first[1] == -signal.SIGKILL else ""
            name = signal.Signals(-first[1]).name
            rank = environments[first[0]]["RANK"]
            print(f"Process {rank} was killed by {name}{why}; the same command goes on.", file=sys.stderr, flush=True)
        said = first is not None and first[1] == codes[0] and code in (2, 3, OUT_OF_MEMORY)  # by the first process
        if first is not None and first[0] > 0 and code != STOPPED and not said:
            _quote(environments[first[0]]["RANK"], errors[first[0] - 1])
    return code


def _wait(processes: list[subprocess.Popen[bytes]], received: list[int]) -> tuple[int, int] | None:
    """Until all have ended; (number, exit code) of the process that failed first, before anything was killed here."""
    first: tuple[int, int] | None = None
    told, deadline = False, float("inf")
    shared = os.environ.get(FIRST_EXIT)
    left = set(range(len(processes)))
    while True:
        ended = {number: code for number in left if (code := processes[number].poll()) is not None}
        left -= set(ended)
        if ended and first is None and any(ended.values()):
            # Of several at once: who was killed, or had no memory, is the reason that the others failed.
            first = min(
                ((number, code) for number, code in ended.items() if code),
                key=lambda item: (item[1] >= 0, item[1] != OUT_OF_MEMORY, item[0]),
            )
            if shared:
                _note(Path(shared), first[1])
        for code in ended.values():
            deadline = min(deadline, time.monotonic() + GRACE_S.get(code, GRACE_AFTER_FAILURE_S))
        if not left:
            return first
        if shared and deadline == float("inf") and Path(shared).exists():  # on another node
            deadline = time.monotonic() + GRACE_AFTER_FAILURE_S
        if received and not told:
            told = True
            for number in left:
                processes[number].terminate()
        again = len(received) > 1 and received[-1] == signal.SIGINT
        if again or time.monotonic() > deadline:
            _kill([processes[number] for number in left])
            return first
        time.sleep(POLL_S)


def _verdict(first: tuple[int, int] | None, codes: Sequence[int], received: Sequence[int]) -> int:
    code = codes[0]
    if first is not None and (code == 1 or code < 0):  # it may have failed because the other did
        code = first[1]
    if code < 0:
        return STOPPED if received else 128 - code
    return code


def _note(path: Path, code: int) -> None:
    with suppress(OSError), path.open("x") as file:
        file.write(str(code if code > 0 else 128 - code))


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _quote(rank: str, file: IO[bytes]) -> None:
    """Repeat the end of what a process said on standard error, with its rank before every line."""
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    print("".join(f"[process {rank}] {line}\n" for line in lines), end="", file=sys.stderr, flush=True)
