"""What an export changes in the two configs, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_hf import edit_json, split_as_qwen

from nemo_ampo.model_folder.facts import TRANSFORMERS_5_ONLY, facts_of, read_facts, read_object
from nemo_ampo.model_folder.loading import load_tokenizer
from nemo_ampo.model_folder.portable import make_portable, note_for_transformers_5, portable_config, same_when_portable


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_folder_of_transformers_4_stays_byte_for_byte(folder_of, family: str) -> None:
    folder = folder_of(family)
    before = contents(folder)
    make_portable(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_folder_of_transformers_5_is_one_model_in_every_spelling(folder_of, family: str) -> None:
    folder = folder_of(family, newer=True)
    facts, tokenizer, before = read_facts(folder), load_tokenizer(folder), contents(folder)
    make_portable(folder)
    written = read_object(folder / "config.json")
    only_old = {key: value for key, value in written.items() if key not in TRANSFORMERS_5_ONLY}
    only_new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert facts_of(written) == facts_of(only_old) == facts_of(only_new) == facts
    changed = {name for name, content in contents(folder).items() if before[name] != content}
    assert changed == {"config.json", "tokenizer_config.json"}
    again = load_tokenizer(folder)
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map
    for name in changed:
        (folder / "packed").mkdir(exist_ok=True)
        (folder / "packed" / name).write_bytes(before[name])
        assert same_when_portable(folder / "packed" / name, folder / name)


def test_transformers_4_reads_the_base_that_stands_inside_the_scaling(folder_of) -> None:
    content = read_object(folder_of("llama") / "config.json")
    content["rope_scaling"]["rope_theta"] = content.pop("rope_theta")
    assert portable_config(content)["rope_theta"] == 500000.0
    assert portable_config(portable_config(content)) == portable_config(content)


def test_a_type_asked_for_is_written_in_the_spellings_there_are(folder_of) -> None:
    older, newer = folder_of("llama"), folder_of("llama", newer=True)
    for folder, keys in ((older, {"torch_dtype"}), (newer, {"torch_dtype", "dtype"})):
        make_portable(folder, "bfloat16")
        written = json.loads((folder / "config.json").read_text())
        assert {key: written[key] for key in ("torch_dtype", "dtype") if key in written} == dict.fromkeys(keys, "bfloat16")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_any_other_change_is_a_difference(folder_of, tmp_path: Path, name: str) -> None:
    one, other = folder_of("llama", newer=True), folder_of("llama")
    edit_json(one / name, **{"initializer_range" if name == "config.json" else "padding_side": 0.5})
    make_portable(one)
    assert not same_when_portable(other / name, one / name)
    assert not same_when_portable(one / "LICENSE", other / "LICENSE")


def test_a_tokenizer_that_transformers_5_replaces_is_noted(folder_of) -> None:
    assert note_for_transformers_5(folder_of("llama")) is None
    folder = folder_of("qwen2")
    assert "load it there with TokenizersBackend" in str(note_for_transformers_5(folder))
    split_as_qwen(folder)
    assert note_for_transformers_5(folder) is None
