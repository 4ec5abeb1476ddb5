"""The knobs of the advantage: the reference's exact arithmetic, the robust mode level, baselines, scales, decided groups."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_ampo.algo.advantage import Levels, ampo_advantage, decided_groups, group_levels
from nemo_ampo.algo.algorithm import PRESETS, AlgorithmConfig, Baseline, ModeLevel, Scale

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
PAPER = json.loads((GOLDEN / "advantage.json").read_text(encoding="utf-8"))["cases"]
ROBUST = json.loads((GOLDEN / "ampo_robust.json").read_text(encoding="utf-8"))["cases"]


def levels_of(
    rewards: Sequence[float],
    modes: Sequence[int],
    rules: AlgorithmConfig,
    lengths: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    valid: Sequence[bool] | None = None,
) -> Levels:
    count = len(rewards)
    return group_levels(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(modes),
        torch.tensor(lengths or [100.0] * count, dtype=torch.float64),
        torch.tensor(groups or [0] * count),
        None if valid is None else torch.tensor(valid),
        rules,
    )


# ampo-paper


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in PAPER])
def test_the_paper_preset_is_the_reference(case: dict[str, Any]) -> None:
    """Also where float32 rounding decides whether modes tie: there its number is asked for, not the tolerant one."""
    names = sorted(set(case["group_ids"]))
    inputs = (
        case["scores"],
        [max(level, 0) for level in case["levels"]],
        PRESETS["ampo-paper"],
        case["response_lengths"],
        [names.index(group) for group in case["group_ids"]],
    )
    found = levels_of(*inputs)
    assert (found.sample_B + found.mode_B).tolist() == pytest.approx(case["expected_ampo"], rel=1e-5, abs=1e-5)
    assert found.sample_B.tolist() == pytest.approx(case["expected_grpo"], rel=1e-5, abs=1e-5)
    branches = [case["branch"][name] for name in names]
    assert found.report.branches == [branch if branch in ("reward", "length") else None for branch in branches]


def test_rounding_decides_in_the_paper_preset_and_nowhere_else() -> None:
    sensitive = [case for case in PAPER if case["float_equality_sensitive"]]
    assert {case["branch"]["g0"] for case in sensitive} == {"reward", "length"}
    for case in sensitive:
        inputs = (case["scores"], case["levels"])
        assert levels_of(*inputs, PRESETS["ampo"], case["response_lengths"]).report.branches == ["length"]


# ampo-robust


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in ROBUST])
def test_robust_groups_by_hand(case: dict[str, Any]) -> None:
    rules = PRESETS["ampo-robust"]
    found = levels_of(case["rewards"], case["modes"], rules, case["lengths"], valid=case["valid"])
    assert found.report.mode_term_GM[0].tolist() == pytest.approx(case["expected_term"], abs=3e-6)
    assert found.sample_B.tolist() == pytest.approx(case["expected_sample"], abs=3e-6)
    of_sample = [
        case["expected_term"][mode - 1] if mode and valid else 0.0
        for mode, valid in zip(case["modes"], case["valid"], strict=True)
    ]
    assert found.mode_B.tolist() == pytest.approx(of_sample, abs=3e-6)
    assert found.report.reasons == [case["reason"]]
    if "branch" in case:
        assert found.report.branches == [case["branch"]]


def robust_term(rewards: Sequence[float], modes: Sequence[int], lengths: Sequence[float] | None = None) -> list[float]:
    return levels_of(rewards, modes, PRESETS["ampo-robust"], lengths).report.mode_term_GM[0].tolist()


def test_with_equal_counts_and_a_clear_difference_it_is_the_papers_term() -> None:
    rewards, modes = [0.1, 0.1, 0.4, 0.4, 0.9, 0.9, 0.7, 0.7], [1, 1, 2, 2, 3, 3, 4, 4]
    paper = levels_of(rewards, modes, PRESETS["ampo"]).report.mode_term_GM[0].tolist()
    assert robust_term(rewards, modes) == pytest.approx(paper, abs=0.01)


@given(st.floats(0, 1), st.floats(-1e-3, 1e-3), st.integers(1, 6), st.integers(1, 6))
def test_the_switch_to_length_has_no_jump(reward: float, gap: float, some: int, others: int) -> None:
    """A thousandth of reward between two modes moves the term by little; the paper's jumps from 0.6 to 0.7 and back."""
    modes, lengths = [1] * some + [4] * others, [20.0] * some + [300.0] * others
    tie = robust_term([reward] * (some + others), modes, lengths)
    near = robust_term([reward + gap] * some + [reward] * others, modes, lengths)
    assert near == pytest.approx(tie, abs=0.06)


