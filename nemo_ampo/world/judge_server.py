"""A judge for machines without one: the OpenAI chat API on top of the embedded world's rules.

It reads dialogue and goals back out of the judge's prompt, scores them by rule and answers as a model would,
so the client, its retries and the whole training loop run unchanged on a laptop. The same request always gets
the same scores; latency and failures can be added to see how a run copes.

Run it with ``python -m nemo_ampo.world.judge_server``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nemo_ampo.errors import DataError, UserError
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.prompts import read_judge_prompt
from nemo_ampo.serve.local import run_app, server_process
from nemo_ampo.world import DEMO_JUDGE

Rules = Callable[[str, str, str, str, str], tuple[float, float]]
"""(dialogue, agent1 name, agent1 goal, agent2 name, agent2 goal) -> goal achievement of both, 0..10."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoJudgeOptions:
    """How the demo judge behaves.

    Attributes:
        latency_ms: wait before each answer, milliseconds.
        fail_rate: share of calls that fail, 0..1; half of these with status 500, half with half a verdict.
        seed: which calls those are. It depends on seed, prompt and how often that prompt was sent, not on
            timing.
    """

    latency_ms: float = 0.0
    fail_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ms <= 600_000:
            raise UserError(f"--latency-ms must lie in 0..600000, not {self.latency_ms}")
        if not 0 <= self.fail_rate <= 1:
            raise UserError(f"--fail-rate must lie in 0..1, not {self.fail_rate}")


class ApiError(Exception):
    """An error in the shape of the OpenAI API."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def create_app(options: DemoJudgeOptions, rules: Rules | None = None) -> FastAPI:
    """The web application.

    Args:
        options: latency and failures.
        rules: scores a dialogue; the embedded world's rules if None.
    """
    score = rules or _world_rules()
    app = FastAPI(title="nemo-ampo demo judge", docs_url=None, redoc_url=None, openapi_url=None)
    sent: Counter[str] = Counter()

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> JSONResponse:
        entry = {"id": DEMO_JUDGE, "object": "model", "created": 0, "owned_by": "nemo-ampo"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat_completions(request: Request) -> JSONResponse:
        prompt = read_chat_request(await request.body())
        reply = judge_reply(prompt, score)
        await asyncio.sleep(options.latency_ms / 1000)
        failure = _draw_failure(prompt, options, sent)
        if failure == "status":
            raise ApiError(500, "failure asked for with --fail-rate", kind="server_error")
        return JSONResponse(_completion(prompt, reply[: len(reply) // 2] if failure == "cut" else reply))

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, status_code=error.status)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(
            ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body,
            status_code=error.status_code,
        )

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    return app


def read_chat_request(body: bytes) -> str:
    """The last judge prompt among the user messages of a ``/v1/chat/completions`` request, or else the last message.

    A second try goes on after the judge prompt with the first reply and a complaint about it.

    Raises:
        ApiError: if the request is not one that can be answered, naming the field at fault.
    """
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(record, dict):
        raise ApiError(400, "the body must be a JSON object")
    model = record.get("model")
    if not isinstance(model, str):
        raise ApiError(400, "model must be a string", param="model")
    if model != DEMO_JUDGE:
        raise ApiError(404, f"the model {model!r} does not exist", param="model", code="model_not_found")
    if record.get("n") not in (None, 1):
        raise ApiError(400, "only n=1 is served", param="n")
    if record.get("stream"):
        raise ApiError(400, "streaming is not served", param="stream")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list that is not empty", param="messages")
    texts = [_text_of(message) for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    if not texts:
        raise ApiError(400, "messages holds no user message", param="messages")
    return next((text for text in reversed(texts) if _is_judge_prompt(text)), texts[-1])


def _is_judge_prompt(text: str) -> bool:
    try:
        read_judge_prompt(text)
    except DataError:
        return False
    return True


def judge_reply(prompt: str, rules: Rules) -> str:
    """What the demo judge says to ``prompt``: the verdict's JSON.

    Raises:
        ApiError: if ``prompt`` is not a judge prompt, or its dialogue is not one the rules know.
    """
    try:
        request = read_judge_prompt(prompt)
        score1, score2 = rules(
            request.dialogue,
            request.agent1_name,
            request.agent1_goal,
            request.agent2_name,
            request.agent2_goal,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    return json.dumps(
        {
            "agent1": {
                "reasoning": f"By the rules, {request.agent1_name} stands at {score1:g} of 10.",
                "score": score1,
            },
            "agent2": {
                "reasoning": f"By the rules, {request.agent2_name} stands at {score2:g} of 10.",
                "score": score2,
            },
        }
    )


def run_demo_judge(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    options: DemoJudgeOptions | None = None,
    ready_file: Path | None = None,
    parent_pid: int | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        options: latency and failures; none by default.
        ready_file: gets the base URL once the server listens, complete or not at all; removed when it stops.
        parent_pid: stop as soon as this process is no longer the parent.

    Raises:
        UserError: if the address cannot be listened on.
    """
    run_app(
        create_app(options or DemoJudgeOptions()),
        host=host,
        port=port,
        ready_file=ready_file,
        parent_pid=parent_pid,
        on_ready=lambda base_url: _log.info("demo judge: base_url=%s model=%s", base_url, DEMO_JUDGE),
    )


