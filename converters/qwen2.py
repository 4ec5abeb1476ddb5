"""Qwen2.5: as Llama, with biases on the query, key and value projections."""

from __future__ import annotations

from converters import llama
from converters.mapping import Family, InterleaveQkv, Row

ROWS: tuple[Row, ...] = (
    *llama.ROWS,
    InterleaveQkv(
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        bias=True,
    ),
)


FAMILY = Family(name="qwen2", rows=ROWS)
