"""The TensorRT-LLM engine on a GPU node: what it reads has arrived, it has room, and all ranks refuse together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import CPU_OF_GPU_NODE, GPU_NODE, HERE, convert, run_nemo
from tiny_hf import write_model

pytestmark = pytest.mark.slow
STAND_IN = HERE / "trtllm_stand_in"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trtllm")
    convert(write_model(folder / "hf", "qwen2", tied=False, vocab_size=516), folder / "model.nemo", machine=CPU_OF_GPU_NODE)
    finished = run_nemo([Path(__file__).parent / "trtllm_jobs.py", folder], 2, STAND_IN, GPU_NODE)
    assert finished.status == 0, finished.err[-8000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_where_mpi_knows_no_ranks_all_of_them_refuse(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["no_mpi"].startswith(
            "ConfigError: rank 1: rollout.engine: TensorRT-LLM sees MPI rank 0 where torch has 1"
        )
    went_on, refused = (rank["no_mpi_undone"] for rank in ranks)
    assert went_on == "RuntimeError: waits for the others" and refused.startswith(
        "ConfigError: rollout.engine: TensorRT-LLM"
    )


def test_the_engine_is_built_and_refitted_from_what_has_arrived(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert all(gap < 0.2 for gap in rank["gaps"])
        assert rank["gaps_undone"]


def test_the_trainers_cached_memory_is_free_before_the_engine_is_loaded(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["order"] == ["empty", "load"] for rank in ranks)
