"""A rehearsal against real ranks over gloo: the same collectives, call by call, and the same peak of tensor memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forking import torchrun_environment

from nemo_ampo.serve.local import free_port

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = SUPPORT.parents[1]
LAYOUTS = {"tensor": "model.tensor_model_parallel_size=2", "pipeline": "model.pipeline_model_parallel_size=2", "data": ""}


def carried_out(how: str, folder: Path, layout: str) -> list[dict[str, Any]]:
    port = free_port("127.0.0.1")
    words = [
        *(sys.executable, str(SUPPORT / "rehearsed.py"), how, str(folder / f"{how}.json"), "ampo", "tiny", "2", "256"),
        *("model.micro_batch_size=2", "rollout.engine=trtllm_server", "rollout.trtllm_server.url=http://nobody.invalid:1"),
        *([LAYOUTS[layout]] if LAYOUTS[layout] else []),
    ]
    started = [
        subprocess.Popen(words, cwd=ROOT, env=os.environ | torchrun_environment(rank, 2, port) | {"PYTHONPATH": str(ROOT)})
        for rank in range(2)
    ]
    assert [process.wait(600) for process in started] == [0, 0]
    return [json.loads((folder / f"{how}.{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rehearsal_is_what_real_ranks_do(layout: str, tmp_path: Path) -> None:
    real, rehearsed = carried_out("real", tmp_path, layout), carried_out("rehearsed", tmp_path, layout)
    for found, expected in zip(rehearsed, real, strict=True):
        assert len(expected["calls"]) > 10
        assert found["calls"] == expected["calls"]
        assert found["peaks"] == pytest.approx(expected["peaks"], rel=0.1)


@pytest.mark.parametrize("layout", ["", "model.pipeline_model_parallel_size=2"])
def test_the_arithmetic_of_the_plan_agrees_with_what_is_carried_out(layout: str) -> None:
    command = "from nemo_ampo.commands.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", command, "rehearse", "ampo", "--config-name", "qwen2.5_7b", "--gpus", "8", "--rank", "0"]
    done = subprocess.run(
        [*words, *([layout] if layout else [])],
        **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 600},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (carried,) = re.findall(r"^fits: ([\d.]+) GB of 80", done.stdout, re.M)
    (counted,) = re.findall(r"^by arithmetic .*: ([\d.]+) GB", done.stdout, re.M)
    assert float(counted) == pytest.approx(float(carried), rel=0.05)
