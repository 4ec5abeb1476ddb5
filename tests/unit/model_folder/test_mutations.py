"""Folders damaged at random: refused in one line, or the same model, or the change that was asked for. Fixed seeds."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import split_in_two

from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import facts_of, read_facts
from nemo_ampo.model_folder.loading import load_model, load_tokenizer
from nemo_ampo.model_folder.policy_files import record_stop_tokens, stop_token_ids
from nemo_ampo.model_folder.portable import make_portable

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 2.5, -0.0, 1e400, float("nan"), 10**40, "", "4", "default", "llama3", "yarn"),
    *(
        [],
        [1],
        {},
        {"rope_type": "linear", "factor": 2.0},
        {"factor": 4.0},
        "\ud800",
        "x" * 500,
        "a\nb\x1b[2J",
        [[]],
        ["full_attention"],
    ),
)
NEW_KEYS = (
    *("qk_norm", "auto_map", "quantization_config", "logit_scale", "sliding_window", "layer_types", "attention_bias"),
    *("rope_scaling", "rope_theta", "rope_parameters", "partial_rotary_factor", "head_dim", "dtype", "torch_dtype"),
)
BY_KEY: dict[str, set[str]] = {
    "num_key_value_heads": {"num_groups"},
    "intermediate_size": {"ffn"},
    "max_position_embeddings": {"max_positions"},
    "rms_norm_eps": {"norm_eps"},
    "initializer_range": {"init_std"},
    "tie_word_embeddings": {"tied"},
    "hidden_size": {"hidden", "head_dim"},
    "num_attention_heads": {"num_heads", "head_dim", "num_groups"},
    "rope_theta": {"rope_base"},
    "rope_scaling": {"rope_base", "rope_scaling"},
    "rope_parameters": {"rope_base", "rope_scaling"},
    "torch_dtype": {"dtype"},
    "model_type": {"family", "qkv_bias"},
} | {key: {name} for key, name in (("vocab_size", "vocab"), ("num_hidden_layers", "num_layers"))}
"""Key of config.json -> facts it may change; any other only itself."""


def mutate(content: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """One value changed, dropped or added, at the top or one level down; and the key at the top it belongs to."""
    changed = copy.deepcopy(content)
    key = rng.choice([*changed, *NEW_KEYS])
    place, name = changed, key
    if isinstance(changed.get(key), dict) and rng.random() < 0.7:
        place, name = changed[key], rng.choice([*changed[key], "rope_theta", "type", "mscale"])
    if rng.random() < 0.2:
        place.pop(name, None)
    else:
        place[name] = rng.choice(JUNK)
    return changed, key


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut off, doubled or put in."""
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at + rng.randrange(1, 9) :],
            data[:at] + rng.choice([b"{", b"}", b'"', b",", b"null", b"0", b"\\ud800", b"\n"]) + data[at:],
        ]
    )


def refused(call: Callable[[], Any]) -> Any:
    """What the call gives, or None when it refuses; it may refuse in one line only."""
    try:
        return call()
    except UserError as error:
        assert error.args and "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) < 700, str(error)
        return None


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_config_json(folder_of, family: str, newer: bool) -> None:
    from transformers import AutoConfig

    folder = folder_of(family, newer=newer)
    path, rng = folder / "config.json", random.Random(f"{family}{newer}")
    content, facts = json.loads(path.read_text()), read_facts(folder)
    accepted = 0
    for number in range(400):
        if number % 4 == 0:
            path.write_bytes(damage(path.read_bytes() if number % 8 else json.dumps(content).encode(), rng))
            refused(lambda: read_facts(folder))
            path.write_text(json.dumps(content))
            continue
        changed, key = mutate(content, rng)
        path.write_text(json.dumps(changed))
        found = refused(lambda: read_facts(folder))
        if found is None:
            continue
        accepted += 1
        differing = {name for name, value in asdict(found).items() if value != asdict(facts)[name]}
        assert differing <= BY_KEY.get(key, {key}), (key, changed.get(key))
        if not newer and "rope_parameters" not in changed and "dtype" not in changed:
            theirs = AutoConfig.from_pretrained(folder)
            assert (float(theirs.rms_norm_eps), theirs.hidden_size) == (found.norm_eps, found.hidden)
            assert theirs.tie_word_embeddings == found.tied
            if not (isinstance(changed.get("rope_scaling"), dict) and "rope_theta" in changed["rope_scaling"]):
                assert theirs.rope_theta == found.rope_base
    assert 20 < accepted < 250


