"""A judge by rules: scores a dialogue of the embedded world from its text alone.

The two goals say which scene it is and what both sides know, so the right outcome can be worked out; the utterances say
what was done. Only the latest attempt counts, an attempt must be unambiguous (one number, one topic) and short, and a
text from outside the world leaves both agents where they started. Pure functions, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from nemo_ampo.world.scenes import EASY, HARD, NAMES, TOPICS, EasyFamily, HardFamily, Numbers

OPEN = 4.0
"""Both agents before anything was decided, and in any dialogue that is not of this world."""
RIGHT = 10.0
PARTIAL_SCORE = 6.0
"""Easy scene: the right act, but partner or topic is not named."""
NEAR = 5.0
"""Hard scene: not the right number, but at most ``_NEAR_BY`` away and within both limits."""
OWN_ONLY = 3.0
"""Hard scene: within the agent's own limit only, or far from the right number."""
UNCLEAR = 2.0
"""Names several numbers, a wrong or a second topic, or goes on for too long."""
AGAINST = 1.0
"""Hard scene: breaks the agent's own limit."""

_NEAR_BY = 2
_MAX_WORDS = 24
_MAX_DIGITS = 4

Scores = tuple[float, float]


@dataclass(frozen=True)
class _Utterance:
    """Who said what: ``speaker`` 0 for agent1, 1 for agent2."""

    speaker: int
    words: str


def judge_dialogue(
    dialogue: str, agent1_name: str, agent1_goal: str, agent2_name: str, agent2_goal: str
) -> tuple[float, float]:
    """Goal achievement of both agents after ``dialogue``, 0..10.

    Args:
        dialogue: lines ``Turn k: NAME said: "..."`` with k = 0, 1, ...; an open last line is no utterance.
        agent1_name, agent1_goal, agent2_name, agent2_goal: names and private goals; agent1 speaks on even turns.

    Returns:
        Scores of agent1 and agent2; :data:`OPEN` for both when the goals are not a pair of this world.
    """
    names, goals = (agent1_name, agent2_name), (agent1_goal, agent2_goal)
    utterances = _utterances(dialogue, names)
    if hard := _read_hard(goals):
        return _judge_hard(hard, utterances)
    if easy := _read_easy(goals, names):
        score = _judge_easy(easy, [u.words for u in utterances if u.speaker == easy.actor])
        return score, score
    return OPEN, OPEN


def _utterances(dialogue: str, names: tuple[str, str]) -> list[_Utterance]:
    """Split at the headers ``Turn k: NAME said:`` that come in their due order; others are part of what is said."""
    spans: list[tuple[int, int]] = []
    position = 0
    while True:
        turn = len(spans)
        header = re.compile(rf"^Turn {turn}: {re.escape(names[turn % 2])} said:", re.MULTILINE)
        if (match := header.search(dialogue, position)) is None:
            break
        spans.append((match.start(), match.end()))
        position = match.end()
    ends = [*(start for start, _ in spans[1:]), len(dialogue)][: len(spans)]
    texts = [dialogue[begin:end].strip() for (_, begin), end in zip(spans, ends, strict=True)]
    return [_Utterance(turn % 2, text) for turn, text in enumerate(texts) if text]


@dataclass(frozen=True)
class _HardScene:
    """What the goals of a hard scene say; ``sides[i]`` and ``numbers[i]`` belong to agent i + 1."""

    family: HardFamily
    sides: tuple[int, int]
    numbers: tuple[Numbers, Numbers]
    right: int


@cache
def _goal_patterns() -> tuple[tuple[HardFamily, int, re.Pattern[str]], ...]:
    return tuple(
        (family, side, _pattern(f"{family.aim} You {family.sides[side].words}.", "([0-9]{1,4})"))
        for family in HARD
        for side in (0, 1)
    )


def _pattern(template: str, number: str) -> re.Pattern[str]:
    return re.compile(number.join(map(re.escape, template.split("{}"))))


def _read_goal(goal: str) -> Iterator[tuple[HardFamily, int, Numbers]]:
    for family, side, pattern in _goal_patterns():
        if match := pattern.fullmatch(goal.strip()):
            a, b, c, d = (int(digits) for digits in match.groups())
            yield family, side, (a, b, c, d)


def _read_hard(goals: tuple[str, str]) -> _HardScene | None:
    for family, side, numbers in _read_goal(goals[0]):
        for other_family, other_side, other_numbers in _read_goal(goals[1]):
            if family is other_family and {side, other_side} == {0, 1}:
                first, second = (numbers, other_numbers) if side == 0 else (other_numbers, numbers)
                right = family.right_answer(first, second)
                return _HardScene(family, (side, other_side), (numbers, other_numbers), right)
    return None


def _judge_hard(scene: _HardScene, utterances: list[_Utterance]) -> Scores:
    scores = (OPEN, OPEN)
    for utterance in utterances:
        said = re.findall("[0-9]+", utterance.words)
        own = [str(number) for number in scene.numbers[utterance.speaker]]
        if not said or said == own:
            continue
        if len(set(said)) > 1 or len(said[0]) > _MAX_DIGITS or _is_long(utterance.words):
            scores = (UNCLEAR, OPEN) if utterance.speaker == 0 else (OPEN, UNCLEAR)
        else:
            scores = _grade(scene, int(said[0]))
    return scores


def _grade(scene: _HardScene, answer: int) -> Scores:
    if answer == scene.right:
        return RIGHT, RIGHT
    fits = [
        scene.family.sides[side].fits(answer, numbers, scene.right)
        for side, numbers in zip(scene.sides, scene.numbers, strict=True)
    ]
    good = NEAR if all(fits) and abs(answer - scene.right) <= _NEAR_BY else OWN_ONLY
    return good if fits[0] else AGAINST, good if fits[1] else AGAINST


@dataclass(frozen=True)
class _EasyScene:
    """What the goals of an easy scene say; ``actor`` 0 or 1 is the agent who has to act."""

    family: EasyFamily
    actor: int
    me: str
    you: str
    topic: str


def _read_easy(goals: tuple[str, str], names: tuple[str, str]) -> _EasyScene | None:
    for family in EASY:
        for actor in (0, 1):
            me, you = names[actor], names[1 - actor]
            for topic in family.topics or ("",):
                goal, partner_goal = (
                    text.format(me=me, you=you, topic=topic) for text in (family.goal, family.partner_goal)
                )
                if (goal, partner_goal) == (goals[actor].strip(), goals[1 - actor].strip()):
                    return _EasyScene(family, actor, me, you, topic)
    return None


def _judge_easy(scene: _EasyScene, spoken: list[str]) -> float:
    score = OPEN
    for words in spoken:
        tokens = re.findall(r"\w+", words.lower())
        if scene.family.act not in " ".join(tokens):
            continue
        topics = set(tokens) & set(TOPICS)
        others = {name.lower() for name in (*NAMES, scene.me)} - {scene.you.lower()}
        if topics - {scene.topic} or set(tokens) & others or _is_long(words):
            score = UNCLEAR
        elif scene.you.lower() in tokens and topics == ({scene.topic} - {""}):
            score = RIGHT
        else:
            score = PARTIAL_SCORE
    return score


def _is_long(words: str) -> bool:
    return len(words.split()) > _MAX_WORDS
