"""Chat servers of the benches: bare HTTP/1.1 on an event loop, each answer after a fixed time.

No web framework: what is measured is the client, and the server of a bench shares its processor. ``verdicts`` answers
everything with one verdict, after the seconds that stand first in the path; ``episodes`` speaks and scores by the rules of
``tests/support/rule_server.py`` after ``--latency-ms``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")

Answer = Callable[[str, bytes], tuple[float, Any]]
"""Path and body of a request to the seconds to wait and the JSON of the answer."""


@contextlib.contextmanager
def chat_server(*words: str) -> Iterator[int]:
    """Run ``python _server.py words...`` and yield the port it listens on."""
    command = [sys.executable, __file__, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.terminate()


class _Connection(asyncio.Protocol):
    def __init__(self, answer: Answer) -> None:
        self._answer, self._data = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        self._data = b""
        wait_s, content = self._answer(head.split(b" ", 2)[1].decode(), body)
        written = json.dumps(content).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(written)
        asyncio.get_running_loop().call_later(wait_s, self._send, head + written)

    def _send(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


def verdicts(path: str, body: bytes) -> tuple[float, Any]:
    return float(path.split("/")[1]), _VERDICT


_JUDGED = {"agent1": {"reasoning": "r " * 100, "score": 7}, "agent2": {"reasoning": "s " * 100, "score": 3}}
_VERDICT = {
    "choices": [{"message": {"content": json.dumps(_JUDGED)}}],
    "usage": {"prompt_tokens": 800, "completion_tokens": 200},
}


class Episodes:
    """Speakers that never leave, and their judge."""

    def __init__(self, latency_s: float) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
        import rule_server

        self._rules, self._latency_s = rule_server, latency_s
        self._asked: Counter[str] = Counter()

    def __call__(self, path: str, body: bytes) -> tuple[float, Any]:
        if path == "/v1/models":
            return 0.0, {"data": [{"id": name} for name in self._rules.MODELS]}
        if path == "/counts":
            return 0.0, {"models": self._asked, "processor_s": time.process_time()}
        request = json.loads(body)
        self._asked[request["model"]] += 1
        return self._latency_s, self._rules.completion(request, patience=self._rules.NOBODY_LEAVES)


async def _serve(answer: Answer) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(answer), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("verdicts", "episodes"))
    parser.add_argument("--latency-ms", type=float, default=50.0)
    args = parser.parse_args()
    uvloop.run(_serve(verdicts if args.kind == "verdicts" else Episodes(args.latency_ms / 1000)))


if __name__ == "__main__":
    main()
