"""A budget of tokens per micro-batch changes what is run together, and no number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nemo_process import convert, run_nemo
from tiny_hf import write_model

pytestmark = pytest.mark.slow

LAYOUTS = {"TP1": (1, 1, 1), "TP2": (2, 2, 1), "DP2": (2, 1, 1), "PP2": (2, 1, 2)}
"""Ranks, tensor and pipeline parallel size."""


@dataclass(frozen=True)
class Measured:
    """What every rank of one layout found."""

    layout: str
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    return convert(write_model(folder / "hf", "qwen2", False), folder / "model.nemo")


@pytest.fixture(scope="module", params=LAYOUTS)
def measured(request: pytest.FixtureRequest, nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    ranks, *layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model.nemo").symlink_to(nemo)
    finished = run_nemo([Path(__file__).parent / "budget_jobs.py", folder, *layout], ranks=ranks)
    assert finished.status == 0, finished.err[-4000:]
    return Measured(request.param, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)])


@pytest.mark.parametrize("case", ["token_mean", "sequence_mean", "constant", "bc"])
def test_losses_and_gradients_are_the_same_for_every_split(measured: Measured, case: str) -> None:
    for rank in measured.ranks:
        found = rank[case]
        assert found["largest"] > 1e-4
        assert list(found["loss"].values()) == pytest.approx([found["loss"]["1 row"]] * len(found["loss"]), abs=1e-6)
        assert max(found["gap"].values()) < 1e-6, found["gap"]


def test_means_over_micro_batches_are_another_loss_for_every_split(measured: Measured) -> None:
    """Why the budget is refused beside algorithm.aggregate_over=micro_batch."""
    losses = measured.ranks[0]["means over micro-batches"]["loss"]
    assert abs(losses["80 tokens"] - losses["1 row"]) > 1e-3
    assert abs(losses["one micro-batch"] - losses["80 tokens"]) > 1e-3


def test_log_probabilities_of_policy_and_reference_are_those_of_all_positions_for_every_split(measured: Measured) -> None:
    for rank in measured.ranks:
        assert max(rank["logprobs"].values()) < 2e-6, rank["logprobs"]


def test_cloning_has_the_loss_and_the_gradients_of_the_class_it_extends(measured: Measured) -> None:
    for rank in measured.ranks:
        for ours, theirs, gap in rank["bc and upstream"].values():
            assert ours == pytest.approx(theirs, abs=1e-6) and gap < 2e-6


def test_all_replicas_run_equally_many_micro_batches(measured: Measured) -> None:
    for name in ("48 tokens", "80 tokens", "one micro-batch"):
        alone, run = zip(*(rank["micro_batches"][name] for rank in measured.ranks), strict=True)
        assert set(run) == {max(alone)}
    counts = [rank["micro_batches"]["48 tokens"] for rank in measured.ranks]
    if measured.layout == "DP2":
        assert counts[0][0] != counts[1][0], "without the agreement they would run unequal numbers"
