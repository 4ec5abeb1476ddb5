"""The batch scripts on a real Slurm: a whole pipeline over two nodes, and one run that everything happens to.

Nodes are slurmd processes of this machine, see tests/support/slurm_cluster.py. A requeued job may wait for two minutes; the
tests tell Slurm to start it at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import Cluster, missing_reason, slurm_cluster, wait_for
from stage_runs import ROOT, Quickstart

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.demo_judge import demo_judge_process
from nemo_ampo.job.attempts import AttemptLog, checkpoint_step
from nemo_ampo.job.status import read_status
from nemo_ampo.runlog import read_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_reason() is not None, reason=f"no private Slurm: {missing_reason()}"),
]

STEPS, SAVE_EVERY = 30, 3
AMPO = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=64",
    "model.global_batch_size=16",
    "model.micro_batch_size=8",
    "model.reinforce.forward_micro_batch_size=8",
    "judge.connection_retries=1",
    "guard.retry_pause_s=1",
]
EVALUATE = ["generate.max_new_tokens=32", "data.limit=4"]
ENVIRONMENT = {"AMPO_MIN_FREE_GB": "0.5", "AMPO_SAVE_RESERVE_S": "5"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster() as running:
        yield running


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


def submit(cluster: Cluster, script: str, *arguments: str, options: list[str], judge: bool, **environment: str) -> str:
    groups = [*options, "--nodes=2", "--ntasks-per-node=1", f"--output={cluster.folder}/job-%j.out"]
    if judge:
        groups += [":", "--nodes=1", "--ntasks=1"]
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


def test_sbatch_runs_the_whole_pipeline_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    few = [f"trainer.sft.{key}=10" for key in ("max_steps", "val_check_interval", "save_interval")]
    path = recipe(tmp_path, run_dir, bc={"config": "tiny", "overrides": ["model.micro_batch_size=16", *few]})
    steps = ["ampo.trainer.reinforce.max_steps=2", "bc.data.heldout_replies=4"]
    job = submit(cluster, "ampo.sh", str(path), *steps, options=["--time=30"], judge=True)
    assert wait_for_end(cluster, job) == "COMPLETED", output(cluster, job)[-6000:]

    status = read_status(run_dir)
    assert [stage.state for stage in status.stages] == ["done"] * 7
    assert (status.attempts, status.running, status.last_error) == (1, False, "")
    logs = run_dir / "logs" / f"{job}-0"
    assert {f"ampo-rank{rank}.log" for rank in (0, 1)} <= {path.name for path in logs.iterdir()}
    assert "preflight: ok: 2 ranks, CPU" in (logs / "preflight.log").read_text()
    assert json.loads((run_dir / "ampo" / "provenance.json").read_text())["world_size"] == 2
    assert [row["step"] for row in read_jsonl(run_dir / "ampo" / "metrics.jsonl")] == [0, 1]
    assert json.loads((run_dir / "evaluate" / "ampo.json").read_text())["summary"]["all"]["samples"] == 4

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf" / "ampo")
    assert sum(p.numel() for p in model.parameters()) > 10_000

    again = submit(cluster, "ampo.sh", str(path), *steps, options=["--time=30"], judge=True)
    assert wait_for_end(cluster, again) == "COMPLETED"
    assert output(cluster, again).count("done before") == 7


class Story:
    """One job whose attempts end in different ways."""

    def __init__(self, cluster: Cluster, run_dir: Path, job: str) -> None:
        self.cluster, self.run_dir, self.job = cluster, run_dir, job
        self.ampo = run_dir / "ampo"

    def trained(self) -> int:
        rows = read_jsonl(self.ampo / "metrics.jsonl")
        return int(rows[-1]["step"]) + 1 if rows else 0

    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def release(self, restarts: int) -> None:
        """Wait until the job is back in the queue, then let it start now."""
        self.wait(lambda: self.restarts() == restarts and self.cluster.state(self.job) == "PENDING", "the requeue")
        hour, now = "TimeLimit=60", "StartTime=now"
        for component in self.cluster.check("squeue", "--noheader", "--format=%A").split():
            self.cluster.check("scontrol", "update", f"JobId={component}", hour, now)
        self.wait(lambda: self.cluster.state(self.job) == "RUNNING", "the restart")

    def until_trained(self, steps: int) -> None:
        self.wait(lambda: self.trained() >= steps, f"{steps} steps", 120)

    def saved_and_lost(self, what: str, asked: float) -> tuple[int, int]:
        """Step of the newest checkpoint, and steps trained beyond it; both are printed, with the seconds since ``asked``."""
        newest = Store(self.ampo / "checkpoints").resumable()[0]
        lost = self.trained() - newest.step
        print(f"{what}: checkpoint at {newest.step}, lost {lost}, written {newest.manifest.written - asked:.1f} s after")
        return newest.step, lost

    def wait(self, holds: Any, what: str, seconds: float = 90) -> None:
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


def test_nothing_is_lost_whatever_ends_an_attempt(cluster: Cluster, quickstart: Quickstart, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    started_with_a_clone(quickstart, run_dir)
    length = [f"trainer.reinforce.max_steps={STEPS}", f"trainer.reinforce.save_interval={SAVE_EVERY}"]
    path = recipe(tmp_path, run_dir, ampo={"config": "tiny", "overrides": [*AMPO, *length]})
    # Two minutes, of which all but a few seconds are kept for saving: over after the first step, by the trainer's own clock.
    too_short = {"options": ["--time=2", "--signal=B:USR1@1"], "AMPO_SAVE_RESERVE_S": "115"}
    job = submit(cluster, "ampo.sh", str(path), judge=True, **too_short)  # type: ignore[arg-type]
    story = Story(cluster, run_dir, job)
    story.wait(lambda: cluster.state(job) == "RUNNING", "the start")
    began = time.time()
    story.wait(lambda: story.restarts() == 1, "the time limit", 120)
    assert story.saved_and_lost("time limit", began) == (1, 0)

    for attempt in (1, 2):
        before = story.trained()
        story.release(attempt)
        story.until_trained(before + 1)
        asked = time.time()
        cluster.check("scancel", "--signal=USR1", "--batch", job)
        story.wait(lambda number=attempt + 1: story.restarts() == number, "the requeue after USR1")
        saved, lost = story.saved_and_lost("USR1", asked)
        assert saved > before and lost == 0

    before = story.trained()
    story.release(3)
    story.until_trained(before + 1)
    judge = [pid for pid in cluster.step_processes("n3") if "demo_judge" in Path(f"/proc/{pid}/cmdline").read_text()]
    asked = time.time()
    os.kill(judge[0], signal.SIGKILL)
    story.wait(lambda: story.restarts() == 4, "the requeue after the judge died")
    saved, lost = story.saved_and_lost("judge killed", asked)
    assert saved > before and lost == 0

    story.release(4)
    before = saved
    story.wait(lambda: (checkpoint_step(story.ampo) or 0) > before, "a checkpoint")
    asked = time.time()
    cluster.kill_node("n2")
    story.wait(lambda: story.restarts() == 5, "the requeue after a node died")
    saved, lost = story.saved_and_lost("node killed", asked)
    assert saved > before and lost <= SAVE_EVERY
    cluster.start_node("n2")
    wait_for(lambda: cluster.idle_nodes() == 3, 60, "the node to come back")
    story.release(5)
    assert wait_for_end(cluster, job) == "COMPLETED", output(cluster, job)[-6000:]

    assert [row["step"] for row in read_jsonl(story.ampo / "metrics.jsonl")] == list(range(STEPS))
    ends = [row["reason"] for row in AttemptLog(run_dir).rows() if row["event"] == "end"]
    limit, warned = "stopped at a checkpoint before the time limit", "asked to stop before the time limit"
    assert ends.pop(4) in ("ampo failed", "asked to end")  # whoever saw the dead node first: the other rank, or Slurm
    assert ends == [limit, warned, warned, "the judge died", "finished"]
    assert {path.name for path in (run_dir / "logs").iterdir()} == {f"{job}-{attempt}" for attempt in range(6)}
    assert (run_dir / "evaluate" / "ampo.json").exists()


def test_a_node_with_other_code_stops_the_job_in_preflight(cluster: Cluster, quickstart: Quickstart, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "nemo_ampo", other / "nemo_ampo", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "nemo_ampo" / "modes.py").open("a") as file:
        file.write("# an edit on one node only\n")
    run_dir = tmp_path / "run"
    started_with_a_clone(quickstart, run_dir)
    node = cluster.folder / "n2.env"
    # Without the working folder in front, which is the same for all nodes.
    node.write_text(f"export PYTHONPATH={other}:{ROOT}\nexport PYTHONSAFEPATH=1\n")
    try:
        with demo_judge_process() as url:
            path = recipe(tmp_path, run_dir, judge={"mode": "external", "base_url": url})
            job = submit(cluster, "ampo.sh", str(path), options=["--time=30", "--nodelist=n1,n2"], judge=False)
            assert wait_for_end(cluster, job, 90) == "FAILED"
    finally:
        node.unlink()
    # Of two nodes neither is the usual one: either may be called odd.
    assert "preflight: n2: nemo-ampo sources is" in output(cluster, job)
    assert not (run_dir / "ampo").exists()
    status = read_status(run_dir)
    assert "preflight failed (status 3)" in status.last_end
    assert "n2: nemo-ampo sources is" in status.last_error


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with demo_judge_process() as url:
        path = recipe(tmp_path, run_dir, judge={"mode": "external", "base_url": url})
        job = submit(cluster, "ampo.sh", str(path), options=["--time=30"], judge=False)
        # One stage is done, so that the attempt would be worth another one.
        wait_for(lambda: (run_dir / "world" / "pack.json").exists(), 90, "the first stage")
        cluster.check("scancel", job)
        wait_for(lambda: not cluster.call("squeue", "--noheader", f"--jobs={job}").stdout.strip(), 60, "the job to be gone")
    assert cluster.state(job) == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"
    assert AttemptLog(run_dir).rows()[-1]["reason"] == "asked to end"
