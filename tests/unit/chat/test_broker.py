"""One limiter and one cache for several processes: real sockets, real processes, also ones that die."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, says

from nemo_ampo.chat.broker import Broker, BrokerClient, BrokerLostError, is_there
from nemo_ampo.chat.cache import ReplyFile
from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.job import shared
from nemo_ampo.chat.limiter import LocalLimiter, SpentFile
from nemo_ampo.chat.limits import Limits, Spent
from nemo_ampo.errors import BudgetError, ChatError, DataError, DiskError, UserError

WAIT_S = 60.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(
        LocalLimiter(Limits(max_concurrency=2, max_calls=8, section="judge"), SpentFile(tmp_path / "spent.json")),
        ReplyFile(tmp_path / "cache", "judge.cache"),
        token="secret",
    )
    yield running
    running.close()


def test_leases_are_shared_by_all_clients(broker: Broker) -> None:
    async def work() -> None:
        one, two = (BrokerClient("127.0.0.1", broker.port, "secret") for _ in range(2))
        first, second = await one.acquire(1, 0.0), await two.acquire(1, 0.0)
        third = asyncio.create_task(two.acquire(1, 0.0))
        await asyncio.sleep(0.1)
        assert not third.done()
        one.settle(first, 1, 0.0)
        await asyncio.wait_for(third, WAIT_S)
        two.settle(second, 1, 0.0)
        await one.aclose()
        await two.aclose()

    asyncio.run(work())


def test_a_cancelled_wait_leaves_no_lease_behind(broker: Broker) -> None:
    async def work() -> None:
        client = BrokerClient("127.0.0.1", broker.port, "secret")
        held = [await client.acquire(1, 0.0) for _ in range(2)]
        waiting = [asyncio.create_task(client.acquire(1, 0.0)) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for lease in held:
            client.settle(lease, 1, 0.0)
        for _ in range(2):
            await asyncio.wait_for(client.acquire(1, 0.0), WAIT_S)
        await client.aclose()

    asyncio.run(work())


def test_the_budget_is_the_jobs(broker: Broker, tmp_path: Path) -> None:
    async def work() -> None:
        clients = [BrokerClient("127.0.0.1", broker.port, "secret") for _ in range(4)]
        for client in clients * 2:
            client.settle(await client.acquire(1, 0.0), 10, 0.25)
        with pytest.raises(BudgetError, match=r"judge\.max_calls"):
            await clients[0].acquire(1, 0.0)
        for client in clients:
            await client.aclose()

    asyncio.run(work())
    broker.close()
    assert SpentFile(tmp_path / "spent.json").load() == Spent(8, 2.0)


def test_replies_are_shared(broker: Broker) -> None:
    async def work() -> None:
        one, two = (BrokerClient("127.0.0.1", broker.port, "secret") for _ in range(2))
        assert await one.get("k") is None
        assert await one.put("k", Completion("7", "why", 1, 2, "stop")) == Completion("7", "why", 1, 2, "stop")
        assert await two.get("k") == Completion("7", "why", 1, 2, "stop", cached=True)
        assert await one.put("f", ChatError("timeout", "late")) is None
        assert await two.get("f") is None
        with pytest.raises(ChatError, match="late"):
            await two.get("f", failures=True)
        await one.aclose()
        await two.aclose()

    asyncio.run(work())


def test_who_does_not_know_the_token_is_hung_up_on(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_ampo.chat.broker._CONNECT_S", 0.5)

    async def work() -> None:
        for token in ("", "guess"):
            client = BrokerClient("127.0.0.1", broker.port, token)
            with pytest.raises(BrokerLostError):
                await asyncio.wait_for(client.acquire(1, 0.0), WAIT_S)
            await client.aclose()
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
        writer.close()

    asyncio.run(work())


def frame(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(4, "big") + content


def greet(token: object) -> bytes:
    return frame(json.dumps({"token": token}).encode())


def end_of(connection: socket.socket) -> bytes:
    """What the broker says until it hangs up."""
    connection.settimeout(WAIT_S)
    said = b""
    try:
        while piece := connection.recv(4096):
            said += piece
    except ConnectionError:
        pass
    return said


GREETINGS = {
    "a web browser": b"GET / HTTP/1.1\r\n\r\n",
    "too long": frame(b"", 62 * 2**20) + b"a" * 4096,
    "just too long": frame(b"a" * 1025),
    "no json": frame(b"secret"),
    "deep json": frame(b"[" * 1000),
    "no object": frame(b'"secret"'),
    "no token": frame(b"{}"),
    "odd token": greet(["secret"]),
    "not ascii": greet("\u00e9\ud800"),
    "raw utf-8": frame('{"token": "\u00e9"}'.encode()),
    "no utf-8": frame(b"\xff\xfe\x00"),
    "nothing": b"",
    "half a length": b"\x00\x00",
    "half a greeting": greet("secret")[:-3],
}


def test_strangers_may_say_little_for_a_moment_and_disturb_nobody(
    broker: Broker, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    strangers = [socket.create_connection(("127.0.0.1", broker.port)) for _ in GREETINGS]
    for stranger, greeting in zip(strangers, GREETINGS.values(), strict=True):
        stranger.sendall(greeting)
    assert is_there("127.0.0.1", broker.port, "secret")

    async def work() -> None:
        client = BrokerClient("127.0.0.1", broker.port, "secret")
        client.settle(await asyncio.wait_for(client.acquire(1, 0.0), WAIT_S), 1, 0.0)
        await client.aclose()

    asyncio.run(work())
    assert [end_of(stranger) for stranger in strangers] == [b""] * len(strangers), "hung up on without a word"
    for stranger in strangers:
        stranger.close()
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_long_greeting_is_not_waited_for(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for is kept in memory, of every stranger at once."""
    monkeypatch.setattr("nemo_ampo.chat.broker._GREETING_S", 10 * WAIT_S)
    for greeting in (frame(b"", 62 * 2**20) + b"a" * 4096, frame(b"", 1025)):
        with socket.create_connection(("127.0.0.1", broker.port)) as stranger:
            stranger.sendall(greeting)
            assert end_of(stranger) == b""


