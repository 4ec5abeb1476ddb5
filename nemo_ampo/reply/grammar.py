r"""The reply format of the four modes: read it, write it, and find the words to be spoken.

A reply names its mode, thinks in named sections when the mode asks for them, and ends in one quoted answer::

    Thinking Level: 2
    <|begin_of_thinking|>
    Intent:
    ...

    Style:
    ...

    Response:
    ...
    <|end_of_thinking|>
    <|begin_of_answer|>
    "the spoken words"
    <|end_of_answer|>

Mode 1 has no thinking block. The tags are plain text, not special tokens. :func:`parse_reply` accepts exactly
what the authors' reward code accepts, which is looser than the skeleton (text around the block, empty
sections, extra sections); ``strict=True`` accepts only the skeleton. The section names come from
:mod:`nemo_ampo.reply.modes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from nemo_ampo.errors import FormatError
from nemo_ampo.reply.modes import MODES, Mode
from nemo_ampo.text import unbroken as one_line
from nemo_ampo.types import Reply

__all__ = ["FORMAT_RULES", "FormatError", "Reply", "one_line", "parse_reply", "render_reply", "spoken_text"]

FORMAT_RULES = ("level", "tags", "order", "answer", "sections", "outside")
"""Values of :attr:`FormatError.rule`, in the order they are checked; ``outside`` is a strict rule."""

BEGIN_THINKING = "<|begin_of_thinking|>"
END_THINKING = "<|end_of_thinking|>"
BEGIN_ANSWER = "<|begin_of_answer|>"
END_ANSWER = "<|end_of_answer|>"
QUOTE = '"'

_HEADINGS = tuple(dict.fromkeys(name for mode in MODES.values() for name in mode.sections))
_TAG = re.compile("|".join(map(re.escape, (BEGIN_THINKING, END_THINKING, BEGIN_ANSWER, END_ANSWER))))
_CUT_TAG = re.compile(r"<(?:\|\w*\|?)?\Z")  # a tag is several tokens: the token limit can fall inside one
_LEVEL_LINE = re.compile(r"^Thinking Level:", re.MULTILINE)
_HEADING_LINE = re.compile(rf"^(?:{'|'.join(_HEADINGS)}):[^\S\n]*$", re.MULTILINE)
_TRACES = (re.compile(r"<\|(?:begin|end)_"), _LEVEL_LINE, _HEADING_LINE)
_DRAFT_HEADING = "\n\nResponse:\n"
_DRAFT_END = re.compile(rf"{_TAG.pattern}|^(?:{'|'.join(_HEADINGS)}):|<\|\w*\|?\Z|^<\Z", re.MULTILINE)
_FINISHED_SENTENCE = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["'\u201d\u2019\u00bb)\]*_]*\s*\Z""")
_FINISHED_QUOTATION = re.compile(r'\s*("[^"]+")\s*')
_OTHER_LINE_BREAK = re.compile(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")


@dataclass(frozen=True)
class _Skeleton:
    """What one mode's reply is recognised by.

    Attributes:
        opening: the first two lines; where they occur, the mode is this one.
        tags: each exactly once in the reply, in this order.
        landmarks: each exactly once in the thinking, none before its predecessor.
        heading: matches the headings of this mode anywhere, and those of other modes at the start of a line.
    """

    opening: str
    tags: tuple[str, ...]
    landmarks: tuple[str, ...]
    heading: re.Pattern[str]


def _skeleton(mode: Mode) -> _Skeleton:
    block = BEGIN_THINKING if mode.sections else BEGIN_ANSWER
    opening = f"Thinking Level: {mode.id}\n{block}\n"
    tags: tuple[str, ...] = (opening, f"\n{END_ANSWER}")
    if mode.sections:
        tags = (opening, f"\n{END_THINKING}", f"{BEGIN_ANSWER}\n", f"\n{END_ANSWER}")
    landmarks = tuple(mark for name in mode.sections for mark in (f"\n\n{name}:\n", f"{name}:\n"))[1:]
    any_heading = "|".join(name if name in mode.sections else f"^{name}" for name in _HEADINGS)
    return _Skeleton(opening, tags, landmarks, re.compile(rf"({any_heading}):\n", re.MULTILINE))


_SKELETONS = {mode.id: _skeleton(mode) for mode in MODES.values()}


def parse_reply(text: str, *, strict: bool = False) -> Reply:
    """Read a decoded reply.

    The mode is the lowest one whose first two lines occur anywhere. Its tags must occur exactly once and in
    order; the answer must begin and end with the only two ``"`` in it; every section of the mode must occur
    once and in order, all but the first after a blank line. Text outside the blocks, empty sections and
    further sections are tolerated, as in the reference.

    Args:
        text: decoded without special tokens, not stripped.
        strict: accept nothing but the skeleton: exactly the mode's sections, none empty, a non-empty answer,
            and no text before, between or after the blocks.

    Returns:
        Mode, answer with its quotes, and section texts without surrounding blanks.

    Raises:
        FormatError: with the first rule of :data:`FORMAT_RULES` that fails.
    """
    mode, thinking = _examined(text)
    # Cut at the bare tags, not at their lines: where one stands inside the quotes the two readings differ,
    # and this is the one that the reference hands to the judge.
    answer = text.split(BEGIN_ANSWER)[-1].split(END_ANSWER)[0].strip()
    reply = Reply(mode, answer, _sections(thinking, _SKELETONS[mode]) if thinking else {})
    if strict:
        _check_strict(reply, text)
    return reply


def mode_of(text: str) -> int:
    """``parse_reply(text).mode``, for whoever needs no more of it.

    Raises:
        FormatError: as :func:`parse_reply` does.
    """
    return _examined(text)[0]


def mode_line(text: str, mode: int) -> tuple[int, int]:
    """Where a reply of this mode says so: begin and end of ``Thinking Level: K``, in characters.

    Raises:
        ValueError: the text is no reply of this mode.
    """
    begin = text.index(_SKELETONS[mode].opening)
    return begin, begin + len(f"Thinking Level: {mode}")


def answer_of(text: str, *, strict: bool = False) -> str | None:
    """The answer of a reply that obeys the grammar, quotes included; None for any other text."""
    try:
        return parse_reply(text, strict=strict).answer
    except FormatError:
        return None


def _examined(text: str) -> tuple[int, str]:
    """Mode of a reply that obeys the grammar, and where its sections stand: from the opening to the end of the thinking."""
    mode = next((k for k, skeleton in _SKELETONS.items() if skeleton.opening in text), None)
    if mode is None:
        raise FormatError("level", "no 'Thinking Level: K' line with the opening tag of that level below it")
    skeleton = _SKELETONS[mode]
    positions = _positions_of_single("tags", skeleton.tags, text)
    if any(later <= earlier for earlier, later in pairwise(positions)):
        raise FormatError("order", f"the tags of level {mode} are not in their order")
    _check_answer(text)
    if not skeleton.landmarks:
        return mode, ""
    thinking = text[positions[0] : positions[1]]
    places = _positions_of_single("sections", skeleton.landmarks, thinking)
    if places != sorted(places):
        raise FormatError("sections", "the sections are not in their order")
    return mode, thinking


def _positions_of_single(rule: str, needles: tuple[str, ...], text: str) -> list[int]:
    for needle in needles:
        count = text.count(needle)
        if count != 1:
            raise FormatError(rule, f"{needle!r} occurs {count} times instead of once")
    return [text.find(needle) for needle in needles]


def _check_answer(text: str) -> None:
    answer = text.split(f"{BEGIN_ANSWER}\n")[-1].split(f"\n{END_ANSWER}")[0]
    if answer.count(QUOTE) != 2 or answer[0] != QUOTE or answer[-1] != QUOTE:
        raise FormatError("answer", f"not one text between two quotation marks: {answer[:80]!r}")


def _sections(thinking: str, skeleton: _Skeleton) -> dict[str, str]:
    headings = list(skeleton.heading.finditer(thinking))
    ends = [heading.start() for heading in headings[1:]] + [len(thinking)]
    return {heading[1]: thinking[heading.end() : end].strip() for heading, end in zip(headings, ends, strict=True)}


def _check_strict(reply: Reply, text: str) -> None:
    if reply.answer.strip(QUOTE).strip() == "":
        raise FormatError("answer", "the answer is empty")
    if tuple(reply.thinking) != MODES[reply.mode].sections:
        raise FormatError("sections", f"level {reply.mode} with the sections {', '.join(reply.thinking)}")
    empty = [name for name, section in reply.thinking.items() if not section]
    if empty:
        raise FormatError("sections", f"section {empty[0]} is empty")
    if text != _written(reply):
        raise FormatError("outside", "text or blank lines outside the blocks and sections")


def render_reply(mode: int, answer: str, thinking: Mapping[str, str] | None = None) -> str:
    """Write the exact skeleton of a mode: the inverse of :func:`parse_reply`.

    Args:
        mode: 1..4.
        answer: the spoken words with their quotation marks.
        thinking: text of each section of the mode, in any order; nothing for mode 1.

    Raises:
        ValueError: an unknown mode, or sections other than the mode's.
        FormatError: the texts themselves break the grammar, for instance a quotation mark inside the answer.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode}: there are only the modes {', '.join(map(str, MODES))}")
    given = dict(thinking or {})
    sections = MODES[mode].sections
    if set(given) != set(sections):
        raise ValueError(f"mode {mode} has the sections ({', '.join(sections)}), got ({', '.join(given)})")
    text = _written(Reply(mode, answer, {name: given[name] for name in sections}))
    parse_reply(text)
    return text


def _written(reply: Reply) -> str:
    answer = f"{BEGIN_ANSWER}\n{reply.answer}\n{END_ANSWER}"
    if not reply.thinking:
        return f"Thinking Level: {reply.mode}\n{answer}"
    thinking = "\n\n".join(f"{name}:\n{section}" for name, section in reply.thinking.items())
    return f"Thinking Level: {reply.mode}\n{BEGIN_THINKING}\n{thinking}\n{END_THINKING}\n{answer}"


def spoken_text(text: str, thinking: bool = True) -> str | None:
    """The words a reply puts into the dialogue, in one pair of quotation marks.

    Unlike :func:`parse_reply` this forgives what it can, since a dialogue has to go on. It never returns
    tags, a level line, a line that is a heading, or thinking that was cut off before the end of its ``Response``
    draft. Line breaks of every kind are read as line feeds.

    Args:
        text: what the model wrote.
        thinking: the speaker uses the four modes. Then, in this order: the last answer block; an answer whose
            end tag is missing but whose quotation is finished; the draft in the last ``Response`` section, when a
            tag or a heading follows it or when it ends with a sentence; for a text without any trace of the
            grammar its last line. Otherwise, for a text without such a trace: from the first to the last
            quotation mark; with only one of them, what follows it; with none, the first line. A plain speaker's
            text with a trace is read as a thinker's.

    Returns:
        The quoted words, or None when the reply holds nothing that may be spoken.
    """
    text = _OTHER_LINE_BREAK.sub("\n", text)
    thinking = thinking or _has_trace(text)
    words = _words_of_thinker(text) if thinking else _words_of_plain_speaker(text)
    if words is None or _has_trace(words.strip(QUOTE)):
        return None
    return f"{QUOTE}{words.strip(QUOTE)}{QUOTE}"


def _has_trace(text: str) -> bool:
    return any(trace.search(text) for trace in _TRACES)


def _words_of_thinker(text: str) -> str | None:
    whole, text = text, _CUT_TAG.sub("", text)
    _, opened, rest = text.rpartition(BEGIN_ANSWER)
    if opened:
        answer, closed, _ = rest.partition(END_ANSWER)
        if closed:
            return answer.strip()
        if quotation := _FINISHED_QUOTATION.fullmatch(rest):
            return quotation[1]
    _, headed, draft = whole.partition(BEGIN_ANSWER)[0].rpartition(_DRAFT_HEADING)
    if headed:
        return _finished_draft(draft)
    return None if _has_trace(whole) else text.split("\n")[-1].strip()


def _finished_draft(draft: str) -> str | None:
    """The words of a draft that was written to its end; None when the reply may have been cut off inside it."""
    if end := _DRAFT_END.search(draft):
        return draft[: end.start()].strip() or None
    return draft.strip() if _FINISHED_SENTENCE.search(draft) else None


def _words_of_plain_speaker(text: str) -> str:
    first, last = text.find(QUOTE), text.rfind(QUOTE)
    if first < 0:
        return text.split("\n")[0].strip()
    if first == last:
        return (text[first + 1 :].strip() or text[:first]).strip()
    return text[first : last + 1]
