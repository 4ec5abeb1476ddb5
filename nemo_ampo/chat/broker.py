"""One limiter, and one cache, for all processes of a job, on any number of machines.

The main rank runs a :class:`Broker` in a thread; the others hold a :class:`BrokerClient` and ask it for leave over TCP,
one line of JSON each way. A connection that breaks gives its leases back, so that a rank that died holds no slot; its
calls in flight are counted at the most they may have cost. Only who knows the token is served.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
from dataclasses import asdict
from typing import Any

from nemo_ampo.chat.cache import Cache
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.limiter import LocalLimiter
from nemo_ampo.chat.limits import Lease
from nemo_ampo.errors import BudgetError, ChatError

_MAX_LINE_BYTES = 64 * 2**20
_MESSAGES_AT_ONCE = 16


class BrokerLostError(RuntimeError):
    """The main rank, which holds the job's limits, is gone: the job cannot go on."""


class Broker:
    """Serves from construction to :meth:`close`.

    Args:
        limiter: the job's; from now on used in the broker's thread only.
        cache: the job's, if it has one; likewise.
        token: what clients must know.
        host: address to listen on.

    Attributes:
        port: where it listens.
    """

    def __init__(self, limiter: LocalLimiter, cache: Cache | None, token: str, host: str = "127.0.0.1") -> None:
        self._limiter, self._cache, self._token = limiter, cache, token
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, host, 0, limit=_MAX_LINE_BYTES, backlog=1024)
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="chat-broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody. Closing twice does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._limiter.aclose()
        if self._cache is not None:
            await self._cache.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = _Connection(self._limiter, self._cache, _Outbox(writer))
        try:
            greeting = _read_line(await reader.readline())
            if not hmac.compare_digest(str(greeting.get("token", "")), self._token):
                return
            while line := await reader.readline():
                connection.handle(_read_line(line))
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # whatever ended it, what it held is given back below
        finally:
            self._tasks.discard(task)
            await connection.close()


class _Connection:
    """What one client holds and waits for."""

    def __init__(self, limiter: LocalLimiter, cache: Cache | None, outbox: _Outbox) -> None:
        self._limiter, self._cache, self._outbox = limiter, cache, outbox
        self._leases: dict[int, Lease] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def handle(self, message: dict[str, Any]) -> None:
        """One request. ``settle`` and ``cancel`` need no answer; the others are answered when they can be."""
        number, do = int(message["id"]), message["do"]
        if do == "settle":
            self._settle(number, int(message["tokens"]), float(message["usd"]))
        elif do == "cancel":
            if number in self._tasks:
                self._tasks[number].cancel()
            self._settle(number, 0, 0.0)
        else:
            work = {"acquire": self._acquire, "get": self._get, "put": self._put}[do]
            task = asyncio.create_task(self._answer(number, work(number, message)))
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def close(self) -> None:
        """Give everything back."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for number, lease in list(self._leases.items()):
            self._settle(number, lease.tokens, lease.usd)
        self._outbox.close()

    def _settle(self, number: int, tokens: int, usd: float) -> None:
        lease = self._leases.pop(number, None)
        if lease is not None:
            self._limiter.settle(lease, tokens, usd)

    async def _answer(self, number: int, work: Any) -> None:
        try:
            answer = await work
        except BudgetError as error:
            answer = {"spent": str(error)}
        except ChatError as error:
            answer = {"failure": [error.kind, str(error)]}
        self._outbox.put({"id": number, **answer})

    async def _acquire(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        self._leases[number] = await self._limiter.acquire(int(message["tokens"]), float(message["usd"]))
        return {}

    async def _get(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        assert self._cache is not None
        found = await self._cache.get(message["key"], failures=bool(message["failures"]))
        return {"reply": asdict(found) if found else None}

    async def _put(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        assert self._cache is not None
        reply, failure = message["reply"], message["failure"]
        kept = await self._cache.put(message["key"], Completion(**reply) if reply else ChatError(*failure))
        return {"reply": asdict(kept) if kept else None}


class _Outbox:
    """Writes the messages of one turn of the loop a few at a time.

    When 64 answers come at once, a write for each would wake the other side 64 times, and in the process of the main rank
    that is a thread which waits for the same interpreter; one write for all would let the first wait for the last.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._lines: list[bytes] = []

    def put(self, message: dict[str, Any]) -> None:
        """Write a message, in the next turn of the loop at the latest."""
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._flush)
        self._lines.append(json.dumps(message).encode("ascii") + b"\n")
        if len(self._lines) >= _MESSAGES_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Hang up, once everything is written."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._lines and not self._writer.is_closing():
            self._writer.write(b"".join(self._lines))
        self._lines.clear()


