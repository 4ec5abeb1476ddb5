"""What a ``/chat/completions`` body may look like, and what is none."""

from __future__ import annotations

import json

import pytest

from nemo_ampo.chat.completion import CallError, Completion, read_completion, read_model_ids
from nemo_ampo.text import one_line


def body(**record: object) -> str:
    return json.dumps({"choices": [{"message": {"content": "hi"}}], **record})


def test_text_and_usage_are_read() -> None:
    assert read_completion(body(usage={"prompt_tokens": 12, "completion_tokens": 3})) == Completion("hi", None, 12, 3)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": None}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}])
def test_missing_usage_counts_as_nothing(usage: object) -> None:
    assert read_completion(body(usage=usage)) == Completion("hi")


@pytest.mark.parametrize("count", [10**400, 10**9, True, 1.5])
def test_a_count_that_cannot_be_is_none(count: object) -> None:
    assert read_completion(body(usage={"prompt_tokens": count, "completion_tokens": 3})) == Completion("hi", None, 0, 3)


def test_lone_surrogates_are_replaced_wherever_a_reply_has_text() -> None:
    message = {"content": "a\ud800b", "reasoning_content": "\udfff"}
    read = read_completion(json.dumps({"choices": [{"message": message, "finish_reason": "\ud801"}]}))
    assert (read.text, read.reasoning, read.finish_reason) == ("a?b", "?", "?")


def test_an_answer_without_a_completion_still_says_what_it_cost() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 50}
    with pytest.raises(CallError) as caught:
        read_completion(json.dumps({"choices": [{"message": {"content": [{"type": "text"}]}}], "usage": usage}))
    assert caught.value.usage == (100, 50)


@pytest.mark.parametrize(
    "content",
    [
        "said", ["sa", None, "id"], {"type": "text", "text": "said"}, [{"text": "said"}], [{"type": None, "text": "said"}],
        [{"type": "text", "text": {"value": "said", "annotations": []}}, {"type": "refusal", "refusal": "no"}],
        [{"type": "output_text", "text": "said", "annotations": []}, {"type": "text", "text": None}],
    ],
)  # fmt: skip
def test_what_was_said_is_read_in_whatever_parts_it_comes(content: object) -> None:
    assert read_completion(body(choices=[{"message": {"content": content}}])) == Completion("said")


def test_a_model_that_says_nothing_has_an_empty_text() -> None:
    assert read_completion(body(choices=[{"message": {"content": None}}])).text == ""
    assert read_completion(body(choices=[{"message": {"role": "assistant", "refusal": "no"}}])).text == ""


@pytest.mark.parametrize(
    "garbage",
    [
        "", "<html>502</html>", "null", "[]", "3", "{}", '{"choices": null}', '{"choices": []}',
        '{"choices": [1]}', '{"choices": {"0": 1}}', '{"choices": [{"message": "hi"}]}',
        '{"choices": [{"message": {"content": 5}}]}',
        '{"choices": [{"message": {"content": [{"type": "text", "text": 5}]}}]}', "[" * 1_000_000,
        '{"choices": [{"message": {"content": [{"type": "text"}]}}]}', '{"choices": [{"message": {"content": [["x"]]}}]}',
        '{"choices": [{"message": {"content": {"type": "text", "text": {"value": 5}}}}]}',
        '{"error": {"message": "overloaded"}}',
    ],
)  # fmt: skip
def test_anything_else_is_a_failed_call_that_may_pass(garbage: str) -> None:
    with pytest.raises(CallError) as caught:
        read_completion(garbage)
    assert (caught.value.kind, caught.value.cause, caught.value.transient) == ("parse", "body", True)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ([{"type": "text", "text": "7"}], "7", None),
        ([{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c"}], "abc", None),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "7"}], "7", "hm"),
        ([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "7"}], "7", "hm"),
        ([{"type": "reasoning", "summary": [{"text": "1 "}, {"text": "2"}]}, {"type": "text", "text": "7"}], "7", "1 2"),
        ([{"type": "reasoning", "text": "a"}, {"type": "thinking", "thinking": "b"}], "", "a\nb"),
        ([{"type": "image_url", "image_url": {}}, {"type": "text", "text": "7"}], "7", None),
        ([{"type": "text", "text": "<think>hm"}, {"type": "text", "text": "</think>7"}], "7", "hm"),
        ([{"type": "thinking", "thinking": [3, {"text": 4}, None]}, {"type": "text", "text": "7"}], "7", None),
        ([], "", None),
    ],
)  # fmt: skip
def test_content_in_parts_is_joined_without_its_thoughts(content: object, text: str, reasoning: str | None) -> None:
    read = read_completion(body(choices=[{"message": {"content": content}}]))
    assert (read.text, read.reasoning) == (text, reasoning)


@pytest.mark.parametrize(("reason", "cut"), [("length", True), ("MAX_TOKENS", True), ("stop", False), (None, False)])
def test_a_reply_says_that_it_was_cut(reason: str | None, cut: bool) -> None:
    assert read_completion(body(choices=[{"message": {"content": "x"}, "finish_reason": reason}])).cut is cut


def test_model_ids() -> None:
    assert read_model_ids('{"data": [{"id": "a"}, {"id": "b"}]}') == ["a", "b"]
    for garbage in ("", "null", "[]", "{}", '{"data": 3}', '{"data": [3]}', '{"data": [{}]}'):
        assert read_model_ids(garbage) == []


def test_one_line() -> None:
    assert one_line("a\n b\t c") == "a b c"
    assert one_line("word " * 100, limit=12) == "word word..."