@pytest.mark.parametrize("newer", [False, True])
def test_an_accepted_config_is_the_model_it_describes(folder_of, newer: bool) -> None:
    folder = folder_of("llama", newer=newer)
    path, rng, ids = folder / "config.json", random.Random(5), torch.arange(300)[None]
    content = json.loads(path.read_text())
    facts = read_facts(folder)
    with torch.no_grad():
        expected = load_model(folder)(ids).logits
        for _ in range(150):
            path.write_text(json.dumps(mutate(content, rng)[0]))
            model = refused(lambda: load_model(folder))
            if (
                model is not None
                and replace(read_facts(folder), dtype=facts.dtype, init_std=0.02, max_positions=2048) == facts
            ):
                assert torch.allclose(model(ids).logits.float(), expected, atol=0.5 if model.dtype != torch.float32 else 0.0)
            if model is not None:
                make_portable(folder)
                assert read_facts(folder) is not None


@pytest.mark.parametrize("newer", [False, True])
def test_tokenizer_files(folder_of, newer: bool) -> None:
    from tokenizers import Tokenizer

    folder, rng = folder_of("llama", newer=newer), random.Random(6)
    text, written = "it's 1,234 <|im_end|> Grüße", Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = written.encode(text, add_special_tokens=False).ids
    originals = {name: (folder / name).read_bytes() for name in ("tokenizer_config.json", "tokenizer.json")}
    accepted = 0
    for number in range(300):
        name = "tokenizer.json" if number % 5 == 0 else "tokenizer_config.json"
        if number % 2:
            changed = json.loads(originals[name])
            key = rng.choice([*changed, "extra_special_tokens", "backend", "tokenizer_class", "auto_map", "chat_template"])
            changed[key] = rng.choice(JUNK)
            (folder / name).write_text(json.dumps(changed))
        else:
            (folder / name).write_bytes(damage(originals[name], rng))
        tokenizer = refused(lambda: load_tokenizer(folder))
        if tokenizer is not None:
            accepted += 1
            if name == "tokenizer_config.json":
                assert tokenizer.encode(text, add_special_tokens=False) == expected
        (folder / name).write_bytes(originals[name])
    assert 20 < accepted < 280


def test_generation_config(folder_of) -> None:
    folder, rng = folder_of("llama"), random.Random(7)
    path, tokenizer = folder / "generation_config.json", load_tokenizer(folder)
    original = path.read_bytes()
    for number in range(300):
        if number % 2:
            path.write_text(json.dumps(json.loads(original) | {"eos_token_id": rng.choice(JUNK)}))
        else:
            path.write_bytes(damage(original, rng))
        stops = refused(lambda: stop_token_ids(folder, tokenizer))
        if stops is not None:
            assert tokenizer.eos_token_id in stops and all(type(i) is int and 0 <= i < 515 for i in stops)
            record_stop_tokens(folder, tokenizer)
            assert stop_token_ids(folder, tokenizer) == stops


def _headers(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield path, 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_index_and_headers(folder_of) -> None:
    folder, rng, ids = folder_of("qwen2"), random.Random(8), torch.arange(100)[None]
    split_in_two(folder)
    places = [(folder / "model.safetensors.index.json", 10**9), *_headers(folder)]
    with torch.no_grad():
        expected = load_model(folder)(ids).logits
        for _ in range(300):
            path, length = rng.choice(places)
            original = path.read_bytes()
            path.write_bytes(damage(original[:length], rng) + original[length:])
            model = refused(lambda: load_model(folder))
            assert model is None or torch.equal(model(ids).logits, expected)
            path.unlink()
            path.write_bytes(original)


def test_a_mutation_that_asks_for_another_model_gets_it(folder_of) -> None:
    content = json.loads((folder_of("llama", newer=True) / "config.json").read_text())
    content["rope_parameters"]["factor"] = 2.0
    assert facts_of(content).rope_scaling.factor == 2.0
