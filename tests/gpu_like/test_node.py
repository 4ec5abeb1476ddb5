"""A GPU node's model on two ranks; and each fix taken away once, to see that its test would fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def test_the_model_is_the_one_a_gpu_runs(ranks: list[dict[str, Any]]) -> None:
    names = {"SelfAttention", "TEDotProductAttention", "TELayerNormColumnParallelLinear", "MLP", "RMSNorm"}
    for rank in ranks:
        assert set(rank["classes"]) == names | {"torch.bfloat16"}


def test_a_file_converted_on_a_cpu_loads_into_transformer_engine(ranks: list[dict[str, Any]]) -> None:
    # The oracle is transformers on the same folder; bf16 keeps three digits.
    for found, expected in zip(ranks[0]["logprobs"], ranks[0]["oracle"], strict=True):
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().mean() < 0.05
    assert all("core_attention._extra_state" in rank["extra_states_undone"] for rank in ranks)


def test_passes_without_gradients_work_with_sequence_parallelism(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [len(rows[0]) for rows in rank["logprobs"]] == [31, 32, 6]
        assert rank["logprobs"] == ranks[0]["logprobs"]
        assert set(rank["scatters"]) == {True}, "training scatters again afterwards"
        assert all(rank["embeddings_undone"])


def test_the_gradient_of_a_split_sequence_is_that_of_all_positions(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["gradients"]["gap"] < 0.02 * rank["gradients"]["largest"]


def test_generation_does_not_read_memory_nobody_wrote(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        tokens, gap = rank["generated"]
        assert tokens > 9 and gap < 0.2
        assert rank["cache_undone"]


def test_a_checkpoint_holds_what_the_device_held(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["saved"] == 0
        assert rank["saved_undone"] > 0
        assert rank["saved_verified"] == ""
        assert "on the disk is not what it is in memory" in rank["saved_undone_verified"], "and would be noticed"


def test_nothing_asks_for_tensorrt_llm(ranks: list[dict[str, Any]]) -> None:
    assert not any(rank["tensorrt_llm"] for rank in ranks)
