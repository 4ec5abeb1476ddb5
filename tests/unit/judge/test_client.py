"""The judge client against a real HTTP server that misbehaves in every way we know."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from tenacity import RetryCallState

from nemo_ampo.chat.calls import Calls
from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.limiter import LocalLimiter
from nemo_ampo.chat.limits import Limits
from nemo_ampo.chat.stats import StatsRecorder
from nemo_ampo.errors import ConfigError, JudgeError, UserError
from nemo_ampo.judge import client as judge_client
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.prompts import read_judge_prompt
from nemo_ampo.serve.local import free_port
from nemo_ampo.types import JudgeRequest, Verdict

KEY = "sk-do-not-show-4711"
KEY_VARIABLE = "TEST_JUDGE_KEY"


def ask(config: JudgeConfig, *requests: JudgeRequest) -> tuple[list[Any], JudgeStats]:
    """Score ``requests`` concurrently; verdicts and errors in order, and the statistics."""

    async def run() -> tuple[list[Any], JudgeStats]:
        async with Judge(config) as judge:
            outcomes = await asyncio.gather(*map(judge.score, requests), return_exceptions=True)
            return outcomes, judge.stats

    return asyncio.run(run())


def check(config: JudgeConfig) -> None:
    async def run() -> None:
        async with Judge(config) as judge:
            await judge.check()

    asyncio.run(run())


def test_a_verdict_and_what_was_sent(tools: Any) -> None:
    server = tools.serve(tools.verdict(7, "3.5"))
    request = tools.request('Turn 0: Ada said: "Grüß dich {{dialogue}}"')
    outcomes, stats = ask(tools.config(server.base_url, max_tokens=99), request)
    assert outcomes == [Verdict(7.0, 3.5, "one", "two")]
    (call,) = server.calls
    assert (call.payload["model"], call.payload["max_tokens"], call.temperature) == ("referee", 99, 0.0)
    assert [message["role"] for message in call.payload["messages"]] == ["user"]
    assert read_judge_prompt(call.prompt) == request
    assert (stats.requests, stats.verdicts, stats.calls, stats.retries, stats.failures) == (1, 1, 1, {}, {})
    assert (stats.prompt_tokens, stats.completion_tokens) == (100, 20)
    assert stats.latency_p50_s is not None and stats.latency_p50_s > 0
    assert stats.latency_p50_s == stats.latency_p95_s


def test_of_a_batch_a_few_prompts_are_written_at_a_time(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in one go, they would hold up the calls under way."""
    written, write = list[str](), judge_client.render_judge_prompt
    go_on = threading.Event()
    server = tools.serve(lambda number, call: dataclasses.replace(tools.verdict(7, 3), hold=go_on))

    def render(*arguments: Any) -> str:
        written.append(str(arguments[1].dialogue))
        return write(*arguments)

    async def run() -> list[Verdict]:
        async with Judge(tools.config(server.base_url, max_concurrency=2)) as judge:
            questions = asyncio.gather(*[judge.score(tools.request(f"Turn {n}")) for n in range(40)])
            while len(server.calls) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # for prompts that should not be written yet
            assert len(written) == 2 * judge_client.QUESTIONS_PER_SLOT
            go_on.set()
            return await questions

    monkeypatch.setattr(judge_client, "render_judge_prompt", render)
    assert asyncio.run(run()) == [Verdict(7.0, 3.0, "one", "two")] * 40
    assert len(set(written)) == len(written) == 40


def test_a_dialogue_with_a_lone_surrogate_can_be_sent(tools: Any) -> None:
    server = tools.serve(tools.verdict())
    outcomes, _ = ask(tools.config(server.base_url), tools.request("broken \udc80 text"))
    assert isinstance(outcomes[0], Verdict)
    assert read_judge_prompt(server.calls[0].prompt).dialogue == "broken ? text"


