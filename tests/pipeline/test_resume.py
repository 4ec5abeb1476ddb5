"""Stopped by Ctrl-C and continued equals never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_runs import AMPO, AMPO_STEPS, ROOT, Quickstart

from nemo_ampo.demo_judge import demo_judge_process
from nemo_ampo.runlog import read_jsonl

pytestmark = pytest.mark.slow


def wait_for_steps(process: subprocess.Popen[bytes], path: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_jsonl(path)) < steps:
        assert process.poll() is None, "the stage ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_leaves_a_folder_that_continues_exactly(quickstart: Quickstart, tmp_path: Path) -> None:
    folder = tmp_path / "ampo"
    with demo_judge_process() as url:
        command = [
            *(sys.executable, "-m", "recipes.ampo", "--config-name", "tiny", f"run.dir={folder}", f"judge.base_url={url}"),
            f"run.init_from={quickstart.folder / 'bc' / 'policy.nemo'}",
            f"data.train={quickstart.folder / 'world' / 'rl_train.jsonl'}",
            *AMPO,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        wait_for_steps(process, folder / "metrics.jsonl", 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        done = len(read_jsonl(folder / "metrics.jsonl"))
        assert process.returncode == 75, errors.decode()
        assert b"the same command continues" in errors
        assert 1 <= done < AMPO_STEPS
        assert not (folder / "policy.nemo").exists()
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    resumed = read_jsonl(folder / "metrics.jsonl")
    straight = read_jsonl(quickstart.folder / "ampo" / "metrics.jsonl")
    assert [r["step"] for r in resumed] == list(range(AMPO_STEPS))
    for mine, other in zip(resumed, straight, strict=True):
        for name in ("reward/mean", "tokens/response", "mode/1/share", "policy/loss", "policy/kl", "policy/grad_norm"):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), (mine["step"], name)
    texts = [[r["text"] for r in read_jsonl(f / "rollouts.jsonl")] for f in (folder, quickstart.folder / "ampo")]
    assert texts[0] == texts[1]
