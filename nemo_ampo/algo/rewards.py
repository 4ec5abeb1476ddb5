"""Reward of one reply: how far it brought the speaker, times how concise it was (or a variant of that).

A reply that breaks the grammar gets a fixed penalty and is a real, bad sample. A reply the judge could not
score has no reward at all; nothing here invents one for it. Everything is plain arithmetic on single samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from nemo_ampo.errors import ConfigError, FormatError
from nemo_ampo.ranges import check_numbers, number
from nemo_ampo.reply.grammar import answer_of, parse_reply
from nemo_ampo.reply.modes import NO_MODE
from nemo_ampo.types import DialogueTurn, RewardParts, ScoredReply, Tokenizer, Verdict

MAX_GOAL = 10.0
"""Top of the judge's scale of goal achievement; 0 is its bottom."""

NO_CHANGE = 0.5
"""Goal component of an utterance after which the judge's score is what it was before."""


class Combine(StrEnum):
    """How the goal and the length component become one reward."""

    product = "product"
    additive = "additive"
    gated = "gated"


@dataclass(frozen=True)
class RewardConfig:
    """Constants of the reward; the defaults are the paper's.

    Attributes:
        combine: ``product``, ``additive`` or ``gated``; see :func:`combine`.
        length_weight: weight of the length component beside the goal's 1, ``additive`` only.
        min_answer_tokens: a shorter answer gets reward 0, tokens with the quotes; 0 accepts any.
        answer_midpoint_tokens: answer length with length score 0.5, tokens with the quotes.
        answer_half_width_tokens: this much shorter scores 1, this much longer scores 0, tokens.
        format_failure_reward: reward of a reply that breaks the grammar; good replies are in [0, 1].
        strict_format: accept only replies that are exactly their mode's skeleton.
    """

    combine: Combine = Combine.product
    length_weight: float = number(1.0, least=0)
    min_answer_tokens: int = number(0, least=0)
    answer_midpoint_tokens: float = number(250.0, least=0, above=True)
    answer_half_width_tokens: float = number(75.0, least=0, above=True)
    format_failure_reward: float = number(-2.0, least=-1e6, most=0)
    strict_format: bool = False

    def __post_init__(self) -> None:
        check_numbers("reward", self)
        if self.length_weight != 1 and self.combine != Combine.additive:
            raise ConfigError(f"reward.length_weight: has no effect with reward.combine={self.combine}, only with additive")
        if self.min_answer_tokens >= self.answer_midpoint_tokens:
            raise ConfigError(
                "reward.min_answer_tokens: must be below reward.answer_midpoint_tokens="
                f"{self.answer_midpoint_tokens:g}, got {self.min_answer_tokens}"
            )


def goal_gain(before: float, after: float) -> float:
    """Share of the possible change of goal achievement that one utterance brought, in [0, 1].

    With the change g = after - before, the scaled change is a = g / (10 - before) for a gain, g / before for
    a loss and 0 for none; the result is (a + 1) / 2, so 0.5 means no change, 1 the goal reached and 0
    everything lost.

    Args:
        before: goal achievement before the utterance, 0..10.
        after: after it, 0..10.

    Raises:
        ValueError: a score outside 0..10.
    """
    for name, score in (("before", before), ("after", after)):
        if not 0 <= score <= MAX_GOAL:
            raise ValueError(f"goal achievement {name} the utterance must be in 0..10, got {score}")
    change = after - before
    if change == 0:
        return NO_CHANGE
    room = MAX_GOAL - before if change > 0 else before
    return (change / room + 1) / 2


def answer_length_score(num_tokens: int, *, config: RewardConfig = RewardConfig()) -> float:
    """Conciseness of the spoken answer, in [0, 1].

    (clip((midpoint - n) / half_width, -1, 1) + 1) / 2: 1 up to 175 tokens, 0.5 at 250 and 0 from 325 on with
    the defaults, linear in between. The midpoint is no target: a short answer is never penalised.

    Args:
        num_tokens: tokens of the answer with its quotes, without special tokens.
        config: midpoint and half width.

    Raises:
        ValueError: a negative number of tokens.
    """
    if num_tokens < 0:
        raise ValueError(f"an answer has 0 tokens or more, got {num_tokens}")
    distance = (config.answer_midpoint_tokens - num_tokens) / config.answer_half_width_tokens
    return (min(max(distance, -1.0), 1.0) + 1) / 2


def _product(goal: float, length: float, config: RewardConfig) -> float:
    return goal * length


def _additive(goal: float, length: float, config: RewardConfig) -> float:
    return (goal + config.length_weight * length) / (1 + config.length_weight)


def _gated(goal: float, length: float, config: RewardConfig) -> float:
    return goal if goal == NO_CHANGE else goal * length


_COMBINE: dict[Combine, Callable[[float, float, RewardConfig], float]] = {
    Combine.product: _product,
    Combine.additive: _additive,
    Combine.gated: _gated,
}


def combine(goal: float, length: float, config: RewardConfig = RewardConfig()) -> float:
    """Reward of a good reply, in [0, 1].

    ::

        product    goal * length                              the paper
        additive   (goal + w * length) / (1 + w)              w = length_weight; a long answer keeps its goal part
        gated      goal * length if goal != 0.5, else 0.5     brevity counts only where the utterance changed something

    Args:
        goal, length: the components, in [0, 1].
        config: which of the three.
    """
    return _COMBINE[config.combine](goal, length, config)


def score_reply(
    turn: DialogueTurn,
    text: str,
    verdict: Verdict | None,
    answer_tokens: int,
    config: RewardConfig = RewardConfig(),
) -> RewardParts:
    """Reward of one reply.

    Args:
        turn: what was replied to; decides whose scores count and where they started.
        text: the decoded reply without special tokens.
        verdict: the judge's scores of the dialogue with the reply, or None when it failed or was not asked.
        answer_tokens: tokens of the answer with its quotes; ignored when the reply breaks the grammar.
        config: constants of the reward.

    Raises:
        ValueError: a goal achievement outside 0..10.
    """
    try:
        reply = parse_reply(text, strict=config.strict_format)
    except FormatError as error:
        return RewardParts(config.format_failure_reward, None, None, NO_MODE, True, error.rule)
    length = answer_length_score(answer_tokens, config=config)
    if verdict is None:
        return RewardParts(None, None, length, reply.mode, valid=False)
    goal = goal_gain(turn.state, verdict.of(turn.seat))
    reward = combine(goal, length, config) if answer_tokens >= config.min_answer_tokens else 0.0
    return RewardParts(reward, goal, length, reply.mode, valid=True)


def scored_reply(
    turn: DialogueTurn,
    text: str,
    num_tokens: int,
    verdict: Verdict | None,
    judge_error: str | None,
    tokenizer: Tokenizer,
    config: RewardConfig,
) -> ScoredReply:
    """One reply with its reward, and everything a report needs to explain it.

    Args:
        turn, text, verdict, config: as in :func:`score_reply`.
        num_tokens: of the reply, the stop token included.
        judge_error: kind of the judge's failure.
        tokenizer: counts the answer's tokens.
    """
    answer = answer_of(text, strict=config.strict_format)
    answer_tokens = len(tokenizer.tokenize(answer)) if answer is not None else 0
    return ScoredReply(
        row_id=turn.row_id,
        dialogue="\n".join(turn.dialog),
        tag=turn.tag,
        text=text,
        num_tokens=num_tokens,
        answer_tokens=answer_tokens,
        parts=score_reply(turn, text, verdict, answer_tokens, config),
        verdict=verdict,
        judge_error=judge_error,
    )
