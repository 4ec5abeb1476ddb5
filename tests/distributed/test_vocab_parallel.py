"""Log-probabilities and entropies from split logits are those of the whole vocabulary, and so are their gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import run_nemo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("vocab")
    finished = run_nemo([Path(__file__).parent / "vocab_jobs.py", folder], ranks=request.param)
    assert finished.status == 0, finished.err[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_values_and_gradients_are_those_of_the_whole_vocabulary(ranks: list[dict[str, Any]], weights: Any) -> None:
    for rank in ranks:
        assert max(rank[f"float32 {weights}"]) < 2e-6
        logprobs, entropy, gradient = rank[f"bfloat16 {weights}"]
        assert max(logprobs, entropy) < 2e-6 and gradient < 0.02, "the gradient is rounded to bf16 once"


def test_stretches_change_nothing(ranks: list[dict[str, Any]]) -> None:
    assert all(rank[f"{kind} stretches"] == 0 for rank in ranks for kind in ("float32", "bfloat16"))


def test_the_logits_stay_in_their_type(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["bfloat16 types"] == ["torch.float32", "torch.float32", "torch.bfloat16"]
        assert rank["float32 finite"] and rank["bfloat16 finite"]
