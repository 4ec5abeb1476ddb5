"""One limiter, and one cache, for all processes of a job, on any number of machines.

The main rank runs a :class:`Broker` in a thread; the others hold a :class:`BrokerClient` and ask it for leave over TCP,
a length and so many bytes of JSON each way. A connection that breaks gives its leases back, so that a rank that died holds
no slot; its calls in flight are counted at the most they may have cost. Only who knows the token is served; whoever does
not may send a few bytes, for a moment. What goes wrong with one client is that client's, and every error reaches who asked.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import random
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

from nemo_ampo.chat.cache import Cache
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.limiter import LocalLimiter
from nemo_ampo.chat.limits import Lease
from nemo_ampo.errors import BudgetError, ChatError, DiskError, UserError
from nemo_ampo.text import one_line

_log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 * 2**20
_MESSAGES_AT_ONCE = 16
_GREETING_BYTES = 1024
_GREETING_S = 2.0
_MAX_STRANGERS = 128
"""Connections, beside one for each rank, that have not shown the token yet; one more, and the oldest has to go."""
_TAKEN_AT_ONCE = 64
"""Connections that are accepted before any is looked at; the kernel lets more wait a second."""
_CONNECT_PAUSE_S = 0.2
_CONNECT_S = 10.0


class BrokerLostError(UserError):
    """The main rank, which holds the job's limits, is gone: the job cannot go on."""


class Broker:
    """Serves from construction to :meth:`close`.

    Args:
        limiter: the job's; from now on used in the broker's thread only.
        cache: the job's, if it has one; likewise.
        token: what clients must know.
        host: address to listen on.
        ranks: of the job, which may all come at once.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self, limiter: LocalLimiter, cache: Cache | None, token: str, host: str = "127.0.0.1", ranks: int = 1
    ) -> None:
        self._limiter, self._cache, self._token = limiter, cache, token
        self._room = _MAX_STRANGERS + ranks
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}
        self._finding: asyncio.Future[Any] = self._loop.create_future()
        self._had_trouble = False
        self._loop.set_exception_handler(self._trouble)
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, host, 0, limit=_GREETING_BYTES, backlog=_TAKEN_AT_ONCE)
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="chat-broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody. Closing twice does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio would log with a traceback each time, such as files that have run out."""
        if not self._had_trouble:
            self._had_trouble = True
            _log.warning("the job's limiter: %s (%r)", context["message"], context.get("exception"))

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
        connection = _Connection(self._limiter, self._cache, self._finding, _Outbox(writer))
        try:
            if not await self._knows_the_token(task, reader):
                return
            connection.welcome()
            while True:
                connection.handle(await _receive(reader, _MAX_MESSAGE_BYTES))
        except (ConnectionError, EOFError, asyncio.CancelledError):
            pass  # whatever ended it, what it held is given back below
        except Exception as error:
            _log.warning("a process of the job sent its limiter what cannot be read; hung up on it: %r", error)
        finally:
            self._tasks.discard(task)
            await connection.close()

    async def _knows_the_token(self, task: asyncio.Task[None], reader: asyncio.StreamReader) -> bool:
        """Whether the first message says the token; it has to be short and soon."""
        if len(self._strangers) >= self._room:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
        self._strangers[task] = None
        try:
            async with asyncio.timeout(_GREETING_S):
                token = (await _receive(reader, _GREETING_BYTES)).get("token")
        except (TimeoutError, ValueError, RecursionError):
            return False
        finally:
            self._strangers.pop(task, None)
        return isinstance(token, str) and hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())


