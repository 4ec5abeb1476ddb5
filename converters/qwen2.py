"""Qwen2.5: as Llama, with biases on the query, key and value projections."""

from __future__ import annotations

from typing import Any

from converters.mapping import Family, InterleaveQkv, JoinGateUp, PadVocab, Rename, Row
from nemo_ampo.errors import UserError

ROWS: tuple[Row, ...] = (
    PadVocab("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
    Rename(
        "model.layers.{i}.input_layernorm.weight",
        "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        ("hidden",),
    ),
    InterleaveQkv(
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
    ),
    InterleaveQkv(
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        bias=True,
    ),
    Rename(
        "model.layers.{i}.self_attn.o_proj.weight",
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        ("hidden", "q_width"),
    ),
    Rename(
        "model.layers.{i}.post_attention_layernorm.weight",
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        ("hidden",),
    ),
    JoinGateUp(
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
        "decoder.layers.{i}.mlp.linear_fc1.weight",
    ),
    Rename(
        "model.layers.{i}.mlp.down_proj.weight",
        "decoder.layers.{i}.mlp.linear_fc2.weight",
        ("hidden", "ffn"),
    ),
    Rename("model.norm.weight", "decoder.final_layernorm.weight", ("hidden",)),
    PadVocab("lm_head.weight", "output_layer.weight", only_untied=True),
)


def check(config: Any) -> None:
    """Refuse sliding-window attention, which Megatron's GPT model does not have.

    Raises:
        UserError: naming the key of config.json.
    """
    if getattr(config, "use_sliding_window", False):
        raise UserError("config.json: use_sliding_window=true is not supported; set it to false for prompts that fit")


FAMILY = Family(name="qwen2", rows=ROWS, qkv_bias=True, check=check)
