"""What a ``/chat/completions`` body may look like, and what is none."""

from __future__ import annotations

import json

import pytest

from nemo_ampo.chat.completion import CallError, Completion, one_line, read_completion, read_model_ids


def body(**record: object) -> str:
    return json.dumps({"choices": [{"message": {"content": "hi"}}], **record})


def test_text_and_usage_are_read() -> None:
    assert read_completion(body(usage={"prompt_tokens": 12, "completion_tokens": 3})) == Completion("hi", None, 12, 3)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": None}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}])
def test_missing_usage_counts_as_nothing(usage: object) -> None:
    assert read_completion(body(usage=usage)) == Completion("hi")


def test_a_model_that_says_nothing_has_an_empty_text() -> None:
    assert read_completion(body(choices=[{"message": {"content": None}}])).text == ""
    assert read_completion(body(choices=[{"message": {"role": "assistant", "refusal": "no"}}])).text == ""


@pytest.mark.parametrize(
    "garbage",
    [
        "", "<html>502</html>", "null", "[]", "3", "{}", '{"choices": null}', '{"choices": []}',
        '{"choices": [1]}', '{"choices": {"0": 1}}', '{"choices": [{"message": "hi"}]}',
        '{"choices": [{"message": {"content": 5}}]}',
        '{"choices": [{"message": {"content": [{"type": "text", "text": "x"}]}}]}', "[" * 1_000_000,
        '{"error": {"message": "overloaded"}}',
    ],
)  # fmt: skip
def test_anything_else_is_a_failed_call_that_may_pass(garbage: str) -> None:
    with pytest.raises(CallError) as caught:
        read_completion(garbage)
    assert (caught.value.kind, caught.value.cause, caught.value.transient) == ("parse", "body", True)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_model_ids() -> None:
    assert read_model_ids('{"data": [{"id": "a"}, {"id": "b"}]}') == ["a", "b"]
    for garbage in ("", "null", "[]", "{}", '{"data": 3}', '{"data": [3]}', '{"data": [{}]}'):
        assert read_model_ids(garbage) == []


def test_one_line() -> None:
    assert one_line("a\n b\t c") == "a b c"
    assert one_line("word " * 100, limit=12) == "word word..."