def test_ranks_come_in_although_strangers_take_all_the_room_again_and_again(broker: Broker) -> None:
    strangers: list[socket.socket] = []
    over = threading.Event()

    def crowd() -> None:
        while not over.wait(0.2):
            strangers.extend(socket.create_connection(("127.0.0.1", broker.port)) for _ in range(150))
            for stranger in strangers[:-300]:
                stranger.close()

    async def work() -> None:
        for _ in range(5):
            client = BrokerClient("127.0.0.1", broker.port, "secret")
            client.settle(await asyncio.wait_for(client.acquire(1, 0.0), WAIT_S), 1, 0.0)
            await client.aclose()

    crowds = [threading.Thread(target=crowd) for _ in range(2)]
    for thread in crowds:
        thread.start()
    try:
        time.sleep(0.5)
        asyncio.run(work())
    finally:
        over.set()
        for thread in crowds:
            thread.join()
    for stranger in strangers:
        stranger.close()


def test_hundreds_of_ranks_may_come_at_once() -> None:
    crowded = Broker(LocalLimiter(Limits(500)), None, "secret", ranks=500)

    async def work() -> None:
        clients = [BrokerClient("127.0.0.1", crowded.port, "secret") for _ in range(500)]
        await asyncio.gather(*[client.acquire(1, 0.0) for client in clients])
        for client in clients:
            await client.aclose()

    asyncio.run(work())
    crowded.close()


CROWDED = """
import resource, sys, time
from nemo_ampo.chat.broker import Broker
from nemo_ampo.chat.limiter import LocalLimiter
from nemo_ampo.chat.limits import Limits

resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
broker = Broker(LocalLimiter(Limits(4)), None, "secret")
print(broker.port, flush=True)
refused, end = 0, time.monotonic() + 4
while time.monotonic() < end:
    try:
        open("/dev/null").close()
    except OSError:
        refused += 1
    time.sleep(0.0005)
print(refused, flush=True)
"""


