"""What a stage leaves in a policy's files reaches the next one unchanged, and whoever draws from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ampo.errors import UserError
from nemo_ampo.files import write_once
from nemo_ampo.model_folder.policy_files import (
    SYSTEM_PROMPT_FILE,
    record_stop_tokens,
    record_system_prompt,
    stop_token_ids,
    system_prompt,
)
from nemo_ampo.prompts import load_prompt

TOKENIZER: Any = SimpleNamespace(eos_token_id=7)


def policy(folder: Path, generation: Any = None, config: dict[str, Any] | None = None) -> Path:
    """A folder with the two files, each only if given."""
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("text", ["a\r\nb\rc\n", "\r\n", " \n", "ends\r", "\ufeffBOM", "Grüße 你好 \u2028\x85", ""])
def test_a_system_prompt_keeps_its_bytes(tmp_path: Path, text: str) -> None:
    write_once(tmp_path / SYSTEM_PROMPT_FILE, text)
    assert system_prompt(tmp_path, None) == text
    (tmp_path / "override.txt").write_bytes(text.encode())
    assert system_prompt(tmp_path / "absent", str(tmp_path / "override.txt")) == text


def test_the_prompt_of_the_last_training_is_the_policys(tmp_path: Path) -> None:
    record_system_prompt(tmp_path, system_prompt(tmp_path, None))
    assert not (tmp_path / SYSTEM_PROMPT_FILE).exists(), "who names none gets the project's own"
    for text in ("cloned", "of the override\r\n"):
        record_system_prompt(tmp_path, text)
        assert system_prompt(tmp_path, None) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_once(folder / SYSTEM_PROMPT_FILE, text)
    assert system_prompt(folder, None) == text


def test_a_prompt_file_keeps_its_line_ends_but_the_last(tmp_path: Path) -> None:
    for content, text in ((b"a\r\nb\r\n", "a\r\nb"), (b"a\rb\r", "a\rb\r"), (b"a\n\n", "a\n")):
        (tmp_path / "p.txt").write_bytes(content)
        assert load_prompt(tmp_path / "p.txt").text == text


def test_a_prompt_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(UserError, match=r"p\.txt: not UTF-8 text \(byte 2\)"):
        system_prompt(tmp_path, str(tmp_path / "p.txt"))


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": 0}, None, (0, 7)),
        ({"eos_token_id": [9, 7]}, None, (7, 9)),
        ({}, {"eos_token_id": 3, "vocab_size": 10}, (3, 7)),
        (None, {"eos_token_id": [3, 4], "vocab_size": 10}, (3, 4, 7)),
        ({"eos_token_id": 1}, {"eos_token_id": 3, "vocab_size": 10}, (1, 7)),
        (None, None, (7,)),
        ({"eos_token_id": None}, None, (7,)),
    ],
)
def test_what_ends_a_reply(tmp_path: Path, generation: Any, config: Any, stops: tuple[int, ...]) -> None:
    assert stop_token_ids(policy(tmp_path, generation, config), TOKENIZER) == stops


@pytest.mark.parametrize("value", [-1, 10, 2.0, True, "7", [7, "x"], [[7]], {"a": 1}, [None], 10**30])
def test_what_is_no_token_id_is_named(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.* is no token id of the model"):
        stop_token_ids(policy(tmp_path, {"eos_token_id": value}, {"vocab_size": 10}), TOKENIZER)


def test_the_trained_end_is_recorded_beside_those_that_were_there(tmp_path: Path) -> None:
    before = {"do_sample": True, "eos_token_id": 0, "pad_token_id": 0, "transformers_version": "4.48.3"}
    record_stop_tokens(policy(tmp_path, before), TOKENIZER)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == before | {"eos_token_id": [0, 7]} and list(written) == list(before)
    assert stop_token_ids(tmp_path, TOKENIZER) == (0, 7)


def test_a_file_that_names_every_end_stays_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'{"eos_token_id":[7, 0],\r\n"top_k":5}')
    record_stop_tokens(tmp_path, TOKENIZER)
    assert (tmp_path / "generation_config.json").read_bytes() == b'{"eos_token_id":[7, 0],\r\n"top_k":5}'


def test_a_policy_without_the_file_gets_one_with_all_its_ends(tmp_path: Path) -> None:
    record_stop_tokens(policy(tmp_path, None, {"eos_token_id": 3, "vocab_size": 10}), TOKENIZER)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 7]}
