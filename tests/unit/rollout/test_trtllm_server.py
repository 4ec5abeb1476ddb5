"""The HTTP engine against a real server whose backend does exactly one thing wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranks import OneProcess
from nemo_ampo.rollout import server_api
from nemo_ampo.rollout.config import TrtLlmServerConfig
from nemo_ampo.rollout.engine import ReplyError, Request, SamplingSpec, StaleWeightsError, UnavailableError
from nemo_ampo.rollout.server_api import Drawn, PromptTokens, Sampling, State
from nemo_ampo.rollout.trtllm_server import TrtLlmServerEngine

SPEC = SamplingSpec(4, (0,))
REQUESTS = [Request(i, (5, 6, 7)[: i + 1], i) for i in range(3)]


@dataclass
class Backend:
    """Answers ``(prompt length, 0)``, last request first; ``change`` spoils what it yields."""

    change: Callable[[list[Drawn]], list[Any]] = lambda rows: rows
    version: str = "1.2.0"
    holds: int | None = None
    lies: int | None = None
    loads: list[tuple[str, int]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    hold: threading.Event | None = None
    files: list[list[str]] = field(default_factory=list)

    def state(self) -> State:
        limits = {"max_prompt": 8, "max_total": 16, "vocab_size": 100}
        return State(tensorrt_llm=self.version, weight_version=self.holds, **limits)

    async def load(self, folder: str, weight_version: int) -> tuple[int, int]:
        self.loads.append((folder, weight_version))
        self.files.append(sorted(p.name for p in Path(folder).iterdir()))
        self.holds = weight_version if self.lies is None else self.lies
        return 2, 80

    async def release(self) -> None:
        self.seen.append("release")

    async def generate(self, requests: list[PromptTokens], sampling: Sampling) -> AsyncIterator[Drawn]:
        assert self.holds is not None
        self.seen.append((requests, sampling))
        rows = [
            Drawn(
                request_id=r.request_id, token_ids=[len(r.prompt_ids), 0], logprobs=[-1.0, -2.0], weight_version=self.holds
            )
            for r in reversed(requests)
        ]
        for row in self.change(rows):
            if isinstance(row, Exception):
                raise row
            yield row
            if self.hold is not None:
                await asyncio.to_thread(self.hold.wait, 10)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def engine_over(backend: Backend, stack: ExitStack, folder: Path, **config: Any) -> TrtLlmServerEngine:
    def publish(target: Path) -> None:
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"w")

    url = stack.enter_context(served(backend))
    settings = replace(TrtLlmServerConfig(url=url), **config)
    engine = TrtLlmServerEngine(settings, publish, folder, OneProcess(), max_batch=2)
    stack.callback(engine.close)
    return engine


def test_responses_come_in_request_order_from_the_published_weights(stack: ExitStack, tmp_path: Path) -> None:
    backend = Backend()
    engine = engine_over(backend, stack, tmp_path)
    report = engine.sync(7)
    assert (report.weight_version, report.num_tensors, report.num_bytes) == (7, 2, 80)
    assert backend.loads == [(str(tmp_path / "v7"), 7)]
    assert backend.files == [["config.json", "model.safetensors"]], "the folder is complete when it is named"
    told: list[int] = []
    responses = engine.generate(REQUESTS, SPEC, on_finish=lambda r: told.append(r.request_id))
    assert [r.request_id for r in responses] == [0, 1, 2]
    assert [r.token_ids for r in responses] == [(1, 0), (2, 0), (3, 0)]
    assert [r.logprobs.tolist() for r in responses if r.logprobs is not None] == [[-1.0, -2.0]] * 3
    assert {r.weight_version for r in responses} == {7}
    assert told == [1, 0, 2], "as they ended, two requests a call"
    requests, sampling = backend.seen[0]
    assert [(r.request_id, r.prompt_ids, r.seed) for r in requests] == [(0, [5], 0), (1, [5, 6], 1)]
    assert (sampling.max_new_tokens, sampling.stop_token_ids, sampling.temperature) == (4, [0], 1.0)
    engine.release()
    assert backend.seen[-1] == "release"


def test_a_response_is_announced_while_others_are_drawn(stack: ExitStack, tmp_path: Path) -> None:
    backend = Backend(hold=threading.Event())
    engine = engine_over(backend, stack, tmp_path)
    engine.sync(1)
    assert backend.hold is not None
    # The server waits behind its first response until that response has arrived here.
    responses = engine.generate(REQUESTS[:2], SPEC, on_finish=lambda r: backend.hold.set())
    assert backend.hold.is_set() and len(responses) == 2


def test_old_versions_leave_the_disk(stack: ExitStack, tmp_path: Path) -> None:
    engine = engine_over(Backend(), stack, tmp_path, keep_versions=2)
    for version in (1, 2, 10):
        engine.sync(version)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v10", "v2"]


def test_a_publication_that_dies_leaves_no_folder_of_that_name(stack: ExitStack, tmp_path: Path) -> None:
    def publish(target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    backend = Backend()
    url = stack.enter_context(served(backend))
    engine = TrtLlmServerEngine(TrtLlmServerConfig(url=url), publish, tmp_path, OneProcess(), 2)
    with pytest.raises(OSError, match="disk full"):
        engine.sync(1)
    assert backend.loads == [] and not (tmp_path / "v1").exists()
    with pytest.raises(StaleWeightsError):
        engine.generate(REQUESTS, SPEC)


def test_equal_versions_are_loaded_once(stack: ExitStack, tmp_path: Path) -> None:
    backend = Backend()
    first, second = (engine_over(backend, stack, tmp_path) for _ in range(2))
    first.sync(3)
    assert second.sync(3).num_tensors == 0
    assert len(backend.loads) == 1


def test_weights_that_changed_behind_our_back_are_refused(stack: ExitStack, tmp_path: Path) -> None:
    backend = Backend()
    engine = engine_over(backend, stack, tmp_path)
    with pytest.raises(StaleWeightsError, match=r"sync\(\) comes before"):
        engine.generate(REQUESTS, SPEC)
    engine.sync(4)
    backend.holds = 5
    with pytest.raises(StaleWeightsError, match=r"409 at /generate: .*weights 5 are loaded, 4 were asked for"):
        engine.generate(REQUESTS, SPEC)


def other_version(rows: list[Drawn]) -> list[Any]:
    return [rows[0], rows[1].model_copy(update={"weight_version": 3})]


def changed(**update: Any) -> Callable[[list[Drawn]], list[Any]]:
    return lambda rows: [rows[0].model_copy(update=update), *rows[1:]]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (other_version, StaleWeightsError, "response 0 was drawn by weights 3, expected 4"),
        (lambda rows: rows[:1], ReplyError, "2 requests, 1 lines"),
        (lambda rows: [], ReplyError, "2 requests, 0 lines"),
        (lambda rows: [rows[0], rows[0]], ReplyError, "came twice"),
        (changed(request_id=9), ReplyError, "response 9 was not asked for"),
        (changed(logprobs=None), ReplyError, "2 tokens, 0 log-probs"),
        (changed(logprobs=[-1.0]), ReplyError, "2 tokens, 1 log-probs"),
        (changed(logprobs=[-1.0, 0.5]), ReplyError, "positive or not finite"),
        (changed(token_ids=[100, 0]), ReplyError, "outside the vocabulary of 100"),
        (changed(token_ids=[], logprobs=[]), ReplyError, "0 tokens"),
        (changed(token_ids=[4] * 5, logprobs=[-1.0] * 5), ReplyError, "5 tokens, expected 1 to 4"),
        (changed(token_ids=[4, 4]), ReplyError, "without a stop token"),
        (lambda rows: [rows[0], RuntimeError("out of memory")], ReplyError, "RuntimeError: out of memory"),
        (lambda rows: [rows[0], KeyError("bug")], UnavailableError, "RemoteProtocolError"),
    ],
)
def test_a_reply_that_is_no_answer_ends_the_call(
    stack: ExitStack, tmp_path: Path, change: Any, kind: type[Exception], words: str
) -> None:
    engine = engine_over(Backend(change=change), stack, tmp_path)
    engine.sync(4)
    with pytest.raises(kind, match=words):
        engine.generate(REQUESTS[:2], SPEC)


def test_a_server_that_does_not_answer_in_time_is_given_up(stack: ExitStack, tmp_path: Path) -> None:
    backend = Backend(hold=threading.Event())
    engine = engine_over(backend, stack, tmp_path, timeout_s=0.3)
    engine.sync(1)
    with pytest.raises(UnavailableError, match="no answer in time"):
        engine.generate(REQUESTS[:2], SPEC)
    assert backend.hold is not None
    backend.hold.set()
    assert len(backend.seen) == 1, "what may have been drawn is not asked for again"


def test_a_load_that_fails_says_why(stack: ExitStack, tmp_path: Path) -> None:
    backend = Backend()

    async def fail(folder: str, weight_version: int) -> tuple[int, int]:
        raise ValueError("config.json: unknown model_type")

    backend.load = fail  # type: ignore[method-assign]
    engine = engine_over(backend, stack, tmp_path)
    with pytest.raises(UnavailableError, match=r"422 at /load: .*unknown model_type"):
        engine.sync(1)


def test_servers_of_another_kind_are_refused_at_once(stack: ExitStack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs TensorRT-LLM 1\.2 or later, found 1\.1\.0"):
        engine_over(Backend(version="1.1.0"), stack, tmp_path)
    config = TrtLlmServerConfig(url="http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"ConnectError at http://127\.0\.0\.1:9/state"):
        TrtLlmServerEngine(config, lambda folder: None, tmp_path, OneProcess(), 2)


def test_each_replica_has_its_server(stack: ExitStack, tmp_path: Path) -> None:
    backends = [Backend(), Backend()]
    urls = ", ".join(stack.enter_context(served(b)) for b in backends)
    config = TrtLlmServerConfig(url=urls)
    for rank in range(2):
        ranks = OneProcess(data_rank=rank, data_size=2, is_main=rank == 0)
        engine = TrtLlmServerEngine(config, lambda folder: None, tmp_path, ranks, 2)
        if rank == 0:
            engine.sync(1)
    assert len(backends[0].loads) == 1 and backends[1].loads == []


def test_the_server_refuses_what_its_engine_cannot_hold(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(holds=1)
    url = stack.enter_context(served(backend))
    sampling = {"max_new_tokens": 4, "stop_token_ids": [0], "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    sampling |= {"greedy": False, "want_logprobs": False}

    def status(prompt: list[Any], **change: Any) -> int:
        requests = [{"request_id": 0, "prompt_ids": prompt, "seed": 1}]
        call = {"weight_version": 1, "sampling": sampling | change, "requests": requests}
        return httpx.post(f"{url}/generate", json=call, trust_env=False).status_code

    assert status([5] * 8) == 200
    for prompt in ([], [5] * 9, [100], [-1], ["5"], [5.0], [True]):
        assert status(prompt) == 422, prompt
    assert status([5], max_new_tokens=16) == 422 and status([5], max_new_tokens=0) == 422
    monkeypatch.setattr(server_api, "_MAX_CALL_BYTES", 1000)
    assert status([5] * 1000) == 413
    assert len(backend.seen) == 1
