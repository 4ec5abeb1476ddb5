"""The embedded server's web side: ``/v1/models`` and ``/v1/chat/completions`` over one engine.

A field that is not served is refused, not ignored: a request that was answered was answered as it was put. Beyond the
OpenAI fields a request may hold ``mode_bias`` (see :mod:`nemo_ampo.serve.dial`), which ``/v1/models`` announces.

What a caller sends is bounded before it costs anything: bodies are read piece by piece up to a size, a number of values
and within a time, read and tokenised outside the event loop, and no more of them are open at once than can be held. A caller
that leaves takes its request along.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from nemo_ampo.errors import EngineError, UserError
from nemo_ampo.ranges import SMALLEST_DRAW
from nemo_ampo.reply.modes import MAX_BIAS
from nemo_ampo.serve.capabilities import CAPABILITIES, MODE_BIAS
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    from nemo_ampo.serve.engine import Generated, ServingEngine

T = TypeVar("T")
MAX_BODY_BYTES = 8 * 2**20
_MOST_DRAINED_BYTES = 8 * MAX_BODY_BYTES
"""A caller reads our refusal only after it has sent its body; beyond this the connection is simply closed."""
_BODY_TIMEOUT_S = 30.0
_MAX_OPEN = 1024
"""Requests open at once, those that wait for a place in the batch included."""
_MAX_OPEN_BYTES = 16 * MAX_BODY_BYTES
_READERS = 2
"""Threads that read and tokenise requests."""
_MOST_VALUES = 20_000
"""Values in a body. Of millions that are wrong each would be looked at and told, which takes minutes and gigabytes."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""A JSON string, also one without end: each byte is looked at once, whatever the body."""
_MAX_STOPS = 4
_MAX_STOP_LENGTH = 1000


def _temperature(value: float | None) -> float | None:
    if value and value < SMALLEST_DRAW:
        raise ValueError(f"must be 0, or at least {SMALLEST_DRAW:g}")
    return value


