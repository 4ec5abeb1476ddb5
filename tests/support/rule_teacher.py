"""A teacher and judge by rule behind one real HTTP server, which counts what it is asked.

As a teacher it writes the mode that the system prompt asks for; of its first tries some break a rule, always the
same ones for the same question. As a judge it scores by a digest of the dialogue. Nothing is drawn from a clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from nemo_ampo.errors import DataError
from nemo_ampo.prompts import read_judge_prompt
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES

MODEL = "rules"


def draw(text: str, size: int) -> int:
    """A number below ``size`` that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % size


@dataclass
class RuleTeacher:
    """What the server does and has seen.

    Attributes:
        hang_after: answers so many calls, then lets every further one wait until ``released`` is set.
        broken: of 100 questions, how many get a bad first reply.
        judge_fails: the judge answers in prose.
        asked: body of a call to how often it came; answered: likewise, of calls that got their answer.
        waiting: calls that wait; one whose caller is gone is dropped.
    """

    hang_after: int | None = None
    broken: int = 30
    judge_fails: bool = False
    released: threading.Event = field(default_factory=threading.Event)
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    base_url: str = ""

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The answer to a conversation."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        user = next(m["content"] for m in messages if m["role"] == "user")
        if system is not None:
            return self._in_mode(int(re.search(r"at level (\d)", system)[1]), user, first_try=len(messages) == 2)
        try:
            request = read_judge_prompt(user)
        except DataError:
            if len(messages) == 1 and draw(user, 100) < self.broken:
                return '""'
            stays = "Turn 2:" not in user or draw(user, 12)
            return f'"I say {draw(user, 1000)}."' if stays else '"left the conversation"'
        if self.judge_fails:
            return "They are both doing fine."
        scores = {agent: draw(f"{agent} {request.dialogue}", 11) for agent in ("agent1", "agent2")}
        return json.dumps({agent: {"reasoning": "by rule", "score": score} for agent, score in scores.items()})

    def _in_mode(self, mode: int, user: str, first_try: bool) -> str:
        good = render_reply(
            mode, f'"I say {draw(user, 1000)}."', {name: f"thought {draw(user, 99)}" for name in MODES[mode].sections}
        )
        if not first_try or draw(f"{mode} {user}", 100) >= self.broken:
            return good
        spoilt = (good.replace('"', ""), good[:-4], f"Sure! {good}", render_reply(1, '"Short."') if mode > 1 else "hm")
        return spoilt[draw(f"{user} {mode}", 4)]

    def app(self) -> FastAPI:
        """The web application."""
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> JSONResponse:
            body = await request.json()
            key = json.dumps(body, sort_keys=True)
            self.asked[key] += 1
            if self.hang_after is not None and sum(self.answered.values()) >= self.hang_after:
                self.waiting += 1
                try:
                    while not self.released.is_set():
                        if await request.is_disconnected():
                            return JSONResponse({}, 499)
                        await _pause()
                finally:
                    self.waiting -= 1
            self.answered[key] += 1
            text = self.reply(body["messages"])
            usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return JSONResponse({"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage})

        return app


async def _pause() -> None:
    import asyncio

    await asyncio.sleep(0.02)


@contextlib.contextmanager
def serving(teacher: RuleTeacher) -> Iterator[RuleTeacher]:
    """Run the server in a thread; sets ``base_url``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        teacher.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(teacher.app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield teacher
        finally:
            teacher.released.set()
            server.should_exit = True
            thread.join(10)
