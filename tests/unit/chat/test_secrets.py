"""A key is found however it is written, and nothing else is touched."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ampo.chat.completion import read_completion
from nemo_ampo.chat.secrets import Secrets

KEY = "sk-AbC/123+xyz=="


def hexed(key: str) -> str:
    return "".join(f"\\u{ord(c):04X}" for c in key)


def packed(key: str, before: str = "", after: str = "") -> str:
    return base64.b64encode((before + key + after).encode()).decode()


WRITTEN: dict[str, Callable[[str], str]] = {
    "plain": lambda key: key,
    "json": lambda key: json.dumps(key),
    "json with slashes": lambda key: json.dumps(key).replace("/", "\\/"),
    "json in json": lambda key: json.dumps(json.dumps(key).replace("/", "\\/")),
    "hex": hexed,
    "hex in json": lambda key: json.dumps(hexed(key).lower()),
    "partly hex": lambda key: key[:1] + hexed(key[1]) + key[2:],
    "percent": lambda key: quote(key, safe=""),
    "percent of all": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "percent twice": lambda key: quote(quote(key, safe=""), safe=""),
    "html": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "html hex": lambda key: "".join(f"&#x{ord(c):X};" for c in key),
    "html without ends": lambda key: "".join(f"&#{ord(c)}" for c in key),
    "javascript": lambda key: "".join(f"\\x{ord(c):02x}" for c in key),
    "javascript in json": lambda key: json.dumps("".join(f"\\x{ord(c):02X}" for c in key)),
}
LONG_ONLY: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "lower": str.lower,
    "bytes": lambda key: key.encode().hex(),
    "bytes in capitals": lambda key: key.encode().hex().upper(),
    "base64": packed,
    "base64 of user and key": lambda key: packed(key, before="user:"),
    "base64 inside": lambda key: packed(key, before="ab", after="cd"),
    "base64url": lambda key: base64.urlsafe_b64encode(key.encode()).decode(),
    "base64 in json": lambda key: packed(key).replace("/", "\\/"),
}
ASCII = st.characters(min_codepoint=33, max_codepoint=126)
LONG_KEYS = st.text(ASCII, min_size=5, max_size=40).map("sk-".__add__)
SHORT_KEYS = st.text(ASCII, min_size=1, max_size=4).map("sk-".__add__)


@given(LONG_KEYS, st.sampled_from([*WRITTEN.items(), *LONG_ONLY.items()]))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_a_key_is_found_however_it_is_written(key: str, way: tuple[str, Callable[[str], str]]) -> None:
    name, write = way
    written = write(key)
    redacted = Secrets([key, "another"]).redact(f"before {written} after")
    assert redacted.startswith("before ") and redacted.endswith(" after")
    assert "[API key]" in redacted and written not in redacted, (name, redacted)


@given(SHORT_KEYS, st.sampled_from(sorted(WRITTEN.items())))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_short_key_is_found_too(key: str, way: tuple[str, Callable[[str], str]]) -> None:
    written = way[1](key)
    assert written not in Secrets([key]).redact(f"\t{written}\t")


@given(LONG_KEYS, st.text(max_size=20), st.text(max_size=20), st.booleans())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_a_body_stays_json_and_its_decoded_text_holds_no_key(key: str, before: str, after: str, ascii_only: bool) -> None:
    said = f"{before}{key}{after}"
    body = json.dumps({"choices": [{"message": {"content": said}}]}, ensure_ascii=ascii_only).replace("/", "\\/")
    text = read_completion(Secrets([key]).redact(body)).text
    assert key not in text and key.lower() not in text.lower()


@given(st.text(max_size=200))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_other_text_is_left_as_it_is(text: str) -> None:
    assert Secrets([KEY, ""]).redact(text) == text and Secrets([]).redact(text) == text


def test_a_short_key_in_other_letter_case_is_anybodys_word() -> None:
    assert Secrets(["EMPTY"]).redact("the empty seat, EMPTY") == "the empty seat, [API key]"


@pytest.mark.parametrize("piece", ["\\", "s\\k", "%25", "a", "&#0", "\\u00", KEY[:-1]])
def test_no_text_takes_long_to_search(piece: str) -> None:
    text = piece * (2**18 // len(piece))
    assert Secrets([KEY]).redact(text) == text
