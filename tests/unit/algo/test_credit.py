"""Which samples are compared and trained on, and which tokens carry what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nemo_ampo.algo.algorithm import AlgorithmConfig
from nemo_ampo.algo.credit import Shares, assign_credit, mode_token_span
from nemo_ampo.ranks import OneProcess
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.types import RewardParts, Sample


def sample(group: int, reward: float | None, goal: float | None = None, mode: int = 1) -> Sample:
    parts = RewardParts(reward, goal, None, mode, reward is not None)
    return Sample(
        group=group,
        row_id="row",
        turn=0,
        dialogue="",
        tag=None,
        text="",
        num_tokens=10,
        answer_tokens=5,
        finish="eos",
        parts=parts,
        mode_tokens=(1, 3),
    )


# Group 0: a verdict is missing. Group 1: every goal is the same, though length told the rewards apart.
SAMPLES = [
    sample(0, 1.0, 1.0),
    sample(0, None),
    sample(0, 0.0, 0.2),
    sample(1, 0.5, 0.5),
    sample(1, 0.4, 0.5),
    sample(1, 0.3, 0.5),
]


def credit(samples: Sequence[Sample] = SAMPLES, penalties: Sequence[float] = (0.0,) * 6, **knobs: Any) -> Any:
    return assign_credit(samples, penalties, AlgorithmConfig(advantage="grpo", scale="none", **knobs))  # type: ignore[arg-type]


def test_a_failed_judge_is_left_out_of_the_group_and_of_the_loss() -> None:
    found = credit()
    assert found.shares.sample_B.tolist() == pytest.approx([0.5, 0.0, -0.5, 0.1, 0.0, -0.1])
    assert found.shares.trained_B.tolist() == [True, False, True, True, True, True]
    assert found.metrics() == pytest.approx(
        {"train/decided_groups": 1, "train/decided_fraction": 0.5, "train/sample_fraction": 5 / 6}
    )


def test_as_zero_it_is_a_bad_reply_without_a_mode() -> None:
    found = credit(judge_failure="zero")
    assert found.shares.sample_B[:3].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert found.shares.trained_B.all()
    paper = assign_credit(SAMPLES, [0.0] * 6, AlgorithmConfig(judge_failure="zero"))  # type: ignore[arg-type]
    assert paper.report.reasons[0] == "invalid_sample"  # so it takes the mode level of its whole group along


def test_decided_groups_are_left_out_of_the_loss_alone() -> None:
    found = credit(drop_decided_groups=True)
    assert found.shares.trained_B.tolist() == [True, False, True, False, False, False]
    assert found.advantages.tolist() == pytest.approx([0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    assert found.metrics()["train/sample_fraction"] == pytest.approx(2 / 6)


def test_a_penalty_is_taken_off_the_reward() -> None:
    assert credit(penalties=[0.2, 9.0, 0.0, 0.0, 0.0, 0.3]).shares.sample_B.tolist() == pytest.approx(
        [0.4, 0.0, -0.4, 0.2, 0.1, -0.3]
    )


def test_each_replica_gets_its_own_rows() -> None:
    found = credit(mode_credit="mode_tokens")
    shares = [found.share(OneProcess(data_rank=rank, data_size=3)) for rank in range(3)]
    assert torch.cat([s.sample_B for s in shares]).equal(found.shares.sample_B)
    assert torch.cat([s.trained_B for s in shares]).equal(found.shares.trained_B)
    assert [len(s.mode_tokens or []) for s in shares] == [2, 2, 2]


def test_tokens_that_name_the_mode_carry_its_term_by_hand() -> None:
    """Responses of 4 and 3 tokens; tokens 1 and 2 of the first name its mode, none of the second does."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    levels = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 4.0])
    trained = torch.ones(2, dtype=torch.bool)
    own = Shares(*levels, trained, [(1, 3), (0, 0)]).per_token(mask)
    assert (own * mask).tolist() == [[0, 0.5, 2.5, 2.5, 0.5, 0], [-1, -1, -1, 0, 0, 0]]
    whole = Shares(*levels, trained, None).per_token(mask)
    assert (whole * mask).tolist() == [[0, 2.5, 2.5, 2.5, 2.5, 0], [3, 3, 3, 0, 0, 0]]


class Pieces:
    """A tokenizer with words of up to three characters as tokens; a leading tag of its own is skipped on request."""

    def __init__(self, text: str) -> None:
        self.words = ["<s>", *(text[i : i + 3] for i in range(0, len(text), 3))]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[i] for i in token_ids if not (skip_special_tokens and i == 0))

    def tokenize(self, text: str) -> list[str]:
        raise AssertionError("the tokens that name the mode are found by decoding alone")


@pytest.mark.parametrize("before", ["", "Hm. ", "A long preamble, as loose grammar tolerates it. " * 9])
@pytest.mark.parametrize("mode", [1, 2])
def test_the_tokens_that_name_the_mode_are_found(before: str, mode: int) -> None:
    thinking = {"Intent": "win", "Style": "calm", "Response": "yes"} if mode == 2 else None
    text = before + render_reply(mode, '"Yes, gladly."', thinking)
    pieces = Pieces(text)
    ids = list(range(len(pieces.words)))
    begin, end = mode_token_span(ids, text, mode, pieces)
    named = pieces.decode(ids[begin:end], skip_special_tokens=True)
    assert f"Thinking Level: {mode}" in named
    assert len(named) < len(f"Thinking Level: {mode}") + 6  # no more than the tokens that touch it
    assert mode_token_span(ids, text, 0, pieces) == (0, 0)
