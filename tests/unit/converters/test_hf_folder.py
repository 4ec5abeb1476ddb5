from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import edit_json, edit_weights

from converters.hf_folder import asset_files, check_tokenizer_files, open_hf_folder
from nemo_ampo.errors import UserError


def test_opens_a_sharded_folder(hf_folder) -> None:
    folder = hf_folder("qwen2")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[:10],
        "model-00002-of-00002.safetensors": names[10:],
    }
    for file, part in halves.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = open_hf_folder(folder)
    assert opened.weights.names() == set(names)
    assert torch.equal(opened.weights.load(names[-1]), tensors[names[-1]])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"absent weight files: model-00002-of-00002\.safetensors"):
        open_hf_folder(folder)


def test_left_over_weight_is_an_error(hf_folder) -> None:
    folder = hf_folder("llama")
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(UserError, match=r"left over: model\.layers\.0\.self_attn\.q_norm\.weight"):
        open_hf_folder(folder)


def test_missing_weight_is_an_error(hf_folder) -> None:
    folder = hf_folder("qwen2")
    edit_weights(folder, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.bias"):
        open_hf_folder(folder)


def test_biases_in_a_llama_folder_are_left_over(hf_folder) -> None:
    folder = hf_folder("qwen2")
    edit_json(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"left over: model\.layers\.0\.self_attn\.k_proj\.bias"):
        open_hf_folder(folder)


def test_a_tied_head_may_be_repeated_but_not_differ(hf_folder) -> None:
    folder = hf_folder("llama", tied=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    open_hf_folder(folder)
    edit_weights(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight: differs from the embedding"):
        open_hf_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(hf_folder, name: str) -> None:
    folder = hf_folder("llama")
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file" if "json" in name else r"no \*\.saf"):
        open_hf_folder(folder)


def test_pickled_weights_get_a_hint(hf_folder) -> None:
    folder = hf_folder("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found pytorch_model\.bin; save it again as safetensors"):
        open_hf_folder(folder)


def test_torn_weights_and_config_are_named(hf_folder) -> None:
    folder = hf_folder("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        open_hf_folder(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        open_hf_folder(folder)


def test_unsupported_family(hf_folder) -> None:
    folder = hf_folder("llama")
    edit_json(folder / "config.json", model_type="gemma2")
    with pytest.raises(UserError, match="'gemma2' is not supported"):
        open_hf_folder(folder)


def test_assets_are_all_files_but_weights_and_hidden_ones(hf_folder) -> None:
    folder = hf_folder("llama")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "original" / "consolidated.00.pth").write_text("weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "base.nemo").write_text("converted into the folder itself")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.json").write_text("{}")
    (folder / "system_prompt.txt").write_text("You are ...")
    assert [p.as_posix() for p in asset_files(folder)] == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "original/params.json",
        "special_tokens_map.json",
        "system_prompt.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def check(folder: Path, allow: bool = False) -> None:
    check_tokenizer_files(folder, allow)


def test_a_complete_tokenizer_passes(hf_folder) -> None:
    check(hf_folder("llama"))


@pytest.mark.parametrize(("key", "words"), [("chat_template", "a chat template"), ("eos_token", "an end-of-sequence token")])
def test_a_base_tokenizer_is_refused_unless_allowed(hf_folder, key: str, words: str) -> None:
    folder = hf_folder("llama")
    edit_json(folder / "tokenizer_config.json", **{key: None})
    edit_json(folder / "special_tokens_map.json", **{key: None})
    with pytest.raises(UserError, match=f"lacks {words}.*--allow-base-tokenizer"):
        check(folder)
    check(folder, allow=True)


def test_no_tokenizer(hf_folder) -> None:
    folder = hf_folder("llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        check(folder)


def test_tokenizer_larger_than_the_embedding(hf_folder) -> None:
    folder = hf_folder("llama")
    for head in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_weights(folder, lambda t, head=head: t.update({head: t[head][:258]}))
    edit_json(folder / "config.json", vocab_size=258)
    with pytest.raises(UserError, match="has 259 ids but the model's embedding only 258 rows"):
        check(folder)


def test_a_folder_whose_name_only_looks_the_same_is_told_apart(hf_folder) -> None:
    folder = hf_folder("llama")
    folder.rename(folder.with_name("m\u00f6del"))
    with pytest.raises(UserError, match=r"no such file; .* has 'm\\xf6del', which looks the same as 'mo\\u0308del'"):
        open_hf_folder(folder.with_name("mo\u0308del"))
