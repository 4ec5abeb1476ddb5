"""Two real ranks: the loss of a batch is one number however it is split, and no rank steps on a bad gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import convert, run_nemo
from tiny_hf import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("update")
    convert(write_model(folder / "hf", "qwen2", True), folder / "model.nemo")
    finished = run_nemo([Path(__file__).parent / "update_jobs.py", folder], ranks=2)
    assert finished.status == 0, finished.err[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant"])
def test_a_mean_over_the_batch_does_not_see_replicas_or_micro_batches(ranks: list[dict[str, Any]], aggregate: str) -> None:
    for rank in ranks:
        found = rank[aggregate]
        assert found["loss"] == pytest.approx(found["oracle"]["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(found["oracle"]["grad_norm"], rel=2e-5)
    assert ranks[0][aggregate] == ranks[1][aggregate]


def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_on_any(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        on_one, on_the_other, clean = rank["skip"]
        assert (on_one["skipped"], on_one["moved"]) == (1, 0)
        assert (on_the_other["skipped"], on_the_other["moved"]) == (1, 0)
        assert clean["skipped"] == 0 and clean["moved"] > 1e-4


def test_the_ranks_stay_equal(ranks: list[dict[str, Any]]) -> None:
    first, second = ([step["weights"] for step in rank["skip"]] for rank in ranks)
    assert first == second and all(abs(weights) < 1e9 for weights in first)
