"""Llama 3.x: grouped-query attention without biases, optional llama3 rope scaling, head tied or not."""

from __future__ import annotations

from converters.mapping import Family, InterleaveQkv, JoinGateUp, PadVocab, Rename, Row

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


FAMILY = Family(name="llama", rows=ROWS)
