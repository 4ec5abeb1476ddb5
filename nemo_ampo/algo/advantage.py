"""Group-relative advantages: GRPO's sample level, and AMPO's mode level on top of it.

A *group* is all responses to one prompt. The sample level asks whether a response was better than the others
of its group; the mode level asks whether its thinking mode was, and where no mode earned more than another it
prefers the mode that got there in fewer tokens. Both levels are plain standard scores on segments.
:func:`group_levels` gives them apart, under the knobs of :class:`~nemo_ampo.algo.algorithm.AlgorithmConfig`.

Samples without a reward (a judge that failed) are ``valid_B = False``: their advantage is 0 and they enter no
statistic. A reply that breaks the grammar has mode 0 and a real, bad reward.

Legend: B samples, G groups, M modes. Inputs are [B] in any order; a group is known by its id, any integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ampo.algo.algorithm import PRESETS, AlgorithmConfig, Baseline, ModeLevel, Scale
from nemo_ampo.algo.mode_level import EPSILON, EQUAL_MEANS, ModeTable, ModeTerm, paper_term, robust_term
from nemo_ampo.reply.modes import NO_MODE, NUM_MODES


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


def ampo_with_report(
    rewards_B: Tensor, modes_B: Tensor, lengths_B: Tensor, groups_B: Tensor, valid_B: Tensor | None = None
) -> tuple[Tensor, GroupReport]:
    """:func:`ampo_advantage`, and what it did in each group."""
    return _advantage(_Batch.of(rewards_B, modes_B, lengths_B, groups_B, valid_B))


@dataclass(frozen=True)
class Levels:
    """Both levels of the advantage, [B] each, 0 at samples without a reward; their sum is the advantage.

    Attributes:
        sample_B: the sample level.
        mode_B: the term of the sample's mode.
        report: what happened in each group.
    """

    sample_B: Tensor
    mode_B: Tensor
    report: GroupReport


def group_levels(
    rewards_B: Tensor,
    modes_B: Tensor,
    lengths_B: Tensor,
    groups_B: Tensor,
    valid_B: Tensor | None = None,
    rules: AlgorithmConfig = PRESETS["ampo"],
) -> Levels:
    """Sample level and mode level under the knobs of an algorithm.

    Sample level, with n the valid samples of the group and d the difference of a reward to its baseline::

        baseline=group_mean      d = r - mean(r)
        baseline=leave_one_out   d = r - mean of the n - 1 others = n / (n - 1) * (r - mean(r))
        scale=group_std          A = d / (std(r) + 1e-6)
        scale=batch_std          A = d / (std(d of all valid samples of the step) + 1e-6)
        scale=none               A = d

    A group of one has baseline 0 and group standard deviation 1. The mode level is ``rules.advantage``:
    :func:`ampo_advantage`'s, the same as the reference's float32 arithmetic has it,
    :func:`~nemo_ampo.algo.mode_level.robust_term`, or none.

    Args:
        rewards_B, modes_B, lengths_B, groups_B, valid_B: as for :func:`ampo_advantage`.
        rules: ``advantage``, ``tie_tolerance``, ``baseline`` and ``scale`` are read.

    Raises:
        ValueError: shapes differ, a mode is outside 0..4, or a valid reward or length is not finite.
    """
    batch = _Batch.of(rewards_B, modes_B, lengths_B, groups_B, valid_B)
    sizes_G = _sizes(batch)
    sample_B = _sample_level(batch, sizes_G, rules.baseline, rules.scale)
    if rules.advantage == ModeLevel.grpo:
        mode_B, report = torch.zeros_like(sample_B), _no_mode_level(batch, sizes_G)
    elif rules.advantage == ModeLevel.ampo_robust:
        mode_B, report = _add_modes(batch, sizes_G, *robust_term(_per_mode(batch, sizes_G), rules.tie_tolerance))
    else:
        state_G, by_length_G, term_GM = paper_term(_per_mode(batch, sizes_G))
        if rules.advantage == ModeLevel.ampo_paper:
            sample_B, by_length_G, term_GM = _reference_arithmetic(batch, state_G)
        mode_B, report = _add_modes(batch, sizes_G, state_G, by_length_G, term_GM)
    return Levels(sample_B.to(batch.dtype), mode_B.to(batch.dtype), report)


def decided_groups(goals_B: Tensor, groups_B: Tensor, valid_B: Tensor) -> Tensor:
    """Samples of groups in which every outcome is the same, so that reward differences say nothing about the goal.

    The outcome of a sample is its goal component; a reply that breaks the grammar is an outcome of its own, below all
    others. A group without a valid sample counts as decided (DAPO's dynamic sampling; here nothing is drawn anew).

    Args:
        goals_B: goal component, NaN for a reply that breaks the grammar.
        groups_B: integer group ids.
        valid_B: False for samples without a reward; they have no outcome.

    Returns:
        bool [B], True for every sample of such a group.
    """
    outcomes_B = goals_B.double().nan_to_num(nan=-1.0)
    ids_G, segments_B = torch.unique(groups_B, return_inverse=True)
    low_G = torch.full((len(ids_G),), torch.inf, dtype=torch.float64)
    low_G = low_G.scatter_reduce(0, segments_B[valid_B], outcomes_B[valid_B], "amin")
    high_G = torch.full_like(low_G, -torch.inf).scatter_reduce(0, segments_B[valid_B], outcomes_B[valid_B], "amax")
    return (high_G - low_G <= EQUAL_MEANS)[segments_B]


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
    """The paper's two levels, or its first one alone where modes play no part."""
    sizes_G = _sizes(batch)
    sample_B = _sample_level(batch, sizes_G, Baseline.group_mean, Scale.group_std)
    if batch.modes_B is None:
        return sample_B.to(batch.dtype), _no_mode_level(batch, sizes_G)
    mode_B, report = _add_modes(batch, sizes_G, *paper_term(_per_mode(batch, sizes_G)))
    return (sample_B + mode_B).to(batch.dtype), report


def _sizes(batch: _Batch) -> Tensor:
    """Valid samples of each group, [G] float64."""
    return _segment_sum(batch.valid_B.double(), batch.segments_B, len(batch.group_ids_G))


def _sample_level(batch: _Batch, sizes_G: Tensor, baseline: Baseline, scale: Scale) -> Tensor:
    """Each reward against its group, [B] float64."""
    segments_B = batch.segments_B
    mean_G = _segment_sum(batch.rewards_B, segments_B, len(sizes_G)) / sizes_G.clamp(min=1)
    single_G = sizes_G <= 1
    mean_G = torch.where(single_G, 0.0, mean_G)
    # Deviations first, squares second: one pass over squares would leave noise of the size of EPSILON in
    # groups of equal rewards.
    deviation_B = torch.where(batch.valid_B, batch.rewards_B - mean_G[segments_B], 0.0)
    variance_G = _segment_sum(deviation_B.square(), segments_B, len(sizes_G)) / (sizes_G - 1).clamp(min=1)
    std_G = torch.where(single_G, 1.0, variance_G.sqrt())
    if baseline == Baseline.leave_one_out:
        deviation_B = deviation_B * torch.where(single_G, 1.0, sizes_G / (sizes_G - 1).clamp(min=1))[segments_B]
    if scale == Scale.group_std:
        return deviation_B / (std_G[segments_B] + EPSILON)
    if scale == Scale.batch_std:
        return deviation_B / (deviation_B[batch.valid_B].std() + EPSILON) if sizes_G.sum() > 1 else deviation_B
    return deviation_B


def _per_mode(batch: _Batch, sizes_G: Tensor) -> ModeTable:
    assert batch.modes_B is not None
    columns = NUM_MODES + 1  # column 0 collects the samples without a mode
    cells_B = batch.segments_B * columns + batch.modes_B

    def per_mode(values_B: Tensor) -> Tensor:
        return _segment_sum(values_B, cells_B, len(sizes_G) * columns).view(len(sizes_G), columns)

    counts = per_mode(batch.valid_B.double())
    at_least_one_GM = counts[:, 1:].clamp(min=1)
    return ModeTable(
        sizes_G=sizes_G,
        unformed_G=counts[:, NO_MODE],
        counts_GM=counts[:, 1:],
        rewards_GM=per_mode(batch.rewards_B)[:, 1:] / at_least_one_GM,
        lengths_GM=per_mode(batch.lengths_B)[:, 1:] / at_least_one_GM,
    )


def _reference_arithmetic(batch: _Batch, state_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both levels as the authors' code computes them: in float32, one group after another.

    Only the last bit differs from :func:`ampo_advantage`, but that bit decides there whether modes tie: the means must be
    equal as float32 numbers. In constant groups rounding often makes them differ, and the term is then rounding noise
    divided by 1e-6 (up to about 0.06) instead of the preference for short modes.

    Args:
        batch: checked inputs.
        state_G: where the mode level is active.

    Returns:
        Sample level [B], whether length decides [G], and the term of each mode [G, M].
    """
    assert batch.modes_B is not None
    rewards_B, lengths_B = batch.rewards_B.float(), batch.lengths_B.float()
    sample_B = torch.zeros_like(batch.rewards_B)
    by_length_G = torch.zeros_like(state_G, dtype=torch.bool)
    term_GM = batch.rewards_B.new_zeros(len(state_G), NUM_MODES)
    for group, state in enumerate(state_G.tolist()):
        own = torch.nonzero((batch.segments_B == group) & batch.valid_B).flatten()
        rewards, modes = rewards_B[own], batch.modes_B[own]
        mean, std = (rewards.mean(), rewards.std()) if len(own) > 1 else (0.0, 1.0)
        sample_B[own] = ((rewards - mean) / (std + EPSILON)).double()
        if state != ModeTerm.ACTIVE:
            continue
        m, length = (
            torch.stack([values_B[own][modes == mode].mean() for mode in range(1, NUM_MODES + 1)])
            for values_B in (rewards_B, lengths_B)
        )
        by_length_G[group] = (m == m.mean()).all()
        by_reward = (m - m.mean()) / (m.std() + EPSILON)
        by_length = torch.tanh(-(length - length.mean()) / (length.std() + EPSILON))
        term_GM[group] = (by_length if by_length_G[group] else by_reward).double()
    return sample_B, by_length_G, term_GM


def _add_modes(
    batch: _Batch, sizes_G: Tensor, state_G: Tensor, by_length_G: Tensor, term_GM: Tensor
) -> tuple[Tensor, GroupReport]:
    """The term of each sample's mode [B], 0 where the group has none, and the report."""
    assert batch.modes_B is not None
    active_G = state_G == ModeTerm.ACTIVE
    term_GM = torch.where(active_G[:, None], term_GM, 0.0)
    columns_B = (batch.modes_B - 1).clamp(min=0)
    has_term_B = batch.valid_B & (batch.modes_B != NO_MODE)
    mode_B = torch.where(has_term_B, term_GM[batch.segments_B, columns_B], 0.0)
    report = GroupReport(batch.group_ids_G, sizes_G.long(), state_G, by_length_G & active_G, term_GM.to(batch.dtype))
    return mode_B, report


def _no_mode_level(batch: _Batch, sizes_G: Tensor) -> GroupReport:
    return GroupReport(
        batch.group_ids_G,
        sizes_G.long(),
        torch.full_like(sizes_G, ModeTerm.OFF, dtype=torch.long),
        torch.zeros_like(sizes_G, dtype=torch.bool),
        torch.zeros(len(sizes_G), NUM_MODES, dtype=batch.dtype),
    )


def _segment_sum(values_B: Tensor, segments_B: Tensor, segments: int) -> Tensor:
    return values_B.new_zeros(segments).index_add(0, segments_B, values_B)
