"""The batch scripts on a real Slurm: a whole pipeline over two nodes, and one run that everything happens to.

Nodes are slurmd processes of this machine, see tests/support/slurm_cluster.py. A requeued job may wait for two minutes; the
tests tell Slurm to start it at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing_reason, slurm_cluster, wait_for
from slurm_jobs import AMPO, Story, output, recipe, started_with_a_clone, submit, wait_for_end
from stage_runs import ROOT, Quickstart

from nemo_ampo.commands.status import read_status
from nemo_ampo.files import read_jsonl
from nemo_ampo.job.attempts import AttemptLog, checkpoint_step
from nemo_ampo.world.judge_server import demo_judge_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(missing_reason() is not None, reason=f"no private Slurm: {missing_reason()}"),
]

STEPS, SAVE_EVERY = 30, 3
WARNED = ["--time=4", "--signal=B:USR1@90"]
"""Too short for the run: Slurm, which looks every 30 s, warns when 120 to 90 s are left."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster() as running:
        yield running


def test_sbatch_runs_the_whole_pipeline_on_two_nodes(
    cluster: Cluster, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    run_dir = tmp_path / "run"
    few = [f"trainer.sft.{key}=10" for key in ("max_steps", "val_check_interval", "save_interval")]
    path = recipe(tmp_path, run_dir, bc={"config": "tiny", "overrides": ["model.micro_batch_size=16", *few]})
    steps = ["ampo.trainer.reinforce.max_steps=2", "bc.data.heldout_replies=1"]  # of two replicas one has nothing to answer
    job = submit(cluster, "ampo.sh", str(path), *steps, options=["--time=30"], servers=1)
    assert wait_for_end(cluster, job) == "COMPLETED", output(cluster, job)[-6000:]

    status = read_status(run_dir)
    assert [stage.state for stage in status.stages] == ["done"] * 7
    assert (status.attempts, status.running, status.last_error) == (1, False, "")
    logs = run_dir / "logs" / f"{job}-0"
    assert {f"ampo-rank{rank}.log" for rank in (0, 1)} <= {path.name for path in logs.iterdir()}
    preflight = (logs / "preflight.log").read_text()
    assert "preflight: ok: 2 ranks, CPU" in preflight
    measured(preflight.strip().splitlines()[-1])
    assert json.loads((run_dir / "ampo" / "provenance.json").read_text())["world_size"] == 2
    assert [row["step"] for row in read_jsonl(run_dir / "ampo" / "metrics.jsonl")] == [0, 1]
    assert json.loads((run_dir / "evaluate" / "ampo.json").read_text())["summary"]["all"]["samples"] == 4

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf" / "ampo")
    assert sum(p.numel() for p in model.parameters()) > 10_000

    again = submit(cluster, "ampo.sh", str(path), *steps, options=["--time=30"], servers=0)
    assert wait_for_end(cluster, again) == "COMPLETED", output(cluster, again)[-6000:]
    assert output(cluster, again).count("done before") == 7
    assert "judge: answers at" in output(cluster, again)  # on the trainer's first node


@pytest.mark.timeout(1800)
def test_nothing_is_lost_whatever_ends_an_attempt(
    cluster: Cluster, quickstart: Quickstart, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    run_dir = tmp_path / "run"
    started_with_a_clone(quickstart, run_dir)
    length = [f"trainer.reinforce.max_steps={STEPS}", f"trainer.reinforce.save_interval={SAVE_EVERY}"]
    path = recipe(tmp_path, run_dir, ampo={"config": "tiny", "overrides": [*AMPO, *length]})
    # A slow judge makes a step long, so that the deadlines come in the middle of the run and of a step.
    judge_options, reserves = tmp_path / "judge_options", [cluster.folder / f"{name}.env" for name in ("n1", "n2")]
    judge_options.write_text("--latency-ms 8000")
    command = (
        f'exec {sys.executable} -m nemo_ampo.world.judge_server --host 0.0.0.0 --port "$JUDGE_PORT" $(cat {judge_options})'
    )
    for reserve in reserves:
        # More than is left of the limit: over after the first step, by the trainer's own clock.
        reserve.write_text("export AMPO_SAVE_RESERVE_S=1000\n")
    job = submit(cluster, "ampo.sh", str(path), options=WARNED, servers=1, AMPO_JUDGE_COMMAND=command)
    story = Story(cluster, run_dir, job, measured)
    story.wait(lambda: cluster.state(job) == "RUNNING", "the start")
    began = time.time()
    story.wait(lambda: story.restarts() == 1, "the time limit", 180)
    assert story.saved_and_lost("own clock, from the start of the job", began) == (1, 0)
    for reserve in reserves:
        reserve.unlink()

    # The first limit is the job's own from its submission. A busy machine may need most of that to load the model, so the
    # other two are made too short once the attempt trains.
    for attempt in (1, 2, 3):
        before = story.trained()
        story.release(attempt, *([] if attempt == 1 else ["TimeLimit=60"]))
        if attempt > 1:
            story.until_trained(before + 1)
            story.shorten()
        story.wait(lambda number=attempt + 1: story.restarts() == number, "Slurm's warning and the requeue", 240)
        warnings = story.warnings()
        assert len(warnings) == attempt
        saved, lost = story.saved_and_lost("time limit", warnings[-1])
        assert before < saved < STEPS and lost <= 1

    judge_options.write_text("")
    before = story.trained()
    story.release(4, "TimeLimit=60")
    story.until_trained(before + 1)
    judge_pid = cluster.task("judge_server", ["n3"])
    asked = time.time()
    os.kill(judge_pid, signal.SIGKILL)
    story.wait(lambda: story.restarts() == 5, "the requeue after the judge died")
    saved, lost = story.saved_and_lost("judge killed", asked)
    assert saved > before and lost == 0

    story.release(5)
    before = saved
    story.wait(lambda: (checkpoint_step(story.ampo) or 0) > before, "a checkpoint")
    asked = time.time()
    cluster.kill_node("n2")
    story.wait(lambda: story.restarts() == 6, "the requeue after a node died")
    saved, lost = story.saved_and_lost("node killed", asked)
    assert saved > before and lost <= SAVE_EVERY
    cluster.start_node("n2")
    wait_for(lambda: cluster.idle_nodes() == 3, 60, "the node to come back")
    # Not at once: the controller still owes the dead node the end of the last attempt, and would tell it to this one.
    story.release(6, now=False)
    assert wait_for_end(cluster, job) == "COMPLETED", output(cluster, job)[-6000:]

    assert [row["step"] for row in read_jsonl(story.ampo / "metrics.jsonl")] == list(range(STEPS))
    ends = [row["reason"] for row in AttemptLog(run_dir).rows() if row["event"] == "end"]
    limit, warned = "stopped at a checkpoint before the time limit", "asked to stop before the time limit"
    assert ends.pop(5) in ("ampo failed", "asked to end")  # whoever saw the dead node first: the other rank, or Slurm
    assert ends == [limit, warned, warned, warned, "the judge died", "finished"]
    assert {path.name for path in (run_dir / "logs").iterdir()} == {f"{job}-{attempt}" for attempt in range(7)}
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
            job = submit(cluster, "ampo.sh", str(path), options=["--time=30", "--nodelist=n1,n2"], servers=0)
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
        job = submit(cluster, "ampo.sh", str(path), options=["--time=30"], servers=0)
        # One stage is done, so that the attempt would be worth another one.
        wait_for(lambda: (run_dir / "world" / "pack.json").exists(), 90, "the first stage")
        cluster.check("scancel", job)
        wait_for(lambda: not cluster.call("squeue", "--noheader", f"--jobs={job}").stdout.strip(), 60, "the job to be gone")
    assert cluster.state(job) == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"
    # The batch script may outlive its job by a moment.
    wait_for(lambda: AttemptLog(run_dir).rows()[-1]["event"] == "end", 30, "the last entry of the diary")
    assert AttemptLog(run_dir).rows()[-1]["reason"] == "asked to end"
