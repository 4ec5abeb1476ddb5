"""Rollouts on a TensorRT-LLM server (1.2 or later) in a container of its own: weights over files, responses over HTTP.

The NeMo container and TensorRT-LLM's current one cannot share a process, a CUDA version or an NCCL communicator, so each
weight version is published as a Hugging Face folder that appears complete under its name or not at all, and the server
is told to load it. Only the replica's leader talks to the server; what it got, or why it got nothing, is shared with the
other ranks. Every reply names the weights it was drawn with; one of another version ends the call.

An exchange has one limit of time for all of it, however slowly the bytes come, and limits of size for lines and bodies, so
that a server gone wrong costs neither the night nor the memory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import httpx
import torch
from pydantic import BaseModel, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from nemo_ampo.chat.proxies import proxy_for, through
from nemo_ampo.errors import EngineError
from nemo_ampo.rollout.config import TrtLlmServerConfig
from nemo_ampo.rollout.engine import (
    Caps,
    Decode,
    OnFinish,
    ReplyError,
    Request,
    Response,
    SamplingSpec,
    StaleWeightsError,
    SyncReport,
    UnavailableError,
    check_complete,
    check_equal_calls,
    check_requests,
    finish_response,
)
from nemo_ampo.rollout.server_api import (
    Drawn,
    GenerateCall,
    LoadCall,
    Loaded,
    PromptTokens,
    Released,
    ReplyLine,
    Sampling,
    State,
)
from nemo_ampo.rollout.trtllm_version import require_server_version
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    from nemo_ampo.ranks import Ranks

_CONNECT_ATTEMPTS = 5
_CONNECT_TIMEOUT_S = 10.0
_MAX_BODY_BYTES = 2**20
_LINE_BYTES, _LINE_BYTES_PER_TOKEN = 2**16, 64
"""A line is at most this long: a token's number and its log-probability take some thirty characters."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Read = Callable[[httpx.Response], Awaitable[T]]


