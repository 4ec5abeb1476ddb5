"""Text of others, made safe to store, to show and to put on one line."""

from __future__ import annotations

import re

# C0 and C1 control characters but tab and line feed, and what turns the reading direction around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def utf8_safe(text: str) -> str:
    """``text`` with every lone surrogate replaced by ``?``, which HTTP and files can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")


def printable(text: str) -> str:
    """``text`` as a terminal may show it: a control character becomes its escape, so that nobody's reply moves a cursor."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), utf8_safe(text))


def unbroken(text: str) -> str:
    """The text with every kind of line break, and the blanks around it, replaced by one blank."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def one_line(text: str, limit: int = 200) -> str:
    """``text``, printable, on one line, cut to ``limit`` characters."""
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."