@given(
    st.lists(st.tuples(st.floats(-2, 1), st.integers(0, 4), st.integers(1, 2048), st.booleans()), min_size=1, max_size=24),
    st.floats(1e-4, 1),
)
def test_robust_terms_are_bounded_and_sum_to_nothing_over_the_modes(
    samples: list[tuple[float, int, int, bool]], tolerance: float
) -> None:
    rewards, modes, lengths, valid = zip(*samples, strict=True)
    rules = AlgorithmConfig(advantage=ModeLevel.ampo_robust, tie_tolerance=tolerance)
    found = levels_of(rewards, modes, rules, [float(n) for n in lengths], valid=valid)
    term = found.report.mode_term_GM[0]
    present = {mode for mode, ok in zip(modes, valid, strict=True) if ok and mode}
    assert term.isfinite().all()
    assert term.abs().max() <= math.sqrt(3) * 1.5  # (K - 1) / sqrt(K) of a standard score, K = 4
    assert all(term[mode - 1] == 0 for mode in {1, 2, 3, 4} - present)
    assert found.mode_B[~torch.tensor(valid)].eq(0).all()
    assert (found.report.reasons == ["active"]) == (len(present) >= 2)


def test_a_mode_seen_once_speaks_more_softly_than_one_seen_often() -> None:
    """Mode 3 is as good in both groups; seen once it is shrunk to 1/2 of its distance, seen eight times to 8/9."""
    once, often = ([0.5] * 4 + [0.55] * n for n in (1, 8))
    weak = robust_term(once, [1] * 4 + [3])[2]
    strong = robust_term(often, [1] * 4 + [3] * 8)[2]
    assert 0 < weak < strong


def test_a_larger_tolerance_lets_length_decide() -> None:
    inputs = ([0.5, 0.5, 0.55, 0.55], [1, 1, 4, 4])
    branches = [
        levels_of(*inputs, AlgorithmConfig(advantage=ModeLevel.ampo_robust, tie_tolerance=t)).report.branches
        for t in (0.005, 0.5)
    ]
    assert branches == [["reward"], ["length"]]


MIXES = {
    "Qwen, cloned": (92, 38, 82, 47),
    "Llama, cloned": (80, 45, 79, 50),
    "Qwen, AMPO at the end": (26, 48, 122, 61),
    "Llama, AMPO at the end": (33, 65, 106, 52),
    "Qwen, GRPO at the end": (2, 4, 43, 207),
    "Llama, GRPO at the end": (5, 10, 80, 160),
}
"""Samples per mode in a step of 256, read off the paper's figure."""


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("concentration", [2.0, 1e6], ids=["per-prompt habits", "i.i.d."])
def test_the_robust_term_is_active_in_nearly_every_group_with_two_modes(mix: str, concentration: float) -> None:
    """2,000 groups of 16; 3 % of the replies break the grammar, 5 % of the verdicts never come."""
    g = torch.Generator().manual_seed(5)
    shares = torch.tensor(MIXES[mix], dtype=torch.float64)
    torch.manual_seed(5)
    own_shares = torch.distributions.Dirichlet(shares / shares.sum() * concentration).sample((2000,))
    modes = torch.multinomial(own_shares, 16, replacement=True, generator=g) + 1
    modes[torch.rand(modes.shape, generator=g) < 0.03] = 0
    failed = (torch.rand(modes.shape, generator=g) < 0.05) & (modes > 0)
    rewards = torch.where(modes > 0, 0.6 + 0.15 * torch.randn(modes.shape, generator=g), -2.0)
    lengths = 100.0 * modes + 20
    groups = torch.arange(2000)[:, None].expand_as(modes)
    drawn = torch.stack([(modes == k).any(1) for k in (1, 2, 3, 4)], 1).sum(1)
    active = {}
    for preset in ("ampo", "ampo-robust"):
        inputs = (rewards.flatten(), modes.flatten(), lengths.flatten(), groups.flatten(), ~failed.flatten())
        report = group_levels(*inputs, rules=PRESETS[preset]).report
        states = torch.tensor([reason == "active" for reason in report.reasons])
        active[preset] = float(states[drawn >= 2].double().mean())
    assert active["ampo-robust"] >= 0.95
    assert active["ampo"] < 0.65  # the same groups under the paper's four conditions


