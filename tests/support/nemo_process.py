"""Commands that need NeMo, without the ten seconds of importing it: forked from a process that has imported it.

    finished = run_nemo(["converters.hf_to_nemo", "--input", ...])
    finished = run_nemo([str(HERE / "update_jobs.py"), folder], ranks=2)

A command gets an interpreter state, command line, environment, folder and output of its own, and each of several ranks the
environment that torchrun would give it. What a real start adds is tested by the pipelines, which start as users do.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from forking import meeting_port, torchrun_environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Finished:
    """A process that ended; of several ranks the first status that is not 0, and what all of them said."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Machine:
    """Where a command seems to run.

    Attributes:
        device: what the process that forks is set up for.
        path: folders that make the machine, before all others.
        container: variables that its container sets.
    """

    device: str = "cpu"
    path: tuple[Path, ...] = ()
    container: tuple[tuple[str, str], ...] = ()


CPU = Machine()
GPU_VISIBLE = Machine("cpu", (HERE / "gpu_like",))
"""A GPU is there, but nothing that a GPU's stack brings, and nobody asked for it."""
CPU_OF_GPU_NODE = Machine(
    "cpu", (HERE / "gpu_like", HERE / "gpu_like" / "extensions"), (("NVIDIA_PYTORCH_VERSION", "25.01"),)
)
"""A stage that runs on the CPU of a GPU node, such as a conversion."""
GPU_NODE = replace(CPU_OF_GPU_NODE, device="gpu")
"""See gpu_like/README.md."""


@dataclass(frozen=True)
class Command:
    """What the forking process is told."""

    words: list[str]
    environment: dict[str, str]
    output: str
    ranks: int


def run_nemo(words: Sequence[object], ranks: int = 1, path: Path | None = None, machine: Machine = CPU) -> Finished:
    """Run a module, or a file that ends in ``.py``, as ``python`` would.

    Args:
        words: the command line.
        ranks: processes that run it.
        path: a further folder of packages, which NeMo may look for too.
        machine: where it seems to run.
    """
    process = _forking_process(path, machine)
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        command = Command([str(word) for word in words], os.environ | dict(machine.container), str(output), ranks)
        process.stdin.write(json.dumps(asdict(command)) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process that forks has died"
        status = next((status for status in json.loads(answer) if status), 0)
        return Finished(status, (output / "out").read_text(), (output / "err").read_text())


def convert(hf: Path, nemo: Path, path: Path | None = None, machine: Machine = CPU) -> Path:
    """The ``.nemo`` file of a Hugging Face folder, without the check that tests of the converter make."""
    words = ["converters.hf_to_nemo", "--input", hf, "--output", nemo, "--no-verify"]
    finished = run_nemo(words, path=path, machine=machine)
    assert finished.status == 0, finished.err[-6000:]
    return nemo


@functools.cache
def _forking_process(path: Path | None, machine: Machine) -> subprocess.Popen[str]:
    """One for each process of the tests, path and machine, for as long as that process lives."""
    process = subprocess.Popen(
        [sys.executable, __file__, machine.device],
        cwd=ROOT,
        env=os.environ | environment_of(machine, path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, process)
    return process


def environment_of(machine: Machine, path: Path | None = None) -> dict[str, str]:
    """Variables with which any Python process is on the machine."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    folders = ":".join(map(str, filter(None, (*machine.path, ROOT, HERE, path))))
    return threads | dict(machine.container) | {"PYTHONPATH": folders}


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- the process that forks -----------------------------------------------------------------------------------------


def main() -> None:
    from nemo_ampo.compat import setup

    before = dict(os.environ)
    setup(sys.argv[1])
    import nemo_ampo.rollout.megatron
    import nemo_ampo.training.actor
    import nemo_ampo.training.bc_trainer
    import nemo_ampo.training.trainer  # noqa: F401 - everything that the commands import

    added = {name: text for name, text in os.environ.items() if before.get(name) != text}
    for line in sys.stdin:
        command = Command(**json.loads(line))
        port, pids = meeting_port(), []
        for rank in range(command.ranks):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _become(replace(command, environment=command.environment | added), rank, port)
                return
            pids.append(pid)
        print(json.dumps(_wait(pids)), flush=True)


def _become(command: Command, rank: int, port: int) -> None:
    """Run the command in this process, which ends as it does."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{command.output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(command.environment)
    if command.ranks > 1:
        os.environ |= torchrun_environment(rank, command.ranks, port)
    sys.argv = command.words
    if command.words[0].endswith(".py"):
        sys.path.insert(0, str(Path(command.words[0]).parent))
        runpy.run_path(command.words[0], run_name="__main__")
    else:
        runpy.run_module(command.words[0], run_name="__main__", alter_sys=True)


def _wait(pids: list[int]) -> list[int]:
    """Statuses in the order of the ranks; one that fails ends the others, as under torchrun."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid]:
            for other in set(pids) - set(statuses):
                os.kill(other, signal.SIGTERM)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    main()
