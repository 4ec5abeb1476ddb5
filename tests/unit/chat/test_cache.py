"""Cache and replay: equal questions, equal replies, also for many processes, after failures and without a server."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, says

from nemo_ampo.chat.cache import SCHEMA_VERSION, ReplyFile
from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.stats import ChatStats
from nemo_ampo.errors import ChatError, ConfigError, DiskError, UserError

Talk = list[dict[str, str]]


def hello(n: int = 0) -> Talk:
    return [{"role": "user", "content": f"hello {n}"}]


def run(
    settings: Any, talks: list[Talk], recording: dict[str, Any] | None = None, **how: Any
) -> tuple[list[Any], ChatStats]:
    async def work() -> tuple[list[Any], ChatStats]:
        async with ChatClient(settings, recording=recording or {}) as client:
            asks = [client.ask(talk, int, **{"temperatures": [0.0, 0.0, 1.0], **how}) for talk in talks]
            return await asyncio.gather(*asks, return_exceptions=True), client.stats

    return asyncio.run(work())


def seen(outcomes: list[Any]) -> list[Any]:
    return [(o.kind, str(o)) if isinstance(o, ChatError) else (o.value, o.tries, o.completion.text) for o in outcomes]


def test_a_question_asked_before_costs_nothing(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    server.play(Act(says("7", reasoning="because")))
    settings = config(server.url, cache=str(tmp_path / "deep" / "cache.sqlite"))
    first, stats = run(settings, [hello()])
    assert (len(server.calls), stats.cache_hits) == (1, 0) and not first[0].completion.cached
    again, stats = run(settings, [hello()])
    assert (len(server.calls), stats.calls, stats.cache_hits, stats.prompt_tokens) == (1, 0, 1, 0)
    assert again[0].completion.cached and again[0].completion.reasoning == "because"
    assert again[0].completion.prompt_tokens == 100


def test_whatever_the_reply_depends_on_is_part_of_the_key(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    server.play(Act(says("7")))
    path = str(tmp_path / "cache.sqlite")

    async def work() -> None:
        async with ChatClient(config(server.url, cache=path)) as client:
            base: dict[str, Any] = {"messages": hello(), "temperature": 0.0}
            variants: list[dict[str, Any]] = [
                {}, {"messages": hello(1)}, {"temperature": 0.5}, {"seed": 1}, {"max_tokens": 5}, {"schema": {"a": 1}},
                {"stop": ["x"]}, {"attempt": 1}, {"extra_body": {"top_p": 0.1}},
            ]  # fmt: skip
            for _ in range(2):
                for variant in variants:
                    await client.complete(client.question(**(base | variant)))
            assert len(server.calls) == len(variants)

    asyncio.run(work())
    run(config(server.url.replace("127.0.0.1", "localhost"), cache=path), [hello()])
    known = len(server.calls)
    run(config(server.url, cache=path, max_concurrency=3, timeout_s=9.0), [hello()])
    assert len(server.calls) == known, "address and patience are not"


def test_equal_questions_at_the_same_time_are_one_call(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    server.play(lambda number, call: Act(says(str(number)), delay_s=0.05))
    outcomes, stats = run(config(server.url, cache=str(tmp_path / "c")), [hello()] * 10)
    assert len(server.calls) == 1 and {outcome.value for outcome in outcomes} == {0}
    assert (stats.calls, stats.cache_hits) == (1, 9)


def unruly(number: int, call: Any) -> Act:
    """Unreadable, busy, broken and good by turns, never the same twice."""
    if number % 5 == 0:
        return Act("{}", status=503)
    if number % 7 == 0:
        return Act("{}", status=400)
    return Act(says(f"no number {number}" if number % 3 == 0 else str(number)))


def test_a_replay_repeats_a_run_with_its_retries_and_failures_and_asks_nobody(
    server: ScriptedChat, config: Any, tmp_path: Path
) -> None:
    path, settings = str(tmp_path / "cache.sqlite"), {"prompt": "abc", "seed": 1}
    talks = [hello(n) for n in range(40)]
    server.play(unruly)
    recorded, stats = run(config(server.url, cache=path, max_concurrency=3), talks, settings)
    assert stats.failures and stats.parse_failures and stats.answers, "a run with all kinds of outcomes"
    server.play(Act(status=500))
    replayed, stats = run(config("http://127.0.0.1:9/v1", replay=path, api_key_env="NOT_SET"), talks, settings)
    assert seen(replayed) == seen(recorded)
    assert (len(server.calls), stats.calls, stats.cost_usd) == (0, 0, 0.0)


def test_check_asks_nobody_in_a_replay(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    server.play(Act(says("7")))
    run(config(server.url, cache=path), [hello()])

    async def work() -> None:
        async with ChatClient(config("http://127.0.0.1:9/v1", replay=path)) as client:
            await client.check()

    asyncio.run(work())


def test_a_question_the_replay_does_not_hold_is_one_clear_error(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    server.play(Act(says("7")))
    run(config(server.url, cache=path), [hello()])
    (error,), _ = run(config(server.url, replay=path), [hello(1)])
    assert type(error) is UserError and "\n" not in str(error)
    assert str(error).startswith(f"endpoint.replay: {path} holds no reply to a question of this run (try 1, key ")


def test_a_replay_of_other_settings_is_refused_before_it_starts(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    server.play(Act(says("7")))
    run(config(server.url, cache=path), [hello()], {"judge.prompt": "abc", "judge.seed": 1})
    with pytest.raises(ConfigError, match=r"endpoint\.replay: .* other settings; these differ: judge\.prompt$"):
        ChatClient(config(server.url, replay=path), recording={"judge.prompt": "xyz", "judge.seed": 1})


def test_a_question_that_failed_is_asked_again_by_the_next_run(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    settings = config(server.url, cache=str(tmp_path / "c"))
    server.play(Act(status=400))
    (error,), _ = run(settings, [hello()])
    assert isinstance(error, ChatError)
    server.play(Act(says("7")))
    (asked,), _ = run(settings, [hello()])
    assert asked.value == 7
    (asked,), _ = run(config(server.url, replay=settings.cache), [hello()])
    assert asked.value == 7


def test_the_first_reply_stays(tmp_path: Path) -> None:
    async def work() -> None:
        one, two = ReplyFile(tmp_path / "c", "judge.cache"), ReplyFile(tmp_path / "c", "judge.cache")
        assert await one.put("k", Completion("first")) == Completion("first")
        assert await two.put("k", Completion("second")) == Completion("first", cached=True)
        assert await two.put("k", ChatError("status", "late failure")) == Completion("first", cached=True)
        assert await one.get("k", failures=True) == Completion("first", cached=True)

    asyncio.run(work())


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.replay: no such file"):
        ReplyFile(tmp_path / "none", "judge.replay", replay=True)
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to be taken for one " * 100)
    with pytest.raises(ConfigError, match=r"judge\.cache: .*text cannot be used as a cache"):
        ReplyFile(text, "judge.cache")
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(ConfigError, match="not a cache of replies"):
        ReplyFile(foreign, "judge.cache")
    old = tmp_path / "old"
    ReplyFile(old, "judge.cache")
    with sqlite3.connect(old) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    for replay in (False, True):
        with pytest.raises(ConfigError, match=rf"schema version {SCHEMA_VERSION + 1}, this program reads {SCHEMA_VERSION}"):
            ReplyFile(old, "judge.cache", replay=replay)


WRITER = """
import asyncio, sys
from nemo_ampo.chat.cache import ReplyFile
from nemo_ampo.chat.completion import Completion