# baseline and scale


def rules(**knobs: Any) -> AlgorithmConfig:
    return AlgorithmConfig(advantage=ModeLevel.grpo, **knobs)


THREE_AND_TWO = ([1.0, 2.0, 6.0, 0.0, 1.0], [1] * 5)
GROUPS = [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        # group means 3 and 0.5; deviations -2, -1, 3 and -0.5, 0.5
        ({"scale": Scale.none}, [-2, -1, 3, -0.5, 0.5]),
        # against the mean of the others: 1 - 4, 2 - 3.5, 6 - 1.5 and 0 - 1, 1 - 0
        ({"scale": Scale.none, "baseline": Baseline.leave_one_out}, [-3, -1.5, 4.5, -1, 1]),
        # sums of squares 14 and 0.5, unbiased: sqrt(7) and sqrt(0.5)
        ({}, [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -0.5 / 0.5**0.5, 0.5 / 0.5**0.5]),
        # all five deviations: 14.5 / 4
        ({"scale": Scale.batch_std}, [value / 3.625**0.5 for value in (-2, -1, 3, -0.5, 0.5)]),
    ],
)
def test_baselines_and_scales_by_hand(knobs: dict[str, Any], expected: list[float]) -> None:
    assert levels_of(*THREE_AND_TWO, rules(**knobs), groups=GROUPS).sample_B.tolist() == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("baseline", list(Baseline))
def test_missing_rewards_play_no_part_in_any_of_them(scale: Scale, baseline: Baseline) -> None:
    chosen = rules(scale=scale, baseline=baseline)
    whole = levels_of(*THREE_AND_TWO, chosen, groups=GROUPS).sample_B.tolist()
    gaps = levels_of(
        [1.0, 9.0, 2.0, 6.0, 0.0, 1.0, 9.0], [1] * 7, chosen, None, [0, 0, 0, 0, 1, 1, 2], [True, False, *[True] * 4, False]
    )
    assert gaps.sample_B.tolist() == pytest.approx([whole[0], 0, *whole[1:], 0])


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("baseline", list(Baseline))
def test_a_group_of_one_keeps_its_reward(scale: Scale, baseline: Baseline) -> None:
    assert levels_of([0.5], [2], rules(scale=scale, baseline=baseline)).sample_B.tolist() == pytest.approx([0.5], rel=2e-6)


def test_the_default_rules_are_the_public_function() -> None:
    case = PAPER[0]
    found = levels_of(case["scores"], case["levels"], PRESETS["ampo"], case["response_lengths"])
    tensors = (torch.tensor(case["scores"], dtype=torch.float64), torch.tensor(case["levels"]))
    public = ampo_advantage(*tensors, torch.tensor(case["response_lengths"]), torch.zeros(len(case["scores"])).long())
    assert torch.equal(found.sample_B + found.mode_B, public)


# decided groups


@pytest.mark.parametrize(
    ("goals", "valid", "decided"),
    [
        pytest.param([0.5, 0.5, 0.5], [True] * 3, True, id="no outcome differs"),
        pytest.param([0.5, 0.6, 0.5], [True] * 3, False, id="one does"),
        pytest.param([0.5, math.nan, 0.5], [True] * 3, False, id="a broken reply is an outcome"),
        pytest.param([math.nan] * 3, [True] * 3, True, id="all broken"),
        pytest.param([0.5, 0.9, 0.5], [True, False, True], True, id="a failed judge has no outcome"),
        pytest.param([0.5, 0.9, 0.1], [False] * 3, True, id="no outcome at all"),
        pytest.param([0.0, math.nan, 0.0], [True] * 3, False, id="broken is worse than nothing gained"),
    ],
)
def test_decided_groups_by_hand(goals: list[float], valid: list[bool], decided: bool) -> None:
    others = [0.1, 0.2]  # an undecided group around it
    found = decided_groups(
        torch.tensor([others[0], *goals, others[1]]),
        torch.tensor([9, 4, 4, 4, 9]),
        torch.tensor([True, *valid, True]),
    )
    assert found.tolist() == [False, decided, decided, decided, False]
