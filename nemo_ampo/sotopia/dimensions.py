"""The seven dimensions of a SOTOPIA evaluation: ranges, the question to the evaluator, and what counts as its answer.

The evaluator is asked once per finished episode, about both agents. Its answer is one JSON object whose shape
:data:`SCORES_SCHEMA` describes, for endpoints that can be held to a schema; :func:`parse_scores` reads it no
less strictly from those that cannot. An answer that cannot be read is no score: the caller asks again a bounded
number of times (:data:`TEMPERATURES`), then the episode counts as failed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_ampo.files import object_in
from nemo_ampo.prompts import PromptTemplate, load_prompt
from nemo_ampo.speech import without_control_tokens
from nemo_ampo.text import utf8_safe
from nemo_ampo.types import Seat

if TYPE_CHECKING:
    from nemo_ampo.dialogue.scenarios import Scenario

DIMENSIONS: dict[str, tuple[int, int]] = {
    "believability": (0, 10),
    "relationship": (-5, 5),
    "knowledge": (0, 10),
    "secret": (-10, 0),
    "social_rules": (-10, 0),
    "financial_and_material_benefits": (-5, 5),
    "goal": (0, 10),
}
"""Name to range, both ends included."""
OVERALL = "overall"
"""Mean of the seven."""

AGENTS = ("agent1", "agent2")

TEMPERATURES = (0.0, 0.0, 1.0)
"""Of the tries for a readable answer: greedy, once more in case the endpoint is not deterministic, then sampled."""

PROMPT = "sotopia_judge"
"""Shipped name of the evaluator's prompt."""


@dataclass(frozen=True)
class Scores:
    """What one judge thinks of one episode.

    Attributes:
        judge: name of the scoring, see ``judge.name`` in the configuration.
        agent1, agent2: dimension to number, all seven of :data:`DIMENSIONS`.
        agent1_reasoning, agent2_reasoning: dimension to the judge's words.
        prompt_tokens, completion_tokens: what it cost.
        tries: replies read until one was usable.
    """

    judge: str
    agent1: Mapping[str, float]
    agent2: Mapping[str, float]
    agent1_reasoning: Mapping[str, str] = field(default_factory=dict)
    agent2_reasoning: Mapping[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tries: int = 1

    def of(self, seat: Seat) -> Mapping[str, float]:
        """Of one seat."""
        return self.agent1 if seat == "agent1" else self.agent2


@dataclass(frozen=True)
class ScoreError:
    """A judge that gave no usable scores: a missing value, asked for again by the next run.

    Attributes:
        judge: name of the scoring.
        kind: of the failure, as the chat client names it.
        message: one line.
    """

    judge: str
    kind: str
    message: str


_FIELDS = ("context", "dialogue", "agent1_name", "agent2_name")
_BOUNDARY = "boundary"
_WHOLE = re.compile(r"[+-]?[0-9]{1,3}")


class ScoresFormatError(ValueError):
    """The evaluator's answer cannot be read; the message says what is wrong with it."""


def _schema() -> dict[str, Any]:
    def closed(properties: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    def grade(low: int, high: int) -> dict[str, Any]:
        return closed({"reasoning": {"type": "string"}, "score": {"type": "integer", "minimum": low, "maximum": high}})

    agent = closed({name: grade(*limits) for name, limits in DIMENSIONS.items()})
    return closed(dict.fromkeys(AGENTS, agent))


SCORES_SCHEMA: dict[str, Any] = _schema()
"""JSON schema of the answer. Reasoning comes before its score, so that a model reasons before it grades."""


def load_score_prompt(name_or_path: str = PROMPT) -> PromptTemplate:
    """The evaluator's prompt.

    Raises:
        ConfigError: no such file, or its placeholders are not those of the shipped one; only ``{{boundary}}``
            may be left out.
    """
    template = load_prompt(name_or_path)
    template.require(_FIELDS, optional=(_BOUNDARY,))
    return template


def score_messages(scenario: Scenario, dialogue: str, template: PromptTemplate | None = None) -> list[dict[str, str]]:
    """The question to the evaluator: one user message.

    The context is everything (both backgrounds with secrets, both goals), in either view. Context, dialogue and
    names stand in blocks whose mark is a hash of their content, so nothing said in the dialogue can close its
    block and pose as an instruction; nor does it reach the evaluator's tokenizer as a control token.

    Args:
        scenario: the situation and its two characters.
        dialogue: what was said, ``Turn k: NAME said: "..."`` with a blank line between turns
            (:meth:`nemo_ampo.dialogue.records.Episode.dialogue`).
        template: from :func:`load_score_prompt`; the shipped one by default.
    """
    from nemo_ampo.dialogue.prompts import context_block

    template = template or load_score_prompt()
    first, second = scenario.agents
    values = {
        "context": context_block(scenario, "environment"),
        "dialogue": dialogue,
        "agent1_name": first.name,
        "agent2_name": second.name,
    }
    values = {name: without_control_tokens(utf8_safe(value)) for name, value in values.items()}
    mark = {_BOUNDARY: _boundary(values)} if _BOUNDARY in template.placeholders else {}
    return [{"role": "user", "content": template.render(**values, **mark)}]


def _boundary(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([values[name] for name in _FIELDS]).encode("ascii")).hexdigest()[:16]


def parse_scores(text: str, judge: str = "") -> Scores:
    """Read the evaluator's answer.

    From the first ``{`` to the last ``}`` it must be one JSON object with both agents, each with all seven
    dimensions, each with ``reasoning`` (a string) and ``score``: a whole number in its range, as a number
    (``8``, ``8.0``) or a string of digits. Text around the object and further keys are ignored; a key given
    twice is refused.

    Raises:
        ScoresFormatError: for any other text.
    """
    if not text.strip():
        raise ScoresFormatError("the answer is empty")
    try:
        record = object_in(text)
    except ValueError as error:
        raise ScoresFormatError(f"the answer cannot be read: {error}") from None
    graded = {agent: _graded(record, agent) for agent in AGENTS}
    return Scores(
        judge=judge,
        agent1={name: float(score) for name, (score, _) in graded["agent1"].items()},
        agent2={name: float(score) for name, (score, _) in graded["agent2"].items()},
        agent1_reasoning={name: why for name, (_, why) in graded["agent1"].items()},
        agent2_reasoning={name: why for name, (_, why) in graded["agent2"].items()},
    )


def _graded(record: dict[str, Any], agent: str) -> dict[str, tuple[int, str]]:
    dimensions = record.get(agent)
    if not isinstance(dimensions, dict):
        raise ScoresFormatError(f"{agent} is missing or not an object")
    return {name: _grade(dimensions.get(name), f"{agent}.{name}", limits) for name, limits in DIMENSIONS.items()}


def _grade(entry: Any, where: str, limits: tuple[int, int]) -> tuple[int, str]:
    if not isinstance(entry, dict):
        raise ScoresFormatError(f"{where} is missing or not an object")
    reasoning = entry.get("reasoning")
    if not isinstance(reasoning, str):
        raise ScoresFormatError(f"{where}.reasoning is missing or not a string")
    return whole_number(entry.get("score"), f"{where}.score", limits), utf8_safe(reasoning)


def whole_number(value: Any, where: str, limits: tuple[int, int]) -> int:
    """A grade as a whole number inside its range.

    Raises:
        ScoresFormatError: naming ``where``.
    """
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ScoresFormatError(f"{where} is not a whole number")
    low, high = limits
    if not low <= value <= high:
        raise ScoresFormatError(f"{where} is outside {low}..{high}")
    return value
