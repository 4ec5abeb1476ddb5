"""Full and read-only disks under cache, replay and record of spending: an alarm, never a lost reply or a hang."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, says
from small_disk import SmallDisk, small_disk

from nemo_ampo.chat.cache import ReplyFile
from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.job import shared
from nemo_ampo.chat.limiter import SAVE_INTERVAL_S, LocalLimiter, SpentFile
from nemo_ampo.chat.limits import Limits, Spent
from nemo_ampo.chat.stats import ChatStats
from nemo_ampo.errors import BudgetError, DataError, UserError

WAIT_S = 60.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 256) as mounted:
        yield mounted


def talk(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {n}"}]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_cache_on_a_disk_that_fills_up_is_an_alarm_and_every_reply_counts(
    server: ScriptedChat, config: Any, tmp_path: Path, disk: SmallDisk, caplog: pytest.LogCaptureFixture, ranks: str
) -> None:
    server.play(lambda number, call: Act(says(f"{number} " + "x" * 4000)))
    settings = config(server.url, cache=str(disk.path / "cache.sqlite"))
    job_of = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": "0"}

    async def work(job: Any) -> ChatStats:
        async with ChatClient(settings, limiter=job.limiter, cache=job.cache) as client:

            async def ask(n: int) -> Completion:
                return await asyncio.wait_for(client.complete(client.question(talk(n), temperature=0.0)), WAIT_S)

            await ask(0)
            disk.fill()
            replies = await asyncio.gather(*[ask(n) for n in range(1, 40)])
            assert sorted(int(reply.text.split()[0]) for reply in replies) == list(range(1, 40))
            assert (await ask(0)).cached, "what it held it still holds"
            disk.free()
            await ask(50)
            assert (await ask(50)).cached, "there is room again"
            return client.stats

    with shared(settings, tmp_path, {}, job_of) as job:
        stats = asyncio.run(work(job))
    assert 0 < stats.cache_failures <= 39 and stats.calls == 41
    (alarm,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert alarm.startswith("endpoint.cache: cannot write") and "full" in alarm and "goes on without it" in alarm


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_record_of_spending_on_a_full_disk_is_an_alarm_and_the_budget_still_holds(
    server: ScriptedChat, config: Any, disk: SmallDisk, caplog: pytest.LogCaptureFixture, ranks: str
) -> None:
    server.play(Act(says("hi")))
    settings = config(server.url, max_calls=3)

    async def work(job: Any) -> list[Any]:
        disk.fill()
        async with ChatClient(settings, limiter=job.limiter, cache=job.cache) as client:
            asks = [asyncio.wait_for(client.complete(client.question(talk(n), temperature=0.0)), WAIT_S) for n in range(5)]
            return await asyncio.gather(*asks, return_exceptions=True)

    with shared(settings, disk.path / "run", {}, {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": "0"}) as job:
        outcomes = asyncio.run(work(job))
        assert job.spent_file is not None and job.spent_file.failures >= 1
    assert [type(outcome) for outcome in outcomes] == [Completion] * 3 + [BudgetError] * 2
    (alarm,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "endpoint_spent.json: No space left on device" in alarm and "spending is counted on" in alarm


def test_what_could_not_be_written_is_written_when_there_is_room(disk: SmallDisk) -> None:
    async def work() -> None:
        file = SpentFile(disk.path / "spent.json")
        limiter = LocalLimiter(Limits(1), file)
        disk.fill()
        limiter.settle(await limiter.acquire(1, 0.0), 1, 0.5)
        assert SpentFile(file.path).load() == Spent()
        disk.free()
        await asyncio.sleep(SAVE_INTERVAL_S)
        limiter.settle(await limiter.acquire(1, 0.0), 1, 0.5)
        assert SpentFile(file.path).load() == Spent(2, 1.0)

    asyncio.run(work())


@pytest.mark.parametrize("text", ["{}", "[" * 100_000, '{"calls": -1, "usd": 0}', '{"calls": 1, "usd": NaN}', "\udcff"])
def test_a_record_of_spending_that_cannot_be_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "spent.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"spent\.json: not a record"):
        SpentFile(tmp_path / "spent.json").load()


def test_a_folder_in_the_place_of_the_record_is_no_record_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "spent.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*spent\.json: Is a directory"):
        SpentFile(tmp_path / "spent.json").load()


RECORDING = """
import asyncio, os, signal, sys
from nemo_ampo.chat.cache import ReplyFile
from nemo_ampo.chat.completion import Completion

async def work():
    cache = ReplyFile(sys.argv[1], "judge.cache")
    cache.record({})
    for n in range(20):
        await cache.put(str(n), Completion(str(n)))
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    await cache.aclose()

asyncio.run(work())
"""


@pytest.mark.parametrize("end", ["closed", "killed"])
@pytest.mark.parametrize("writable", [True, False])
def test_a_replay_needs_no_right_to_write_and_leaves_nothing_behind(disk: SmallDisk, end: str, writable: bool) -> None:
    path = disk.path / "odd ?#%20 name.sqlite"
    done = subprocess.run([sys.executable, "-c", RECORDING, str(path), end], timeout=WAIT_S)
    assert done.returncode == (0 if end == "closed" else -signal.SIGKILL)
    if not writable:
        disk.make_read_only()
    before = {file.name: file.read_bytes() for file in disk.path.iterdir() if not file.name.endswith("-shm")}
    assert any(name.endswith("-wal") for name in before) == (end == "killed")

    async def work() -> list[Completion | None]:
        replay = ReplyFile(path, "judge.replay", replay=True)
        replay.require({})
        found = [await replay.get(str(n)) for n in range(20)]
        await replay.aclose()
        return found

    assert [found.text for found in asyncio.run(work()) if found] == [str(n) for n in range(20)]
    assert {file.name: file.read_bytes() for file in disk.path.iterdir() if not file.name.endswith("-shm")} == before


@pytest.mark.parametrize("trouble", ["full", "read only"])
def test_a_cache_that_cannot_be_begun_is_one_line(disk: SmallDisk, config: Any, trouble: str) -> None:
    if trouble == "full":
        disk.fill()
    else:
        disk.make_read_only()
    with pytest.raises(UserError) as caught:
        ChatClient(config("http://127.0.0.1:9/v1", cache=str(disk.path / "deep" / "c.sqlite")))
    assert str(disk.path) in str(caught.value) and "\n" not in str(caught.value)


def test_caches_and_tokens_are_for_their_owner_only(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    server.play(Act(says("hi")))
    settings = config(server.url, cache=str(tmp_path / "cache.sqlite"))
    seen: dict[str, int] = {}

    async def work(job: Any) -> None:
        async with ChatClient(settings, limiter=job.limiter, cache=job.cache) as client:
            await client.complete(client.question(talk(0), temperature=0.0))
            seen.update({file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()})

    before = os.umask(0)
    try:
        with shared(settings, tmp_path, {}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}) as job:
            asyncio.run(work(job))
    finally:
        os.umask(before)
    private = {"cache.sqlite", "cache.sqlite-wal", "cache.sqlite-shm", "endpoint_broker.json"}
    assert private <= set(seen) and {seen[name] for name in private} == {0o600}