def test_unreadable_verdicts_are_asked_for_again_at_the_scheduled_temperatures(tools: Any) -> None:
    replies = ["I think 7.", '{"agent1": {', tools.verdict_text(70, 1), "", tools.verdict_text(4, 6)]
    server = tools.serve(lambda number, call: tools.says(replies[number]))
    outcomes, stats = ask(tools.config(server.base_url), tools.request())
    assert outcomes == [Verdict(4.0, 6.0, "one", "two")]
    assert server.temperatures == [0.0, 0.0, 1.0, 1.0, 1.0]
    talks = [call.payload["messages"] for call in server.calls]
    assert [len(talk) for talk in talks] == [1, 3, 1, 1, 1], "the second try is told what is wrong, once"
    assert all(talk[0] == talks[0][0] for talk in talks)
    assert talks[1][1] == {"role": "assistant", "content": "I think 7."}
    assert talks[1][2]["role"] == "user" and "it has no JSON object" in talks[1][2]["content"]
    assert stats.parse_failures == 4
    assert (stats.calls, stats.retries, stats.failures) == (5, {"parse": 3, "empty": 1}, {})
    assert (stats.prompt_tokens, stats.completion_tokens) == (500, 100), "unreadable replies were paid for too"


def test_what_an_unreadable_reply_quotes_is_shown_to_the_judge_without_control_tokens(tools: Any) -> None:
    quoted = 'He said "<|im_end|>" and {"[INST]": 1, "[INST]": 2}'
    server = tools.serve(lambda number, call: tools.verdict() if number else tools.says(quoted))
    ask(tools.config(server.base_url), tools.request())
    shown, request = (message["content"] for message in server.calls[1].payload["messages"][1:])
    assert shown == 'He said "< |im_end|>" and {"[ INST]": 1, "[ INST]": 2}'
    assert "key '[ INST]' occurs twice" in request


@pytest.mark.parametrize(("content", "kind"), [("no idea", "parse"), (" \n", "empty"), (None, "empty")])
def test_unreadable_to_the_end_is_a_failure(tools: Any, content: str | None, kind: str) -> None:
    server = tools.serve(tools.says(content))
    (error,), stats = ask(tools.config(server.base_url, temperatures=[0.0, 0.5]), tools.request())
    assert isinstance(error, JudgeError) and error.kind == kind and "try 2 of 2" in str(error)
    assert server.temperatures == [0.0, 0.5]
    assert (stats.verdicts, stats.failures, stats.retries) == (0, {kind: 1}, {kind: 1})


def test_busy_and_broken_endpoints_are_asked_again_at_the_same_temperature(tools: Any) -> None:
    troubles = [
        tools.Answer('{"error": {"message": "slow down"}}', status=429, headers={"Retry-After": "0"}),
        tools.Answer("upstream down", status=503),
        tools.Answer(drop=True),
        tools.Answer("<html>try later</html>", headers={"Content-Type": "text/html"}),
    ]
    server = tools.serve(lambda number, call: troubles[number] if number < 4 else tools.verdict(5, 5))
    outcomes, stats = ask(tools.config(server.base_url, connection_retries=4), tools.request())
    assert outcomes == [Verdict(5.0, 5.0, "one", "two")]
    assert server.temperatures == [0.0] * 5
    assert stats.retries == {"rate_limit": 1, "server_error": 1, "connection": 1, "body": 1}


def test_each_try_for_a_verdict_has_its_own_connection_retries(tools: Any) -> None:
    busy = tools.Answer(status=500)
    answers = [busy, tools.says("?"), busy, tools.says("?"), busy, tools.verdict(1, 2)]
    server = tools.serve(lambda number, call: answers[number])
    outcomes, stats = ask(tools.config(server.base_url, connection_retries=1), tools.request())
    assert isinstance(outcomes[0], Verdict)
    assert server.temperatures == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert stats.retries == {"server_error": 3, "parse": 2}


@pytest.mark.parametrize(("status", "cause"), [(429, "rate_limit"), (500, "server_error"), (503, "server_error")])
def test_patience_with_a_busy_endpoint_ends(tools: Any, status: int, cause: str) -> None:
    server = tools.serve(tools.Answer('{"error": {"message": "over\\nloaded"}}', status=status))
    (error,), stats = ask(tools.config(server.base_url, connection_retries=2), tools.request())
    assert isinstance(error, JudgeError) and error.kind == "status"
    assert str(status) in str(error) and "loaded" in str(error) and "\n" not in str(error)
    assert len(server.calls) == 3, "a call that brings no answer is not tried at other temperatures"
    assert (stats.retries, stats.failures) == ({cause: 2}, {"status": 1})


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_other_statuses_fail_at_once(tools: Any, status: int) -> None:
    server = tools.serve(tools.Answer('{"error": {"message": "no"}}', status=status))
    (error,), stats = ask(tools.config(server.base_url, structured="off"), tools.request())
    assert isinstance(error, JudgeError) and error.kind == "status" and str(status) in str(error)
    assert len(server.calls) == 1
    assert (stats.retries, stats.failures) == ({}, {"status": 1})


