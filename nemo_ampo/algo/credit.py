"""From scored samples to the advantage of every token: who is compared, who is trained on, which tokens get what.

Joins the pure parts (:mod:`nemo_ampo.algo.advantage`, the KL penalty in the reward) under the knobs of
:class:`~nemo_ampo.algo.algorithm.AlgorithmConfig`. Legend: B samples of the job or of one replica, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_ampo.algo.advantage import GroupReport, decided_groups, group_levels
from nemo_ampo.algo.algorithm import AlgorithmConfig, JudgeFailure, Kl, ModeCredit
from nemo_ampo.algo.loss import kl_estimate
from nemo_ampo.ranks import Ranks, slice_for
from nemo_ampo.reply.grammar import mode_line
from nemo_ampo.reply.modes import NO_MODE

if TYPE_CHECKING:
    from nemo_ampo.types import Sample, Tokenizer


@dataclass(frozen=True)
class Shares:
    """What the samples of one replica are trained with.

    Attributes:
        sample_B, mode_B: the two levels of the advantage, float32.
        trained_B: False for samples that the loss leaves out.
        mode_tokens: response tokens that carry the mode level, first and last-plus-one; None puts it on all tokens.
    """

    sample_B: Tensor
    mode_B: Tensor
    trained_B: Tensor
    mode_tokens: Sequence[tuple[int, int]] | None

    def per_token(self, mask_BT: Tensor) -> Tensor:
        """Advantage of each token [B, T]; what stands outside the response is for the loss to leave out.

        Args:
            mask_BT: True on the response, one unbroken run in each row.
        """
        if self.mode_tokens is None:
            return (self.sample_B + self.mode_B)[:, None].expand(mask_BT.shape)
        position_BT = torch.arange(mask_BT.size(1)) - mask_BT.int().argmax(1, keepdim=True)
        spans_B2 = torch.tensor(self.mode_tokens).view(-1, 2)
        names_mode_BT = (position_BT >= spans_B2[:, :1]) & (position_BT < spans_B2[:, 1:])
        return self.sample_B[:, None] + names_mode_BT * self.mode_B[:, None]


@dataclass(frozen=True)
class Credit:
    """Both levels for every sample of the job, and what was left out.

    Attributes:
        shares: of all samples.
        report: what the advantage did in each group.
        decided_B: samples of groups in which every outcome is the same.
        decided_groups: how many groups those are.
    """

    shares: Shares
    report: GroupReport
    decided_B: Tensor
    decided_groups: int

    @property
    def advantages(self) -> Tensor:
        """Advantage of each sample [B], 0 where it is not trained on; the mode level counts whichever tokens carry it."""
        return torch.where(self.shares.trained_B, self.shares.sample_B + self.shares.mode_B, 0.0)

    def share(self, ranks: Ranks) -> Shares:
        """What this replica's own samples are trained with."""
        rows = slice_for(range(len(self.decided_B)), ranks.data_rank, ranks.data_size)
        spans = self.shares.mode_tokens
        return Shares(
            self.shares.sample_B[rows],
            self.shares.mode_B[rows],
            self.shares.trained_B[rows],
            None if spans is None else [spans[row] for row in rows],
        )

    def metrics(self) -> dict[str, float]:
        """The ``train/`` metrics."""
        count = max(len(self.decided_B), 1)
        return {
            "train/decided_groups": float(self.decided_groups),
            "train/decided_fraction": float(self.decided_B.sum()) / count,
            "train/sample_fraction": float(self.shares.trained_B.sum()) / count,
        }


def assign_credit(samples: Sequence[Sample], penalties_B: Sequence[float], rules: AlgorithmConfig) -> Credit:
    """Compare samples within their groups.

    Args:
        samples: of the whole job, groups complete.
        penalties_B: KL penalty of each, see :func:`kl_penalties`.
        rules: of the algorithm.
    """
    valid_B = torch.tensor([s.parts.valid for s in samples])
    modes_B = torch.tensor([s.parts.mode for s in samples])
    if rules.judge_failure == JudgeFailure.zero:
        modes_B = torch.where(valid_B, modes_B, NO_MODE)
        valid_B = torch.ones_like(valid_B)
    groups_B = torch.tensor([s.group for s in samples])
    rewards_B = torch.tensor([s.parts.reward or 0.0 for s in samples], dtype=torch.float64)
    levels = group_levels(
        rewards_B - torch.tensor(penalties_B, dtype=torch.float64),
        modes_B,
        torch.tensor([float(s.num_tokens) for s in samples]),
        groups_B,
        valid_B,
        rules,
    )
    goals_B = torch.tensor([torch.nan if s.parts.goal is None else s.parts.goal for s in samples], dtype=torch.float64)
    decided_B = decided_groups(goals_B, groups_B, valid_B)
    return Credit(
        shares=Shares(
            levels.sample_B.float(),
            levels.mode_B.float(),
            valid_B & ~decided_B if rules.drop_decided_groups else valid_B,
            [s.mode_tokens for s in samples] if rules.mode_credit == ModeCredit.mode_tokens else None,
        ),
        report=levels.report,
        decided_B=decided_B,
        decided_groups=len(groups_B[decided_B].unique()),
    )


def kl_penalties(
    logprobs_BT: Tensor | None, ref_logprobs_BT: Tensor, mask_BT: Tensor, rules: AlgorithmConfig
) -> list[float]:
    """What ``kl=in_reward`` takes off each reward: kl_coef times the estimates summed over the response; else 0.

    Args:
        logprobs_BT: of the policy before the update; None where nothing reads them.
        ref_logprobs_BT: of the reference policy.
        mask_BT: the response tokens.
        rules: ``kl``, ``kl_coef`` and ``kl_kind`` are read.
    """
    if rules.kl != Kl.in_reward:
        return [0.0] * len(mask_BT)
    assert logprobs_BT is not None
    kl_BT = kl_estimate(logprobs_BT, ref_logprobs_BT, rules.kl_kind, mask_BT)
    return (rules.kl_coef * kl_BT.double().sum(-1)).tolist()


def mode_token_span(token_ids: Sequence[int], text: str, mode: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that write ``Thinking Level: K``: first and last-plus-one, (0, 0) for a reply without a mode.

    Args:
        token_ids: of the response.
        text: their decoded text without special tokens.
        mode: 1..4, or 0.
        tokenizer: that decodes them.
    """
    if mode == NO_MODE:
        return 0, 0
    begin, end = mode_line(text, mode)

    def num_characters(num_tokens: int) -> int:
        return len(tokenizer.decode(token_ids[:num_tokens], skip_special_tokens=True))

    # The line is usually the first thing written: look in a short prefix, and in the whole response only if it is later.
    counts = range(len(token_ids) + 1)
    limit = 16
    while limit < len(token_ids) and num_characters(limit) < end:
        limit *= 4
    counts = counts[: limit + 1]
    return bisect_right(counts, begin, key=num_characters) - 1, bisect_left(counts, end, key=num_characters)
