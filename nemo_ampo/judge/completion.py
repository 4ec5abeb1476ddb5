"""One HTTP call's outcome: the text of a chat completion, or why there is none.

The body is read here, field by field, instead of through a client library's typed models: those are built
without validation, and what a proxy sends with status 200 is not always a chat completion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nemo_ampo.errors import JudgeError


class CallError(JudgeError):
    """One HTTP call brought no chat completion.

    Attributes:
        cause: name under which a repetition is counted, see :class:`nemo_ampo.judge.stats.JudgeStats`.
        transient: whether the same call may succeed later.
        status: HTTP status, or None if no answer came.
        retry_after_s: the wait the endpoint asked for, seconds.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        cause: str,
        transient: bool,
        status: int | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(kind, message)
        self.cause = cause
        self.transient = transient
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Completion:
    """The first choice of a chat completion.

    Attributes:
        text: its content; empty if the model said nothing.
        prompt_tokens, completion_tokens: usage as reported; 0 if the endpoint reports none.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int


def read_completion(body: str) -> Completion:
    """Read the body of a ``/chat/completions`` answer.

    Raises:
        CallError: of kind ``parse``, if it is not a chat completion.
    """
    try:
        record = json.loads(body)
        content = record["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _no_completion(body) from None
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise _no_completion(body)
    usage = record.get("usage")
    return Completion(content, _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens"))


def read_model_ids(body: str) -> list[str]:
    """Ids in the body of a ``/models`` answer; empty if it is not such a list."""
    try:
        return [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def one_line(text: str, limit: int = 200) -> str:
    """``text`` on one line, cut to ``limit`` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _tokens(usage: Any, key: str) -> int:
    count = usage.get(key) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0


def _no_completion(body: str) -> CallError:
    shown = one_line(body, 80) or "an empty body"
    return CallError("parse", f"the answer is not a chat completion: {shown}", cause="body", transient=True)
