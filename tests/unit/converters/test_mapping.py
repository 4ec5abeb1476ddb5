from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_hf import make_config

from converters import llama, qwen2
from converters.families import FAMILIES
from converters.mapping import bind, check_names, stacked_dims
from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import facts_of

SHAPE = replace(
    facts_of(
        {
            "model_type": "llama",
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 130,
            "max_position_embeddings": 64,
        }
    ),
    head_dim=3,  # an odd one has no rotation, but a place in every table
)


def random_weights(rows, shape):
    return {
        name: torch.randn(dims)
        for binding in bind(rows, shape)
        for name, dims in zip(binding.hf_names, binding.row.hf_dims(shape), strict=True)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_tables_name_exactly_the_weights_of_the_transformers_model(family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(family, tied)
    model = AutoModelForCausalLM.from_config(config)
    shape = facts_of(config.to_dict())
    mapped = {
        name: dims
        for b in bind(FAMILIES[family].rows, shape)
        for name, dims in zip(b.hf_names, b.row.hf_dims(shape), strict=True)
    }
    # named_parameters() lists a tied head once, as the embedding.
    assert mapped == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [llama.ROWS, qwen2.ROWS])
def test_every_row_comes_back_bit_for_bit(rows) -> None:
    weights = random_weights(rows, SHAPE)
    seen = set()
    for binding in bind(rows, SHAPE):
        nemo = binding.to_nemo(weights.__getitem__, SHAPE)
        assert tuple(nemo.shape) == binding.row.nemo_dims(SHAPE)
        for name, tensor in binding.to_hf(nemo, SHAPE).items():
            assert torch.equal(tensor, weights[name]), name
            seen.add(name)
    assert seen == set(weights)


def test_vocabulary_is_padded_to_128_whatever_the_parallel_size() -> None:
    [embedding] = [b for b in bind(llama.ROWS, SHAPE) if b.key == "embedding.word_embeddings.weight"]
    assert embedding.row.nemo_dims(SHAPE) == (256, 8)
    padded = embedding.to_nemo(lambda name: torch.ones(130, 8), SHAPE)
    assert padded[:130].eq(1).all() and padded[130:].eq(0).all()


def test_a_tied_model_has_no_output_layer() -> None:
    tied = replace(SHAPE, tied=True)
    keys = {b.key for b in bind(llama.ROWS, SHAPE)} - {b.key for b in bind(llama.ROWS, tied)}
    assert keys == {"output_layer.weight"}


def test_layers_are_stacked_in_the_checkpoint() -> None:
    rows = {b.key: b.row for b in bind(qwen2.ROWS, SHAPE)}
    # (4 + 2 * 2) heads of width 3 = 24 rows.
    assert stacked_dims(rows["decoder.layers.self_attention.linear_qkv.weight"], SHAPE) == (2, 24, 8)
    assert stacked_dims(rows["decoder.layers.self_attention.linear_qkv.bias"], SHAPE) == (2, 24)
    assert stacked_dims(rows["decoder.final_layernorm.weight"], SHAPE) == (8,)


def test_wrong_shape_names_the_tensor() -> None:
    weights = random_weights(llama.ROWS, SHAPE)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(11, 8)
    [binding] = [b for b in bind(llama.ROWS, SHAPE) if b.layer == 1 and b.key == "decoder.layers.mlp.linear_fc1.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: shape \[11, 8\].*\[12, 8\]"):
        binding.to_nemo(weights.__getitem__, SHAPE)


def test_missing_and_left_over_names_are_listed() -> None:
    with pytest.raises(UserError, match=r"here: .*missing: b, c; left over: x"):
        check_names({"a", "x"}, {"a", "b", "c"}, "here")
    check_names({"a"}, {"a"}, "here")


def test_unknown_family_lists_the_supported_ones() -> None:
    with pytest.raises(UserError, match="'mistral' is not supported; supported: llama, qwen2"):
        facts_of({"model_type": "mistral"})
