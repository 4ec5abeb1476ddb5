"""Group-relative advantages: the reference's numbers, a plain-loop oracle, and worked groups."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemo_ampo.algo.advantage import GroupReport, ampo_advantage, ampo_with_report, group_levels, grpo_advantage
from nemo_ampo.algo.algorithm import AlgorithmConfig, ModeLevel

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((GOLDEN / "advantage.json").read_text(encoding="utf-8"))["cases"]
]
REFERENCE = {"abs": 2e-3, "rel": 2e-3}
"""The reference works in float32 with another order of summation."""


def tensors(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, modes, lengths and group ids; the reference's -1 for a failed sample is our mode 0."""
    names = sorted(set(case["group_ids"]))
    return (
        torch.tensor(case["scores"], dtype=torch.float64),
        torch.tensor([max(level, 0) for level in case["levels"]]),
        torch.tensor([float(length) for length in case["response_lengths"]]),
        torch.tensor([names.index(group) for group in case["group_ids"]]),
    )


@pytest.mark.parametrize("case", CASES)
def test_golden_ampo(case: dict[str, Any]) -> None:
    expected = case["tolerant_ampo"] if case["float_equality_sensitive"] else case["expected_ampo"]
    assert ampo_advantage(*tensors(case)).tolist() == pytest.approx(expected, **REFERENCE)


@pytest.mark.parametrize("case", CASES)
def test_golden_grpo(case: dict[str, Any]) -> None:
    rewards, _, _, groups = tensors(case)
    # Of constant groups the reference leaves rounding noise divided by 1e-6, up to 0.06, where we give 0.
    sensitive = case["float_equality_sensitive"]
    expected = [0.0] * len(rewards) if sensitive else case["expected_grpo"]
    assert grpo_advantage(rewards, groups).tolist() == pytest.approx(expected, **REFERENCE)


@pytest.mark.parametrize("case", CASES)
def test_golden_diagnostics(case: dict[str, Any]) -> None:
    _, report = ampo_with_report(*tensors(case), None)
    names = sorted(set(case["group_ids"]))
    inactive = {
        "group_of_one": {"group_of_one"},
        "dropped": {"invalid_sample", "mode_absent", "mode_too_small"},
    }
    for group, reason, branch, terms in zip(
        names, report.reasons, report.branches, report.mode_term_GM.tolist(), strict=True
    ):
        expected = case["branch"][group]
        if expected in inactive:
            assert reason in inactive[expected]
            assert branch is None
            assert terms == [0.0] * 4
        elif not case["float_equality_sensitive"]:
            assert (reason, branch) == ("active", expected)
            known = [case["expected_mode_term"][group][str(mode)] for mode in range(1, 5)]
            assert terms == pytest.approx(known, **REFERENCE)
        else:
            assert (reason, branch) == ("active", "length")


