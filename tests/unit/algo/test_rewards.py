"""The reward of one reply, against the reference's numbers and by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ampo.algo.rewards import Combine, RewardConfig, answer_length_score, combine, goal_gain, score_reply
from nemo_ampo.errors import ConfigError
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.types import DialogueTurn, Verdict

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
REWARD = json.loads((GOLDEN / "reward.json").read_text(encoding="utf-8"))
LENGTH = json.loads((GOLDEN / "length_score.json").read_text(encoding="utf-8"))
GOOD = render_reply(1, '"Fine by me."')
BAD = "Fine by me."


def turn(number: int = 0, agent1: float = 4.0, agent2: float = 5.0) -> DialogueTurn:
    return DialogueTurn(
        row_id="row",
        dialog=(f"Turn {number}: Mia said:",),
        turn=number,
        instruction="",
        agent1_name="Mia",
        agent2_name="Ben",
        agent1_goal="",
        agent2_goal="",
        agent1_state=agent1,
        agent2_state=agent2,
    )


def verdict_of(judge: dict[str, Any] | None) -> Verdict | None:
    """What the judge client hands on: nothing when a reply cannot be read or a score is out of range."""
    if judge is None:
        return None
    agent1, agent2 = float(judge["agent1"]), float(judge["agent2"])
    return Verdict(agent1, agent2) if 0 <= agent1 <= 10 and 0 <= agent2 <= 10 else None


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in REWARD["cases"]])
def test_golden_reward(case: dict[str, Any]) -> None:
    text = GOOD if case.get("format_ok", True) else BAD
    state = case["state"]
    parts = score_reply(
        turn(case["turn"], state["agent1"], state["agent2"]),
        text,
        verdict_of(case["judge"]),
        case["answer_tokens"],
    )
    if case["judge_rounds"] == 5:
        # D3: the reference scores a judge that failed with 0; to us that is a missing value, not a bad reply.
        assert case["expected_score"] == 0
        assert (parts.valid, parts.reward, parts.goal) == (False, None, None)
        return
    assert parts.valid
    assert parts.reward == pytest.approx(case["expected_score"], abs=1e-12)
    if case["expected_level"] == -1:
        assert (parts.mode, parts.goal, parts.length) == (0, None, None)
        assert parts.format_rule == "level"
    else:
        assert (parts.mode, parts.format_rule) == (case["expected_level"], None)
        assert parts.goal == pytest.approx(case["expected_grad_score"], abs=1e-12)
        assert parts.length == pytest.approx(case["expected_answer_length_score"], abs=1e-12)


@pytest.mark.parametrize("case", REWARD["scale_gradient"], ids=lambda c: f"{c['grad']}@{c['state']}")
def test_golden_scaled_change(case: dict[str, Any]) -> None:
    before, after = case["state"], case["state"] + case["grad"]
    if "expected_error" in case:
        # Where the reference divides by zero the score after the utterance is off the judge's scale.
        with pytest.raises(ValueError, match=r"0\.\.10"):
            goal_gain(before, after)
    else:
        assert goal_gain(before, after) == pytest.approx((case["expected"] + 1) / 2, abs=1e-12)


@pytest.mark.parametrize("case", LENGTH["cases"], ids=lambda c: str(c["answer_tokens"]))
def test_golden_length(case: dict[str, Any]) -> None:
    assert answer_length_score(case["answer_tokens"]) == pytest.approx(case["expected"], abs=1e-12)


@pytest.mark.parametrize(
    ("before", "after", "gain"),
    [(4, 7, 0.75), (6, 3, 0.25), (5, 5, 0.5), (0, 0, 0.5), (10, 10, 0.5), (0, 10, 1.0), (10, 0, 0.0)],
)
def test_goal_gain_by_hand(before: float, after: float, gain: float) -> None:
    assert goal_gain(before, after) == pytest.approx(gain)


SCORES = st.floats(0, 10)


@given(SCORES, SCORES, SCORES)
def test_goal_gain_is_bounded_and_grows_with_the_outcome(before: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= goal_gain(before, low) <= goal_gain(before, high) <= 1


@pytest.mark.parametrize("score", [-0.001, 10.001, math.nan, math.inf])
def test_goal_gain_refuses_what_is_off_the_scale(score: float) -> None:
    with pytest.raises(ValueError, match="before"):
        goal_gain(score, 5)
    with pytest.raises(ValueError, match="after"):
        goal_gain(5, score)


def test_length_score_takes_its_constants_from_the_config() -> None:
    config = RewardConfig(answer_midpoint_tokens=100, answer_half_width_tokens=50)
    assert [answer_length_score(n, config=config) for n in (50, 75, 100, 125, 150)] == [1, 0.75, 0.5, 0.25, 0]


def test_length_score_refuses_a_negative_count() -> None:
    with pytest.raises(ValueError, match="-1"):
        answer_length_score(-1)


def test_the_reward_is_the_product_of_its_parts() -> None:
    parts = score_reply(turn(), GOOD, Verdict(7, 5), 265)
    assert parts.goal == pytest.approx(0.75)
    assert parts.length == pytest.approx(0.4)
    assert parts.reward == pytest.approx(0.3) == combine(0.75, 0.4)


def test_the_speaker_decides_whose_scores_count() -> None:
    verdict = Verdict(agent1=7, agent2=0)
    assert score_reply(turn(2), GOOD, verdict, 60).goal == pytest.approx(0.75)
    assert score_reply(turn(3), GOOD, verdict, 60).goal == 0


def test_a_broken_reply_is_a_real_sample_even_when_the_judge_was_not_asked() -> None:
    parts = score_reply(turn(), BAD, None, 0)
    assert (parts.reward, parts.mode, parts.valid) == (-2.0, 0, True)


def test_a_failed_judge_leaves_the_mode_and_no_reward() -> None:
    parts = score_reply(turn(), GOOD, None, 60)
    assert (parts.reward, parts.mode, parts.valid, parts.format_rule) == (None, 1, False, None)


def test_the_penalty_and_the_strict_check_are_configured() -> None:
    text = "Well.\n" + GOOD
    strict = RewardConfig(format_failure_reward=-1.0, strict_format=True)
    assert score_reply(turn(), text, Verdict(7, 5), 60).reward == pytest.approx(0.75)
    parts = score_reply(turn(), text, Verdict(7, 5), 60, strict)
    assert (parts.reward, parts.format_rule) == (-1.0, "outside")


@pytest.mark.parametrize(
    ("config", "goal", "length", "reward"),
    [
        (RewardConfig(), 0.8, 0.5, 0.4),
        (RewardConfig(combine=Combine.additive), 0.8, 0.5, 0.65),
        (RewardConfig(combine=Combine.additive, length_weight=0.25), 0.8, 0.4, 0.72),
        (RewardConfig(combine=Combine.additive, length_weight=0.0), 0.8, 0.4, 0.8),
        (RewardConfig(combine=Combine.gated), 0.8, 0.5, 0.4),
        (RewardConfig(combine=Combine.gated), 0.5, 0.1, 0.5),
        (RewardConfig(combine=Combine.gated), 0.2, 0.5, 0.1),
    ],
)
def test_variants_by_hand(config: RewardConfig, goal: float, length: float, reward: float) -> None:
    assert combine(goal, length, config) == pytest.approx(reward)


def test_the_variant_reaches_the_reward() -> None:
    """Goal 0.75 (4 -> 7 of 10) and length 0.4 (265 tokens); then an unmoved goal, where the gate forgives the length."""
    for variant, moved, unmoved in (("product", 0.3, 0.2), ("additive", 0.575, 0.45), ("gated", 0.3, 0.5)):
        config = RewardConfig(combine=Combine(variant))
        assert score_reply(turn(), GOOD, Verdict(7, 5), 265, config).reward == pytest.approx(moved)
        assert score_reply(turn(), GOOD, Verdict(4, 5), 265, config).reward == pytest.approx(unmoved)


@pytest.mark.parametrize("variant", list(Combine))
@pytest.mark.parametrize(("tokens", "zero"), [(2, True), (4, True), (5, False)])
def test_an_answer_below_the_minimum_earns_nothing_in_any_variant(variant: Combine, tokens: int, zero: bool) -> None:
    parts = score_reply(turn(), GOOD, Verdict(7, 5), tokens, RewardConfig(combine=variant, min_answer_tokens=5))
    assert (parts.reward == 0) == zero
    assert (parts.mode, parts.valid, parts.goal) == (1, True, 0.75)


def test_the_paper_has_no_variant() -> None:
    config = RewardConfig()
    assert (config.combine, config.min_answer_tokens, config.strict_format) == ("product", 0, False)


@given(SCORES.map(lambda s: s / 10), SCORES.map(lambda s: s / 10), st.sampled_from(Combine), st.floats(0, 5))
def test_every_variant_stays_in_range(goal: float, length: float, variant: Combine, weight: float) -> None:
    config = RewardConfig(combine=variant, length_weight=weight if variant == Combine.additive else 1.0)
    assert 0 <= combine(goal, length, config) <= 1 + 1e-12


def test_records_are_frozen() -> None:
    for record in (RewardConfig(), score_reply(turn(), BAD, None, 0)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.reward = 1.0  # type: ignore[misc, union-attr]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("answer_midpoint_tokens", 0.0),
        ("answer_half_width_tokens", -1.0),
        ("answer_half_width_tokens", math.inf),
        ("length_weight", -1.0),
        ("length_weight", 2.0),
        ("min_answer_tokens", -1),
        ("min_answer_tokens", 250),
        ("format_failure_reward", 0.5),
        ("format_failure_reward", -math.inf),
    ],
)
def test_the_config_refuses_constants_that_make_no_sense(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.{key}"):
        RewardConfig(**{key: value})
