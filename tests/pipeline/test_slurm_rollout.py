"""A job of three groups on a real Slurm: trainer, judge and rollout server, of which the server is killed once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import missing_reason, slurm_cluster
from slurm_jobs import AMPO, Story, output, recipe, started_with_a_clone, submit, wait_for_end
from stage_runs import ROOT, Quickstart

from nemo_ampo.files import read_jsonl
from nemo_ampo.job.attempts import AttemptLog

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(missing_reason() is not None, reason=f"no private Slurm: {missing_reason()}"),
]
STEPS = 6


def stand_in(folder: Path) -> Path:
    """What runs in place of the Python of TensorRT-LLM's container."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/support/rollout_stand_in.py "$@"\n')
    path.chmod(0o755)
    return path


def test_the_rollout_server_is_a_group_of_the_job_and_its_death_loses_nothing(
    quickstart: Quickstart, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    run_dir = tmp_path / "run"
    started_with_a_clone(quickstart, run_dir)
    keys = [f"trainer.reinforce.max_steps={STEPS}", "trainer.reinforce.save_interval=100", "rollout.engine=trtllm_server"]
    path = recipe(tmp_path, run_dir, ampo={"config": "tiny", "overrides": [*AMPO, *keys]}, rollout={"start_s": 120})
    server = {"ROLLOUT_PYTHON": str(stand_in(tmp_path)), "ROLLOUT_GPUS": "0", "AMPO_RANKS_PER_NODE": "2"}
    with slurm_cluster() as cluster:
        job = submit(cluster, "ampo.sh", str(path), options=["--time=30"], servers=2, nodes=1, **server)
        story = Story(cluster, run_dir, job, measured)
        story.wait(lambda: cluster.state(job) == "RUNNING", "the start")
        story.until_trained(2)
        said = output(cluster, job)
        order = ["rollout server: answers at http://", "preflight: ok: 2 ranks", " ampo: srun"]
        assert sorted(order, key=said.index) == order
        server_pid = cluster.task("rollout_stand_in")
        asked = time.time()
        os.kill(server_pid, signal.SIGKILL)
        story.wait(lambda: story.restarts() == 1, "the requeue after the rollout server died")
        saved, lost = story.saved_and_lost("rollout server killed", asked)
        assert 2 <= saved < STEPS and lost == 0
        story.release(1)
        assert wait_for_end(cluster, job) == "COMPLETED", output(cluster, job)[-6000:]

    assert [row["step"] for row in read_jsonl(story.ampo / "metrics.jsonl")] == list(range(STEPS))
    gaps = [row["engine/logprob_gap"] for row in read_jsonl(story.ampo / "metrics.jsonl")]
    assert max(gaps) < 1e-3, "the server drew with the trainer's weights"
    ends = [row["reason"] for row in AttemptLog(run_dir).rows() if row["event"] == "end"]
    assert ends == ["the rollout server died", "finished"]
    assert (run_dir / "evaluate" / "ampo.json").exists()
