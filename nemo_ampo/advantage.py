"""Group-relative advantages: GRPO's sample level, and AMPO's mode level on top of it.

A *group* is all responses to one prompt. The sample level asks whether a response was better than the others
of its group; the mode level asks whether its thinking mode was, and where no mode earned more than another it
prefers the mode that got there in fewer tokens. Both levels are plain standard scores, so the file is three
of them on segments.

Samples without a reward (a judge that failed) are ``valid_B = False``: their advantage is 0 and they enter no
statistic. A reply that breaks the grammar has mode 0 and a real, bad reward.

Legend: B samples, G groups, M modes. Inputs are [B] in any order; a group is known by its id, any integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from nemo_ampo.modes import NO_MODE, NUM_MODES

EPSILON = 1e-6
"""Added to every standard deviation before dividing by it."""

EQUAL_MEANS = 1e-6
"""Modes whose mean rewards are all this close to their common mean have earned the same."""


class ModeTerm(IntEnum):
    """Whether a group had a mode-level term, or the first reason why not."""

    ACTIVE = 0
    OFF = 1
    """The algorithm has no mode level."""
    NO_VALID_SAMPLE = 2
    GROUP_OF_ONE = 3
    INVALID_SAMPLE = 4
    """A reply breaks the grammar and so has no mode."""
    MODE_ABSENT = 5
    MODE_TOO_SMALL = 6
    """A mode was used by a single sample."""


@dataclass(frozen=True)
class GroupReport:
    """What happened in each group.

    Attributes:
        group_ids_G: the ids, ascending.
        sizes_G: valid samples.
        state_G: a :class:`ModeTerm` each.
        by_length_G: the modes earned the same, so length decides; meaningful where active.
        mode_term_GM: the term of each mode, 0 where inactive.
    """

    group_ids_G: Tensor
    sizes_G: Tensor
    state_G: Tensor
    by_length_G: Tensor
    mode_term_GM: Tensor

    @property
    def reasons(self) -> list[str]:
        """State of each group by name: ``active``, ``off``, ``group_of_one`` and so on."""
        return [ModeTerm(state).name.lower() for state in self.state_G.tolist()]

    @property
    def branches(self) -> list[str | None]:
        """What told the modes apart: ``reward`` or ``length``, None where the term was inactive."""
        active_G = self.state_G == ModeTerm.ACTIVE
        return [
            ("length" if by_length else "reward") if active else None
            for active, by_length in zip(active_G.tolist(), self.by_length_G.tolist(), strict=True)
        ]


def grpo_advantage(rewards_B: Tensor, groups_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
    """Sample level only: each reward as a standard score within its group (GRPO).

    A = (r - mean(group)) / (std(group) + 1e-6), the standard deviation unbiased. A group of one has mean 0
    and standard deviation 1.

    Args:
        rewards_B: rewards; whatever stands at invalid samples is ignored, NaN included.
        groups_B: integer group ids.
        valid_B: False for samples without a reward; None when all have one.

    Returns:
        Advantages [B], 0 at invalid samples; float64 for float64 rewards, else float32.

    Raises:
        ValueError: shapes differ, or a valid reward is not finite.
    """
    return _advantage(_Batch.of(rewards_B, None, None, groups_B, valid_B))[0]


def ampo_advantage(
    rewards_B: Tensor, modes_B: Tensor, lengths_B: Tensor, groups_B: Tensor, valid_B: Tensor | None = None
) -> Tensor:
    """Sample level plus mode level (AMPO).

    The paper's advantage of a response is the sum of two standard scores: its reward among all responses of
    the group, and its mode's mean reward among the mean rewards of the four modes. When the modes' mean
    rewards are equal the second one is replaced by a bounded bonus for shorter modes. With m_k, l_k the mean
    reward and mean length of mode k in the group, over its valid samples::

        A      = (r - mean(r)) / (std(r) + 1e-6) + term_k        k: mode of the sample
        term_k = (m_k - mean(m)) / (std(m) + 1e-6)               some |m_k - mean(m)| > 1e-6
        term_k = tanh(-(l_k - mean(l)) / (std(l) + 1e-6))        otherwise

    mean(m), std(m), mean(l), std(l) are over the four modes, not weighted by how often they were used; every
    standard deviation is unbiased. A group has the term only if it has more than one valid sample, none of
    them without a mode, and each of the four modes at least twice.

    Args:
        rewards_B: rewards; whatever stands at invalid samples is ignored, NaN included.
        modes_B: integer 1..4, 0 for a reply that breaks the grammar.
        lengths_B: tokens of the whole response.
        groups_B: integer group ids.
        valid_B: False for samples without a reward; None when all have one.

    Returns:
        Advantages [B], 0 at invalid samples; float64 for float64 rewards, else float32.

    Raises:
        ValueError: shapes differ, a mode is outside 0..4, or a valid reward or length is not finite.
    """
    return _advantage(_Batch.of(rewards_B, modes_B, lengths_B, groups_B, valid_B))[0]


AdvantageFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, GroupReport]]
"""(rewards_B, modes_B, lengths_B, groups_B, valid_B) -> (advantages_B, report)."""


def ampo_with_report(
    rewards_B: Tensor, modes_B: Tensor, lengths_B: Tensor, groups_B: Tensor, valid_B: Tensor | None = None
) -> tuple[Tensor, GroupReport]:
    """:func:`ampo_advantage`, and what it did in each group."""
    return _advantage(_Batch.of(rewards_B, modes_B, lengths_B, groups_B, valid_B))


def grpo_with_report(
    rewards_B: Tensor, modes_B: Tensor, lengths_B: Tensor, groups_B: Tensor, valid_B: Tensor | None = None
) -> tuple[Tensor, GroupReport]:
    """:func:`grpo_advantage` under the common signature; every group reports ``off``."""
    return _advantage(_Batch.of(rewards_B, None, None, groups_B, valid_B))


ADVANTAGES: dict[str, AdvantageFn] = {"ampo": ampo_with_report, "grpo": grpo_with_report}
"""The algorithms a configuration can name."""


@dataclass(frozen=True)
class _Batch:
    """Checked inputs, in float64 and 0 at invalid samples; ``modes_B`` is None when modes play no part."""

    rewards_B: Tensor
    modes_B: Tensor | None
    lengths_B: Tensor
    group_ids_G: Tensor
    segments_B: Tensor
    valid_B: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        rewards_B: Tensor,
        modes_B: Tensor | None,
        lengths_B: Tensor | None,
        groups_B: Tensor,
        valid_B: Tensor | None,
    ) -> _Batch:
        if rewards_B.dim() != 1:
            raise ValueError(f"rewards_B must be [B], got {tuple(rewards_B.shape)}")
        named = {"modes_B": modes_B, "lengths_B": lengths_B, "groups_B": groups_B, "valid_B": valid_B}
        for name, tensor in named.items():
            if tensor is not None and tensor.shape != rewards_B.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, rewards_B {tuple(rewards_B.shape)}")
        if modes_B is not None and ((modes_B < NO_MODE) | (modes_B > NUM_MODES)).any():
            raise ValueError(f"modes_B must be in {NO_MODE}..{NUM_MODES}, got {modes_B.unique().tolist()}")
        valid_B = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
        lengths_B = torch.zeros_like(rewards_B) if lengths_B is None else lengths_B
        for name, tensor in (("rewards_B", rewards_B), ("lengths_B", lengths_B)):
            if not tensor[valid_B].isfinite().all():
                raise ValueError(f"{name} is not finite at a sample that valid_B calls valid")
        group_ids_G, segments_B = torch.unique(groups_B, return_inverse=True)
        return cls(
            rewards_B=torch.where(valid_B, rewards_B.detach().double(), 0.0),
            modes_B=None if modes_B is None else modes_B.long(),
            lengths_B=torch.where(valid_B, lengths_B.detach().double(), 0.0),
            group_ids_G=group_ids_G,
            segments_B=segments_B,
            valid_B=valid_B,
            dtype=torch.float64 if rewards_B.dtype == torch.float64 else torch.float32,
        )


def _advantage(batch: _Batch) -> tuple[Tensor, GroupReport]:
    sizes_G = _segment_sum(batch.valid_B.double(), batch.segments_B, len(batch.group_ids_G))
    advantages_B = _sample_level(batch, sizes_G)
    if batch.modes_B is None:
        state_G = torch.full_like(sizes_G, ModeTerm.OFF, dtype=torch.long)
        by_length_G = torch.zeros_like(sizes_G, dtype=torch.bool)
        term_GM = sizes_G.new_zeros(len(sizes_G), NUM_MODES)
    else:
        state_G, by_length_G, term_GM = _mode_level(batch, batch.modes_B, sizes_G)
        # A valid sample of mode 0 reads the column of mode 1: its group has no term, so that column is 0.
        columns_B = (batch.modes_B - 1).clamp(min=0)
        advantages_B = advantages_B + torch.where(batch.valid_B, term_GM[batch.segments_B, columns_B], 0.0)
    term_GM = term_GM.to(batch.dtype)
    report = GroupReport(batch.group_ids_G, sizes_G.long(), state_G, by_length_G, term_GM)
    return advantages_B.to(batch.dtype), report


def _sample_level(batch: _Batch, sizes_G: Tensor) -> Tensor:
    """Standard score of each reward within its group, [B] float64."""
    segments_B = batch.segments_B
    mean_G = _segment_sum(batch.rewards_B, segments_B, len(sizes_G)) / sizes_G.clamp(min=1)
    single_G = sizes_G <= 1
    mean_G = torch.where(single_G, 0.0, mean_G)
    # Deviations first, squares second: one pass over squares would leave noise of the size of EPSILON in
    # groups of equal rewards.
    deviation_B = torch.where(batch.valid_B, batch.rewards_B - mean_G[segments_B], 0.0)
    variance_G = _segment_sum(deviation_B.square(), segments_B, len(sizes_G)) / (sizes_G - 1).clamp(min=1)
    std_G = torch.where(single_G, 1.0, variance_G.sqrt())
    return deviation_B / (std_G[segments_B] + EPSILON)


def _mode_level(batch: _Batch, modes_B: Tensor, sizes_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """State [G], whether length decides [G], and the term of each mode [G, M] float64."""
    columns = NUM_MODES + 1  # column 0 collects the samples without a mode
    cells_B = batch.segments_B * columns + modes_B

    def per_mode(values_B: Tensor) -> Tensor:
        return _segment_sum(values_B, cells_B, len(sizes_G) * columns).view(len(sizes_G), columns)

    counts = per_mode(batch.valid_B.double())
    counts_GM = counts[:, 1:]
    reasons = (
        (ModeTerm.NO_VALID_SAMPLE, sizes_G == 0),
        (ModeTerm.GROUP_OF_ONE, sizes_G == 1),
        (ModeTerm.INVALID_SAMPLE, counts[:, NO_MODE] > 0),
        (ModeTerm.MODE_ABSENT, (counts_GM == 0).any(1)),
        (ModeTerm.MODE_TOO_SMALL, (counts_GM == 1).any(1)),
    )
    state_G = torch.full_like(sizes_G, ModeTerm.ACTIVE, dtype=torch.long)
    for reason, holds_G in reversed(reasons):
        state_G = torch.where(holds_G, int(reason), state_G)

    rewards_GM = per_mode(batch.rewards_B)[:, 1:] / counts_GM.clamp(min=1)
    lengths_GM = per_mode(batch.lengths_B)[:, 1:] / counts_GM.clamp(min=1)
    by_length_G = ((rewards_GM - rewards_GM.mean(1, keepdim=True)).abs() <= EQUAL_MEANS).all(1)
    term_GM = torch.where(by_length_G[:, None], torch.tanh(-_scores(lengths_GM)), _scores(rewards_GM))
    active_G = state_G == ModeTerm.ACTIVE
    return state_G, by_length_G & active_G, torch.where(active_G[:, None], term_GM, 0.0)


def _scores(values_GM: Tensor) -> Tensor:
    """Standard score of each column within its row."""
    deviation_GM = values_GM - values_GM.mean(1, keepdim=True)
    std_G1 = (deviation_GM.square().sum(1, keepdim=True) / (NUM_MODES - 1)).sqrt()
    return deviation_GM / (std_G1 + EPSILON)


def _segment_sum(values_B: Tensor, segments_B: Tensor, segments: int) -> Tensor:
    return values_B.new_zeros(segments).index_add(0, segments_B, values_B)
