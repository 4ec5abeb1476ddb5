"""Prompt texts as files, and the two things done with them: fill placeholders, and mark what is data.

The shipped texts are our own words. A configuration may name another file instead; it is read by the same
loader and held to the same placeholders, so a misspelt one stops the run before any model loads.
"""

from nemo_ampo.prompts.judging import (
    harmless_request,
    read_judge_prompt,
    render_judge_prompt,
    require_judge_placeholders,
)
from nemo_ampo.prompts.template import PromptTemplate, load_prompt

__all__ = [
    "PromptTemplate",
    "harmless_request",
    "load_prompt",
    "read_judge_prompt",
    "render_judge_prompt",
    "require_judge_placeholders",
]
