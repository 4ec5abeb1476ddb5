"""A real chat server (uvicorn in a thread) that does what a script says, bad behaviour included."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Act:
    """What the server does with one call.

    Attributes:
        body: of the answer.
        status, headers: likewise.
        delay_s: before it.
        hang: never answers.
        hang_up_after: closes the connection after so many bytes of a body announced in full.
        repeat: sends ``body`` so many times, chunked.
    """

    body: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang: bool = False
    hang_up_after: int | None = None
    repeat: int = 1


@dataclass(frozen=True)
class Seen:
    """One call as it arrived."""

    payload: dict[str, Any]
    authorization: str | None
    target: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return str(self.payload["messages"][0]["content"])


Script = Callable[[int, Seen], Act]


def says(content: object, *, usage: tuple[int, int] | None = (100, 20), **message: object) -> str:
    """Body of a chat completion."""
    record: dict[str, Any] = {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}]
    }
    if usage:
        record["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(record)


def verdict_json(score1: object, score2: object) -> str:
    return json.dumps({"agent1": {"reasoning": "one", "score": score1}, "agent2": {"reasoning": "two", "score": score2}})


class ScriptedChat:
    """``script(number, call)`` says what happens to call ``number`` (from 0)."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls: list[Seen] = []
        self.in_flight = self.max_in_flight = 0
        self.url = ""

    def play(self, script: Script | Act) -> ScriptedChat:
        """Forget what was, and go on with another script."""
        self.script = script if callable(script) else lambda number, call: script
        self.calls.clear()
        self.max_in_flight = 0
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"].endswith("/models"):
            listing = json.dumps({"data": [{"id": "referee"}]})
            await _answer(send, Act(listing))
            return
        target = f"{scope['path']}?{scope['query_string'].decode()}"
        self.calls.append(Seen(json.loads(body), headers.get("authorization"), target, headers))
        number = len(self.calls) - 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            act = self.script(number, self.calls[number])
            if act.hang:
                await receive()  # until the client hangs up
                return
            await asyncio.sleep(act.delay_s)
        finally:
            self.in_flight -= 1
        await _answer(send, act)


@contextlib.contextmanager
def serve(script: Script | Act) -> Iterator[ScriptedChat]:
    """Run a server on a free port of this machine."""
    app = ScriptedChat(lambda number, call: Act())
    app.play(script)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    app.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield app
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _answer(send: Send, act: Act) -> None:
    body = act.body.encode("utf-8", "surrogatepass")
    headers = {"content-type": "application/json", **act.headers}
    if act.hang_up_after is not None:
        headers |= {"content-length": str(len(body))}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": act.status, "headers": raw})
    if act.hang_up_after is not None:
        await send({"type": "http.response.body", "body": body[: act.hang_up_after], "more_body": True})
        await asyncio.sleep(0.02)
        raise ConnectionAbortedError("hang up in the middle, as the script says")
    for _ in range(act.repeat):
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