@contextlib.contextmanager
def demo_judge_process(options: DemoJudgeOptions | None = None, *, start_timeout_s: float = 60.0) -> Iterator[str]:
    """Run the demo judge as a process of its own and yield its base URL.

    The process is stopped on leaving the block, and stops by itself should this process die.

    Raises:
        UserError: if it does not come up, with what it printed.
    """
    options = options or DemoJudgeOptions()
    command = [sys.executable, "-m", "nemo_ampo.world.judge_server", "--latency-ms", str(options.latency_ms)]
    command += ["--fail-rate", str(options.fail_rate), "--seed", str(options.seed)]
    with server_process(command, what="the demo judge", start_timeout_s=start_timeout_s) as base_url:
        yield base_url


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo-judge", description="Serve the embedded rule-based judge.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--latency-ms", type=float, default=DemoJudgeOptions.latency_ms)
    parser.add_argument("--fail-rate", type=float, default=DemoJudgeOptions.fail_rate, help="share of calls that fail")
    parser.add_argument("--seed", type=int, default=DemoJudgeOptions.seed, help="which calls fail")
    parser.add_argument("--ready-file", type=typed_path, help="gets the base URL once the server listens")
    parser.add_argument("--parent-pid", type=int, help="stop when this process is no longer the parent")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run_demo_judge(
            host=arguments.host,
            port=arguments.port,
            options=DemoJudgeOptions(arguments.latency_ms, arguments.fail_rate, arguments.seed),
            ready_file=arguments.ready_file,
            parent_pid=arguments.parent_pid,
        )
    except UserError as error:
        _log.error("error: %s", error)
        return 2
    return 0


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if texts and len(texts) == len(content):
            return "".join(texts)
    raise ApiError(400, "content must be a string or a list of text parts", param="messages")


def _world_rules() -> Rules:
    from nemo_ampo.world.rules import judge_dialogue

    return judge_dialogue


def _draw_failure(prompt: str, options: DemoJudgeOptions, sent: Counter[str]) -> str | None:
    if options.fail_rate == 0:
        return None
    key = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
    sent[key] += 1
    draw = random.Random(f"{options.seed} {key} {sent[key]}")
    return draw.choice(("status", "cut")) if draw.random() < options.fail_rate else None


def _completion(prompt: str, reply: str) -> dict[str, Any]:
    # The rules have no tokenizer; words stand in for tokens.
    prompt_tokens, completion_tokens = len(prompt.split()), len(reply.split())
    message = {"role": "assistant", "content": reply}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": DEMO_JUDGE,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