def test_a_burst_of_strangers_leaves_the_job_files_to_open(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", CROWDED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    port = int(job.stdout.readline())
    strangers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for _ in range(1500):
            stranger = socket.socket()
            stranger.setblocking(False)
            stranger.connect_ex(("127.0.0.1", port))
            strangers.append(stack.enter_context(stranger))
            if len(strangers) > 800:
                strangers.pop(0).close()
        out, err = job.communicate(timeout=WAIT_S)
    assert out.strip() == "0" and "Traceback" not in err


def test_an_address_that_drips_is_not_a_broker_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                for byte in frame(b'{"welcome": true}'):
                    connection.sendall(bytes([byte]))
                    time.sleep(0.2)

        dripping = threading.Thread(target=drip)
        dripping.start()
        began = time.monotonic()
        assert not is_there("127.0.0.1", server.getsockname()[1], "secret", timeout_s=0.5)
        assert time.monotonic() - began < 3
        dripping.join()


def test_a_number_that_is_used_twice_costs_its_client_only(broker: Broker) -> None:
    ask = frame(json.dumps({"id": 1, "do": "acquire", "tokens": 1, "usd": 0.0}).encode())
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", broker.port)) as rank:
            rank.sendall(greet("secret") + ask * 3)
            end_of(rank)

    async def work() -> None:
        client = BrokerClient("127.0.0.1", broker.port, "secret")
        for _ in range(2):
            await asyncio.wait_for(client.acquire(1, 0.0), WAIT_S)
        await client.aclose()

    asyncio.run(work())


def odd_messages(count: int) -> list[bytes]:
    """What a broken rank may send: seeded, so that each run sends the same."""
    draw = random.Random(4)
    values: list[Any] = [None, True, -1, 2**70, 1.5, float("nan"), "", "\ud800", "acquire", [], [[]], {}, {"a": 1}]
    verbs = ["acquire", "settle", "cancel", "get", "put", "close", "", None, [], {"a": 1}]

    def message() -> bytes:
        kind = draw.randrange(4)
        if kind == 0:
            return frame(draw.randbytes(draw.randrange(60)))
        if kind == 1:
            return frame(draw.choice([b"[" * 5000, b"{}", b"[]", b"null", b"{" * 50, b'{"id": 1}']))
        fields: dict[str, Any] = {"id": draw.randrange(5), "do": draw.choice(verbs)}
        for name in ("id", "tokens", "usd", "key", "failures", "reply", "failure"):
            if draw.random() < 0.6:
                fields[name] = draw.choice(values)
        return frame(json.dumps(fields).encode())

    return [message() for _ in range(count)]


def test_whatever_a_broken_rank_sends_is_its_own_trouble(broker: Broker) -> None:
    messages = odd_messages(600)
    for start in range(0, len(messages), 12):
        with socket.create_connection(("127.0.0.1", broker.port)) as rank:
            with contextlib.suppress(OSError):  # hung up on already: nothing to send, and nothing to shut down
                for message in (greet("secret"), *messages[start : start + 12]):
                    rank.sendall(message)
                rank.shutdown(socket.SHUT_WR)
            end_of(rank)

    async def work() -> None:
        client = BrokerClient("127.0.0.1", broker.port, "secret")
        await asyncio.wait_for(client.put("fine", Completion("7")), WAIT_S)
        assert await asyncio.wait_for(client.get("fine"), WAIT_S) == Completion("7", cached=True)
        await client.aclose()

    asyncio.run(work())


class BrokenCache:
    """Raises what nobody expects."""

    async def get(self, key: str, *, failures: bool = False) -> Completion | None:
        raise LookupError("in pieces\nand more")

    async def put(self, key: str, outcome: Completion | ChatError) -> Completion | None:
        raise DiskError(28, "judge.cache: cannot write FILE: full")

    async def aclose(self) -> None: ...


def test_an_error_of_the_main_rank_reaches_who_waits_for_it() -> None:
    broken = Broker(LocalLimiter(Limits(1)), BrokenCache(), "secret")

    async def work() -> None:
        client = BrokerClient("127.0.0.1", broken.port, "secret")
        with pytest.raises(BrokerLostError, match=r"limiter at 127\.0\.0\.1:\d+ failed: LookupError: in pieces and more"):
            await asyncio.wait_for(client.get("k"), WAIT_S)
        with pytest.raises(DiskError, match="cannot write FILE: full"):
            await asyncio.wait_for(client.put("k", Completion("7")), WAIT_S)
        await asyncio.wait_for(client.acquire(1, 0.0), WAIT_S)
        await client.aclose()

    asyncio.run(work())
    broken.close()


def test_a_lost_broker_is_told_to_those_who_wait(broker: Broker) -> None:
    async def work() -> None:
        client = BrokerClient("127.0.0.1", broker.port, "secret")
        for _ in range(2):
            await client.acquire(1, 0.0)
        waiting = asyncio.create_task(client.acquire(1, 0.0))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(broker.close)
        with pytest.raises(BrokerLostError, match="main rank"):
            await asyncio.wait_for(waiting, WAIT_S)
        with pytest.raises(BrokerLostError):
            await client.acquire(1, 0.0)
        await client.aclose()

    asyncio.run(work())


HOLDER = """
import asyncio, sys
from nemo_ampo.chat.broker import BrokerClient

async def work():
    client = BrokerClient("127.0.0.1", int(sys.argv[1]), "secret")
    for _ in range(2):
        await client.acquire(1, 0.5)
    print("holding", flush=True)
    await asyncio.sleep(600)

asyncio.run(work())
"""


def test_a_process_that_is_killed_gives_its_leases_back_and_its_calls_are_counted(broker: Broker, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(broker.port)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "holding\n"

        async def work() -> None:
            client = BrokerClient("127.0.0.1", broker.port, "secret")
            waiting = asyncio.create_task(client.acquire(1, 0.0))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            holder.send_signal(signal.SIGKILL)
            client.settle(await asyncio.wait_for(waiting, WAIT_S), 1, 0.0)
            await client.aclose()

        asyncio.run(work())
    broker.close()
    assert SpentFile(tmp_path / "spent.json").load() == Spent(3, 1.0)


def test_a_damaged_record_of_spending_is_named(tmp_path: Path) -> None:
    (tmp_path / "spent.json").write_text("{}")
    with pytest.raises(DataError, match=r"spent\.json"):
        LocalLimiter(Limits(1), SpentFile(tmp_path / "spent.json"))


RANK = """
import asyncio, sys
from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.job import shared

config = EndpointConfig(sys.argv[1], "referee", max_concurrency=3, cache=sys.argv[3])

async def work(job):
    async with ChatClient(config, limiter=job.limiter, cache=job.cache) as client:
        talks = [[{"role": "user", "content": f"question {n}"}] for n in range(12)]
        questions = [client.question(talk, temperature=0.0) for talk in talks]
        texts = [c.text for c in await asyncio.gather(*map(client.complete, questions))]
        print(" ".join(texts), client.stats.calls, flush=True)
        if sys.stdin.readline():  # the main rank leaves last
            return

with shared(config, sys.argv[2], {}) as job:
    asyncio.run(work(job))
"""


def test_the_ranks_of_a_job_find_each_other_and_share_everything(server: ScriptedChat, tmp_path: Path) -> None:
    server.play(lambda number, call: Act(says(f"reply-{number}"), delay_s=0.03))
    stale = tmp_path / "endpoint_broker.json"
    stale.write_text(json.dumps({"host": "127.0.0.1", "port": 9, "token": "x", "start": {"MASTER_PORT": "1"}}))
    command = [sys.executable, "-c", RANK, server.url, str(tmp_path), str(tmp_path / "cache")]
    job = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}

    def start(rank: int) -> subprocess.Popen[str]:
        environment = {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]

    others = [start(rank) for rank in (1, 2)]
    time.sleep(0.3)
    ranks = [start(0), *others]
    try:
        lines = [rank.stdout.readline().split() for rank in ranks if rank.stdout]
        for rank in (others[0], others[1], ranks[0]):
            rank.communicate("go\n", timeout=WAIT_S)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    replies = [line[:12] for line in lines]
    assert replies[0] == replies[1] == replies[2] and len(set(replies[0])) == 12
    assert sum(int(line[12]) for line in lines) == len(server.calls)
    assert server.max_in_flight <= 3, "max_concurrency is the whole job's"
    assert not stale.exists(), "the main rank has cleaned up"
    assert SpentFile(tmp_path / "endpoint_spent.json").load().calls == len(server.calls)


STAYS = """
import sys, time
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.job import shared
with shared(EndpointConfig("http://127.0.0.1:9/v1", "referee"), sys.argv[1], {}):
    print("there", flush=True)
    time.sleep(600)
"""


def test_the_file_of_a_killed_start_is_not_believed_although_all_else_is_the_same(config: Any, tmp_path: Path) -> None:
    """Plain torchrun: address, port, run id and restart count are those of every start."""
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    job |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    notice, settings = tmp_path / "endpoint_broker.json", config("http://127.0.0.1:9/v1")
    command = [sys.executable, "-c", STAYS, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, **job, "RANK": "0"}, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None and killed.stdout.readline() == "there\n"
        killed.kill()
    stale = json.loads(notice.read_text())

    async def ask(rank: Any) -> None:
        rank.limiter.settle(await asyncio.wait_for(rank.limiter.acquire(1, 0.0), WAIT_S), 1, 0.0)

    def second_rank() -> None:
        with shared(settings, tmp_path, {}, {**job, "RANK": "1"}) as rank:
            asyncio.run(ask(rank))

    with socket.create_server(("127.0.0.1", 0)) as other, concurrent.futures.ThreadPoolExecutor() as threads:
        # The port may have gone to another program since, which takes connections and says nothing.
        for port in (stale["port"], other.getsockname()[1]):
            notice.write_text(json.dumps({**stale, "port": port}))
            waiting = threads.submit(second_rank)
            with pytest.raises(TimeoutError):
                waiting.result(0.5)
            with shared(settings, tmp_path, {}, {**job, "RANK": "0"}) as rank:
                waiting.result(WAIT_S)
                asyncio.run(ask(rank))
            assert not notice.exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 5000, '{"start": 1}', '{"host": "x", "port": "y", "token": 1}', '{"host": 1, "port": 1e999}']
)
def test_a_file_that_cannot_be_read_is_waited_out(config: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "endpoint_broker.json").write_text(content)
    settings, rank = config("http://127.0.0.1:9/v1"), {"WORLD_SIZE": "2", "RANK": "1"}
    with (
        pytest.raises(UserError, match=r"endpoint_broker\.json: the main rank did not write it"),
        shared(settings, tmp_path, {}, rank, timeout_s=0.2),
    ):
        pass