class TextPart(BaseModel):
    """A piece of a message's text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; parts of a text follow each other as they are."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


class ChatRequest(BaseModel):
    """The fields that are served, with the API's defaults; null is the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: Annotated[float | None, Field(ge=0, le=2), AfterValidator(_temperature)] = None
    top_p: Annotated[float | None, Field(ge=SMALLEST_DRAW, le=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    mode_bias: dict[Literal["1", "2", "3", "4"], _Bias] | None = None


class _RefusedError(Exception):
    """A request that gets an error instead of a reply."""

    def __init__(self, status: int, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.response = _error(status, message, **fields)


def create_app(engine: ServingEngine, model: str) -> FastAPI:
    """The web application.

    Args:
        engine: generates.
        model: the name under which the checkpoint is served.
    """
    app = FastAPI(title="nemo-ampo serve", docs_url=None, redoc_url=None, openapi_url=None)
    desk = _Desk(engine, model)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> JSONResponse:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "nemo-ampo", "max_model_len": engine.context}
        return JSONResponse({"object": "list", "data": [entry | {CAPABILITIES: [MODE_BIAS]}]})

    async def chat_completions(request: Request) -> JSONResponse:
        try:
            return await desk.serve(request)
        except _RefusedError as refused:
            return refused.response
        except ClientDisconnect:
            return _error(499, "the caller left")

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    return app


class _Desk:
    """Takes requests in, as many as can be held, and hands replies out."""

    def __init__(self, engine: ServingEngine, model: str) -> None:
        self._engine, self._model = engine, model
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._open = self._open_bytes = 0

    async def serve(self, request: Request) -> JSONResponse:
        """One request.

        Raises:
            _RefusedError: it gets an error.
            ClientDisconnect: nobody waits for the reply any more.
        """
        with self._place():
            asked, prompt = await self._read(request)
            future = self._submit(asked, prompt)
            try:
                reply = await _unless_gone(request, asyncio.wrap_future(future))
            except EngineError as error:
                raise _RefusedError(500, str(error), kind="server_error") from None
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

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._open >= _MAX_OPEN:
            raise _RefusedError(503, f"{self._open} requests are open already; try again", kind="overloaded_error")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _read(self, request: Request) -> tuple[ChatRequest, tuple[int, ...]]:
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(_BODY_TIMEOUT_S):
                    await self._receive(request, body)
            except TimeoutError:
                raise _RefusedError(408, f"the body did not come within {_BODY_TIMEOUT_S:g} s") from None
            work = asyncio.get_running_loop().run_in_executor(self._readers, self._understand, bytes(body))
            return await _unless_gone(request, work)
        finally:
            self._open_bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Fill ``body``; each byte in it is counted in ``_open_bytes``."""
        size, problem = 0, None
        async for chunk in request.stream():
            size += len(chunk)
            if size > _MOST_DRAINED_BYTES:
                break
            if size > MAX_BODY_BYTES:
                problem = problem or _RefusedError(413, f"the body is longer than {MAX_BODY_BYTES // 2**20} MiB")
            elif self._open_bytes + len(chunk) > _MAX_OPEN_BYTES:
                problem = problem or _RefusedError(
                    503, "too many large requests are open; try again", kind="overloaded_error"
                )
            if problem is None:
                body += chunk
                self._open_bytes += len(chunk)
        if problem is not None:
            raise problem

    def _understand(self, body: bytes) -> tuple[ChatRequest, tuple[int, ...]]:
        """The request and its prompt tokens; may take long, so not for the event loop."""
        if _num_values(body) > _MOST_VALUES and _num_values(_STRING.sub(b"", body)) > _MOST_VALUES:
            raise _RefusedError(400, f"the body holds more than {_MOST_VALUES} values")
        try:
            asked = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            param, said = _what_is_wrong(error)
            raise _RefusedError(400, one_line(said), param=one_line(param)) from None
        if asked.model != self._model:
            problem = f"the model {one_line(asked.model)!r} does not exist; {self._model!r} is served"
            raise _RefusedError(404, problem, param="model", code="model_not_found")
        try:
            return asked, self._engine.encode([message.plain() for message in asked.messages])
        except UserError as error:
            raise _refused_by_engine(error) from None

    def _submit(self, asked: ChatRequest, prompt: tuple[int, ...]) -> Future[Generated]:
        from nemo_ampo.serve.engine import GenerateRequest

        try:
            return self._engine.submit(
                GenerateRequest(
                    prompt=prompt,
                    max_tokens=asked.max_completion_tokens or asked.max_tokens or self._engine.context,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=asked.seed,
                    stop=tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()),
                    mode_bias={int(mode): bias for mode, bias in (asked.mode_bias or {}).items()},
                )
            )
        except UserError as error:
            raise _refused_by_engine(error) from None


def _num_values(body: bytes) -> int:
    """At least as many as there are values in a JSON text; exact where no string holds one of the marks."""
    return 1 + sum(body.count(mark) for mark in (b",", b"[", b"{"))


def _what_is_wrong(error: ValidationError) -> tuple[str, str]:
    """The field and one line on it.

    Of a union, pydantic tells what each kind of value finds wrong. The kind that was sent gets the furthest, or finds
    something else wrong than the kind.
    """

    def places(one: Any) -> list[str]:
        # pydantic also names the kind that was tried, such as list[...]: no part of the request
        return [str(place) for place in one["loc"] if not re.search(r"[-\[]", str(place))] or ["body"]

    told = max(error.errors(), key=lambda one: (len(places(one)), not one["type"].endswith("_type")))
    where = places(told)
    return where[0], f"{'.'.join(where)}: {told['msg'].removeprefix('Value error, ')}"


def _refused_by_engine(error: UserError) -> _RefusedError:
    text = str(error)
    code = "context_length_exceeded" if text.startswith("context_length_exceeded") else None
    return _RefusedError(400, text, param="mode_bias" if text.startswith("mode_bias") else "messages", code=code)


async def _unless_gone(request: Request, work: asyncio.Future[T]) -> T:
    """The work's result; the work is cancelled as soon as the caller has left.

    Raises:
        ClientDisconnect: the caller has left.
    """
    gone = asyncio.create_task(_disconnected(request))
    try:
        either: set[asyncio.Future[Any]] = {work, gone}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers={"Retry-After": "1"} if status == 503 else None)
