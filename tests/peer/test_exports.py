"""What this project exports is one model to transformers 4, transformers 5 and vLLM: tokens, numbers, the end of a reply."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer
import pytest
from nemo_process import ROOT, convert, run_nemo
from tiny_hf import as_written_by_5, edit_json, split_as_qwen, write_model, write_tokenizer

from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.data.chat import build_messages, encode_prompt
from nemo_ampo.errors import ConfigError
from nemo_ampo.model_folder.loading import load_tokenizer
from nemo_ampo.model_folder.portable import note_for_transformers_5
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.serve.config import ServeConfig, ServeEngine, choose_engine
from nemo_ampo.serve.launch import served

pytestmark = peer.MARKS

CASES = {
    f"{family}-{'tied' if tied else 'untied'}": (family, tied) for family in ("llama", "qwen2") for tied in (True, False)
}
WRITTEN_BY_5 = ("llama-untied", "qwen2-tied")
READERS = {
    "transformers 4": ("transformers", sys.executable),
    "transformers 5": ("transformers", peer.PYTHON),
    "vLLM": ("vllm", peer.PYTHON),
}
CONVERSATIONS = [build_messages("Think.", f'Turn {i}: Ada said: "Grüße, 12{i}, don\'t?"') for i in range(4)]
REPLIES = [
    render_reply(mode, f'"Yes {i}."', dict.fromkeys(MODES[mode].sections, "so")) for i, mode in enumerate((1, 2, 1, 3))
]
DIGITS = [("1", "2")]
"""A token that a tokenizer finds in the conversations unless it takes every digit by itself, as Qwen's does."""
END, PAD, PLAIN = 257, 258, 65
MAX_NEW_TOKENS, MAX_MODEL_LEN = 120, 1024
TOLERANCE = 1e-4
"""Nats per token; all compute in 32 bits."""


@dataclass(frozen=True)
class Exported:
    """One folder, and what each reader makes of it."""

    folder: Path
    numbers: dict[str, dict[str, Any]]


def train_and_export(folder: Path, family: str, tied: bool, of_5: bool) -> Path:
    """A tiny model that learns four replies by heart, and their end, which its generation_config.json did not name."""
    hf = write_model(folder / "hf", family, tied, hidden_size=128)
    edit_json(hf / "generation_config.json", eos_token_id=PAD)
    write_tokenizer(hf, DIGITS)
    if family == "qwen2":
        split_as_qwen(hf)
    if of_5:
        as_written_by_5(hf)
    rows = folder / "rows.jsonl"
    turns = [[message["content"] for message in messages] for messages in CONVERSATIONS]
    rows.write_text(
        "".join(
            json.dumps({"system": system, "instruction": user, "input": "", "output": reply}) + "\n"
            for (system, user), reply in zip(turns, REPLIES, strict=True)
        )
    )
    started = ("run.dir=" + str(folder / "bc"), f"run.init_from={convert(hf, folder / 'start.nemo')}")
    data = (f"data.train={rows}", f"data.heldout={rows}", "data.max_tokens=1024", "data.heldout_replies=0")
    sizes = [
        f"model.{of}{size}=4" for of in ("", "data.validation_ds.") for size in ("micro_batch_size", "global_batch_size")
    ]
    steps = ("trainer.sft.max_epochs=48", "trainer.sft.val_check_interval=0", "trainer.sft.save_interval=0")
    for command in (
        ["recipes.bc", *started, *data, *sizes, *steps],
        ["converters.nemo_to_hf", "--input", folder / "bc" / "policy.nemo", "--output", folder / "exported"],
    ):
        finished = run_nemo(command)
        assert finished.status == 0, finished.err[-6000:]
    return folder / "exported"


