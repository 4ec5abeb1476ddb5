"""What the tests of this folder share: a checkpoint converted on a GPU node, and what two of its ranks measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import CPU_OF_GPU_NODE, GPU_NODE, convert, run_nemo
from tiny_hf import write_model


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("node")
    convert(write_model(folder / "hf", "qwen2", True), folder / "model.nemo", machine=CPU_OF_GPU_NODE)
    finished = run_nemo([Path(__file__).parent / "node_jobs.py", folder], ranks=2, machine=GPU_NODE)
    assert finished.status == 0, finished.err[-8000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