class BrokerClient:
    """Limiter and cache of a process that is not the main rank (or is: the main rank uses one too).

    Belongs to the event loop that first awaits it.

    Args:
        host, port, token: of the broker.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        self._address, self._token = (host, port), token
        self._connecting: asyncio.Task[None] | None = None
        self._outbox: _Outbox | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._leases: dict[Lease, int] = {}
        self._number = 0

    async def acquire(self, tokens: int, usd: float) -> Lease:
        """See :class:`~nemo_ampo.chat.limiter.Limiter`."""
        number, _ = await self._request({"do": "acquire", "tokens": tokens, "usd": usd})
        lease = Lease(time.monotonic(), tokens, usd)
        self._leases[lease] = number
        return lease

    def settle(self, lease: Lease, tokens: int, usd: float) -> None:
        """See :class:`~nemo_ampo.chat.limiter.Limiter`."""
        number = self._leases.pop(lease, None)
        if number is not None and self._outbox is not None:
            self._outbox.put({"id": number, "do": "settle", "tokens": tokens, "usd": usd})

    async def get(self, key: str, *, failures: bool = False) -> Completion | None:
        """See :class:`~nemo_ampo.chat.cache.Cache`."""
        _, answer = await self._request({"do": "get", "key": key, "failures": failures})
        return Completion(**answer["reply"]) if answer["reply"] else None

    async def put(self, key: str, outcome: Completion | ChatError) -> Completion | None:
        """See :class:`~nemo_ampo.chat.cache.Cache`."""
        failure = [outcome.kind, str(outcome)] if isinstance(outcome, ChatError) else None
        reply = asdict(outcome) if isinstance(outcome, Completion) else None
        _, answer = await self._request({"do": "put", "key": key, "reply": reply, "failure": failure})
        return Completion(**answer["reply"]) if answer["reply"] else None

    async def aclose(self) -> None:
        """Hang up; closing twice, as limiter and as cache, does nothing."""
        if self._reader_task is not None:
            self._reader_task.cancel()
        if self._outbox is not None:
            self._outbox.close()

    async def _request(self, message: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Number and answer of a request."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        await asyncio.shield(self._connecting)
        assert self._outbox is not None and self._reader_task is not None
        if self._reader_task.done():
            raise self._lost()
        self._number += 1
        number = self._number
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._outbox.put({"id": number, **message})
        try:
            found = await answer
        except asyncio.CancelledError:
            if message["do"] == "acquire":
                self._outbox.put({"id": number, "do": "cancel"})
            raise
        finally:
            self._waiting.pop(number, None)
        if "spent" in found:
            raise BudgetError(found["spent"])
        if "failure" in found:
            raise ChatError(*found["failure"])
        return number, found

    async def _connect(self) -> None:
        try:
            reader, writer = await asyncio.open_connection(*self._address, limit=_MAX_LINE_BYTES)
        except OSError:
            raise self._lost() from None
        self._outbox = _Outbox(writer)
        self._outbox.put({"token": self._token})
        self._reader_task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                answer = _read_line(line)
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except ConnectionError:
            pass  # told to those who wait below, like an orderly end
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(self._lost())

    def _lost(self) -> BrokerLostError:
        host, port = self._address
        return BrokerLostError(f"the main rank's limiter at {host}:{port} is gone")


def _read_line(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record
