"""A real HTTP server that answers as a script says and remembers what it was asked."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.types import JudgeRequest


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; ``hold`` delays it until the event is set, ``drop`` hangs up instead."""

    body: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    drop: bool = False
    trickle: bool = False


@dataclass(frozen=True)
class Call:
    """What one ``/chat/completions`` call carried."""

    payload: dict[str, Any]
    authorization: str | None

    @property
    def temperature(self) -> float:
        return float(self.payload["temperature"])

    @property
    def prompt(self) -> str:
        return str(self.payload["messages"][-1]["content"])


Script = Callable[[int, Call], Answer]


class ScriptedJudge:
    """``script(number, call)`` gives the answer to call ``number`` (from 0)."""

    def __init__(self, script: Script, models: Answer) -> None:
        self.script = script
        self.models = models
        self.calls: list[Call] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def temperatures(self) -> list[float]:
        return [call.temperature for call in self.calls]

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                judge._send(self, judge.models)

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                call = Call(payload, self.headers.get("Authorization"))
                with judge.lock:
                    number = len(judge.calls)
                    judge.calls.append(call)
                    judge.in_flight += 1
                    judge.max_in_flight = max(judge.max_in_flight, judge.in_flight)
                try:
                    answer = judge.script(number, call)
                    while answer.hold and not answer.hold.wait(0.01) and not judge.closing.is_set():
                        pass
                finally:
                    # Before the answer leaves: the client may send its next call as soon as it has it.
                    with judge.lock:
                        judge.in_flight -= 1
                judge._send(self, answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.close_connection = answer.drop
        if answer.drop:
            return
        body = answer.body.encode("utf-8", "surrogatepass")
        try:
            handler.send_response(answer.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            if answer.trickle:
                for byte in body:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                    if self.closing.wait(0.05):
                        return
            else:
                handler.wfile.write(body)
        except OSError:
            handler.close_connection = True  # the client has given up


def says(content: object, **extra: object) -> Answer:
    """A chat completion whose first choice says ``content``."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return Answer(json.dumps({"id": "x", "choices": [{"index": 0, "message": message}], "usage": usage} | extra))


def verdict_text(score1: object, score2: object) -> str:
    return json.dumps({"agent1": {"reasoning": "one", "score": score1}, "agent2": {"reasoning": "two", "score": score2}})


def verdict(score1: object = 7, score2: object = 3) -> Answer:
    """A chat completion that holds a readable verdict."""
    return says(verdict_text(score1, score2))


class Tools:
    """What the tests of this folder share, as a fixture, so that no test module imports another."""

    Answer = Answer
    Call = Call
    says = staticmethod(says)
    verdict = staticmethod(verdict)
    verdict_text = staticmethod(verdict_text)

    def __init__(self) -> None:
        self.servers: list[ScriptedJudge] = []

    def serve(self, script: Script | Answer, *, models: Answer | None = None) -> ScriptedJudge:
        """Start a server: a script, or one answer to everything."""
        answer = script if isinstance(script, Answer) else None
        listing = Answer(json.dumps({"object": "list", "data": [{"id": "referee"}]}))
        server = ScriptedJudge(
            (lambda number, call: answer) if answer else script,  # type: ignore[arg-type, return-value]
            models or listing,
        )
        self.servers.append(server)
        return server

    def config(self, base_url: str, **changes: Any) -> JudgeConfig:
        """A configuration for a server of this machine, impatient enough for tests."""
        config = JudgeConfig(
            base_url=base_url, model="referee", timeout_s=20.0, backoff_initial_s=0.001, backoff_max_s=0.002
        )
        return replace(config, **changes)

    @staticmethod
    def child_environment() -> dict[str, str]:
        """This environment, for a process that shall import what this one imports."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    @staticmethod
    def request(dialogue: str = 'Turn 0: Ada said: "Hello"') -> JudgeRequest:
        return JudgeRequest(dialogue, "Ada", "Ben", "borrow the car", "keep the car")


@pytest.fixture
def tools() -> Iterator[Tools]:
    shared = Tools()
    yield shared
    for server in shared.servers:
        server.close()
