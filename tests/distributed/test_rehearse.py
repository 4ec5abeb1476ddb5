"""A rehearsal against real ranks over gloo: the same collectives, call by call, and the same peak of tensor memory.

The real ranks' peak is counted twice, pass by pass as a rehearsal counts it and by torch's MemTracker.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forking import meeting_port, torchrun_environment

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = SUPPORT.parents[1]
SERVED = ["rollout.engine=trtllm_server", "rollout.trtllm_server.url=http://nobody.invalid:1"]
BUDGET = ["model.tokens_per_micro_batch=512", "model.micro_batch_size=1", "model.data.validation_ds.micro_batch_size=1"]
JOBS = {
    "tensor": ("ampo", [*SERVED, "model.tensor_model_parallel_size=2"]),
    "pipeline": ("ampo", [*SERVED, "model.pipeline_model_parallel_size=2"]),
    "data": ("ampo", SERVED),
    "cloning": ("bc", ["model.tensor_model_parallel_size=2", *BUDGET]),
}


def carried_out(how: str, folder: Path, stage: str, overrides: list[str]) -> list[dict[str, Any]]:
    port = meeting_port()
    words = [
        *(sys.executable, str(SUPPORT / "rehearsed.py"), how, str(folder / f"{how}.json"), stage, "tiny", "2", "256"),
        *("model.micro_batch_size=2", *overrides),
    ]
    started = [
        subprocess.Popen(words, cwd=ROOT, env=os.environ | torchrun_environment(rank, 2, port) | {"PYTHONPATH": str(ROOT)})
        for rank in range(2)
    ]
    assert [process.wait(600) for process in started] == [0, 0]
    return [json.loads((folder / f"{how}.{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("job", JOBS)
def test_a_rehearsal_is_what_real_ranks_do(job: str, tmp_path: Path) -> None:
    real, rehearsed = carried_out("real", tmp_path, *JOBS[job]), carried_out("rehearsed", tmp_path, *JOBS[job])
    for found, expected in zip(rehearsed, real, strict=True):
        assert len(expected["calls"]) > 10
        assert found["calls"] == expected["calls"]
        assert found["peaks"] == pytest.approx(expected["peaks"], rel=0.1)
        assert found["peak"] == pytest.approx(expected["peak"], rel=0.1)


def rehearse(stage: str, *words: str) -> tuple[int, str]:
    """Exit status and output."""
    command = "from nemo_ampo.commands.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "rehearse", stage, "--config-name", "qwen2.5_7b", "--rank", "0", *words],
        **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 600},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("stage", "layout"), [("ampo", []), ("ampo", ["model.pipeline_model_parallel_size=2"]), ("bc", [])])
def test_the_arithmetic_of_the_plan_agrees_with_what_is_carried_out(stage: str, layout: list[str]) -> None:
    status, text = rehearse(stage, "--gpus", "8", *layout)
    assert status == 0, text
    (carried,) = re.findall(r"^fits: ([\d.]+) GB of 80", text, re.M)
    (counted,) = re.findall(r"^by arithmetic .*: ([\d.]+) GB", text, re.M)
    assert float(counted) == pytest.approx(float(carried), rel=0.05)


def test_what_does_not_fit_is_exit_status_1() -> None:
    """Seven billion parameters with all of Adam's states on one card."""
    alone = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    status, text = rehearse("bc", "--gpus", "1", *alone)
    assert status == 1, text
    assert re.search(r"^DOES NOT FIT: \d{3}\.\d GB of 80, a tenth of which is left free$", text, re.M)
    assert "longest rows that fit: 0 tokens" in text
