"""What the batch scripts would start, for every kind of allocation: ``python tests/support/slurm_lines.py`` rewrites the
golden file after a wanted change.

The allocation is made up: Slurm's variables, and a stub of the one command that knows the nodes' names and addresses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "slurm_lines.txt"

STUB = """#!/bin/sh
case "$2" in
  hostnames) printf '%s\\n' "$3" | tr ',' '\\n' ;;
  node) echo "NodeName=$3 NodeAddr=10.0.0.${3#gpu} Port=6818" ;;
  *) exit 1 ;;
esac
"""


@dataclass(frozen=True)
class Case:
    """One kind of allocation."""

    nodes: int
    judge: str
    container: str
    rollout_server: bool = False
    judge_image: bool = False

    @property
    def title(self) -> str:
        server = " with a rollout server" if self.rollout_server else ""
        image = " with an image of the judge's own" if self.judge_image else ""
        return f"## nodes={self.nodes} judge={self.judge} container={self.container}{server}{image}"

    @property
    def servers(self) -> list[str]:
        """Names of the groups behind the trainer's."""
        return ["judge"] * (self.judge == "hetjob") + ["rollout"] * self.rollout_server

    def environment(self, stubs: Path) -> dict[str, str]:
        names = ",".join(f"gpu{i}" for i in range(1, self.nodes + 1))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "AMPO_", "OMP_"))}
        given = {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "AMPO_PLAN_PYTHON": sys.executable,
            "AMPO_PYTHON": "python",
            "AMPO_NODES": str(self.nodes),
            "AMPO_GPUS_PER_NODE": "8",
            "AMPO_CONTAINER": self.container,
            "AMPO_SBATCH": "--account=lab --time=08:00:00",
            "AMPO_MPI": "pmix",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": names,
        }
        if self.container != "none":
            given |= {"AMPO_IMAGE": "/images/nemo.sqsh", "AMPO_MOUNTS": "/data:/data,/runs:/runs"}
        if self.servers:
            given |= {"SLURM_HET_SIZE": str(len(self.servers) + 1), "SLURM_JOB_NODELIST_HET_GROUP_0": names}
            given |= {f"SLURM_JOB_NODELIST_HET_GROUP_{i}": f"gpu{8 + i}" for i in range(1, len(self.servers) + 1)}
        if self.judge == "hetjob":
            given |= {"AMPO_JUDGE_GPUS": "4", "AMPO_JUDGE_COMMAND": 'vllm serve judge --port "$JUDGE_PORT"'}
        if self.judge_image:
            given |= {"AMPO_JUDGE_IMAGE": "/images/vllm.sqsh"}
        if self.rollout_server:
            given |= {"ROLLOUT_GPUS": "2"}
            given |= {"ROLLOUT_IMAGE": "/images/trtllm.sqsh"} if self.container != "none" else {}
        return inherited | given


SMALL = ("bc.model.micro_batch_size=1", "ampo.model.reinforce.forward_micro_batch_size=4")
"""What the tiny recipe's batches need to be shared by up to 32 ranks."""
CONTAINERS, NODES = ("none", "pyxis", "apptainer"), (1, 2, 4)
CASES = [
    *(Case(nodes, judge, container) for container in CONTAINERS for judge in ("external", "hetjob") for nodes in NODES),
    *(Case(nodes, "hetjob", container, True) for container in CONTAINERS for nodes in NODES),
    Case(2, "external", "none", True),
    *(Case(2, "hetjob", container, judge_image=True) for container in ("pyxis", "apptainer")),
]


def dry_run(case: Case, *extra: str, script: str = "ampo.sh", **variables: str) -> str:
    """Everything ``--dry-run`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "scontrol"
        stub.write_text(STUB)
        stub.chmod(0o755)
        judge = ["judge.mode=external", "judge.base_url=http://judge:8000/v1"] if case.judge == "external" else []
        command = [f"slurm/{script}", "--dry-run", "run_dir=/runs/mine", *SMALL, *judge, *extra]
        environment = case.environment(Path(folder)) | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(case: Case) -> str:
    """The sbatch line and every srun line, in order."""
    wanted = ["ampo.model.micro_batch_size=1"] + ["ampo.rollout.engine=trtllm_server"] * case.rollout_server
    found = [line for line in dry_run(case, *wanted).splitlines() if line.startswith(("sbatch ", "srun "))]
    return "\n".join([case.title, *found]).replace(str(ROOT), "$ROOT")


def golden() -> dict[str, str]:
    """Title of each case -> its section."""
    sections = GOLDEN.read_text(encoding="utf-8").strip().split("\n\n")
    return {section.splitlines()[0]: section for section in sections}


if __name__ == "__main__":
    GOLDEN.write_text("\n\n".join(map(lines, CASES)) + "\n", encoding="utf-8")
