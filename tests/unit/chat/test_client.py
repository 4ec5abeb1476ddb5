"""What the shared chat client does beyond the judge's needs: pool, schema, thoughts, seeds, budgets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, Seen, says

from nemo_ampo.chat.client import Asked, ChatClient
from nemo_ampo.chat.config import PoolMember, Price
from nemo_ampo.chat.stats import ChatStats
from nemo_ampo.chat.transport import read_retry_after
from nemo_ampo.errors import BudgetError, ChatError, ConfigError

HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def with_client(settings: Any, work: Callable[[ChatClient], Awaitable[Any]]) -> tuple[Any, ChatStats]:
    async def run() -> tuple[Any, ChatStats]:
        async with ChatClient(settings) as client:
            return await work(client), client.stats

    return asyncio.run(run())


def complete(settings: Any, times: int = 1, **how: Any) -> tuple[list[Any], ChatStats]:
    async def work(client: ChatClient) -> list[Any]:
        calls = [client.complete(client.question(HELLO, temperature=0.0, **how)) for _ in range(times)]
        return await asyncio.gather(*calls, return_exceptions=True)

    return with_client(settings, work)


def ask(settings: Any, **how: Any) -> tuple[Asked[int], ChatStats]:
    return with_client(settings, lambda client: client.ask(HELLO, int, **{"temperatures": [0.0, 0.0, 1.0], **how}))


def test_what_is_sent(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says("hi")))
    settings = config(server.url, extra_body={"top_p": 0.5, "max_tokens": None, "max_completion_tokens": 7})
    (completion,), stats = complete(settings, seed=3, schema=SCHEMA, stop=["\n"], extra_body={"top_k": 1})
    assert (completion.text, completion.prompt_tokens, completion.completion_tokens) == ("hi", 100, 20)
    assert (completion.finish_reason, completion.cached, completion.reasoning) == ("stop", False, None)
    schema = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}
    assert server.calls[0].payload == {
        "model": "referee", "messages": HELLO, "temperature": 0.0, "seed": 3, "stop": ["\n"],
        "response_format": schema, "top_p": 0.5, "max_completion_tokens": 7, "top_k": 1,
    }  # fmt: skip
    assert stats.requests == 0 and stats.calls == 1


def test_the_schedule_of_temperatures_and_seeds(server: ScriptedChat, config: Any) -> None:
    server.play(lambda number, call: Act(says(["seven", "sieben", "7"][number])))
    asked, stats = ask(config(server.url), seed=40)
    assert (asked.value, asked.tries, asked.completion.text) == (7, 3, "7")
    sent = [call.payload for call in server.calls]
    assert [(p["temperature"], p["seed"], len(p["messages"])) for p in sent] == [(0.0, 40, 2), (0.0, 41, 4), (1.0, 42, 2)]
    assert "invalid literal" in sent[1]["messages"][3]["content"]
    assert (stats.requests, stats.answers, stats.parse_failures) == (1, 1, 2)
    server.play(lambda number, call: Act(says(["seven", "7"][number])))
    ask(config(server.url), explain=False)
    assert [len(call.payload["messages"]) for call in server.calls] == [2, 2]
    assert "seed" not in server.calls[0].payload


def test_the_first_failure_of_each_kind_is_told(server: ScriptedChat, config: Any, caplog: pytest.LogCaptureFixture) -> None:
    server.play(Act('{"error": "the key has been revoked"}', status=401))

    async def work(client: ChatClient) -> None:
        for _ in range(3):
            with pytest.raises(ChatError):
                await client.ask(HELLO, int, temperatures=[0.0])

    with_client(config(server.url), work)
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "endpoint: no answer: status 401" in told and "the key has been revoked" in told


def test_other_errors_of_the_reader_are_not_hidden(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says("7")))

    def broken(text: str) -> int:
        raise KeyError(text)

    with pytest.raises(KeyError):
        with_client(config(server.url), lambda client: client.ask(HELLO, broken, temperatures=[0.0]))


@pytest.mark.parametrize("status", [400, 422, 501])
def test_an_endpoint_without_schemas_is_found_out_once(server: ScriptedChat, config: Any, status: int) -> None:
    server.play(lambda n, call: Act("{}", status=status) if "response_format" in call.payload else Act(says("hi")))

    async def work(client: ChatClient) -> None:
        for _ in range(3):
            await client.complete(client.question(HELLO, temperature=0.0, schema=SCHEMA))

    _, stats = with_client(config(server.url), work)
    assert ["response_format" in call.payload for call in server.calls] == [True, False, False, False]
    assert stats.retries == {"structured": 1}


def test_a_bad_question_does_not_teach_that_schemas_are_unknown(server: ScriptedChat, config: Any) -> None:
    server.play(lambda n, call: Act("{}", status=400) if n < 2 else Act(says("hi")))

    async def work(client: ChatClient) -> None:
        with pytest.raises(ChatError):
            await client.complete(client.question(HELLO, temperature=0.0, schema=SCHEMA))
        for _ in range(2):
            await client.complete(client.question(HELLO, temperature=0.0, schema=SCHEMA))

    with_client(config(server.url), work)
    assert ["response_format" in call.payload for call in server.calls] == [True, False, True, True]


def test_structured_off_never_sends_one_and_on_never_gives_in(server: ScriptedChat, config: Any) -> None:
    server.play(Act("{}", status=400))
    complete(config(server.url, structured="off"), schema=SCHEMA)
    complete(config(server.url, structured="on"), schema=SCHEMA)
    assert ["response_format" in call.payload for call in server.calls] == [False, True]


@pytest.mark.parametrize("act", [Act("no such field", status=400), Act(says("yes"))], ids=["refused", "ignored"])
def test_structured_on_at_an_endpoint_that_lacks_it_is_one_error_at_the_start(
    server: ScriptedChat, config: Any, act: Act
) -> None:
    server.play(act)
    with pytest.raises(ConfigError, match=r"^endpoint\.structured=on: .*does not hold referee to a JSON schema") as caught:
        with_client(config(server.url, structured="on"), lambda client: client.check())
    assert "\n" not in str(caught.value)
    server.play(Act(says('{"answer": "yes"}')))
    with_client(config(server.url, structured="on"), lambda client: client.check())


def test_what_is_no_completion_is_paid_for_too(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says([{"type": "text"}], usage=(1_000_000, 0))))
    priced = config(server.url, price={"referee": Price(1.0, 2.0)}, max_usd=10.0, connection_retries=0)
    (failure,), stats = complete(priced)
    assert isinstance(failure, ChatError) and failure.kind == "parse"
    assert (stats.prompt_tokens, stats.cost_usd) == (1_000_000, 1.0)


def test_thoughts_that_no_usage_reports_are_not_free(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says("7", reasoning_content="t" * 40_000, usage=None)))
    _, stats = complete(config(server.url, price={"referee": Price(0.0, 1.0)}))
    assert stats.cost_usd == pytest.approx((40_000 + 4) / 4 / 1e6, rel=1e-3)


def test_the_thoughts_of_a_reasoning_model_are_not_its_answer(server: ScriptedChat, config: Any) -> None:
    bodies = [
        says("7", reasoning_content="hmm"), says("7", reasoning="hmm"), says("<think>hmm</think>\n\n7"),
        says("hmm\n</think>\n7"), says("<think>\nhmm\n</think>7"),
    ]  # fmt: skip
    server.play(lambda number, call: Act(bodies[number]))
    for _ in bodies:
        asked, _ = ask(config(server.url, connection_retries=0))
        assert (asked.value, asked.completion.reasoning) == (7, "hmm")
        server.play(lambda number, call, rest=bodies: Act(rest[number]))
        bodies = bodies[1:] + bodies[:1]


def test_a_broken_address_is_left_for_the_other(server: ScriptedChat, other: ScriptedChat, config: Any) -> None:
    server.play(Act("{}", status=503))
    other.play(Act(says("hi")))
    pool = [PoolMember(other.url, model="referee-b")]
    settings = config(server.url, endpoints=pool, backoff_initial_s=60.0, backoff_max_s=60.0)
    begin = time.monotonic()
    outcomes, stats = complete(settings, times=40)
    assert time.monotonic() - begin < 50, "nobody waited for the backoff"
    assert [outcome.text for outcome in outcomes] == ["hi"] * 40
    assert {call.payload["model"] for call in other.calls} == {"referee-b"} and len(other.calls) == 40
    assert stats.retries["server_error"] == len(server.calls) < 40

    async def later(client: ChatClient) -> None:
        await asyncio.gather(*[client.complete(client.question(HELLO, temperature=0.0)) for _ in range(10)])
        known = len(server.calls)
        await asyncio.gather(*[client.complete(client.question(HELLO, temperature=0.0)) for _ in range(20)])
        assert len(server.calls) == known, "a resting address is not asked"

    with_client(settings, later)


def test_calls_are_spread_and_a_recovered_address_is_used_again(
    server: ScriptedChat, other: ScriptedChat, config: Any
) -> None:
    server.play(Act(says("a"), delay_s=0.01))
    other.play(Act(says("b"), delay_s=0.01))
    settings = config(server.url, endpoints=[PoolMember(other.url)])
    complete(settings, times=40)
    assert min(len(server.calls), len(other.calls)) >= 15

    async def work(client: ChatClient) -> None:
        server.play(Act("{}", status=500))
        await asyncio.gather(*[client.complete(client.question(HELLO, temperature=0.0)) for _ in range(10)])
        server.play(Act(says("a")))
        await asyncio.sleep(0.02)
        for _ in range(10):
            await client.complete(client.question(HELLO, temperature=0.0))
        assert server.calls

    with_client(settings, work)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_address_that_refuses_us_fails_over_and_alone_fails_at_once(
    server: ScriptedChat, other: ScriptedChat, config: Any, status: int
) -> None:
    server.play(Act("{}", status=status))
    other.play(Act(says("hi")))
    outcomes, _ = complete(config(server.url, endpoints=[PoolMember(other.url)]), times=6)
    assert [outcome.text for outcome in outcomes] == ["hi"] * 6
    server.play(Act("{}", status=status))
    (error,), _ = complete(config(server.url))
    assert isinstance(error, ChatError) and len(server.calls) == 1


def test_each_address_has_its_own_key(
    server: ScriptedChat, other: ScriptedChat, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "aaa")
    monkeypatch.setenv("KEY_B", "bbb")
    server.play(Act(says("a")))
    other.play(Act(says("b")))
    complete(config(server.url, api_key_env="KEY_A", endpoints=[PoolMember(other.url, api_key_env="KEY_B")]), times=8)
    assert {call.authorization for call in server.calls} == {"Bearer aaa"}
    assert {call.authorization for call in other.calls} == {"Bearer bbb"}


def test_an_azure_address_and_headers_from_the_environment(
    server: ScriptedChat, other: ScriptedChat, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_KEY", "4711-azure-key")
    server.play(lambda n, call: Act(says(f"you came with {call.headers['api-key']}")))
    other.play(Act(says("hi")))
    azure = f"{server.url}/deployments/judge?api-version=2024-06-01"
    headers = {"api-key": "$AZURE_KEY", "X-Team": "social"}
    settings = config(azure, headers=headers, endpoints=[PoolMember(other.url, headers={})])
    outcomes, _ = complete(settings, times=6)
    assert {call.target for call in server.calls} == {"/v1/deployments/judge/chat/completions?api-version=2024-06-01"}
    assert {(call.headers["api-key"], call.headers["x-team"]) for call in server.calls} == {("4711-azure-key", "social")}
    assert other.calls and not {"api-key", "x-team"} & set(other.calls[0].headers)
    assert {outcome.text for outcome in outcomes} == {"you came with [API key]", "hi"}
    server.play(Act("{}", status=401))
    with pytest.raises(ConfigError, match=r"check the key in AZURE_KEY$"):
        with_client(config(azure, headers=headers), lambda client: client.check([client.question(HELLO, temperature=0.0)]))
    monkeypatch.delenv("AZURE_KEY")
    with pytest.raises(ConfigError, match=r"^endpoint\.headers\.api-key: environment variable AZURE_KEY is not set"):
        ChatClient(settings)


def test_a_spent_quota_is_not_waited_for(server: ScriptedChat, config: Any) -> None:
    server.play(Act(json.dumps({"error": {"code": "insufficient_quota"}}), status=429))
    (error,), _ = complete(config(server.url))
    assert isinstance(error, ChatError) and len(server.calls) == 1


def test_a_pause_the_endpoint_asks_for_holds_for_all_calls_also_above_the_backoff(server: ScriptedChat, config: Any) -> None:
    times: list[float] = []

    def script(number: int, call: Seen) -> Act:
        times.append(time.monotonic())
        return Act("{}", status=429, headers={"retry-after": "1"}) if number == 0 else Act(says("hi"))

    server.play(script)

    async def work(client: ChatClient) -> None:
        first = asyncio.create_task(client.complete(client.question(HELLO, temperature=0.0)))
        while not server.calls:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        await asyncio.gather(first, *[client.complete(client.question(HELLO, temperature=0.0)) for _ in range(3)])

    with_client(config(server.url), work)
    assert len(times) == 5 and min(times[1:]) - times[0] >= 1.0
    server.play(Act("{}", status=429, headers={"retry-after": "3600"}))
    (error,), _ = complete(config(server.url, retry_after_max_s=0.01, connection_retries=2))
    assert isinstance(error, ChatError) and len(server.calls) == 3


def test_a_date_is_a_time_to_wait_too() -> None:
    assert read_retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        apart = read_retry_after("Fri, 01 Jan 2100 00:00:00") - read_retry_after("Fri, 01 Jan 2100 00:00:00 GMT")
    time.tzset()
    assert abs(apart) < 60, "a date without a zone is not one of this machine's zone"
    odd = ("", "soon", "-1", "-0.5", "nan", "inf", "1e9", "0x10", "1_0", "\u0663", "9" * 400, "3,5")
    assert [read_retry_after(text) for text in ("7", "3.5", " 2. ")] == [7.0, 3.5, 2.0]
    assert [read_retry_after(text) for text in odd] == [0.0] * len(odd)
    assert [read_retry_after(text, "3500") for text in ("", "9", "soon")] == [3.5, 3.5, 3.5]
    assert [read_retry_after("9", text) for text in odd] == [9.0] * len(odd)


def test_a_redirect_is_an_error_that_shows_nothing_to_the_other_side(server: ScriptedChat, config: Any) -> None:
    server.play(Act("", status=307, headers={"location": "http://127.0.0.1:9/v1"}))
    (error,), _ = complete(config(server.url, connection_retries=0))
    assert isinstance(error, ChatError) and "status 307" in str(error)


def test_the_budget_in_calls_is_exact(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says("hi")))
    outcomes, stats = complete(config(server.url, max_calls=5), times=12)
    assert sum(isinstance(outcome, BudgetError) for outcome in outcomes) == 7
    assert len(server.calls) == stats.calls == 5


def test_the_budget_in_dollars_is_never_exceeded(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says("hi", usage=(4, 1000))))
    priced = {"price": {"referee": Price(1.0, 1.0)}, "max_tokens": 1000, "max_usd": 0.0051, "max_concurrency": 4}
    outcomes, stats = complete(config(server.url, **priced), times=30)
    assert stats.cost_usd <= 0.0051 and stats.calls == 5, "1,004 tokens at $1 a million each"
    assert sum(isinstance(outcome, BudgetError) for outcome in outcomes) == 25


def test_a_reply_without_usage_is_not_free(server: ScriptedChat, config: Any) -> None:
    server.play(Act(says("x" * 400, usage=None)))
    _, stats = complete(config(server.url, price={"referee": Price(0.0, 1e6)}))
    assert stats.cost_usd == pytest.approx(100.0) and stats.completion_tokens == 0


def test_cancelled_calls_give_their_slots_back(server: ScriptedChat, config: Any) -> None:
    server.play(lambda number, call: Act(hang=True) if number < 2 else Act(says("hi")))

    async def work(client: ChatClient) -> Any:
        stuck = [asyncio.create_task(client.complete(client.question(HELLO, temperature=0.0))) for _ in range(5)]
        while len(server.calls) < 2:
            await asyncio.sleep(0.005)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        return await client.complete(client.question(HELLO, temperature=0.0))

    completion, _ = with_client(config(server.url, max_concurrency=2), work)
    assert completion.text == "hi"


@pytest.mark.parametrize("proxied", [False, True])
def test_who_is_refused_learns_that_it_may_have_been_the_proxy(
    server: ScriptedChat, config: Any, monkeypatch: pytest.MonkeyPatch, proxied: bool
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if proxied:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    server.play(Act("no", 403))
    asked = config("http://judge.invalid/v1" if proxied else server.url)
    with pytest.raises(ConfigError, match=r"status 403.*; set .*api_key_env") as caught:
        with_client(asked, lambda client: client.check([client.question(HELLO, temperature=0.0)]))
    assert str(caught.value).endswith("let the address past the proxy (no_proxy)") is proxied


def test_the_proxy_of_the_environment_is_used(server: ScriptedChat, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.play(Act(says("through the proxy")))
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (completion,), _ = complete(config("http://judge.invalid/v1"))
    assert completion.text == "through the proxy"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (completion,), _ = complete(config(server.url))
    assert completion.text == "through the proxy"
