"""A Slurm of its own on 127.0.0.1 for the tests: munge, a controller, two fake nodes, two partitions.

Everything it writes lies in one directory, its configuration included (SLURM_CONF), so that a Slurm which this machine may
have is not touched. By hand: ``python tests/slurm_cluster.py start DIRECTORY``, what it prints, then ``stop DIRECTORY``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

# cred_expire is also how long a requeued job waits before it may start again (120 s unless told).
CONF = """\
ClusterName=sovit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=3
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}
KillWait=10
OverTimeLimit=0
SlurmdTimeout=10
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(RuntimeError):
    """Why there can be no Slurm here, for the reason of a skip."""


def install() -> None:
    """Debian's packages, unless they are there. Raises Unavailable."""
    if all(shutil.which(program, path=PATH) for program in PROGRAMS):
        return
    if not shutil.which("apt-get") or os.geteuid():
        raise Unavailable(f"Slurm is not installed, and installing {' '.join(PACKAGES)} needs Debian and root")
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Unavailable(f"apt-get could not install {' '.join(PACKAGES)}: {(done.stderr.splitlines() or ['?'])[-1]}")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


class Cluster:
    """A running Slurm; ``environment`` is what its commands need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def queue(self) -> list[str]:
        """Such as ["12_0 RUNNING n1", "12_1 PENDING "]."""
        return self.call("squeue", "-h", "-r", "-o", "%i %T %N").splitlines()

    def node_state(self, node: str) -> str:
        return self.call("sinfo", "-h", "-N", "-n", node, "-p", "low", "-o", "%t")

    def start_node(self, node: str) -> None:
        self.call("slurmd", "-N", node, "-f", str(self.root / "slurm.conf"))
        wait_for(
            lambda: self.node_state(node) in ("idle", "mix", "alloc"), f"node {node}: {self.root}/slurmd.{node}.log"
        )

    def kill_node(self, node: str) -> list[int]:
        """Everything on a node at once, as a lost power cable does: its daemon, its step daemons and their processes."""
        commands = dict(processes())
        tasks = [pid for pid in commands if environ(pid).get("SLURMD_NODENAME") == node]
        steps = [pid for pid in map(parent, tasks) if commands.get(pid, "").startswith("slurmstepd")]
        daemon = [pid for pid, words in commands.items() if words.startswith(f"slurmd -N {node} ")]
        mine = [*daemon, *steps, *tasks]  # a step daemon that outlives its task would report the end of a job
        for pid in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return mine

    def clear(self) -> None:
        """Cancel what is in the queue, and wait until it is gone."""
        for line in self.queue():
            self.call("scancel", line.split()[0], check=False)
        wait_for(lambda: not self.queue(), "an empty queue")


def running() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def processes() -> list[tuple[int, str]]:
    """(pid, command line) of every process, zombies left out."""
    found = []
    for pid in running():
        with contextlib.suppress(OSError):
            words = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words:
                found.append((pid, words))
    return found


def parent(pid: int) -> int:
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def environ(pid: int) -> dict[str, str]:
    try:
        text = (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def start(root: Path, *, user_signal: bool = True, grace: int = 15) -> Cluster:
    """Start a Slurm below ``root``. ``user_signal``: tell jobs of a preemption by their own signal (USR2), not by TERM.

    Raises Unavailable if it cannot be installed or does not start.
    """
    install()
    root.mkdir(parents=True, exist_ok=True)
    (root / "state").mkdir(exist_ok=True)
    cluster = Cluster(root)
    try:
        with contextlib.ExitStack() as stack:  # held together, so that the three differ
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        (root / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(),
                user=cluster.call("id", "-un"),
                root=root,
                ports=ports,
                grace=grace,
                user_signal="SlurmctldParameters=preempt_send_user_signal" if user_signal else "",
            )
        )
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o600)
        files = [f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        cluster.call("munged", "--force", f"--socket={root}/munge.socket", *files)
        cluster.call("slurmctld", "-f", str(root / "slurm.conf"))
        wait_for(lambda: "UP" in cluster.call("scontrol", "ping", check=False), "the controller")
        for node in NODES:
            cluster.start_node(node)
    except (RuntimeError, TimeoutError, OSError) as error:
        stop(root)
        raise Unavailable(f"Slurm does not start here: {error}") from None
    return cluster


def stop(root: Path) -> None:
    """End every process of the Slurm below ``root``; does nothing where none runs."""
    cluster = Cluster(root)
    with contextlib.suppress(RuntimeError, TimeoutError, OSError):
        cluster.clear()
    pids = [int(file.read_text()) for file in sorted(root.glob("*.pid"), reverse=True) if file.read_text().strip()]
    names = ("slurmd", "slurmctld", "munged", "slurmstepd")
    commands = dict(processes())
    pids = [pid for pid in pids if any(name in commands.get(pid, "") for name in names)]  # the number may be another's
    for pid, words in commands.items():  # step daemons and what is left of jobs, but not the shell that calls this
        if environ(pid).get("SLURM_CONF") == str(root / "slurm.conf"):
            pids += [pid] if words.startswith(names) or "SLURM_JOB_ID" in environ(pid) else []
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not {pid for pid, _ in processes()} & set(pids), "the daemons to end", 15)
            break


@contextlib.contextmanager
def running_cluster(root: Path, **options: object) -> Iterator[Cluster]:
    cluster = start(root, **options)  # type: ignore[arg-type]
    try:
        yield cluster
    finally:
        stop(root)


if __name__ == "__main__":
    deed, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    if deed == "start":
        start(folder)
        print(f"export SLURM_CONF={folder}/slurm.conf PATH=$PATH:/usr/sbin")
    else:
        stop(folder)