@pytest.mark.parametrize("body", ["", "garbage", "[]", '{"choices": []}', "[" * 100_000, '"\\ud800"', "\udc80"])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/json; charset=no-such"])
def test_a_garbage_body_is_a_failure(tools: Any, body: str, content_type: str) -> None:
    server = tools.serve(tools.Answer(body, headers={"Content-Type": content_type}))
    (error,), stats = ask(tools.config(server.base_url, connection_retries=1), tools.request())
    assert isinstance(error, JudgeError) and error.kind == "parse"
    assert (len(server.calls), stats.retries, stats.failures) == (2, {"body": 1}, {"parse": 1})


@pytest.mark.parametrize(
    ("damage", "kind", "cause"),
    [({"Content-Length": "999"}, "connection", "connection"), ({"Content-Encoding": "gzip"}, "parse", "body")],
    ids=["breaks off", "packed"],
)
def test_a_body_that_is_not_whole_or_packed_unasked(tools: Any, damage: dict[str, str], kind: str, cause: str) -> None:
    server = tools.serve(tools.Answer("{}", headers=damage | {"Connection": "close"}))
    config = tools.config(server.base_url, connection_retries=1)
    (error,), stats = ask(config, tools.request())
    assert isinstance(error, JudgeError) and error.kind == kind
    assert stats.retries == {cause: 1}


@pytest.mark.parametrize("charset", ["rot13", "idna", '"', "utf-16"])
def test_json_is_utf_8_whatever_a_header_claims(tools: Any, charset: str) -> None:
    answer = tools.verdict()
    answer.headers["Content-Type"] = f"application/json; charset={charset}"
    (verdict,), stats = ask(tools.config(tools.serve(answer).base_url), tools.request())
    assert verdict.agent1 >= 0 and stats.failures == {}


@pytest.mark.parametrize("explain", [True, False])
def test_a_lone_surrogate_in_a_reply_is_only_an_odd_sign(tools: Any, tmp_path: Path, explain: bool) -> None:
    odd = '{"choices": [{"message": {"content": "no \\ud800 json"}}]}'
    server = tools.serve(lambda number, call: tools.Answer(odd) if number == 0 else tools.verdict())
    config = tools.config(server.base_url, explain_parse_error=explain, cache=str(tmp_path / "cache.sqlite"))
    (verdict,), stats = ask(config, tools.request())
    assert verdict.agent1 >= 0 and stats.parse_failures == 1


def test_silence_is_a_timeout(tools: Any) -> None:
    never = threading.Event()
    server = tools.serve(lambda number, call: tools.Answer(hold=never) if number < 2 else tools.verdict())
    config = tools.config(server.base_url, timeout_s=0.3, connection_retries=1)
    (error,), stats = ask(config, tools.request())
    assert isinstance(error, JudgeError) and error.kind == "timeout" and "0.3 s" in str(error)
    assert (stats.calls, stats.retries, stats.failures) == (2, {"timeout": 1}, {"timeout": 1})
    assert stats.latency_p50_s is None
    outcomes, _ = ask(config, tools.request())
    assert isinstance(outcomes[0], Verdict)


def test_an_answer_that_trickles_in_byte_by_byte_is_a_timeout_too(tools: Any) -> None:
    trickle = tools.Answer("x" * 10_000, trickle=True)
    server = tools.serve(trickle)
    (error,), _ = ask(tools.config(server.base_url, timeout_s=0.5, connection_retries=0), tools.request())
    assert isinstance(error, JudgeError) and error.kind == "timeout"


def test_nobody_listens(tools: Any) -> None:
    config = tools.config(f"http://127.0.0.1:{free_port('127.0.0.1')}/v1", connection_retries=2)
    (error,), stats = ask(config, tools.request())
    assert isinstance(error, JudgeError) and error.kind == "connection"
    assert (stats.calls, stats.retries, stats.failures) == (3, {"connection": 2}, {"connection": 1})


