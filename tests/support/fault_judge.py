"""A real HTTP judge that fails for a share of the questions, decided by what is asked, so that every fault can be counted.

Whether a question fails, and how, follows from the sha256 of its prompt: asking again does not help (unless ``heal_after``
says so), and a test can work out beforehand which samples must end up without a verdict.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fault-judge"
FAULTS = ("status", "garbage", "range", "hang_up", "swapped_schema")


def digest(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")


def fault_of(prompt: str, percent: float) -> str | None:
    """How this question fails, None if it is answered."""
    number = digest(prompt)
    return FAULTS[number % len(FAULTS)] if (number >> 8) % 10_000 < percent * 100 else None


def scores_of(prompt: str) -> tuple[int, int]:
    """The scores of an answered question."""
    number = digest(prompt)
    return (number >> 16) % 11, (number >> 24) % 11


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    """The default of 5 would add refused connections to the faults that were asked for."""


class FaultJudge:
    """Server and its counts.

    Attributes:
        percent: share of questions that fail, 0..100; may be changed while running.
        asked: calls by prompt (the first message; a re-ask adds others behind it).
        answered: prompts that got a verdict, with it.
        silent: while set, nobody gets an answer.
        held: while set, answers wait.
        answer_after_s: before an answer is given, seconds.
        refuses_after: status 400 from so many calls on.
    """

    def __init__(self, percent: float, heal_after: int | None = None) -> None:
        self.percent, self._heal_after = percent, heal_after
        self.asked: Counter[str] = Counter()
        self.answered: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self.silent, self.held = threading.Event(), threading.Event()
        self.answer_after_s = 0.0
        self.refuses_after: int | None = None
        self._server = Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def faulty(self) -> set[str]:
        """Prompts asked so far that never got an answer."""
        return set(self.asked) - set(self.answered)

    def _decide(self, prompt: str) -> tuple[str | None, str]:
        with self._lock:
            self.asked[prompt] += 1
            healed = self._heal_after is not None and self.asked[prompt] > self._heal_after
            fault = None if healed else fault_of(prompt, self.percent)
            if fault is None:
                self.answered[prompt] = scores_of(prompt)
        one, two = scores_of(prompt)
        verdict: dict[str, Any] = {
            "agent1": {"reasoning": "as told", "score": one},
            "agent2": {"reasoning": "as told", "score": two},
        }
        if fault == "range":
            verdict["agent1"]["score"] = 11
        if fault == "swapped_schema":
            verdict = {"score": {"agent1": one, "agent2": two}}
        return fault, "I would say it went well." if fault == "garbage" else json.dumps(verdict)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fault, text = judge._decide(payload["messages"][0]["content"])
                was_silent = judge.silent.is_set()
                time.sleep(judge.answer_after_s)
                while judge.silent.is_set() or judge.held.is_set():
                    time.sleep(0.05)
                if was_silent or fault == "hang_up":
                    self.close_connection = True
                elif judge.refuses_after is not None and judge.asked.total() > judge.refuses_after:
                    self._send(400, {"error": {"message": "not with me"}})
                elif fault == "status":
                    self._send(500, {"error": {"message": "out of order"}})
                else:
                    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
                    self._send(200, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

            def _send(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@contextmanager
def fault_judge(percent: float, heal_after: int | None = None) -> Iterator[FaultJudge]:
    judge = FaultJudge(percent, heal_after)
    try:
        yield judge
    finally:
        judge.close()
