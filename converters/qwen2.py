"""Qwen2.5: as Llama, with biases on the query, key and value projections."""

from __future__ import annotations

from typing import Any

from converters import llama
from converters.mapping import Family, InterleaveQkv, Row
from nemo_ampo.errors import UserError

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


def check(config: Any) -> None:
    """Refuse sliding-window attention, which Megatron's GPT model does not have.

    Raises:
        UserError: naming the key of config.json.
    """
    if getattr(config, "use_sliding_window", False):
        raise UserError("config.json: use_sliding_window=true is not supported; set it to false for prompts that fit")


FAMILY = Family(name="qwen2", rows=ROWS, qkv_bias=True, check=check)