class TrtLlmServerEngine:
    """An engine behind HTTP; see the module's docstring.

    Args:
        config: addresses and time limits.
        publish: writes the trainer's current weights into the folder it is given; every rank of the job calls it.
        weights_dir: parent of the published folders, on a file system that trainer and server see under one path.
        ranks: this process's place in the job.
        max_batch: requests of one HTTP call.
        decode: tokens to text, only needed for stop strings.

    Raises:
        UnavailableError: the server cannot be reached.
        ConfigError: its TensorRT-LLM is too old.
    """

    def __init__(
        self,
        config: TrtLlmServerConfig,
        publish: Callable[[Path], None],
        weights_dir: Path,
        ranks: Ranks,
        max_batch: int,
        decode: Decode | None = None,
    ) -> None:
        urls = [url.strip() for url in config.url.split(",") if url.strip()]
        self._config = config
        self._publish = publish
        self._weights_dir = weights_dir
        self._ranks = ranks
        self._decode = decode
        self._weight_version: int | None = None
        self._url = urls[ranks.data_rank % len(urls)].rstrip("/")
        # asyncio, since only there a limit can hold for a whole exchange: from the connection to the last byte.
        self._runner = asyncio.Runner()
        try:
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
                proxy=proxy_for(self._url),
                trust_env=False,
                headers={"accept-encoding": "identity"},  # packed bodies have no bound
            )
        except (ValueError, ImportError) as error:
            raise UnavailableError(
                f"rollout server: no way to {self._url}{through(self._url)}: {one_line(str(error))}"
            ) from None
        state: State = self._on_leader(lambda: self._call(State, "GET", "/state"))
        require_server_version(state.tensorrt_llm)
        self.caps = Caps(
            logprob_kind="raw",
            max_batch=max_batch,
            max_prompt=state.max_prompt,
            max_total=state.max_total,
            vocab_size=state.vocab_size,
            own_weights=True,
        )

    def sync(self, weight_version: int) -> SyncReport:
        """Publish the weights as a folder, let the server load it, and believe it only when it says so."""
        begin = time.monotonic()
        self._weight_version = None
        folder = self._publish_folder(weight_version)
        loaded: Loaded = self._on_leader(lambda: self._load(folder, weight_version))
        if loaded.weight_version != weight_version:
            raise StaleWeightsError(f"the server loaded weights {loaded.weight_version}, {weight_version} were published")
        self._weight_version = weight_version
        self._prune()
        return SyncReport(weight_version, loaded.num_tensors, loaded.num_bytes, time.monotonic() - begin)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        """See :meth:`nemo_ampo.rollout.engine.Engine.generate`. Responses arrive one by one, as they end."""
        version = self._weight_version
        if version is None:
            raise StaleWeightsError("the server holds no weights of the trainer: sync() comes before generate()")
        check_equal_calls(requests, sampling, self._ranks.variants)
        check_requests(requests, sampling, self.caps)
        if sampling.stop_strings and self._decode is None:
            finish_response(requests[0], [0], None, sampling, self.caps, None, version)  # raises

        def ask() -> dict[int, Response]:
            finished: dict[int, Response] = {}

            def take(response: Response) -> None:
                if response.request_id in finished:
                    raise ReplyError(f"response {response.request_id} came twice")
                finished[response.request_id] = response
                if on_finish is not None:
                    on_finish(response)

            for begin in range(0, len(requests), self.caps.max_batch):
                self._draw(requests[begin : begin + self.caps.max_batch], sampling, version, take)
            return finished

        finished = self._on_leader(ask)
        if on_finish is not None and not self._ranks.is_leader:
            for response in finished.values():
                on_finish(response)
        return check_complete(requests, finished, version)

    def release(self) -> None:
        """The server gives back its cache; the next :meth:`sync` gets it again."""
        self._on_leader(lambda: self._call(Released, "POST", "/release").released)

    def close(self) -> None:
        """Close the connection; the server lives on."""
        self._runner.run(self._client.aclose())
        self._runner.close()

    def _draw(
        self, requests: Sequence[Request], sampling: SamplingSpec, version: int, take: Callable[[Response], None]
    ) -> None:
        by_id = {r.request_id: r for r in requests}
        call = GenerateCall(
            weight_version=version,
            sampling=Sampling(
                max_new_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                greedy=sampling.greedy,
                want_logprobs=sampling.want_logprobs,
            ),
            requests=[PromptTokens(request_id=r.request_id, prompt_ids=list(r.prompt_ids), seed=r.seed) for r in requests],
        )
        limit = _LINE_BYTES + _LINE_BYTES_PER_TOKEN * sampling.max_new_tokens

        async def read(reply: httpx.Response) -> None:
            count = 0
            async for line in _lines(reply, limit):
                if line.error is not None:
                    raise ReplyError(f"rollout server: {one_line(line.error)}")
                if line.count is not None:
                    if line.count != count or count != len(requests):
                        raise ReplyError(f"rollout server: {len(requests)} requests, {count} lines, it says {line.count}")
                    return
                assert line.drawn is not None
                count += 1
                take(self._response(line.drawn, by_id, sampling, version))
            raise ReplyError(f"rollout server: the reply broke off after {count} of {len(requests)} responses")

        self._exchange("POST", "/generate", read, call.model_dump_json(), self._config.timeout_s)

    def _response(self, drawn: Drawn, by_id: dict[int, Request], sampling: SamplingSpec, version: int) -> Response:
        if drawn.weight_version != version:
            raise StaleWeightsError(
                f"response {drawn.request_id} was drawn by weights {drawn.weight_version}, expected {version}"
            )
        if drawn.request_id not in by_id:
            raise ReplyError(f"response {drawn.request_id} was not asked for")
        logprobs = None if drawn.logprobs is None else torch.tensor(drawn.logprobs, dtype=torch.float32)
        request = by_id[drawn.request_id]
        return finish_response(request, drawn.token_ids, logprobs, sampling, self.caps, self._decode, version)

    def _publish_folder(self, weight_version: int) -> Path:
        """Write beside the target, then rename: a folder with this name is complete."""
        folder = self._weights_dir / f"v{weight_version}"
        staging = self._weights_dir / f".v{weight_version}.partial"
        if self._ranks.is_main:
            for leftover in (staging, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir(parents=True)
        self._ranks.any(False)  # nobody writes before the folder is there
        self._publish(staging)
        if self._ranks.is_main:
            _flush(staging)
            staging.rename(folder)
            _flush(self._weights_dir)
        self._ranks.any(False)  # nobody asks for it before it has its name
        return folder

    def _prune(self) -> None:
        if not self._ranks.is_main:
            return
        versions = sorted(int(p.name[1:]) for p in self._weights_dir.glob("v*") if p.name[1:].isdigit())
        for version in versions[: -self._config.keep_versions]:
            shutil.rmtree(self._weights_dir / f"v{version}", ignore_errors=True)

    def _load(self, folder: Path, weight_version: int) -> Loaded:
        call = LoadCall(folder=str(folder.resolve()), weight_version=weight_version)
        return self._call(Loaded, "POST", "/load", call.model_dump_json(), self._config.load_timeout_s)

    def _call(self, kind: type[M], method: str, path: str, content: str | None = None, timeout_s: float | None = None) -> M:
        async def read(reply: httpx.Response) -> M:
            body = await _body(reply)
            if len(body) > _MAX_BODY_BYTES:
                raise ReplyError(f"rollout server: an answer longer than {_MAX_BODY_BYTES // 2**20} MiB at {path}")
            try:
                return kind.model_validate_json(body)
            except ValidationError as error:
                raise ReplyError(f"rollout server: unreadable {kind.__name__}: {_first_line(error)}") from None

        return self._exchange(method, path, read, content, timeout_s or self._config.timeout_s)

    def _exchange(self, method: str, path: str, read: Read[T], content: str | None, timeout_s: float) -> T:
        """One request and what ``read`` makes of its answer, all within ``timeout_s``."""
        return self._runner.run(self._within(method, self._url + path, read, content, timeout_s))

    async def _within(self, method: str, url: str, read: Read[T], content: str | None, timeout_s: float) -> T:
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return await self._ask(method, url, read, content)
        except TimeoutError:
            if not limit.expired():  # not ours, but of whoever takes the responses
                raise
            asked = f"{url}{through(url)}"
            raise UnavailableError(f"rollout server: no answer in time ({timeout_s:g} s in all) from {asked}") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:
            said = one_line(str(error))
            raise UnavailableError(f"rollout server: {type(error).__name__} at {url}{through(url)}: {said}") from None

    async def _ask(self, method: str, url: str, read: Read[T], content: str | None) -> T:
        request = self._client.build_request(method, url, content=content, headers={"content-type": "application/json"})
        # Only a connection that never came about is tried again: then nothing can have happened over there.
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((httpx.ConnectError, httpx.ConnectTimeout)),
            stop=stop_after_attempt(_CONNECT_ATTEMPTS),
            wait=wait_exponential(multiplier=0.2, max=5),
            reraise=True,
        ):
            with attempt:
                reply = await self._client.send(request, stream=True)
        try:
            if reply.status_code != httpx.codes.OK:
                _refuse(reply, await _body(reply))
            return await read(reply)
        finally:
            await reply.aclose()

    def _on_leader(self, work: Callable[[], Any]) -> Any:
        """Run on the replica's leader; every rank of the replica gets its result or raises its error."""
        outcome: tuple[Any, EngineError | None] = (None, None)
        if self._ranks.is_leader:
            try:
                outcome = (work(), None)
            except EngineError as error:
                outcome = (None, error)
        result, failure = self._ranks.share(outcome)
        if failure is not None:
            raise failure
        return result


