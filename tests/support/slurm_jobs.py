"""Jobs of a private Slurm: submitting the batch scripts, letting a requeued job start at once, and what became of a run."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from slurm_cluster import Cluster, wait_for
from stage_runs import ROOT, SMALL_STEPS, Quickstart

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.files import read_jsonl

AMPO = [*SMALL_STEPS, "judge.connection_retries=1", "guard.retry_pause_s=1"]
EVALUATE = ["generate.max_new_tokens=32", "data.limit=4"]
ENVIRONMENT = {"AMPO_MIN_FREE_GB": "0.5", "AMPO_SAVE_RESERVE_S": "5"}


def recipe(folder: Path, run_dir: Path, **sections: Any) -> Path:
    settings: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {"world": True},
        "judge": {"mode": "hetjob", "start_s": 60},
        "bc": {"config": "tiny", "overrides": ["model.micro_batch_size=16"]},
        "ampo": {"config": "tiny", "overrides": AMPO},
        "evaluate": {"config": "tiny", "policies": ["ampo"], "overrides": EVALUATE},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings | sections))
    return path


def submit(
    cluster: Cluster, script: str, *arguments: str, options: list[str], servers: int, nodes: int = 2, **environment: str
) -> str:
    """``sbatch`` of a trainer's group and so many groups of servers; the job's id."""
    groups = [*options, f"--nodes={nodes}", f"--output={cluster.folder}/job-%j.out"]
    groups += [f"--ntasks-per-node={environment.get('AMPO_RANKS_PER_NODE', '1')}"]
    groups += [":", "--nodes=1", "--ntasks=1"] * servers
    command = ["sbatch", "--parsable", *groups, f"slurm/{script}", *arguments]
    return cluster.check(*command, cwd=ROOT, **(ENVIRONMENT | environment)).strip()


def output(cluster: Cluster, job: str) -> str:
    path = cluster.folder / f"job-{job}.out"
    return path.read_text() if path.exists() else ""


def wait_for_end(cluster: Cluster, job: str, seconds: float = 300) -> str:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    try:
        wait_for(lambda: cluster.state(job) in ended, seconds, f"job {job} to end")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output(cluster, job)[-6000:]}") from None
    return cluster.state(job)


class Started(Exception):  # noqa: N818 - no error of anybody
    """A job that was to be changed has begun."""


class Story:
    """One job whose attempts end in different ways."""

    def __init__(self, cluster: Cluster, run_dir: Path, job: str, measured: Callable[[str], None]) -> None:
        self.cluster, self.run_dir, self.job, self.measured = cluster, run_dir, job, measured
        self.ampo = run_dir / "ampo"

    def trained(self) -> int:
        rows = read_jsonl(self.ampo / "metrics.jsonl")
        return int(rows[-1]["step"]) + 1 if rows else 0

    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def release(self, restarts: int, *changes: str, now: bool = True) -> None:
        """Wait until the job is back in the queue, then let it start, now or after Slurm's own two minutes."""
        self.wait(lambda: self.restarts() == restarts and self.cluster.state(self.job) == "PENDING", "the requeue")
        self.update(*changes)
        if now:
            with contextlib.suppress(Started):
                self.update("StartTime=now")
        self.wait(lambda: self.cluster.state(self.job) == "RUNNING", "the restart", 300)

    def shorten(self) -> None:
        """A limit that ends one to two minutes from now: Slurm's next look is a warning."""
        minutes = self.cluster.job(self.job)["RunTime"].split(":")[-2]
        self.update(f"TimeLimit={int(minutes) + 2}")

    def update(self, *changes: str) -> None:
        """Of every component of the job, as an operator would.

        Raises:
            Started: a change that only a waiting job takes came when all of it ran already.
        """
        for component in self.cluster.check("squeue", "--noheader", "--format=%A").split() if changes else ():
            try:
                self.cluster.check("scontrol", "update", f"JobId={component}", *changes)
            except AssertionError as error:
                raise Started if "no longer pending" in str(error) else error from None

    def until_trained(self, steps: int) -> None:
        self.wait(lambda: self.trained() >= steps, f"{steps} steps", 240)

    def saved_and_lost(self, what: str, asked: float) -> tuple[int, int]:
        """Step of the newest checkpoint and steps trained beyond it, kept as figures with the seconds since ``asked``."""
        newest = Store(self.ampo / "checkpoints").resumable()[0]
        lost = self.trained() - newest.step
        waited = newest.manifest.written - asked
        when = f"{abs(waited):.1f} s {'after' if waited > 0 else 'before'}"
        self.measured(f"{what}: checkpoint at step {newest.step}, published {when}, {lost} steps lost")
        return newest.step, lost

    def warnings(self) -> list[float]:
        """When Slurm's signals came, Unix time to the second, from the job's diary."""
        said = (line.split(" ", 2) for line in output(self.cluster, self.job).splitlines())
        texts = [f"{words[0]} {words[1]}" for words in said if words[2:] == ["asked to stop before the time limit"]]
        return [time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S")) for text in texts]

    def wait(self, holds: Any, what: str, seconds: float = 180) -> None:
        try:
            wait_for(holds, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{output(self.cluster, self.job)[-6000:]}") from None


def started_with_a_clone(quickstart: Quickstart, run_dir: Path) -> None:
    """A run folder whose stages before AMPO are done."""
    for name in ("world", "hf/base", "nemo"):
        shutil.copytree(quickstart.folder / name, run_dir / name)
    (run_dir / "bc").mkdir()
    shutil.copy(quickstart.folder / "bc" / "policy.nemo", run_dir / "bc")