def test_one_failure_does_not_touch_the_others(tools: Any) -> None:
    def script(number: int, call: Any) -> Any:
        return tools.Answer(status=400) if "poison" in call.prompt else tools.verdict(len(call.prompt) % 10, 0)

    server = tools.serve(script)
    dialogues = ["a", "poison", "bb", "ccc"]
    outcomes, stats = ask(tools.config(server.base_url), *map(tools.request, dialogues))
    assert [type(outcome) for outcome in outcomes] == [Verdict, JudgeError, Verdict, Verdict]
    assert len({outcome.agent1 for outcome in outcomes if isinstance(outcome, Verdict)}) == 3
    assert (stats.requests, stats.verdicts, stats.failures) == (4, 3, {"status": 1})


def test_as_many_calls_in_flight_as_configured_and_no_more(tools: Any) -> None:
    go_on = threading.Event()

    def script(number: int, call: Any) -> Any:
        return dataclasses.replace(tools.verdict(), hold=go_on)

    server = tools.serve(script)

    async def run() -> list[Verdict]:
        async with Judge(tools.config(server.base_url, max_concurrency=3)) as judge:
            questions = asyncio.gather(*[judge.score(tools.request()) for _ in range(12)])
            while len(server.calls) < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # for calls that should not come
            assert len(server.calls) == 3
            go_on.set()
            return await questions

    assert len(asyncio.run(run())) == 12
    assert (len(server.calls), server.max_in_flight) == (12, 3)


def test_a_call_that_waits_for_its_repetition_holds_no_slot(tools: Any) -> None:
    others_done = threading.Event()

    def script(number: int, call: Any) -> Any:
        if "patient" in call.prompt and not others_done.is_set():
            return tools.Answer(status=503)
        if "last" in call.prompt:
            others_done.set()
        return tools.verdict()

    server = tools.serve(script)
    config = tools.config(
        server.base_url,
        max_concurrency=1,
        connection_retries=2000,
        backoff_initial_s=0.01,
        backoff_max_s=0.02,
    )
    outcomes, _ = ask(config, *map(tools.request, ["patient", "second", "last"]))
    assert all(isinstance(outcome, Verdict) for outcome in outcomes)


def test_the_wait_grows_obeys_the_endpoint_and_has_a_limit(tools: Any) -> None:
    config = tools.config("http://127.0.0.1:9/v1", backoff_initial_s=1.0, backoff_max_s=30.0, retry_after_max_s=60.0)
    calls = Calls(config, LocalLimiter(Limits.of(config)), StatsRecorder())

    def waits(attempt: int, retry_after_s: float) -> list[float]:
        error = CallError("status", "busy", cause="rate_limit", transient=True, retry_after_s=retry_after_s)
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.attempt_number = attempt
        state.set_exception((CallError, error, None))  # type: ignore[arg-type]
        return [calls.wait_s(state, set(calls.pool.endpoints)) for _ in range(200)]

    assert all(0 <= wait <= 1 for wait in waits(1, 0.0)) and len(set(waits(1, 0.0))) > 100
    assert max(waits(3, 0.0)) > 2 and all(wait <= 4 for wait in waits(3, 0.0))
    assert all(wait <= 30 for wait in waits(50, 0.0))
    assert set(waits(1, 5.0)) == {5.0}
    assert set(waits(1, 3600.0)) == {60.0}


def test_cancelling_a_question_is_not_a_judge_failure(tools: Any) -> None:
    held = threading.Event()
    server = tools.serve(lambda number, call: tools.Answer(hold=held))

    async def run() -> JudgeStats:
        async with Judge(tools.config(server.base_url)) as judge:
            question = asyncio.create_task(judge.score(tools.request()))
            while not server.calls:
                await asyncio.sleep(0.01)
            question.cancel()
            with pytest.raises(asyncio.CancelledError):
                await question
            return judge.stats

    stats = asyncio.run(run())
    assert (stats.calls, stats.failures, stats.retries) == (1, {}, {})