class _Connection:
    """What one client holds and waits for."""

    def __init__(self, limiter: LocalLimiter, cache: Cache | None, finding: asyncio.Future[Any], outbox: _Outbox) -> None:
        self._limiter, self._cache, self._finding, self._outbox = limiter, cache, finding, outbox
        self._leases: dict[int, Lease] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def welcome(self) -> None:
        """Say that the token was right: who waits for this knows that the main rank of the job is there."""
        self._outbox.put({"welcome": True})

    def handle(self, message: dict[str, Any]) -> None:
        """One request. ``settle`` and ``cancel`` need no answer; the others are answered when they can be."""
        number, do = int(message["id"]), message["do"]
        if do not in ("settle", "cancel") and (number in self._tasks or number in self._leases):
            raise ValueError(f"request {number} twice")
        if do == "settle":
            self._settle(number, *_amounts(message))
        elif do == "cancel":
            if number in self._tasks:
                self._tasks[number].cancel()
            self._settle(number, 0, 0.0)
        else:
            work = {
                "acquire": self._acquire,
                "get": self._get,
                "put": self._put,
                "tell": self._tell,
                "hear": self._hear,
            }[do]
            task = asyncio.create_task(self._answer(number, work, message))
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

    async def _answer(self, number: int, work: Any, message: dict[str, Any]) -> None:
        try:
            answer = await work(number, message)
        except ChatError as error:
            answer = {"error": "chat", "why": [error.kind, str(error)]}
        except DiskError as error:
            answer = {"error": "disk", "why": [error.errno or 0, str(error)]}
        except BudgetError as error:
            answer = {"error": "budget", "why": [str(error)]}
        except Exception as error:  # whatever it is, nobody waits for ever
            answer = {"error": "other", "why": [one_line(f"{type(error).__name__}: {error}")]}
        self._outbox.put({"id": number, **answer})

    async def _acquire(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        self._leases[number] = await self._limiter.acquire(*_amounts(message))
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

    async def _tell(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        if not self._finding.done():
            self._finding.set_result(message["finding"])
        return {}

    async def _hear(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        return {"finding": await asyncio.shield(self._finding)}


def _amounts(message: dict[str, Any]) -> tuple[int, float]:
    """Tokens and dollars.

    Raises:
        ValueError: no budget could count them.
    """
    tokens, usd = int(message["tokens"]), float(message["usd"])
    if tokens < 0 or not 0 <= usd < math.inf:
        raise ValueError(f"{tokens} tokens, {usd} dollars")
    return tokens, usd


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
        self._lines.append(_packed(message))
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

    async def tell(self, finding: Any) -> None:
        """Say once to all clients, now and later, what this one found out."""
        await self._request({"do": "tell", "finding": finding})

    async def hear(self) -> Any:
        """What another client has found out; waits for it."""
        _, answer = await self._request({"do": "hear"})
        return answer["finding"]

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
        if "error" in found:
            raise self._error(found["error"], found["why"])
        return number, found

    def _error(self, name: str, why: list[Any]) -> Exception:
        known = {"chat": ChatError, "disk": DiskError, "budget": BudgetError}
        return known[name](*why) if name in known else BrokerLostError(f"{self._where()} failed: {why[0]}")

    async def _connect(self) -> None:
        begun = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    reader, writer = await asyncio.open_connection(*self._address, limit=2**20)
                    self._outbox = _Outbox(writer)
                    self._outbox.put({"token": self._token})
                    await _receive(reader, _GREETING_BYTES)
                break
            except (OSError, EOFError, ValueError):
                if time.monotonic() - begun > _CONNECT_S:
                    raise self._lost() from None
                await asyncio.sleep(random.uniform(0, 2 * _CONNECT_PAUSE_S))  # too many at once, perhaps
        self._reader_task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                answer = await _receive(reader, _MAX_MESSAGE_BYTES)
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except Exception:
            pass  # told to those who wait below, like an orderly end
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(self._lost())

    def _where(self) -> str:
        host, port = self._address
        return f"the main rank's limiter at {host}:{port}"

    def _lost(self) -> BrokerLostError:
        return BrokerLostError(f"{self._where()} is gone")


def is_there(host: str, port: int, token: str, timeout_s: float = _GREETING_S) -> bool:
    """Whether a broker with this token serves at an address and says so in time."""
    end = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(_packed({"token": token}))
            expected = _packed({"welcome": True})
            received = b""
            while expected.startswith(received) and received != expected:
                connection.settimeout(max(end - time.monotonic(), 1e-3))
                piece = connection.recv(len(expected) - len(received))
                if not piece or time.monotonic() > end:
                    return False
                received += piece
            return received == expected
    except (OSError, ValueError, OverflowError):
        return False


def _packed(message: dict[str, Any]) -> bytes:
    content = json.dumps(message).encode("ascii")
    return len(content).to_bytes(4, "big") + content


async def _receive(reader: asyncio.StreamReader, limit: int) -> dict[str, Any]:
    """The next message.

    Raises:
        EOFError: there is none.
        ValueError: it is longer than ``limit`` or not an object.
    """
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    record = json.loads(await reader.readexactly(length))
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record
