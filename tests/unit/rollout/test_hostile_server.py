"""The HTTP engine against servers that never end, never say where a line ends, or say something else."""

from __future__ import annotations

import gzip
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_ampo.errors import EngineError
from nemo_ampo.ranks import OneProcess
from nemo_ampo.rollout.config import TrtLlmServerConfig
from nemo_ampo.rollout.engine import Request, SamplingSpec, UnavailableError
from nemo_ampo.rollout.trtllm_server import TrtLlmServerEngine

SPEC = SamplingSpec(4, (0,))
REQUESTS = [Request(i, (5, 6, 7)[: i + 1], i) for i in range(2)]
STATE = {"tensorrt_llm": "1.2.0", "weight_version": 1, "max_prompt": 8, "max_total": 16, "vocab_size": 100}
LOADED = {"weight_version": 1, "num_tensors": 2, "num_bytes": 80, "seconds": 0.1}
GOOD = [
    {"drawn": {"request_id": 0, "token_ids": [4, 0], "logprobs": [-1.0, -2.0], "weight_version": 1}},
    {"drawn": {"request_id": 1, "token_ids": [5, 0], "logprobs": [-0.5, 0.0], "weight_version": 1}},
    {"count": 2},
]
Connection = socket.socket


@contextmanager
def server(answer: Callable[[str, Connection], None]) -> Iterator[str]:
    """A server that reads a request and lets ``answer`` write to the socket; one connection a request."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection: Connection) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            rows = head.lower().split(b"\r\n")
            length = next((int(row.split(b":")[1]) for row in rows if row.startswith(b"content-length")), 0)
            got = len(head.split(b"\r\n\r\n", 1)[1])
            while got < length:
                got += len(connection.recv(65536))
            try:
                answer(head.split()[1].decode(), connection)
            except OSError:  # the engine has had enough
                return

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()


def whole(connection: Connection, body: bytes, head: bytes = b"") -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n" + body)


def otherwise_good(spoilt: str, answer: Callable[[Connection], None]) -> Callable[[str, Connection], None]:
    """Answers all paths but one as it should."""
    bodies = {"/state": json.dumps(STATE), "/load": json.dumps(LOADED), "/generate": "\n".join(map(json.dumps, GOOD))}

    def talk(asked: str, connection: Connection) -> None:
        if asked == spoilt:
            answer(connection)
        else:
            whole(connection, bodies[asked].encode())

    return talk


def run_against(url: str, folder: Path, timeout_s: float = 30.0) -> list[tuple[int, ...]]:
    config = TrtLlmServerConfig(url=url, timeout_s=timeout_s, load_timeout_s=timeout_s)
    engine = TrtLlmServerEngine(config, lambda target: None, folder, OneProcess(), max_batch=2)
    try:
        engine.sync(1)
        return [response.token_ids for response in engine.generate(REQUESTS, SPEC)]
    finally:
        engine.close()


Drip = Callable[[Connection], None]


def drip_head(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    forever(connection, b"a")


def drip_body(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    forever(connection, b" ")


def drip_chunks(connection: Connection) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    forever(connection, b"1\r\n \r\n")


def forever(connection: Connection, piece: bytes) -> None:
    while True:
        connection.sendall(piece)
        time.sleep(0.02)


@pytest.mark.parametrize("path", ["/state", "/load", "/generate"])
@pytest.mark.parametrize("drip", [drip_head, drip_body, drip_chunks])
def test_a_server_that_drips_does_not_outlast_the_limit(
    path: str, drip: Callable[[Connection], None], tmp_path: Path
) -> None:
    """Each byte comes in time; only a limit for all of them ends this."""
    with (
        server(otherwise_good(path, drip)) as url,
        pytest.raises(UnavailableError, match=rf"no answer in time \(0\.4 s in all\) from {url}{path}"),
    ):
        run_against(url, tmp_path, timeout_s=0.4)


def test_a_proxy_is_for_other_machines_and_named_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with server(otherwise_good("", lambda connection: None)) as url:
        assert run_against(url, tmp_path) == [(4, 0), (5, 0)]
    with pytest.raises(UnavailableError, match=r"through the proxy http://127\.0\.0\.1:9: ") as raised:
        run_against("http://rollouts.example:8200", tmp_path)
    assert "secret" not in str(raised.value)


def endless(piece: bytes) -> Callable[[Connection], None]:
    def answer(connection: Connection) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            connection.sendall(piece)

    return answer


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/generate", endless(b"a" * 65536), "a line longer than 65,792 bytes"),
        ("/generate", endless(b'{"drawn": ' + b"[" * 65536), "a line longer than"),
        ("/generate", endless(b"\n" * 65536), "unreadable line"),
        ("/generate", endless(b'{"error": null}\n' * 4096), "a line without meaning"),
        ("/generate", endless(json.dumps(GOOD[0]).encode() + b"\n"), "response 0 came twice"),
        ("/generate", lambda c: whole(c, gzip.compress(b"{}"), b"Content-Encoding: gzip\r\n"), "packed as gzip"),
        ("/state", endless(b" " * 65536), "an answer longer than 1 MiB at /state"),
        ("/load", endless(b"[" * 65536), "an answer longer than 1 MiB at /load"),
        ("/load", lambda c: whole(c, b"[" * 100_000), "unreadable Loaded"),
        ("/load", lambda c: whole(c, b'{"weight_version": 1e400}'), "unreadable Loaded"),
        ("/state", lambda c: whole(c, b"\xff\xfe"), "unreadable State"),
        ("/state", lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 60_000 + b"\r\n"), "ProtocolError at"),
        ("/state", lambda c: c.sendall(b"SSH-2.0-OpenSSH\r\n"), "ProtocolError at"),
        ("/state", lambda c: None, "ProtocolError at"),
        ("/state", lambda c: c.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\n\r\n"), "302 at /state"),
    ],
)  # fmt: skip
def test_what_never_ends_or_is_no_answer_ends_the_call_in_one_line(
    path: str, answer: Drip, words: str, tmp_path: Path
) -> None:
    with server(otherwise_good(path, answer)) as url, pytest.raises(EngineError, match=words) as raised:
        run_against(url, tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_no_reply_that_was_changed_is_taken_for_another(tmp_path: Path) -> None:
    """Random changes of a good answer: the tokens are those that were sent, or the call ends in one line."""
    draw = random.Random(12)
    bodies = [mutated(draw) for _ in range(400)]
    answered: list[bytes] = []

    def answer(connection: Connection) -> None:
        answered.append(bodies[len(answered)])
        whole(connection, answered[-1])

    good = [(4, 0), (5, 0)]
    with server(otherwise_good("/generate", answer)) as url:
        config = TrtLlmServerConfig(url=url)
        engine = TrtLlmServerEngine(config, lambda target: None, tmp_path, OneProcess(), max_batch=2)
        engine.sync(1)
        taken = 0
        for body in bodies:
            try:
                tokens = [response.token_ids for response in engine.generate(REQUESTS, SPEC)]
            except EngineError as error:
                assert "\n" not in str(error)
                continue
            taken += 1
            assert tokens == good or all(str(token).encode() in body for row in tokens for token in row)
        engine.close()
    assert len(answered) == 400 and 5 < taken < 200


VALUES = [None, True, -1, 2**70, 0.5, 1e308, float("nan"), "1", "", [], {}, [None], [-1.0, "x"], [1, 2, 3, 4, 5]]


def mutated(draw: random.Random) -> bytes:
    rows = json.loads(json.dumps(GOOD))
    for _ in range(draw.randrange(3)):
        row = draw.choice(rows)
        target = row["drawn"] if isinstance(row.get("drawn"), dict) and draw.random() < 0.8 else row
        key = draw.choice([*target, "other"]) if target else "other"
        if draw.random() < 0.3:
            target.pop(key, None)
        else:
            target[key] = draw.choice(VALUES)
    if draw.random() < 0.3:
        draw.shuffle(rows)
    body = bytearray("\n".join(map(json.dumps, rows)).encode())
    if draw.random() < 0.4:
        body[draw.randrange(len(body))] = draw.randrange(256)
    return bytes(body[: draw.randrange(len(body))] if draw.random() < 0.2 else body)
