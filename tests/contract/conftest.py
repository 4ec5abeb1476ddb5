"""Runs ``contract_jobs.py`` once per family, and once on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import convert, run_nemo
from tiny_hf import write_model

JOBS = Path(__file__).parent / "contract_jobs.py"
STAND_IN = JOBS.parents[1] / "support" / "trtllm_stand_in"
VOCAB = 516  # more than the tokenizer's 259 tokens, and divisible by two ranks
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""A scaling that bites within the tests' short prompts, with the 32 positions below."""


def measure(family: str, folder: Path, ranks: int = 1) -> dict[str, Any]:
    changes = {"rope_scaling": ROPE | {"original_max_position_embeddings": 32}} if family == "llama" else {}
    convert(write_model(folder / "hf", family, tied=False, vocab_size=VOCAB, **changes), folder / "model.nemo", STAND_IN)
    finished = run_nemo([JOBS, family, folder], ranks, STAND_IN)
    assert finished.status == 0, finished.err[-6000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {family: measure(family, tmp_path_factory.mktemp(family)) for family in ("qwen2", "llama")}


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure("qwen2", tmp_path_factory.mktemp("two"), ranks=2)