async def _pieces(reply: httpx.Response) -> AsyncIterator[bytes]:
    packed = reply.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise ReplyError(f"rollout server: an answer packed as {one_line(packed, 20)}, which was not asked for")
    async for piece in reply.aiter_raw():
        yield piece


async def _body(reply: httpx.Response) -> bytes:
    """The body, or as much of it as shows that it is too long."""
    body = bytearray()
    async for piece in _pieces(reply):
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            break
    return bytes(body)


async def _lines(reply: httpx.Response, limit: int) -> AsyncIterator[ReplyLine]:
    """The lines of a ``/generate`` answer, each at most ``limit`` bytes long."""
    rest = b""
    async for piece in _pieces(reply):
        *whole, rest = (rest + piece).split(b"\n")
        for text in whole:
            yield _line(text, limit)
        if len(rest) > limit:
            break
    if rest:
        yield _line(rest, limit)


def _line(text: bytes, limit: int) -> ReplyLine:
    if len(text) > limit:
        raise ReplyError(f"rollout server: a line longer than {limit:,} bytes")
    try:
        line = ReplyLine.model_validate_json(text)
    except ValidationError as error:
        raise ReplyError(f"rollout server: unreadable line: {_first_line(error)}") from None
    if (line.drawn is None) + (line.count is None) + (line.error is None) != 2:
        raise ReplyError(f"rollout server: a line without meaning: {one_line(text.decode(errors='replace'), 80)}")
    return line


def _refuse(reply: httpx.Response, body: bytes) -> NoReturn:
    said = one_line(body.decode("utf-8", "replace"))
    url = reply.request.url
    text = f"rollout server: {reply.status_code} at {url.path}{through(str(url))}: {said}"
    if reply.status_code == httpx.codes.CONFLICT:
        raise StaleWeightsError(text)
    raise UnavailableError(text)


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    return one_line(f"{'.'.join(map(str, first['loc'])) or 'reply'}: {first['msg']}")


def _flush(folder: Path) -> None:
    """Make a folder's files and names durable before they are relied on."""
    for path in (*(p for p in folder.iterdir() if p.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
