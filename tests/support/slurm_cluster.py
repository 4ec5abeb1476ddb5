"""A private two-node Slurm in a temporary folder: own munge, own ports, torn down by process id.

Several slurmd of one host play the nodes; ``SLURM_CONF`` points every command at this cluster, so that a Slurm of the
machine is neither used nor touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_ampo.serve.local import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SEARCH = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")])
NODES = ("n1", "n2", "n3")

CONFIG = """
ClusterName=private
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
TaskProlog={folder}/task_prolog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
DefMemPerCPU=100
# Heterogeneous jobs are started by the backfill scheduler only.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

TASK_PROLOG = """#!/bin/sh
# Prints what this node's tasks shall have in their environment: how a test makes one node differ from the other.
cat "{folder}/$SLURMD_NODENAME.env" 2>/dev/null || true
"""


def missing_reason() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    return None


@dataclass
class Cluster:
    """The daemons and the commands that talk to them."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "AMPO_"))}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}

    def start(self) -> None:
        # Short: a Unix socket's path may have 107 characters.
        (self.folder / "state").mkdir()
        prolog = self.folder / "task_prolog.sh"
        prolog.write_text(TASK_PROLOG.format(folder=self.folder))
        prolog.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port('127.0.0.1')} CPUs=8 RealMemory=8000 "
            "State=UNKNOWN"
            for name in NODES
        )
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=self.folder,
                host=host,
                controller_port=free_port("127.0.0.1"),
                nodes=nodes,
                # The ports of a job follow from its number: clusters that run at a time must not count alike.
                first_job=1 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")),
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"key-file": key} | {f"{n}-file": self.folder / f"munge.{n}" for n in ("log", "pid", "seed")}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._spawn("munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *options)
        wait_for(lambda: (self.folder / "munge.socket").exists(), 10, "munged to listen")
        self._spawn("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.idle_nodes() == len(NODES), 30, "both nodes to be idle")

    def start_node(self, name: str) -> None:
        self._spawn("slurmd", "-D", "-N", name, as_name=name)

    def idle_nodes(self) -> int:
        done = self.call("sinfo", "--noheader", "--Node", "--format=%T")
        return done.stdout.split().count("idle")

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, cwd=cwd, timeout=60
        )

    def check(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        done = self.call(*command, cwd=cwd, **environment)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; of a heterogeneous job those of its first component."""
        text = self.check("scontrol", "show", "job", "--oneliner", job_id).splitlines()[0]
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def step_processes(self, node: str) -> list[int]:
        """Process ids of the job steps' daemons of one node and of everything they started."""
        steps = [pid for pid, line in commands().items() if re.match(r"slurmstepd: \[", line) and self._runs_on(pid, node)]
        return [*steps, *(child for pid in steps for child in descendants(pid))]

    def task(self, words: str, nodes: Sequence[str] = NODES) -> int:
        """Process id of the topmost process of a step whose command line holds ``words``."""
        running = [pid for node in nodes for pid in self.step_processes(node)]
        lines = commands()
        return next(pid for pid in running if words in lines.get(pid, ""))

    def _runs_on(self, step_daemon: int, node: str) -> bool:
        """A step daemon's tasks carry the names of their node and of their cluster's configuration."""
        wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()}
        for pid in descendants(step_daemon):
            with contextlib.suppress(OSError):
                if wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    return True
        return False

    def kill_node(self, name: str) -> None:
        """What a power cut does: daemon and tasks gone at once."""
        victims = self.step_processes(name)
        for pid in (self.daemons[name].pid, *victims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(name).wait()

    def stop(self) -> None:
        self.call("scancel", "--user=root", "--full", "--signal=KILL")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not any(self.step_processes(name) for name in NODES), 10, "the last step to end")
        for name in NODES:
            for pid in self.step_processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for name in (*NODES, "slurmctld", "munged"):
            if (daemon := self.daemons.pop(name, None)) is not None:
                daemon.terminate()
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _spawn(self, program: str, *arguments: str, as_name: str = "") -> None:
        path = shutil.which(program, path=SEARCH)
        assert path is not None
        name = as_name or program
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen([path, *arguments], env=self.environment, stdout=out, stderr=out)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start, yield, tear down."""
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)


def wait_for(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def commands() -> dict[int, str]:
    """Command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    return found


def descendants(pid: int) -> Sequence[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    below = list(parents.get(pid, []))
    for child in below:
        below.extend(parents.get(child, []))
    return below
