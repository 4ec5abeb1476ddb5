"""config.json in both spellings; what is not understood is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import LLAMA3_ROPE, make_config

from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import Llama3Scaling, facts_of, read_facts
from nemo_ampo.model_folder.loading import transformers_config


def old(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model as transformers 4 writes it."""
    return json.loads(make_config(family, False).to_json_string()) | {"torch_dtype": "bfloat16"} | changes


def new(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The same model as transformers 5 writes it."""
    content = old(family)
    rope = {"rope_theta": content.pop("rope_theta"), **(content.pop("rope_scaling") or {"rope_type": "default"})}
    return (
        content | {"rope_parameters": rope, "dtype": content.pop("torch_dtype"), "transformers_version": "5.2.0"} | changes
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_spellings_are_one_model(family: str) -> None:
    assert facts_of(new(family)) == facts_of(old(family)) == facts_of(old(family) | new(family))


def test_what_the_newer_spelling_says_counts() -> None:
    facts = facts_of(new())
    assert facts.rope_base == 500000.0 and facts.dtype == "bfloat16"
    assert facts.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 256)
    assert facts_of(new(rope_parameters={"full_attention": new()["rope_parameters"]})) == facts


def test_absent_keys_take_the_defaults_of_the_file_format() -> None:
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    content = {key: old()[key] for key in ("model_type", "max_position_embeddings", *sizes)}
    facts = facts_of(content)
    assert (facts.num_groups, facts.head_dim, facts.norm_eps, facts.rope_base) == (4, 16, 1e-6, 10000.0)
    assert (facts.rope_scaling, facts.tied, facts.dtype, facts.init_std) == (None, False, None, 0.02)
    for key in content:
        with pytest.raises(UserError, match=f"{key} "):
            facts_of({k: v for k, v in content.items() if k != key})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 10000.0}, r"rope_theta=10000.0; rope_parameters.rope_theta=500000.0: these contradict"),
        ({"rope_scaling": None}, r"rope_parameters=.*rope_scaling=None: these contradict"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 2.0}}, "these contradict"),
        ({"torch_dtype": "float32"}, "torch_dtype='float32' contradicts dtype='bfloat16'"),
        ({"rope_parameters": {"full_attention": None}}, r"rope_parameters\.full_attention=null: expected a value"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, r"rope_parameters\.rope_theta=null: expected"),
        ({"rope_parameters": LLAMA3_ROPE | {"type": "default"}}, "rope_type='llama3' contradicts type='default'"),
    ],
)
def test_spellings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        facts_of(new(**changes))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "su", "mrope", "proportional", "", 3, True])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_other_kinds_of_scaling_are_refused(name: str, kind: object) -> None:
    content = old() if name == "rope_scaling" else new()
    with pytest.raises(UserError, match=f"{name} type .* is not supported"):
        facts_of(content | {name: {"rope_type": kind, "factor": 4.0}})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "key 'quantization_config'.*unquantised"),
        ("llama", {"auto_map": {"AutoConfig": "x.Y"}}, "key 'auto_map'.*never run"),
        ("llama", {"attention_multiplier": 0.5}, "key 'attention_multiplier' .0.5. is not supported for llama"),
        ("llama", {"logit_scale": 0.1}, "key 'logit_scale'"),
        ("llama", {"residual_multiplier": 1.0}, "key 'residual_multiplier'"),
        ("llama", {"attention_chunk_size": 8192}, "key 'attention_chunk_size'"),
        ("llama", {"qk_norm": True}, "key 'qk_norm' .true.*Remove the key if it does not"),
        ("llama", {"sliding_window": 128}, "key 'sliding_window'"),
        ("llama", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("llama", {"mlp_bias": 1}, "mlp_bias=1 is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=true.*set it to false"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": LLAMA3_ROPE | {"attention_factor": 1.2}}, "key 'attention_factor'"),
        ("llama", {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor=1 must be above"),
        ("llama", {"rope_scaling": LLAMA3_ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": {}}, "rope_scaling type None is not supported"),
        ("llama", {"rope_scaling": {"rope_theta": 500000.0}}, "rope_scaling type None is not supported"),
        ("llama", {"rope_scaling": "llama3"}, "rope_scaling='llama3': expected an object"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures=.* is not supported"),
        ("llama", {"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: llama, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"torch_dtype": "int8"}, "torch_dtype='int8' is not supported; expected float32"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': expected a number above 0"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps=null: expected a value"),
        ("llama", {"rope_theta": None}, "rope_theta=null: expected a value"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("llama", {"rope_theta": True}, "rope_theta=true: expected a number above 0"),
        ("llama", {"rope_theta": 0.5}, "rope_theta=0.5: expected a number above 1"),
        ("llama", {"vocab_size": 515.0}, "vocab_size=515.0: expected a whole number"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false': expected true or false"),
        ("llama", {"head_dim": 15}, "head_dim=15: rotary embeddings need an even one"),
        ("llama", {"head_dim": None, "hidden_size": 63}, "hidden_size=63 is not a multiple"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        facts_of(old(family, **changes))
    assert "\n" not in str(refusal.value)


def test_what_real_files_hold_beside_is_accepted() -> None:
    every_key = json.loads(make_config("qwen2", False).to_json_string(use_diff=False))
    assert facts_of(every_key) == facts_of(old("qwen2", torch_dtype=None))
    beside = {
        "_name_or_path": "me/model",
        "rope_interleaved": False,
        "is_llama_config": True,
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_fixed": True,
        "use_mrope": False,
        "max_sequence_length": 2048,
        "layer_types": ["full_attention"] * 2,
        "use_sliding_window": False,
        "quantization_config": None,
        "task_specific_params": {},
    }
    assert facts_of(old() | beside) == facts_of(old())
    assert facts_of(old("qwen2", sliding_window=4096, max_window_layers=21)) == facts_of(old("qwen2"))


DAMAGED = ['{"a": 1', "[]", "7", "", "\ufeff{}", '{"a": 1, "a": 2}', '{"a":' * 99_999, f'{{"a": {"9" * 5000}}}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_that_is_no_object_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json") as refusal:
        read_facts(tmp_path)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_text_or_no_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"config\.json: not UTF-8 text \(byte 0\)"):
        read_facts(tmp_path)
    with pytest.raises(UserError, match=r"absent/config\.json: no such file"):
        read_facts(tmp_path / "absent")


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE, LLAMA3_ROPE | {"factor": 32.0, "low_freq_factor": 2.0}])
@pytest.mark.parametrize("head_dim", [16, 24, 128])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None, head_dim: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    facts = facts_of(old(rope_scaling=scaling, head_dim=head_dim))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3" if scaling else "default"](transformers_config(facts), "cpu")
    torch.testing.assert_close(torch.tensor(facts.inverse_frequencies()), expected, rtol=1e-5, atol=0.0)