def group_of(
    rewards: list[float], modes: list[int], lengths: list[float] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(rewards)
    return (
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(modes),
        torch.tensor(lengths or [100.0] * count),
        torch.zeros(count, dtype=torch.long),
    )


def test_two_groups_by_hand() -> None:
    # Group 7: rewards 1, 2, 3: mean 2, std 1. Group -4: rewards 0, 1: mean 0.5, std 1/sqrt(2).
    rewards = torch.tensor([1.0, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    groups = torch.tensor([7, -4, 7, -4, 7])
    half = 0.5 / (math.sqrt(0.5) + 1e-6)
    unit = 1 / (1 + 1e-6)
    expected = [-unit, -half, 0.0, half, unit]
    assert grpo_advantage(rewards, groups).tolist() == pytest.approx(expected, abs=1e-12)


def test_mode_term_by_hand() -> None:
    # Every mode twice with mean rewards 0.1, 0.2, 0.3, 0.4: mean 0.25, unbiased std sqrt(0.05 / 3).
    rewards = [0.05, 0.15, 0.15, 0.25, 0.25, 0.35, 0.35, 0.45]
    inputs = group_of(rewards, [1, 1, 2, 2, 3, 3, 4, 4])
    _, report = ampo_with_report(*inputs, None)
    std = math.sqrt(0.05 / 3) + 1e-6
    assert report.mode_term_GM[0].tolist() == pytest.approx([-0.15 / std, -0.05 / std, 0.05 / std, 0.15 / std])
    mode_part = ampo_advantage(*inputs) - grpo_advantage(inputs[0], inputs[3])
    assert mode_part[::2].tolist() == pytest.approx(report.mode_term_GM[0].tolist())
    assert mode_part[1::2].tolist() == pytest.approx(report.mode_term_GM[0].tolist())


def test_equal_modes_prefer_the_shorter_by_hand() -> None:
    # Mean lengths 100, 200, 300, 400: mean 250, unbiased std sqrt(50000 / 3). Equal mean rewards.
    lengths = [90.0, 110, 190, 210, 290, 310, 390, 410]
    inputs = group_of([0.2, 0.8] * 4, [1, 1, 2, 2, 3, 3, 4, 4], lengths)
    _, report = ampo_with_report(*inputs, None)
    std = math.sqrt(50000 / 3) + 1e-6
    expected = [math.tanh(distance / std) for distance in (150, 50, -50, -150)]
    assert report.branches == ["length"]
    assert report.mode_term_GM[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("gap", "branch"), [(5e-7, "length"), (5e-6, "reward")])
def test_mode_means_are_equal_within_a_millionth(gap: float, branch: str) -> None:
    inputs = group_of([0.5 + gap] * 2 + [0.5] * 6, [1, 1, 2, 2, 3, 3, 4, 4])
    assert ampo_with_report(*inputs, None)[1].branches == [branch]


@pytest.mark.parametrize("reward", [0.3, 5 / 6, 0.8, -2.0, 0.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_leave_no_noise(reward: float, dtype: torch.dtype) -> None:
    modes = [1] * 2 + [2] * 2 + [3] * 2 + [4] * 10
    rewards, _, lengths, groups = group_of([reward] * 16, modes)
    rewards = rewards.to(dtype)
    assert grpo_advantage(rewards, groups).abs().max() < 1e-9
    assert ampo_advantage(rewards, torch.tensor(modes), lengths, groups).abs().max() < 1e-9


EIGHT = [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("modes", "invalid", "reason"),
    [
        pytest.param(EIGHT, [], "active", id="every mode twice"),
        pytest.param([2], [], "group_of_one", id="one sample"),
        pytest.param([0], [], "group_of_one", id="one broken sample"),
        pytest.param([*EIGHT, 0], [], "invalid_sample", id="a broken reply"),
        pytest.param([1, 1, 2, 2, 3, 3, 3, 3], [], "mode_absent", id="no mode 4"),
        pytest.param([1, 1, 2, 2, 3, 3, 3, 4], [], "mode_too_small", id="mode 4 once"),
        pytest.param([*EIGHT, 4], [8], "active", id="judge failed, enough left"),
        pytest.param(EIGHT, [7], "mode_too_small", id="judge failed, mode 4 once left"),
        pytest.param(EIGHT, [6, 7], "mode_absent", id="judge failed on all of mode 4"),
        pytest.param([*EIGHT, 0], [8], "active", id="a sample without reward or mode"),
        pytest.param([1, 2], [0], "group_of_one", id="judge failed, one left"),
        pytest.param([1, 2], [0, 1], "no_valid_sample", id="judge failed on all"),
    ],
)
def test_why_the_mode_term_is_inactive(modes: list[int], invalid: list[int], reason: str) -> None:
    inputs = group_of([0.1 * i for i in range(len(modes))], modes)
    valid = torch.tensor([i not in invalid for i in range(len(modes))])
    advantages, report = ampo_with_report(*inputs, valid)
    assert report.reasons == [reason]
    assert (report.branches == ["reward"]) == (reason == "active")
    assert report.sizes_G.tolist() == [len(modes) - len(invalid)]
    if reason != "active":
        assert torch.equal(advantages, grpo_advantage(inputs[0], inputs[3], valid))


@pytest.mark.parametrize("filler", [0.0, -2.0, 1e6, math.nan, math.inf])
def test_a_sample_without_a_reward_changes_nothing_for_the_others(filler: float) -> None:
    with_gap = group_of([0.9, filler, 0.7, 0.6, 0.8, 0.4, 0.5, 0.3, 0.2], [1, 4, 1, 2, 2, 3, 3, 4, 4])
    without = group_of([0.9, 0.7, 0.6, 0.8, 0.4, 0.5, 0.3, 0.2], EIGHT)
    valid = torch.tensor([True, False] + [True] * 7)
    with_gap[2][1] = filler
    ampo, grpo = ampo_advantage(*with_gap, valid), grpo_advantage(with_gap[0], with_gap[3], valid)
    assert ampo[1] == grpo[1] == 0
    assert ampo[valid].tolist() == pytest.approx(ampo_advantage(*without).tolist(), abs=1e-12)
    assert grpo[valid].tolist() == pytest.approx(grpo_advantage(without[0], without[3]).tolist(), abs=1e-12)


def test_a_broken_reply_pulls_the_mean_of_its_group() -> None:
    rewards, modes, lengths, groups = group_of([0.5, 0.5, -2.0], [1, 2, 0])
    # mean -1/3, deviations 5/6, 5/6, -5/3, unbiased variance 25/12
    std = math.sqrt(25 / 12) + 1e-6
    expected = [5 / 6 / std, 5 / 6 / std, -5 / 3 / std]
    assert ampo_advantage(rewards, modes, lengths, groups).tolist() == pytest.approx(expected)


def oracle(
    rewards: list[float], modes: list[int], lengths: list[float], groups: list[int], valid: list[bool]
) -> tuple[list[float], list[float]]:
    """GRPO and AMPO written with loops and the standard library."""
    members = defaultdict(list)
    for i, group in enumerate(groups):
        if valid[i]:
            members[group].append(i)
    grpo, mode_part = [0.0] * len(rewards), [0.0] * len(rewards)
    for own in members.values():
        if len(own) == 1:
            grpo[own[0]] = rewards[own[0]] / (1 + 1e-6)
            continue
        mean = statistics.fmean(rewards[i] for i in own)
        std = statistics.stdev(rewards[i] for i in own)
        for i in own:
            grpo[i] = (rewards[i] - mean) / (std + 1e-6)
        by_mode = {mode: [i for i in own if modes[i] == mode] for mode in (1, 2, 3, 4)}
        if any(modes[i] == 0 for i in own) or any(len(users) < 2 for users in by_mode.values()):
            continue
        m = {mode: statistics.fmean(rewards[i] for i in users) for mode, users in by_mode.items()}
        length = {mode: statistics.fmean(lengths[i] for i in users) for mode, users in by_mode.items()}
        m_mean, l_mean = statistics.fmean(m.values()), statistics.fmean(length.values())
        equal = all(abs(value - m_mean) <= 1e-6 for value in m.values())
        for i in own:
            if equal:
                spread = statistics.stdev(length.values()) + 1e-6
                mode_part[i] = math.tanh(-(length[modes[i]] - l_mean) / spread)
            else:
                mode_part[i] = (m[modes[i]] - m_mean) / (statistics.stdev(m.values()) + 1e-6)
    return grpo, [a + b for a, b in zip(grpo, mode_part, strict=True)]


Sample = tuple[int, int, int, int, bool]


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """(tenths of reward, mode, length, group, valid); half of them hold every mode twice in a group."""
    sample = st.tuples(st.integers(-20, 10), st.integers(0, 4), st.integers(1, 2048), st.integers(-3, 3), st.booleans())
    samples = draw(st.lists(sample, min_size=1, max_size=20))
    if draw(st.booleans()):
        rewards = st.integers(0, 10) if draw(st.booleans()) else st.just(draw(st.integers(0, 10)))
        group = draw(st.integers(-3, 9))
        samples += [(draw(rewards), mode, draw(st.integers(1, 2048)), group, True) for mode in EIGHT]
    return draw(st.permutations(samples))


def as_tensors(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rewards, modes, lengths, groups, valid = zip(*samples, strict=True)
    return (
        torch.tensor(rewards, dtype=torch.float64) / 10,
        torch.tensor(modes),
        torch.tensor(lengths, dtype=torch.float32),
        torch.tensor(groups),
        torch.tensor(valid),
    )


def both(samples: list[Sample]) -> list[float]:
    rewards, modes, lengths, groups, valid = as_tensors(samples)
    ampo = ampo_advantage(rewards, modes, lengths, groups, valid)
    return ampo.tolist() + grpo_advantage(rewards, groups, valid).tolist()


@given(batches())
def test_matches_the_plain_loops(samples: list[Sample]) -> None:
    rewards, modes, lengths, groups, valid = as_tensors(samples)
    grpo, ampo = oracle(rewards.tolist(), modes.tolist(), lengths.tolist(), groups.tolist(), valid.tolist())
    assert grpo_advantage(rewards, groups, valid).tolist() == pytest.approx(grpo, abs=1e-8)
    assert ampo_advantage(rewards, modes, lengths, groups, valid).tolist() == pytest.approx(ampo, abs=1e-8)


@given(batches(), st.randoms(use_true_random=False))
def test_order_does_not_matter(samples: list[Sample], random: Any) -> None:
    order = list(range(len(samples)))
    random.shuffle(order)
    before = both(samples)
    after = both([samples[i] for i in order])
    expected = [before[i] for i in order] + [before[len(samples) + i] for i in order]
    assert after == pytest.approx(expected, abs=1e-8)


@given(batches(), st.integers(-(2**40), 2**40))
def test_group_ids_are_only_names(samples: list[Sample], shift: int) -> None:
    renamed = [(reward, mode, length, shift - group, valid) for reward, mode, length, group, valid in samples]
    assert both(renamed) == pytest.approx(both(samples), abs=1e-8)


@given(batches())
def test_groups_do_not_touch_each_other(samples: list[Sample]) -> None:
    together = both(samples)
    for group in {sample[3] for sample in samples}:
        own = [i for i, sample in enumerate(samples) if sample[3] == group]
        alone = both([samples[i] for i in own])
        expected = [together[i] for i in own] + [together[len(samples) + i] for i in own]
        assert alone == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", list(ModeLevel))
def test_a_trainer_calls_every_algorithm_alike(name: ModeLevel) -> None:
    inputs = group_of([0.9, 0.7, 0.6, 0.8, 0.4, 0.5, 0.3, 0.2], EIGHT)
    levels = group_levels(*inputs, rules=AlgorithmConfig(advantage=name))
    assert isinstance(levels.report, GroupReport)
    assert levels.report.reasons == ["off" if name == "grpo" else "active"]
    assert levels.report.branches == [None if name == "grpo" else "reward"]
    assert levels.sample_B.tolist() == pytest.approx(grpo_advantage(inputs[0], inputs[3]).tolist(), abs=1e-6)
    assert bool(levels.mode_B.any()) == (name != "grpo")


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtype_follows_the_rewards(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    rewards, modes, lengths, groups = group_of([0.5, 0.25], [1, 2])
    assert ampo_advantage(rewards.to(given_dtype), modes, lengths, groups).dtype == dtype
    assert grpo_advantage(rewards.to(given_dtype), groups).dtype == dtype


def test_an_empty_batch_has_no_advantages() -> None:
    nothing = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.long)
    assert ampo_advantage(nothing, ids, nothing, ids).shape == (0,)
    assert grpo_advantage(nothing, ids).shape == (0,)


def test_advantages_carry_no_gradient() -> None:
    rewards, modes, lengths, groups = group_of([0.5, 0.25], [1, 2])
    assert not ampo_advantage(rewards.requires_grad_(), modes, lengths, groups).requires_grad


def test_bad_input_is_named() -> None:
    rewards, modes, lengths, groups = group_of([0.5, 0.25], [1, 2])
    with pytest.raises(ValueError, match="groups_B"):
        grpo_advantage(rewards, groups[:1])
    with pytest.raises(ValueError, match="valid_B"):
        grpo_advantage(rewards, groups, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"rewards_B must be \[B\]"):
        grpo_advantage(rewards[None], groups[None])
    with pytest.raises(ValueError, match="modes_B"):
        ampo_advantage(rewards, modes + 3, lengths, groups)
    with pytest.raises(ValueError, match="rewards_B is not finite"):
        grpo_advantage(rewards * math.nan, groups)
    with pytest.raises(ValueError, match="lengths_B is not finite"):
        ampo_advantage(rewards, modes, lengths * math.inf, groups)
