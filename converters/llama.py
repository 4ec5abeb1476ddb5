"""Llama 3.x: grouped-query attention without biases, optional llama3 rope scaling, head tied or not."""

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
    """Refuse Llama variants with biases, which NeMo can express only for all linear layers at once.

    Raises:
        UserError: naming the key of config.json.
    """
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise UserError(f"config.json: {key}=true is not supported; Llama 3.x has no biases")


FAMILY = Family(name="llama", rows=ROWS, qkv_bias=False, check=check)
