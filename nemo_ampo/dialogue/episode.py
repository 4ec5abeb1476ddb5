"""One dialogue of two agents: who speaks when, what they are shown, and when it is over.

Agent1 speaks on even turns, agent2 on odd ones, 20 utterances together. Every utterance is stored before the next one
is asked for, so :func:`play` can go on from whatever was stored before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from nemo_ampo.dialogue.agents import SILENT, Agent, Said
from nemo_ampo.dialogue.config import LeaveRule
from nemo_ampo.dialogue.prompts import PromptTexts, View, instruction_after, instruction_head, turn_line, visible_text
from nemo_ampo.dialogue.records import LEAVING_WORDS, Episode, EpisodeKey, Termination, Turn
from nemo_ampo.dialogue.scenarios import SEATS, Scenario
from nemo_ampo.errors import ChatError
from nemo_ampo.files import derived_seed
from nemo_ampo.types import Seat

_LEAVING_PHRASES = (LEAVING_WORDS, "leave the conversation")
_OUTER_SIGNS = re.compile(r"^[\W_]+|[\W_]+$")


@dataclass(frozen=True)
class EpisodeRules:
    """The protocol of a dialogue.

    Attributes:
        view: what the characters know of each other.
        texts: wording of their prompts.
        leave_rule: when an utterance ends the dialogue.
        max_turns: utterances of both speakers together.
        max_prompt_tokens: a longer chat-templated prompt ends the dialogue unspoken.
    """

    view: View
    texts: PromptTexts
    leave_rule: LeaveRule = LeaveRule.strict
    max_turns: int = 20
    max_prompt_tokens: int = 6144


class TurnLog(Protocol):
    """Where utterances are kept; :class:`nemo_ampo.dialogue.records.EpisodeStore`."""

    def add_turn(self, key: EpisodeKey, turn: Turn) -> None:
        """Keep one utterance."""
        ...

    def end(self, key: EpisodeKey, terminated_by: Termination, error: str | None = None) -> None:
        """Keep why the dialogue is over."""
        ...


def new_episode(key: EpisodeKey, scenario: Scenario, pairing: str, view: View) -> Episode:
    """An episode before its first word."""
    first, second = scenario.agents
    return Episode(
        key=key,
        pairing=pairing,
        view=view,
        environment_id=scenario.environment.environment_id,
        codename=scenario.environment.codename,
        relationship=int(scenario.environment.relationship),
        hard=scenario.hard,
        agent1_id=first.agent_id,
        agent2_id=second.agent_id,
        agent1_name=first.name,
        agent2_name=second.name,
        agent1_goal=visible_text(scenario.goal("agent1"), "agent1", view),
        agent2_goal=visible_text(scenario.goal("agent2"), "agent2", view),
    )


async def play(
    episode: Episode, scenario: Scenario, agents: Mapping[Seat, Agent], rules: EpisodeRules, log: TurnLog
) -> Episode:
    """Play to the end, from the turns the episode already has.

    Args:
        episode: as far as it was played.
        scenario: who meets whom.
        agents: who speaks for each seat.
        rules: of the dialogue.
        log: gets each utterance before the next one is asked for, and the end.

    Returns:
        The episode with all turns and why it stopped. An endpoint that gives no reply ends it with ``failed``: nothing is
        raised.
    """
    heads = {seat: instruction_head(scenario, seat, rules.view, rules.texts) for seat in SEATS}
    turns = list(episode.turns)
    lines = [turn_line(turn.index, turn.speaker, turn.text) for turn in turns]
    error = None
    while (over := ending(turns, rules)) is None:
        index = len(turns)
        seat = SEATS[index % 2]
        speaker = scenario.agent(seat).name
        prompt = instruction_after(heads[seat], index, [*lines, turn_line(index, speaker)], rules.texts)
        if agents[seat].prompt_tokens(prompt) > rules.max_prompt_tokens:
            over = Termination.prompt_limit
            break
        try:
            said = await agents[seat].speak(prompt, turn_seed(episode.key, index))
        except ChatError as failure:
            error = f"turn {index}, {seat} ({speaker}): {failure}"
            over = Termination.prompt_limit if _is_about_length(failure) else Termination.failed
            break
        turns.append(_turn(index, seat, speaker, said))
        lines.append(turn_line(index, speaker, turns[-1].text))
        log.add_turn(episode.key, turns[-1])
    log.end(episode.key, over, error)
    return replace(episode, turns=tuple(turns), terminated_by=over, error=error)


def ending(turns: Sequence[Turn], rules: EpisodeRules) -> Termination | None:
    """Why no more can be said after these turns; None while the dialogue goes on."""
    if turns and turns[-1].failed == SILENT:
        return Termination.silent
    if turns and leaves(turns[-1].text, rules.leave_rule):
        return Termination.left
    return Termination.max_turns if len(turns) >= rules.max_turns else None


def leaves(text: str, rule: LeaveRule) -> bool:
    """Whether an utterance ends the dialogue.

    >>> leaves("Please do not leave the conversation!", LeaveRule.strict)
    False
    """
    words = text.lower()
    if rule is LeaveRule.reference:
        return any(phrase in words for phrase in _LEAVING_PHRASES)
    return _OUTER_SIGNS.sub("", words) in _LEAVING_PHRASES


def turn_seed(key: EpisodeKey, index: int) -> int:
    """Sampling seed of one utterance, 0..2^31-1: from seed, pairing, seat and turn, not from the order of play."""
    return derived_seed(f"{key.seed} {key.combo_id} {key.seat} {index}")


def _turn(index: int, seat: Seat, speaker: str, said: Said) -> Turn:
    heard, completion = said.heard, said.completion
    return Turn(
        index=index,
        seat=seat,
        speaker=speaker,
        text=heard.text if heard.text is not None else LEAVING_WORDS,
        raw=completion.text,
        reasoning=completion.reasoning,
        mode=heard.mode,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        failed=heard.failed,
        finish_reason=completion.finish_reason,
        seed=said.seed,
    )


def _is_about_length(failure: ChatError) -> bool:
    """Servers refuse a prompt beyond their context with status 400; the dialogue ends as at our own limit."""
    text = str(failure).lower()
    return failure.kind == "status" and ("context_length" in text or "context length" in text)
