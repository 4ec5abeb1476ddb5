"""The judge's prompt: written for a model, readable without loss by a program.

Each value stands in a block of its own, ``[field mark]`` to ``[/field mark]``. The mark is a hash of all the
values, so no value can contain the line that ends its own block: a policy cannot learn to close the dialogue
early and dictate scores. It depends on nothing else, so the same request always gives the same prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from nemo_ampo.errors import DataError
from nemo_ampo.prompts.template import PromptTemplate
from nemo_ampo.speech import without_control_tokens
from nemo_ampo.text import utf8_safe
from nemo_ampo.types import JudgeRequest

_FIELDS = ("dialogue", "agent1_name", "agent1_goal", "agent2_name", "agent2_goal")
_BOUNDARY = "boundary"
_BOUNDARY_HEX_DIGITS = 16
_OPENING = re.compile(rf"^\[(?:{'|'.join(_FIELDS)}) ([0-9a-f]{{{_BOUNDARY_HEX_DIGITS}}})\]$", re.MULTILINE)


def require_judge_placeholders(template: PromptTemplate) -> None:
    """Check that ``template`` shows the judge all it needs; only ``{{boundary}}`` may be left out.

    Raises:
        ConfigError: naming the placeholders that are missing or unknown.
    """
    template.require(_FIELDS, optional=(_BOUNDARY,))


def render_judge_prompt(template: PromptTemplate, request: JudgeRequest) -> str:
    """The user message that asks for a verdict on ``request``. Lone surrogates become ``?``."""
    values = {name: utf8_safe(getattr(request, name)) for name in _FIELDS}
    if _BOUNDARY in template.placeholders:
        return template.render(**values, **{_BOUNDARY: _boundary(values)})
    return template.render(**values)


def harmless_request(request: JudgeRequest) -> JudgeRequest:
    """The request without control tokens of any server; see :mod:`nemo_ampo.speech`."""
    return JudgeRequest(**{name: without_control_tokens(getattr(request, name)) for name in _FIELDS})


def read_judge_prompt(prompt: str) -> JudgeRequest:
    """The request that ``prompt`` was rendered from, exactly, whatever its values contain.

    Raises:
        DataError: if ``prompt`` has no blocks, or their mark does not fit their content.
    """
    # In the order of the text: a value may hold a whole prompt with a true mark, but never start before ours.
    for boundary in dict.fromkeys(_OPENING.findall(prompt)):
        values = _read_blocks(prompt, boundary)
        # A value may hold blocks with a mark of its own choosing; only a true mark is the values' hash.
        if values is not None and _boundary(values) == boundary:
            return JudgeRequest(**values)
    raise DataError(
        "this message is not a judge prompt with marked blocks; "
        "its file needs the blocks [field {{boundary}}] ... [/field {{boundary}}] of the shipped judge.txt"
    )


def _read_blocks(prompt: str, boundary: str) -> dict[str, str] | None:
    values = {}
    for name in _FIELDS:
        _, opened, rest = prompt.partition(f"[{name} {boundary}]\n")
        value, closed, _ = rest.partition(f"\n[/{name} {boundary}]")
        if not (opened and closed):
            return None
        values[name] = value
    return values


def _boundary(values: Mapping[str, str]) -> str:
    canonical = json.dumps([values[name] for name in _FIELDS])
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:_BOUNDARY_HEX_DIGITS]
