"""Speakers and an evaluator by rule behind a real HTTP server, which counts what it is asked.

Models: ``rule-speaker`` (thinks in the four modes when it has a system prompt), ``rule-partner`` (plain speech,
``rule-reasoner`` with a hidden chain of thought in <think> tags), ``rule-judge`` (seven dimensions by a hash of the
dialogue), ``prose-judge`` (never answers in JSON), ``second-try-judge`` (does when told what was wrong). What is said
depends on the request alone.

``GET /counts`` says what was answered. ``POST /hold/N`` lets N more calls be answered and then keeps every further caller
waiting until ``POST /hold/0``: a run can be killed while it is certain that nothing answered was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.serve.local import run_app
from nemo_ampo.sotopia.dimensions import DIMENSIONS

MODELS = ("rule-speaker", "rule-partner", "rule-reasoner", "rule-judge", "prose-judge", "second-try-judge")
NOBODY_LEAVES = 20
"""Patience of speakers who stay to the last turn and finish every reply."""
_OPEN_LINE = re.compile(r"Turn (\d+): (.+) said:\Z")


class RuleServer:
    """The ASGI application.

    Args:
        latency_s: before each reply.
        patience: turns after which a speaker leaves are drawn from 2..patience, and some replies are cut off; with
            :data:`NOBODY_LEAVES` and more neither happens.
    """

    def __init__(self, latency_s: float = 0.0, patience: int = 10) -> None:
        self.latency_s = latency_s
        self.patience = patience
        self.answered: Counter[str] = Counter()
        self.by_model: Counter[str] = Counter()
        self.left_before_hold: int | None = None
        self.released = asyncio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, answer = await self.answer(scope["path"], body, receive)
        content = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def answer(self, path: str, body: bytes, receive: Any) -> tuple[int, Any]:
        if path == "/v1/chat/completions":
            if not await self.may_go_on(receive):
                return 499, {}
            return await self.chat(json.loads(body), hashlib.sha256(body).hexdigest())
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]}
        if path == "/counts":
            repeated = {key: n for key, n in self.answered.items() if n > 1}
            return 200, {
                "answered": sum(self.answered.values()),
                "repeated": len(repeated),
                "models": dict(self.by_model),
                "processor_s": time.process_time(),
            }
        if path.startswith("/hold/"):
            count = int(path.rsplit("/", 1)[1])
            self.left_before_hold = count or None
            self.released.set()
            self.released = asyncio.Event()
            return 200, {}
        return (200, {"status": "ok"}) if path == "/health" else (404, {})

    async def may_go_on(self, receive: Any) -> bool:
        """Wait while callers are held; False when the caller is gone by then."""
        if self.left_before_hold == 0:
            waiting = [asyncio.create_task(self.released.wait()), asyncio.create_task(receive())]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            gone = waiting[1].done()
            for task in waiting:
                task.cancel()
            return not gone
        if self.left_before_hold is not None:
            self.left_before_hold -= 1
        return True

    async def chat(self, request: dict[str, Any], key: str) -> tuple[int, Any]:
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        self.answered[key] += 1
        self.by_model[request["model"]] += 1
        return 200, completion(request, self.patience)


def completion(request: dict[str, Any], patience: int) -> dict[str, Any]:
    """The body of a chat completion."""
    messages = request["messages"]
    text = reply(request["model"], [m["content"] for m in messages], messages[0]["role"] == "system", patience)
    usage = {"prompt_tokens": sum(len(m["content"]) for m in messages) // 4, "completion_tokens": len(text) // 4}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": usage}


def reply(model: str, contents: list[str], told_to_think: bool, patience: int) -> str:
    prompt = contents[-1]
    draw = int.from_bytes(hashlib.sha256(f"{model} {prompt}".encode()).digest()[:4])
    if model == "prose-judge" or (model == "second-try-judge" and len(contents) == 1):
        return "Both of them did rather well, I should say."
    if model in ("rule-judge", "second-try-judge"):
        return json.dumps({agent: _grades(draw >> shift) for agent, shift in (("agent1", 0), ("agent2", 3))})
    line = _OPEN_LINE.search(prompt)
    assert line is not None, prompt[-200:]
    turn, name = int(line[1]), line[2]
    words = f"{name.split()[0]} speaks for the {turn}th time, about {draw % 997}."
    if patience < NOBODY_LEAVES and turn >= 2 + draw % (patience - 1):
        words = "left the conversation"
    if told_to_think:
        mode = 1 + draw % 4
        written = render_reply(mode, f'"{words}"', {name: f"about {name}" for name in MODES[mode].sections})
        return written[: len(written) // 2] if draw % 53 == 0 and patience < NOBODY_LEAVES else written
    return f'<think>I am {name}.</think>\n"{words}"' if model == "rule-reasoner" else f'{name}: "{words}"'


def _grades(draw: int) -> dict[str, Any]:
    grades = {}
    for i, (name, (low, high)) in enumerate(DIMENSIONS.items()):
        grades[name] = {"reasoning": f"by rule {i}", "score": low + (draw >> i) % (high - low + 1)}
    return grades


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--parent-pid", type=int)
    args = parser.parse_args()
    app = RuleServer(args.latency_ms / 1000, args.patience)
    run_app(app, host="127.0.0.1", port=0, ready_file=args.ready_file, parent_pid=args.parent_pid, on_ready=lambda url: None)


if __name__ == "__main__":
    main()
