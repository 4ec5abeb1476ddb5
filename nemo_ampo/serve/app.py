"""The embedded server's web side: ``/v1/models`` and ``/v1/chat/completions`` over one engine.

A field that is not served is refused, not ignored: a request that was answered was answered as it was put. Beyond the
OpenAI fields a request may hold ``mode_bias`` (see :mod:`nemo_ampo.serve.dial`), which ``/v1/models`` announces.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemo_ampo.errors import EngineError, UserError
from nemo_ampo.serve.capabilities import CAPABILITIES, MODE_BIAS

if TYPE_CHECKING:
    from nemo_ampo.serve.engine import Engine

_DISCONNECT_POLL_S = 0.25


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """The fields that are served, with the API's defaults."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    mode_bias: dict[Literal["1", "2", "3", "4"], float] = Field(default_factory=dict)


def create_app(engine: Engine, model: str) -> FastAPI:
    """The web application.

    Args:
        engine: generates.
        model: the name under which the checkpoint is served.
    """
    app = FastAPI(title="nemo-ampo serve", docs_url=None, redoc_url=None, openapi_url=None)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> JSONResponse:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "nemo-ampo", "max_model_len": engine.context}
        return JSONResponse({"object": "list", "data": [entry | {CAPABILITIES: [MODE_BIAS]}]})

    async def chat_completions(request: Request) -> JSONResponse:
        try:
            asked = ChatRequest.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return _error(400, f"{where}: {first['msg']}", param=where)
        if asked.model != model:
            return _error(404, f"the model {asked.model!r} does not exist; {model!r} is served", code="model_not_found")
        return await _complete(engine, asked, request)

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    return app


async def _complete(engine: Engine, asked: ChatRequest, request: Request) -> JSONResponse:
    from nemo_ampo.serve.engine import GenerateRequest

    prompt = engine.encode([message.model_dump() for message in asked.messages])
    limit = asked.max_completion_tokens or asked.max_tokens or engine.context
    try:
        future = engine.submit(
            GenerateRequest(
                prompt=prompt,
                max_tokens=limit,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed,
                stop=tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()),
                mode_bias={int(mode): bias for mode, bias in asked.mode_bias.items()},
            )
        )
    except UserError as error:
        code = "context_length_exceeded" if str(error).startswith("context_length_exceeded") else None
        return _error(400, str(error), param="messages", code=code)
    answer = asyncio.wrap_future(future)
    while not answer.done():
        await asyncio.wait([answer], timeout=_DISCONNECT_POLL_S)
        if not answer.done() and await request.is_disconnected():
            answer.cancel()
            return _error(499, "the caller left")
    try:
        reply = answer.result()
    except EngineError as error:
        return _error(500, str(error), kind="server_error")
    message = {"role": "assistant", "content": reply.text}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply.ids)}
    return JSONResponse(
        {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
    )


def _error(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status)
