"""What counts as an answer of the judge.

The text from its first ``{`` to its last ``}`` must be one JSON object that holds, for ``agent1`` and
``agent2``, an object with ``reasoning`` (anything) and ``score`` (a number, or a string that is one, in
0..10). That is the reference behaviour, narrowed where Python's ``float()`` is more generous than a judge
should be: no booleans, no underscores, no digits outside ASCII, no negative zero. A key given twice, NaN and Infinity
make a reply unreadable, wherever they stand.
"""

from __future__ import annotations

import json
import math
import re

from nemo_ampo.errors import JudgeError
from nemo_ampo.files import object_in
from nemo_ampo.text import utf8_safe
from nemo_ampo.types import Verdict

MIN_SCORE, MAX_SCORE = 0.0, 10.0

_AGENT_SCHEMA = {
    "type": "object",
    # The reasoning comes first: a score written before it would be a guess.
    "properties": {"reasoning": {"type": "string"}, "score": {"type": "integer", "enum": list(range(11))}},
    "required": ["reasoning", "score"],
    "additionalProperties": False,
}
VERDICT_SCHEMA = {
    "type": "object",
    "properties": {"agent1": _AGENT_SCHEMA, "agent2": _AGENT_SCHEMA},
    "required": ["agent1", "agent2"],
    "additionalProperties": False,
}
"""What the judge prompt asks for, for endpoints that can hold a model to a JSON schema. Narrower than the parser."""

_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def parse_verdict(text: str) -> Verdict:
    """Read the judge's reply.

    Raises:
        JudgeError: of kind ``parse``, if the reply is not readable by the rules above. No other error,
        whatever the text.
    """
    try:
        record = object_in(text)
    except ValueError as error:
        raise _unreadable(str(error)) from None
    (score1, reasoning1), (score2, reasoning2) = _agent(record, "agent1"), _agent(record, "agent2")
    return Verdict(agent1=score1, agent2=score2, agent1_reasoning=reasoning1, agent2_reasoning=reasoning2)


def _agent(record: dict[str, object], agent: str) -> tuple[float, str]:
    entry = record.get(agent)
    if not isinstance(entry, dict):
        raise _unreadable(f"{agent} is missing or not an object")
    for key in ("reasoning", "score"):
        if key not in entry:
            raise _unreadable(f"{agent} has no {key}")
    return _score(entry["score"], agent), _reasoning(entry["reasoning"])


def _score(value: object, agent: str) -> float:
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        score = float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # Compared before conversion: an integer may be too large for a float.
        score = float(value) if MIN_SCORE <= value <= MAX_SCORE else math.nan
    else:
        raise _unreadable(f"the score of {agent} is not a number")
    if not MIN_SCORE <= score <= MAX_SCORE or math.copysign(1.0, score) < 0:
        raise _unreadable(f"the score of {agent} is outside {MIN_SCORE:g}..{MAX_SCORE:g}")
    return score


def _reasoning(value: object) -> str:
    return utf8_safe(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _unreadable(why: str) -> JudgeError:
    return JudgeError("parse", f"the judge's reply cannot be read: {why}")
