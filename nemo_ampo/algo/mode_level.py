"""What the mode level adds to an advantage: the paper's rule, and a robust one that any two modes are enough for.

Both read the same table (what each mode of each group earned and took) and answer with one term per mode and group, and
with the reason where there is none. Legend: G groups, M modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from nemo_ampo.reply.modes import NUM_MODES

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
    ONE_MODE = 7
    """Robust term: the valid replies share one mode, so there is nothing to compare."""


@dataclass(frozen=True)
class ModeTable:
    """What the modes of each group earned and took.

    Attributes:
        sizes_G: valid samples.
        unformed_G: valid samples that break the grammar.
        counts_GM: valid samples of each mode.
        rewards_GM, lengths_GM: their mean reward and mean length; 0 for an absent mode.
    """

    sizes_G: Tensor
    unformed_G: Tensor
    counts_GM: Tensor
    rewards_GM: Tensor
    lengths_GM: Tensor


def paper_term(table: ModeTable) -> tuple[Tensor, Tensor, Tensor]:
    """The mode level of :func:`~nemo_ampo.algo.advantage.ampo_advantage`, whose docstring has the formula.

    Args:
        table: what the modes of each group earned and took.

    Returns:
        State [G], whether length decides [G], and the term of each mode [G, M].
    """
    state_G = _first_reason(
        (ModeTerm.NO_VALID_SAMPLE, table.sizes_G == 0),
        (ModeTerm.GROUP_OF_ONE, table.sizes_G == 1),
        (ModeTerm.INVALID_SAMPLE, table.unformed_G > 0),
        (ModeTerm.MODE_ABSENT, (table.counts_GM == 0).any(1)),
        (ModeTerm.MODE_TOO_SMALL, (table.counts_GM == 1).any(1)),
    )
    rewards_GM = table.rewards_GM
    by_length_G = ((rewards_GM - rewards_GM.mean(1, keepdim=True)).abs() <= EQUAL_MEANS).all(1)
    term_GM = torch.where(by_length_G[:, None], torch.tanh(-_scores(table.lengths_GM)), _scores(rewards_GM))
    return state_G, by_length_G, term_GM


PRIOR_SAMPLES = 1.0
"""Robust term: the mean of a mode counts as if this many more of its samples had been average."""


def robust_term(table: ModeTable, tie_tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """A mode level that any two modes are enough for, and that has no jump where modes tie.

    Over the K modes that the valid replies of the group use (K of at least 2), n_k of them in mode k::

        m_k    = c + n_k / (n_k + 1) * (mean reward of mode k - c)      c: mean of the K mean rewards
        l_k    = the same of the mean lengths
        s      = std(m)
        w      = s^2 / (s^2 + tie_tolerance^2)
        term_k = w * (m_k - mean(m)) / s + (1 - w) * tanh(-(l_k - mean(l)) / (std(l) + 1e-6))

    Shrinking towards the mean keeps a mode with a single sample from speaking as loudly as one with many; with equal
    counts it cancels out of both standard scores. Far above the tolerance this is the paper's reward term, at equal
    rewards its length term. Where s = 0 the first summand is 0.

    Args:
        table: what the modes of each group earned and took.
        tie_tolerance: the spread s at which both summands weigh the same, in units of reward.

    Returns:
        State [G], whether length weighs more than reward [G], and the term of each mode [G, M], 0 for absent modes.
    """
    present_GM = table.counts_GM > 0
    modes_G1 = present_GM.sum(1, keepdim=True).clamp(min=1)

    def shrunk(values_GM: Tensor) -> tuple[Tensor, Tensor]:
        """Deviations of the shrunk means from their mean [G, M], and their standard deviation [G, 1]."""
        mean_G1 = torch.where(present_GM, values_GM, 0.0).sum(1, keepdim=True) / modes_G1
        shrunk_GM = (values_GM - mean_G1) * table.counts_GM / (table.counts_GM + PRIOR_SAMPLES)
        mean_G1 = torch.where(present_GM, shrunk_GM, 0.0).sum(1, keepdim=True) / modes_G1
        deviation_GM = torch.where(present_GM, shrunk_GM - mean_G1, 0.0)
        return deviation_GM, (deviation_GM.square().sum(1, keepdim=True) / (modes_G1 - 1).clamp(min=1)).sqrt()

    rewards_GM, spread_G1 = shrunk(table.rewards_GM)
    lengths_GM, length_spread_G1 = shrunk(table.lengths_GM)
    squared_G1 = spread_G1.square() + tie_tolerance**2
    weight_G1 = spread_G1.square() / squared_G1
    # w / s written as s / (s^2 + tolerance^2): nothing to divide by zero where the rewards are equal.
    by_reward_GM = rewards_GM * spread_G1 / squared_G1
    by_length_GM = torch.tanh(-lengths_GM / (length_spread_G1 + EPSILON))
    term_GM = torch.where(present_GM, by_reward_GM + (1 - weight_G1) * by_length_GM, 0.0)
    state_G = _first_reason(
        (ModeTerm.NO_VALID_SAMPLE, table.sizes_G == 0),
        (ModeTerm.GROUP_OF_ONE, table.sizes_G == 1),
        (ModeTerm.ONE_MODE, present_GM.sum(1) < 2),
    )
    return state_G, weight_G1[:, 0] < 0.5, term_GM


def _first_reason(*reasons: tuple[ModeTerm, Tensor]) -> Tensor:
    """The first reason that holds in each group, ACTIVE where none does, [G]."""
    state_G = torch.full_like(reasons[0][1], ModeTerm.ACTIVE, dtype=torch.long)
    for reason, holds_G in reversed(reasons):
        state_G = torch.where(holds_G, int(reason), state_G)
    return state_G


def _scores(values_GM: Tensor) -> Tensor:
    """Standard score of each column within its row."""
    deviation_GM = values_GM - values_GM.mean(1, keepdim=True)
    std_G1 = (deviation_GM.square().sum(1, keepdim=True) / (NUM_MODES - 1)).sqrt()
    return deviation_GM / (std_G1 + EPSILON)