def test_a_main_rank_that_does_not_come_is_one_clear_error(config: Any, tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "1"}
    with (
        pytest.raises(UserError, match=r"endpoint_broker\.json: the main rank did not write it within 0\.2 s"),
        shared(config("http://127.0.0.1:9/v1"), tmp_path, {}, environment, timeout_s=0.2),
    ):
        pass


def test_one_process_needs_no_server_and_remembers_what_it_spent(server: ScriptedChat, config: Any, tmp_path: Path) -> None:
    server.play(Act(says("hi")))
    settings = config(server.url, max_calls=5)

    def ask(times: int) -> list[Any]:
        async def work() -> list[Any]:
            with shared(settings, tmp_path, {}, {}) as job:
                async with ChatClient(settings, limiter=job.limiter) as client:
                    talk = [{"role": "user", "content": "hello"}]
                    calls = [client.complete(client.question(talk, temperature=0.0)) for _ in range(times)]
                    return await asyncio.gather(*calls, return_exceptions=True)

        return asyncio.run(work())

    assert all(isinstance(outcome, Completion) for outcome in ask(3))
    outcomes = ask(3)
    assert [isinstance(outcome, BudgetError) for outcome in outcomes] == [False, False, True], "of the job, not the run"
    assert not list(tmp_path.glob("*broker*"))
