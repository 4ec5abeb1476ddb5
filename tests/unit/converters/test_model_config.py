from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from tiny_hf import LLAMA3_ROPE, make_config

from converters.model_config import ARCHITECTURE_KEYS, check_architecture, nemo_config, rope_config
from nemo_ampo.checkpoint.nemo_writing import add_assets
from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import ModelFacts, facts_of


def facts(family: str, tied: bool = False, **changes) -> ModelFacts:
    """Of the config.json that transformers writes."""
    return facts_of(json.loads(make_config(family, tied, **changes).to_json_string(use_diff=False)))


def convert(family: str, tied: bool = False, **changes):
    return nemo_config(facts(family, tied, **changes), Path("/tokenizer"))


def test_every_compared_key_is_written_for_a_scaled_model() -> None:
    assert set(ARCHITECTURE_KEYS) <= set(convert("llama"))


def test_llama_keys() -> None:
    config = convert("llama", tied=True)
    assert config["share_embeddings_and_output_weights"] is True
    assert config["qkv_bias"] is False and config["bias"] is False
    assert config["num_query_groups"] == 2 and config["kv_channels"] == 16
    assert config["override_vocab_size"] == 640 and config["hf_vocab_size"] == 515
    assert config["encoder_seq_length"] == config["max_position_embeddings"] == 2048
    assert config["rotary_base"] == 500000 and isinstance(config["rotary_base"], int)
    assert config["scale_positional_embedding"] is True
    assert [config[k] for k in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")] == [
        8.0,
        1.0,
        4.0,
        256,
    ]
    assert config["tokenizer"]["type"] == "/tokenizer" and config["tokenizer"]["library"] == "huggingface"


def test_qwen_keys() -> None:
    config = convert("qwen2")
    assert config["qkv_bias"] is True and config["bias"] is False
    assert config["share_embeddings_and_output_weights"] is False
    assert config["scale_positional_embedding"] is False and "scale_factor" not in config


def test_head_dim_of_the_config_wins_over_the_quotient() -> None:
    assert convert("llama", head_dim=24)["kv_channels"] == 24
    assert facts("llama", head_dim=24).q_width == 96


def test_real_vocabularies_need_no_padding_beyond_128() -> None:
    # Llama 3: 128256; Qwen2.5 0.5B to 3B: 151936; 7B and up: 152064.
    for vocab in (128256, 151936, 152064):
        assert convert("qwen2", vocab_size=vocab)["override_vocab_size"] == vocab


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=true"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling type 'linear'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling type 'dynamic'"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling type 'yarn'"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
    ],
)
def test_what_nemo_cannot_express_is_refused_by_key(family: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(family, **changes)


def test_old_spelling_and_default_type_of_rope_scaling() -> None:
    old = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"} | {"type": "llama3"}
    assert rope_config(facts("llama", rope_scaling=old))["old_context_len"] == 256
    plain = rope_config(facts("llama", rope_scaling={"rope_type": "default"}))
    assert plain["scale_positional_embedding"] is False


def test_incomplete_llama3_scaling_names_what_lacks() -> None:
    config = make_config("llama", False).to_dict()
    config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    with pytest.raises(UserError, match="lacks high_freq_factor, original_max_position_embeddings"):
        facts_of(config)


def packed(tmp_path: Path, stored: dict, config: dict) -> tuple[Path, Path]:
    """A ``.nemo`` file without weights, and the folder of its Hugging Face files."""
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(config))
    nemo = tmp_path / "policy.nemo"
    content = yaml.safe_dump(stored).encode()
    with tarfile.open(nemo, "w:") as tar:
        member = tarfile.TarInfo("./model_config.yaml")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    add_assets(nemo, assets)
    return nemo, assets


def written(family: str) -> dict:
    return json.loads(make_config(family, False).to_json_string(use_diff=False))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_that_was_converted_from_a_misread_config_is_refused_with_the_cure(tmp_path: Path, family: str) -> None:
    config = written(family)
    # What transformers 4 makes of the words of transformers 5: its own defaults.
    misread = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    nemo, assets = packed(tmp_path, nemo_config(facts_of(misread), tmp_path), config)
    with pytest.raises(UserError, match=r"policy.nemo: model_config.yaml has rotary_base=10000.* convert .* again"):
        check_architecture(nemo, assets)
