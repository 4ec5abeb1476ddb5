"""One HTTP call's outcome: the text of a chat completion, or why there is none.

The body is read here, field by field, instead of through a client library's typed models: what a proxy sends with
status 200 is not always a chat completion.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import orjson

from nemo_ampo.errors import ChatError
from nemo_ampo.text import one_line, utf8_safe

_OPEN, _CLOSE = "<think>", "</think>"
_ABSURD_TOKENS = 10**9
_SAID = ("text", "output_text")
_THOUGHT = ("thinking", "reasoning")
_THOUGHT_FIELDS = ("thinking", "reasoning", "summary", "text")
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length")
_AS_USUAL = ("stop", "end_turn", "eos", "eos_token", "stop_sequence", "stop_str")
_CLOSE_LINE = re.compile(r"^[ \t]*</think>", re.MULTILINE)


class CallError(ChatError):
    """One HTTP call brought no chat completion.

    Attributes:
        cause: name under which a repetition is counted, see :class:`nemo_ampo.chat.stats.ChatStats`.
        transient: whether the same call may succeed later.
        status: HTTP status, or None if no answer came.
        retry_after_s: the wait the endpoint asked for, seconds.
        usage: prompt and completion tokens that an answer without a completion reports all the same; it is paid for.
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
        usage: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(kind, message, permanent=status is not None and not transient)
        self.cause = cause
        self.transient = transient
        self.status = status
        self.retry_after_s = retry_after_s
        self.usage = usage


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

    @property
    def cut(self) -> bool:
        """It ended at the limit of its tokens, not where the model would have ended it."""
        return self.finish_reason is not None and self.finish_reason.lower() in _CUT

    @property
    def odd_end(self) -> str | None:
        """Why it ended, if neither the model nor a limit ended it: a filter, an error, a call of tools."""
        usual = self.finish_reason is None or self.finish_reason.lower() in (*_CUT, *_AS_USUAL)
        return None if usual else self.finish_reason


def read_completion(body: str) -> Completion:
    """Read the body of a ``/chat/completions`` answer.

    Raises:
        CallError: of kind ``parse``, if it is not a chat completion.
    """
    try:
        record = _json(body)
    except (ValueError, RecursionError):
        raise _no_completion(body) from None
    usage = _usage(record)
    try:
        choice = record["choices"][0]
        message = choice["message"]
        content, parted = _content(message.get("content"))
    except (LookupError, TypeError, AttributeError):
        raise _no_completion(body, usage) from None
    text, thoughts = split_thoughts(utf8_safe(content))
    # Servers that separate the thoughts themselves use one of these names, or parts of the content.
    candidates = (message.get("reasoning_content"), message.get("reasoning"), parted, thoughts)
    finish = choice.get("finish_reason")
    return Completion(
        text=text,
        reasoning=next((utf8_safe(part) for part in candidates if isinstance(part, str) and part), None),
        prompt_tokens=usage[0],
        completion_tokens=usage[1],
        finish_reason=utf8_safe(finish) if isinstance(finish, str) else None,
    )


def _content(content: Any) -> tuple[str, str]:
    """What was said and what was thought, of a message's content: a text, nothing, one typed part or a list of parts.

    Raises:
        TypeError, LookupError: it is none of these.
    """
    said, thought = list[str](), list[str]()
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") is None or part["type"] in _SAID:
            said.append(_text(part))
        elif part["type"] in _THOUGHT:
            thought += [_plain(part[name]) for name in _THOUGHT_FIELDS if part.get(name)]
        # A part of another type, such as a picture or a citation, is nothing that was said.
    return "".join(said), "\n".join(thought)


def _text(part: Any) -> str:
    """Of a part: a text, nothing, or a record that holds one under ``text`` or, as annotated texts do, under ``value``."""
    if isinstance(part, dict):
        return _text(part["text"] if "text" in part else part["value"])
    if part is not None and not isinstance(part, str):
        raise TypeError("text")
    return part or ""


def _plain(thought: Any) -> str:
    """A thought's text, given as such or as parts; of thoughts only what can be read is kept."""
    parts = thought if isinstance(thought, list) else [thought]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _json(body: str) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:  # it knows no lone surrogates, which a model's bytes can become
        return json.loads(body)


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


def _usage(record: Any) -> tuple[int, int]:
    """Prompt and completion tokens that an answer reports; 0 for what is no such count."""
    usage = record.get("usage") if isinstance(record, dict) else None
    counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (c if type(c) is int and 0 <= c < _ABSURD_TOKENS else 0 for c in counts)
    return prompt, completion


def _no_completion(body: str, usage: tuple[int, int] = (0, 0)) -> CallError:
    shown = one_line(body, 80) or "an empty body"
    message = f"the answer is not a chat completion: {shown}"
    return CallError("parse", message, cause="body", transient=True, usage=usage)
