"""One HTTP call's outcome: the text of a chat completion, or why there is none.

The body is read here, field by field, instead of through a client library's typed models: what a proxy sends with
status 200 is not always a chat completion.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from nemo_ampo.errors import ChatError

_OPEN, _CLOSE = "<think>", "</think>"
_CLOSE_LINE = re.compile(r"^[ \t]*</think>", re.MULTILINE)


class CallError(ChatError):
    """One HTTP call brought no chat completion.

    Attributes:
        cause: name under which a repetition is counted, see :class:`nemo_ampo.chat.stats.ChatStats`.
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
        text: its content without the thoughts of a reasoning model; empty if the model said nothing else.
        reasoning: those thoughts; None if the endpoint shows none.
        prompt_tokens, completion_tokens: usage as reported; 0 if the endpoint reports none.
        finish_reason: why the model stopped (``stop``, ``length``, ...); None if the endpoint does not say.
        cached: it was read from a cache: no call was sent.
    """

    text: str
    reasoning: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    cached: bool = False


def read_completion(body: str) -> Completion:
    """Read the body of a ``/chat/completions`` answer.

    Raises:
        CallError: of kind ``parse``, if it is not a chat completion.
    """
    try:
        record = json.loads(body)
        choice = record["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _no_completion(body) from None
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise _no_completion(body)
    text, thoughts = split_thoughts(content)
    # Servers that separate the thoughts themselves use one of these names.
    candidates = (message.get("reasoning_content"), message.get("reasoning"), thoughts)
    usage, finish = record.get("usage"), choice.get("finish_reason")
    return Completion(
        text=text,
        reasoning=next((part for part in candidates if isinstance(part, str) and part), None),
        prompt_tokens=_tokens(usage, "prompt_tokens"),
        completion_tokens=_tokens(usage, "completion_tokens"),
        finish_reason=finish if isinstance(finish, str) else None,
    )


def split_thoughts(content: str) -> tuple[str, str | None]:
    """Separate ``<think>...</think>`` from what a reasoning model then says: ``(text, thoughts or None)``.

    The opening tag may be missing, since some chat templates put it into the prompt; then the closing tag must begin
    a line, which no tag quoted inside a JSON string does. Where several closing tags compete, a quoted one could pass
    for the real one and what follows it for the answer; then nothing counts as said. The same holds for thoughts that
    never end.
    """
    opened = content.lstrip().startswith(_OPEN)
    ends = [match.end() for match in _CLOSE_LINE.finditer(content)]
    if opened and content.count(_CLOSE) == 1:
        ends = [content.index(_CLOSE) + len(_CLOSE)]
    if len(ends) == 1:
        thoughts = content[: ends[0] - len(_CLOSE)].strip().removeprefix(_OPEN).strip()
        return content[ends[0] :].strip(), thoughts
    if opened or ends:
        return "", content.strip()
    return content, None


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
