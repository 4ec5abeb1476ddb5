"""What a GPU node can import and a stage must not: each substitute that keeps it away, there and taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nemo_process import CPU_OF_GPU_NODE, GPU_NODE, HERE, Machine, environment_of
from tiny_hf import write_model

pytestmark = pytest.mark.slow
STAND_IN = HERE / "trtllm_stand_in"
ACTOR = """
import sys
from nemo_ampo import compat
compat.setup("gpu")
import nemo_ampo.training.actor
print("tensorrt_llm" in sys.modules)
"""


def run(machine: Machine, undone: str, *command: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(Path(__file__).parent / "undo.py"), undone, *map(str, command)]
    return subprocess.run(words, env=os.environ | environment_of(machine, path), capture_output=True, text=True)


@pytest.mark.parametrize("undone", ["nothing", "apex, amp_C, transformer_engine"])
def test_a_conversion_on_a_gpu_nodes_cpu_takes_no_gpu_extension(undone: str, tmp_path: Path) -> None:
    hf, nemo = write_model(tmp_path / "hf", "qwen2", True), tmp_path / "model.nemo"
    words = ("converters.hf_to_nemo", "--input", hf, "--output", nemo)  # the comparison of logits builds a model
    process = run(CPU_OF_GPU_NODE, undone, *words)
    assert (process.returncode == 0, nemo.exists()) == ((True, True) if undone == "nothing" else (False, False)), (
        process.stderr
    )
    if undone != "nothing":
        assert "FusedLayerNorm" in process.stderr, "Apex has no RMSNorm"


@pytest.mark.parametrize("undone", ["nothing", "nemo_aligner.utils.trt_llm"])
@pytest.mark.parametrize("there", [False, True])
def test_the_policy_does_not_ask_for_tensorrt_llm(undone: str, there: bool, tmp_path: Path) -> None:
    script = tmp_path / "actor.py"
    script.write_text(ACTOR)
    process = run(GPU_NODE, undone, script, path=STAND_IN if there else None)
    if undone == "nothing":
        assert (process.returncode, process.stdout) == (0, "False\n"), process.stderr
    elif there:
        assert (process.returncode, process.stdout) == (0, "True\n"), process.stderr
    else:
        assert process.returncode == 1 and "No module named 'tensorrt_llm'" in process.stderr
