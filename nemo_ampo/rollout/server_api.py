"""The HTTP interface of a rollout server: its messages, and the application around whatever draws the tokens.

The launcher in TensorRT-LLM's container (:mod:`nemo_ampo.rollout.trtllm_serve`) and the tests' stand-in serve the same
application over different backends. Each reply names the weights it was drawn with, and a call that asks for another
version is refused, so that a stale engine can never look like a fresh one.

    GET  /state     what is served and which weights are in it
    POST /load      load a published Hugging Face folder under a version number
    POST /generate  one JSON line per response as soon as it is complete, then a line that counts them
    POST /release   give back cache memory until the next load
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Protocol

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

_MAX_CALL_BYTES = 256 * 2**20
"""Of a request: a thousand prompts of thirty thousand tokens."""


class WireModel(BaseModel):
    """A misspelt field, or a value of another kind, is an error on either side."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class State(WireModel):
    """What a server is. ``weight_version`` is None until the first load."""

    tensorrt_llm: str
    weight_version: int | None = None
    max_prompt: PositiveInt
    max_total: PositiveInt
    vocab_size: PositiveInt


class LoadCall(WireModel):
    """Load the folder, as the server sees it, under this version."""

    folder: str
    weight_version: int


class Loaded(WireModel):
    """What a load moved. ``num_tensors`` is 0 when the version was already there."""

    weight_version: int
    num_tensors: NonNegativeInt
    num_bytes: NonNegativeInt
    seconds: NonNegativeFloat


class Released(WireModel):
    """Memory was given back."""

    released: bool


class Sampling(WireModel):
    """The part of :class:`~nemo_ampo.rollout.engine.SamplingSpec` a server needs; stop strings are the client's."""

    max_new_tokens: PositiveInt
    stop_token_ids: list[int]
    temperature: float
    top_p: float
    top_k: int
    greedy: bool
    want_logprobs: bool


class PromptTokens(WireModel):
    """One request."""

    request_id: int
    prompt_ids: list[int]
    seed: int


class GenerateCall(WireModel):
    """Draw one response per request with exactly these weights."""

    weight_version: int
    sampling: Sampling
    requests: list[PromptTokens]


class Drawn(WireModel):
    """One response: tokens without the prompt, the stop token included; log-probabilities at temperature 1."""

    request_id: int
    token_ids: list[int]
    logprobs: list[float] | None = None
    weight_version: int


class ReplyLine(WireModel):
    """One line of a ``/generate`` reply: a response, the final count, or what went wrong."""

    drawn: Drawn | None = None
    count: int | None = None
    error: str | None = None


class Backend(Protocol):
    """What draws the tokens."""

    def state(self) -> State:
        """Versions and limits; ``weight_version`` of what is loaded now."""
        ...

    async def load(self, folder: str, weight_version: int) -> tuple[int, int]:
        """Replace the weights; number of tensors and bytes."""
        ...

    def generate(self, requests: list[PromptTokens], sampling: Sampling) -> AsyncIterator[Drawn]:
        """Responses in the order in which they end."""
        ...

    async def release(self) -> None:
        """Give back memory that the next load can get again."""
        ...


def make_app(backend: Backend) -> FastAPI:
    """The application. Weights never change while responses are being drawn."""
    app = FastAPI(title="nemo-ampo rollout server")
    app.add_middleware(_BoundedBody)
    turn = _Turn()

    @app.get("/state")
    async def state() -> State:
        return backend.state()

    @app.post("/load")
    async def load(call: LoadCall) -> Loaded:
        begin = time.monotonic()
        async with turn.alone():
            if backend.state().weight_version == call.weight_version:
                return Loaded(weight_version=call.weight_version, num_tensors=0, num_bytes=0, seconds=0.0)
            try:
                tensors, size = await backend.load(call.folder, call.weight_version)
            except (OSError, ValueError, RuntimeError) as error:
                raise HTTPException(422, f"cannot load {call.folder}: {error}") from error
        seconds = time.monotonic() - begin
        return Loaded(weight_version=call.weight_version, num_tensors=tensors, num_bytes=size, seconds=seconds)

    @app.post("/generate")
    async def generate(call: GenerateCall) -> StreamingResponse:
        state = backend.state()
        _check_prompts(call, state)
        loaded = state.weight_version
        if loaded != call.weight_version:
            raise HTTPException(409, f"weights {loaded} are loaded, {call.weight_version} were asked for")
        return StreamingResponse(_lines(backend, call, turn), media_type="application/x-ndjson")

    @app.post("/release")
    async def release() -> Released:
        async with turn.alone():
            await backend.release()
        return Released(released=True)

    return app


def _check_prompts(call: GenerateCall, state: State) -> None:
    """An engine may answer a prompt it cannot hold with silence, or with the end of its process."""
    for prompt in call.requests:
        length = len(prompt.prompt_ids)
        if not 1 <= length <= state.max_prompt or length + call.sampling.max_new_tokens > state.max_total:
            limits = f"the server takes 1 to {state.max_prompt}, {state.max_total} with the response"
            asked = f"{length} prompt tokens and {call.sampling.max_new_tokens} new ones"
            raise HTTPException(422, f"request {prompt.request_id}: {asked}; {limits}")
        if not all(0 <= token < state.vocab_size for token in prompt.prompt_ids):
            raise HTTPException(422, f"request {prompt.request_id}: a token outside the vocabulary of {state.vocab_size}")


class _BoundedBody:
    """Refuses a request's body as soon as it is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def bounded() -> AsgiMessage:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _MAX_CALL_BYTES:
                raise HTTPException(413, f"the body is longer than {_MAX_CALL_BYTES // 2**20} MiB")
            return message

        await self._app(scope, bounded, send)


async def _lines(backend: Backend, call: GenerateCall, turn: _Turn) -> AsyncIterator[str]:
    count = 0
    async with turn.shared():
        try:
            async for drawn in backend.generate(call.requests, call.sampling):
                count += 1
                yield ReplyLine(drawn=drawn).model_dump_json(exclude_none=True) + "\n"
        except (OSError, ValueError, RuntimeError) as error:
            yield ReplyLine(error=f"{type(error).__name__}: {error}").model_dump_json(exclude_none=True) + "\n"
            return
    yield ReplyLine(count=count).model_dump_json(exclude_none=True) + "\n"


class _Turn:
    """Many calls may draw at once; a load waits for them and keeps new ones out."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._drawing = 0
        self._loading = False

    def shared(self) -> _Shared:
        return _Shared(self)

    def alone(self) -> _Alone:
        return _Alone(self)


class _Shared:
    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    async def __aenter__(self) -> None:
        turn = self._turn
        async with turn._changed:
            await turn._changed.wait_for(lambda: not turn._loading)
            turn._drawing += 1

    async def __aexit__(self, *exception: object) -> None:
        turn = self._turn
        async with turn._changed:
            turn._drawing -= 1
            turn._changed.notify_all()


class _Alone:
    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    async def __aenter__(self) -> None:
        turn = self._turn
        async with turn._changed:
            await turn._changed.wait_for(lambda: not turn._loading and turn._drawing == 0)
            turn._loading = True

    async def __aexit__(self, *exception: object) -> None:
        turn = self._turn
        async with turn._changed:
            turn._loading = False
            turn._changed.notify_all()