def test_the_key_is_sent_and_shown_nowhere(
    tools: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    echo = {"error": {"message": f"the key {KEY} is not welcome"}}  # as some gateways do
    answers = [
        tools.Answer(json.dumps(echo), status=500),
        tools.Answer(f"<html>{KEY}</html>"),
        tools.Answer(drop=True),
        tools.says(f"my key is {KEY}"),
        tools.says(tools.verdict_text(KEY, 1)),
        tools.says(tools.verdict_text(5, 5).replace("one", KEY)),
        tools.Answer(json.dumps(echo), status=401),
    ]
    server = tools.serve(lambda number, call: answers[min(number, len(answers) - 1)])
    config = tools.config(server.base_url, api_key_env=KEY_VARIABLE)
    shown = [repr(config), repr(Judge(config))]
    with caplog.at_level(logging.DEBUG):
        outcomes, stats = ask(config, tools.request())
        (refused,), _ = ask(config, tools.request())
    assert {call.authorization for call in server.calls} == {f"Bearer {KEY}"}
    assert len(server.calls) == 7 and isinstance(outcomes[0], Verdict) and isinstance(refused, JudgeError)
    assert refused.__cause__ is None and refused.__context__ is None
    shown += [str(outcomes[0]), repr(stats), repr(refused), *caplog.messages, str(vars(refused))]
    shown += traceback.format_exception(refused)
    assert caplog.messages, "nothing was logged, so nothing was tested"
    assert not [text for text in shown if KEY in text]
    with pytest.raises(UserError) as caught:
        check(tools.config(tools.serve(answers[6], models=answers[6]).base_url, api_key_env=KEY_VARIABLE))
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_no_key_of_the_environment_is_sent_unasked(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = tools.serve(tools.verdict())
    ask(tools.config(server.base_url), tools.request())
    assert server.calls[0].authorization is None


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_missing_key_is_named_before_anything_is_sent(
    tools: Any, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        check(tools.config("http://127.0.0.1:9/v1", api_key_env=KEY_VARIABLE))


@pytest.mark.parametrize("value", ["sk-two\nlines", "sk two words", "sk-gr\u00fc\u00df"])
def test_what_cannot_be_a_key_is_refused_and_not_repeated(tools: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(ConfigError, match=KEY_VARIABLE) as caught:
        Judge(tools.config("http://127.0.0.1:9/v1", api_key_env=KEY_VARIABLE))
    assert "sk" not in str(caught.value)


def test_a_bad_prompt_file_stops_the_start(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{{dialogue}} {{agent1_name}} {{agent1_goal}} {{agent2_name}} {{agent2_gaol}}")
    with pytest.raises(ConfigError, match=r"mine\.txt.*\{\{agent2_goal\}\}"):
        Judge(tools.config("http://127.0.0.1:9/v1", prompt=str(path)))


def test_a_prompt_file_of_ones_own_is_used(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{{dialogue}}|{{agent1_name}}|{{agent1_goal}}|{{agent2_name}}|{{agent2_goal}}\n")
    server = tools.serve(tools.verdict())
    ask(tools.config(server.base_url, prompt=str(path)), tools.request("Hi"))
    assert server.calls[0].prompt == "Hi|Ada|borrow the car|Ben|keep the car"


def test_check_asks_a_first_time_with_everything_the_run_will_send(tools: Any) -> None:
    server = tools.serve(tools.verdict())
    check(tools.config(server.base_url, seed=3, max_tokens=77, extra_body={"top_k": 1}, temperatures=[0.0, 0.0, 0.7]))
    assert server.temperatures == [0.0, 0.7], "each temperature once"
    for call in server.calls:
        sent = {name: call.payload[name] for name in ("model", "max_tokens", "seed", "top_k")}
        assert sent == {"model": "referee", "max_tokens": 77, "seed": 3, "top_k": 1}
        assert call.payload["response_format"]["type"] == "json_schema"
        assert read_judge_prompt(call.prompt).agent1_name


@pytest.mark.parametrize("listing", ['{"data": []}', "not json", '{"data": [{"id": "other"}]}'])
def test_check_lets_a_call_decide_where_the_model_is_not_listed(tools: Any, listing: str) -> None:
    server = tools.serve(tools.verdict(), models=tools.Answer(listing))
    check(tools.config(server.base_url))
    missing = tools.Answer('{"error": {"message": "no such model"}}', status=404)
    server = tools.serve(missing, models=tools.Answer(listing))
    with pytest.raises(UserError, match=rf"judge\.base_url {server.base_url}: status 404.*no such model.*referee"):
        check(tools.config(server.base_url))
    assert len(server.calls) == 1


def test_check_works_where_models_are_not_listed_at_all(tools: Any) -> None:
    check(tools.config(tools.serve(tools.verdict(), models=tools.Answer(status=404)).base_url))


REFUSALS: dict[str, tuple[Any, str]] = {
    "temperature": (lambda sent: sent["temperature"] == 0, "temperature=0.0"),
    "later temperature": (lambda sent: sent["temperature"] == 1, "temperature=1.0"),
    "seed": (lambda sent: "seed" in sent, "seed=5"),
    "max_tokens": (lambda sent: "max_tokens" in sent, "max_tokens=2048"),
    "extra_body": (lambda sent: "top_k" in sent, "top_k=1"),
}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_parameter_that_the_endpoint_refuses_is_named_before_the_run(tools: Any, name: str, status: int) -> None:
    refuses, shown = REFUSALS[name]
    no = tools.Answer('{"error": {"message": "Unsupported value"}}', status=status)
    server = tools.serve(lambda number, call: no if refuses(call.payload) else tools.verdict())
    with pytest.raises(UserError) as caught:
        check(tools.config(server.base_url, seed=5, extra_body={"top_k": 1}))
    message = str(caught.value)
    assert f"status {status}" in message and "Unsupported value" in message and shown in message and "\n" not in message


@pytest.mark.parametrize("kind", ["400", "422", "500", "hang up", "web page", "silence"])
def test_an_endpoint_that_fails_because_of_the_schema_is_found_out_at_the_start(tools: Any, kind: str) -> None:
    failures = {
        "hang up": tools.Answer(drop=True), "web page": tools.Answer("<html>"),
        "silence": tools.Answer(hold=threading.Event()),
    }  # fmt: skip
    failure = failures[kind] if kind in failures else tools.Answer('{"message": "KeyError: schema"}', status=int(kind))
    server = tools.serve(lambda number, call: failure if "response_format" in call.payload else tools.verdict())
    config = tools.config(server.base_url, connection_retries=1, timeout_s=0.5 if kind == "silence" else 20.0)

    async def run() -> tuple[Verdict, int]:
        async with Judge(config) as judge:
            await judge.check()
            asked = len(server.calls)
            return await judge.score(tools.request()), len(server.calls) - asked

    assert asyncio.run(run()) == (Verdict(7.0, 3.0, "one", "two"), 1)


def test_one_bad_moment_at_the_start_does_not_cost_the_schema(tools: Any) -> None:
    server = tools.serve(lambda number, call: tools.Answer(status=503) if number == 0 else tools.verdict())
    check(tools.config(server.base_url, temperatures=[0.0, 1.0]))
    assert ["response_format" in call.payload for call in server.calls] == [True, False, True, True]


def test_an_endpoint_that_asks_for_a_pause_at_the_start_gets_it_and_keeps_the_schema(tools: Any) -> None:
    busy = tools.Answer(status=429, headers={"Retry-After": "0.4"})
    server = tools.serve(lambda number, call: busy if number == 0 else tools.verdict())
    begin = time.monotonic()
    check(tools.config(server.base_url, temperatures=[0.0]))
    assert ["response_format" in call.payload for call in server.calls] == [True, True]
    assert time.monotonic() - begin >= 0.4


def test_an_endpoint_that_stays_out_of_order_is_told_and_left_to_the_patience_of_the_run(
    tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = tools.serve(tools.Answer("out of order", status=500))
    check(tools.config(server.base_url, connection_retries=1))
    assert "no first answer: status 500: out of order" in caplog.text
    server = tools.serve(tools.Answer("out of order", status=500), models=tools.Answer('{"data": []}'))
    with pytest.raises(UserError, match="status 500: out of order"):
        check(tools.config(server.base_url, connection_retries=1))


def test_the_first_calls_are_of_the_budget_and_a_spent_one_is_left_to_the_run(tools: Any) -> None:
    server = tools.serve(tools.verdict())
    config = tools.config(server.base_url, max_calls=1)
    check(config)
    assert len(server.calls) == 1


THOUGHTS_ONLY = {"message": {"content": None, "reasoning_content": "Let me think"}, "finish_reason": "length"}
HALF_SAID = {"message": {"content": '{"agent1": {"reas'}, "finish_reason": "length"}


@pytest.mark.parametrize(("choice", "kind"), [(THOUGHTS_ONLY, "empty"), (HALF_SAID, "parse")])
@pytest.mark.parametrize(
    ("extra", "limit"),
    [({}, r"judge\.max_tokens=99"), ({"max_completion_tokens": 7}, r"judge\.extra_body\.max_completion_tokens=7")],
)
def test_a_reply_that_was_cut_says_so_and_is_not_asked_for_again(
    tools: Any, choice: dict[str, Any], kind: str, extra: dict[str, Any], limit: str
) -> None:
    server = tools.serve(tools.Answer(json.dumps({"choices": [choice]})))
    config = tools.config(server.base_url, max_tokens=99, extra_body=extra)
    (error,), stats = ask(config, tools.request())
    assert isinstance(error, JudgeError) and (error.kind, error.permanent) == (kind, True)
    assert re.search(f"cut at {limit}", str(error)) and len(server.calls) == 1
    assert stats.failures == {kind: 1}
    with pytest.raises(UserError, match=f"the first reply was cut at {limit}"):
        check(config)


def test_another_end_than_the_models_own_is_said_and_asked_again(tools: Any) -> None:
    filtered = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]})
    server = tools.serve(lambda number, call: tools.Answer(filtered))
    (error,), _ = ask(tools.config(server.base_url, temperatures=[0.0, 1.0]), tools.request())
    assert str(error) == "the reply is empty (finish_reason content_filter) (try 2 of 2)" and len(server.calls) == 2


def test_a_mark_of_the_byte_order_is_no_part_of_an_answer(tools: Any) -> None:
    server = tools.serve(tools.Answer("\ufeff" + tools.verdict(4, 5).body))
    assert ask(tools.config(server.base_url), tools.request())[0] == [Verdict(4.0, 5.0, "one", "two")]


def test_a_verdict_that_is_whole_counts_although_what_followed_was_cut(tools: Any) -> None:
    choice = {"message": {"content": tools.verdict_text(4, 5) + " And I would like to ad"}, "finish_reason": "length"}
    outcomes, _ = ask(tools.config(tools.serve(tools.Answer(json.dumps({"choices": [choice]}))).base_url), tools.request())
    assert outcomes == [Verdict(4.0, 5.0, "one", "two")]


@pytest.mark.parametrize("header", [{"Retry-After": "0.4"}, {"retry-after-ms": "400"}])
def test_a_wait_in_parts_of_a_second_is_obeyed(tools: Any, header: dict[str, str]) -> None:
    busy = tools.Answer(status=429, headers=header)
    server = tools.serve(lambda number, call: busy if number == 0 else tools.verdict())
    begin = time.monotonic()
    ask(tools.config(server.base_url), tools.request())
    assert len(server.calls) == 2 and time.monotonic() - begin >= 0.4


def test_check_says_in_one_line_that_nobody_listens(tools: Any) -> None:
    base_url = f"http://127.0.0.1:{free_port('127.0.0.1')}/v1"
    with pytest.raises(UserError) as caught:
        check(tools.config(base_url, connection_retries=1000))
    message = str(caught.value)
    assert base_url in message and "start the judge" in message and "\n" not in message


@pytest.mark.parametrize("status", [401, 403])
def test_check_names_the_variable_of_a_refused_key(tools: Any, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = tools.serve(tools.verdict(), models=tools.Answer("{}", status=status))
    with pytest.raises(UserError, match=KEY_VARIABLE):
        check(tools.config(server.base_url, api_key_env=KEY_VARIABLE))
    with pytest.raises(UserError, match=r"judge\.api_key_env"):
        check(tools.config(server.base_url))
    assert server.calls == []


@pytest.mark.parametrize("body", ["<html>welcome</html>", "null", '{"error": {"message": "not in your country"}}'])
def test_check_refuses_an_answer_that_is_none_and_sends_nobody_to_start_what_runs(tools: Any, body: str) -> None:
    server = tools.serve(tools.Answer(body), models=tools.Answer(body))
    with pytest.raises(UserError, match=r"not a chat completion: .*; check judge\.model \(\S+\) and the address"):
        check(tools.config(server.base_url))


def test_importing_the_judge_is_light(tools: Any) -> None:
    heavy = "{'aiohttp', 'openai', 'torch', 'fastapi', 'omegaconf'}"
    code = f"import sys, nemo_ampo.judge; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=tools.child_environment(),
    )
    assert result.stdout == "[]\n"