def read(reader: str, folder: Path, out: Path) -> dict[str, Any]:
    kind, python = READERS[reader]
    job = {
        "folder": str(folder),
        "conversations": CONVERSATIONS,
        "text": [i * 7 % 256 for i in range(600)],
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "forced": [END, PAD, PLAIN],
    }
    (out / "job.json").write_text(json.dumps(job))
    command = [
        python,
        str(ROOT / "tests" / "support" / "peer_numbers.py"),
        kind,
        str(out / "job.json"),
        str(out / "numbers.json"),
    ]
    process = subprocess.run(command, env=peer.environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    numbers: dict[str, Any] = json.loads((out / "numbers.json").read_text())
    return numbers


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    of_5 = request.param in WRITTEN_BY_5
    export = train_and_export(folder, *CASES[request.param], of_5)
    return Exported(export, {reader: read(reader, export, folder) for reader in READERS})


def test_every_reader_finds_the_same_model(exported: Exported) -> None:
    tokenizer = load_tokenizer(exported.folder)
    prompts = [encode_prompt(messages, tokenizer) for messages in CONVERSATIONS]
    old = exported.numbers["transformers 4"]
    assert old["version"].startswith("4.48")
    assert exported.numbers["transformers 5"]["version"].startswith("5.")
    for reader, numbers in exported.numbers.items():
        assert numbers["prompts"] == prompts, reader
        replies = list(zip(old["replies"], numbers["replies"], strict=True))
        assert [theirs["tokens"] for _, theirs in replies] == [ours["tokens"] for ours, _ in replies], reader
        gaps = [abs(a - b) for ours, theirs in replies for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)]
        text = [abs(a - b) for a, b in zip(old["text"], numbers["text"], strict=True)]
        print(
            f"{exported.folder.parent.name}, {reader} {numbers['version']}: {max(gaps):.1e} and {max(text):.1e} nats apart"
        )
        assert max(gaps) < TOLERANCE and max(text) < TOLERANCE, reader
    assert min(old["text"]) < -1, "a text that the model does not know by heart"


def test_every_reader_stops_where_the_policy_was_taught_to(exported: Exported) -> None:
    """Also at the end token that the folder did not name before training, and at no other."""
    assert json.loads((exported.folder / "generation_config.json").read_text())["eos_token_id"] == [PAD, END]
    for reader, numbers in exported.numbers.items():
        ends = {len(reply["tokens"]): reply["tokens"][-1] for reply in numbers["replies"]}
        assert ends.pop(MAX_NEW_TOKENS) != END and set(ends.values()) == {END}, reader
        assert numbers["lengths"] == [1, 1, MAX_NEW_TOKENS], reader


def test_vllm_behind_our_own_command_says_the_same(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package for CPUs has no `vllm` command that starts.
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\nshift; exec {Path(peer.PYTHON).absolute()} -m vllm.entrypoints.openai.api_server --model "$@"\n'
    )
    program.chmod(0o755)
    for name, value in (peer.environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]

    async def ask(url: str, model: str) -> list[Any]:
        async with ChatClient(EndpointConfig(url, model, timeout_s=300)) as client:
            asked = [client.complete(client.question(m, temperature=0.0, max_tokens=MAX_NEW_TOKENS)) for m in CONVERSATIONS]
            return list(await asyncio.gather(*asked))

    with served(exported.folder, ServeConfig(engine=ServeEngine.vllm, extra_args=small)) as server:
        answers = asyncio.run(ask(server.base_url, server.model))
    tokenizer = load_tokenizer(exported.folder)
    for answer, reply in zip(answers, exported.numbers["transformers 4"]["replies"], strict=True):
        assert answer.text == tokenizer.decode(reply["tokens"], skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if reply["tokens"][-1] == END else "length")


def test_a_tokenizer_that_vllm_would_misread_is_not_given_to_it(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "qwen2", tied=True, hidden_size=128)
    write_tokenizer(hf, DIGITS)
    ours, theirs = (read(reader, hf, tmp_path)["prompts"] for reader in ("transformers 4", "transformers 5"))
    assert ours != theirs and note_for_transformers_5(hf) is not None
    with pytest.raises(ConfigError, match=r"take embedded"):
        choose_engine(ServeConfig(engine=ServeEngine.vllm), checkpoints=[hf])