async def work():
    cache = ReplyFile(sys.argv[1], "judge.cache")
    for i in range(200):
        kept = await cache.put(f"key {i}", Completion(f"of process {sys.argv[2]}"))
        print(kept.text)

asyncio.run(work())
"""


def test_many_processes_write_at_once_and_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "c")]
    writers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(4)]
    kept = [writer.communicate(timeout=120)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    assert all(len(lines) == 200 for lines in kept)
    assert len({tuple(lines) for lines in kept}) == 1, "every process uses the reply that is in the file"


CREATOR = """
import sys, time
from nemo_ampo.chat.cache import ReplyFile

print("ready", flush=True)
begin = float(sys.stdin.readline())
for i in range(40):
    time.sleep(max(0.0, begin + 0.02 * i - time.time()))
    ReplyFile(f"{sys.argv[1]}/{i}", "judge.cache")
"""


def test_processes_that_create_a_cache_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    creators = [subprocess.Popen([sys.executable, "-c", CREATOR, str(tmp_path / "new")], **pipes) for _ in range(6)]
    for creator in creators:
        assert creator.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    begin = str(time.time() + 0.2)
    for creator in creators:
        creator.stdin.write(begin + "\n")  # type: ignore[union-attr]
        creator.stdin.flush()  # type: ignore[union-attr]
    said = [creator.communicate(timeout=120)[1] for creator in creators]
    assert said == [""] * 6 and [creator.returncode for creator in creators] == [0] * 6
    assert not list((tmp_path / "new").glob(".*")), "no lock stays behind"


@pytest.mark.parametrize(
    "change",
    [
        "text = NULL", "text = 7", "text = x'fffe'", "finish_reason = 7", "reasoning = x'ff'", "prompt_tokens = 'x'",
        "completion_tokens = NULL", "failure_kind = 'timeout'", "failure = 'late'", "failure_kind = 3, failure = 4",
    ],
)  # fmt: skip
def test_a_damaged_reply_is_named_and_asked_for_again(
    server: ScriptedChat, config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    file, others = tmp_path / "cache", {"replay": None, "cache": None}
    server.play(Act(says("hi")))

    async def work(**where: str) -> Completion:
        async with ChatClient(config(server.url, **(others | where))) as client:
            return await client.complete(client.question([{"role": "user", "content": "hello"}], temperature=0.0))

    asyncio.run(work(cache=str(file)))
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute(f"UPDATE replies SET {change}")
    with pytest.raises(DiskError, match=r"endpoint\.replay: cannot read .*: the reply with key \w+ was damaged or edited"):
        asyncio.run(work(replay=str(file)))
    assert asyncio.run(work(cache=str(file))).text == "hi" and len(server.calls) == 2
    assert caplog.text.count("was damaged or edited") == 1


@pytest.mark.parametrize("settings", ["{", "[1]", "", '{"a": 1, "a": 2}'])
def test_damaged_settings_of_a_recording_are_named(tmp_path: Path, settings: str) -> None:
    ReplyFile(tmp_path / "cache", "judge.cache").record({})
    with contextlib.closing(sqlite3.connect(tmp_path / "cache")) as database, database:
        database.execute("UPDATE recordings SET settings = ?", (settings,))
    with pytest.raises(ConfigError, match=r"judge\.replay: .*cache was damaged or edited: "):
        ReplyFile(tmp_path / "cache", "judge.replay", replay=True).require({"b": 1})


def test_a_replay_under_a_name_that_no_file_can_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        ReplyFile(tmp_path / ("x" * 300), "judge.replay", replay=True)
