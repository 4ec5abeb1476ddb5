"""The one door for what others send: API keys and passwords leave it as ``[API key]``, however they are written.

An endpoint that repeats a key may write it as JSON does (``\\/``, ``\\u0041``, also inside a string of a string) or as
JavaScript may (``\\x41``), percent-encoded, with HTML entities, in base64 or hexadecimal digits, or in other letter case.
All of these are looked for in the text as it came, so that no decoding afterwards can bring a key back.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote

_SIGN = "[API key]"
_LONG = 8
"""A shorter key is only looked for as it is: in other letter case or in base64 it could be anybody's word."""


class Secrets:
    """Texts that nobody may see.

    Args:
        texts: the keys; empty ones are left out.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        secrets = sorted({text for text in texts if text}, key=len, reverse=True)
        packed = [form for text in secrets if len(text) >= _LONG for form in _packed_forms(text)]
        written = [f"(?i:{_escapable(text)})" if len(text) >= _LONG else _escapable(text) for text in secrets]
        self._any = re.compile("|".join([*written, *map(re.escape, packed)])) if secrets else None
        self._plain = [text.lower() for text in secrets] + [form.lower() for form in packed]
        self._escape = re.compile("|".join(_signs_of_escapes("".join(secrets))))

    def redact(self, text: str) -> str:
        """``text`` without secrets."""
        if self._any is None:
            return text
        # The pattern takes a hundred times as long as looking for the plain forms, and few texts hold an escape.
        lowered = text.lower()
        if any(form in lowered for form in self._plain) or self._escape.search(text):
            return self._any.sub(_SIGN, text)
        return text


def _signs_of_escapes(characters: str) -> Iterator[str]:
    """Patterns of which one is in every text that holds one of the characters in an escaped form."""
    yield from (r"\\u00", r"\\x", "%[0-9A-Fa-f]{2}", "&#")
    if "/" in characters:
        yield r"\\/"
    if set(characters) & {'"', "\\"}:
        yield r'\\["\\]'
    if set(characters) & set('&"<>'):
        yield "&[aqlg]"


def _escapable(secret: str) -> str:
    return "".join(_forms_of(character) for character in secret)


def _forms_of(character: str) -> str:
    """Pattern of one character, plain or escaped in any of the ways above, a few times over."""
    code = ord(character)
    named = {"&": "|&amp;", '"': "|&quot;", "<": "|&lt;", ">": "|&gt;"}.get(character, "")
    # Every repetition is bounded, so that no text takes long to search.
    slashed = rf"\\{{0,8}}(?:{re.escape(character)}|(?<=\\)(?:u(?i:{code:04x})|x(?i:{code:02x})))"
    return rf"(?:{slashed}|%(?:25){{0,4}}(?i:{code:02x})|&#0{{0,6}}{code};?|&#[xX]0{{0,6}}(?i:{code:x});?{named})"


def _packed_forms(secret: str) -> Iterator[str]:
    """The secret's bytes in hexadecimal digits, and in base64, alone or anywhere inside a longer text such as
    ``user:secret``, in both alphabets."""
    raw = secret.encode("utf-8")
    yield from {raw.hex(), raw.hex().upper()}
    for before in range(3):
        packed = base64.b64encode(b"\0" * before + raw).rstrip(b"=").decode("ascii")
        # The first signs hold bits of what stands before, the last one bits of what follows.
        first = (0, 2, 3)[before]
        last = len(packed) - (1 if (before + len(raw)) % 3 else 0)
        core = packed[first:last]
        yield from {core, core.replace("+", "-").replace("/", "_"), core.replace("/", r"\/"), quote(core, safe="")}
