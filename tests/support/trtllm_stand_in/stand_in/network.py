"""LLaMA from converted TensorRT-LLM weights, in torch. Legend: B rows, T positions, H width, V vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

Weights = dict[str, torch.Tensor]


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name to shape of every weight of this rank, as the engine's config implies them."""
    tp, hidden, inner = config.mapping.tp_size, config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_size
    joined = query + 2 * config.num_key_value_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.vocab_embedding.weight": (config.vocab_size // tp, hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    if not config.share_embedding_table:
        shapes["lm_head.weight"] = (config.vocab_size // tp, hidden)
    for layer in range(config.num_hidden_layers):
        name = f"transformer.layers.{layer}."
        shapes |= {
            f"{name}input_layernorm.weight": (hidden,),
            f"{name}post_layernorm.weight": (hidden,),
            f"{name}attention.qkv.weight": (joined // tp, hidden),
            f"{name}attention.dense.weight": (hidden, query // tp),
            f"{name}mlp.fc.weight": (inner // tp, hidden),
            f"{name}mlp.gate.weight": (inner // tp, hidden),
            f"{name}mlp.proj.weight": (hidden, inner // tp),
        }
        if config.attn_bias:
            shapes |= {f"{name}attention.qkv.bias": (joined // tp,), f"{name}attention.dense.bias": (hidden,)}
    return shapes


def rotary_frequencies(config: Any) -> torch.Tensor:
    """Inverse frequencies [head size / 2], with Llama 3.1's scaling if the config has it."""
    size = config.head_size
    inverse = 1.0 / (config.rotary_base ** (torch.arange(0, size, 2).float() / size))
    scaling = config.rotary_scaling
    if not scaling:
        return inverse
    assert scaling["type"] == "llama3", scaling
    context = scaling["original_max_position_embeddings"]
    turns = context * inverse / (2 * math.pi)  # of this frequency within the old context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (share + (1 - share) / scaling["factor"])


def next_logits(config: Any, weights: Weights, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Logits behind each row's last token, float32 [B, V]. Rows are padded on the right."""
    tp, rank = config.mapping.tp_size, config.mapping.tp_rank
    x = _embed(weights["transformer.vocab_embedding.weight"], tokens_BT, tp, rank)
    angles = torch.outer(torch.arange(tokens_BT.size(1)).float(), rotary_frequencies(config))
    angles = torch.cat([angles, angles], -1)
    for layer in range(config.num_hidden_layers):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"transformer.layers.{layer}.")}
        attended = _attention(config, own, _norm(x, own["input_layernorm.weight"], config), angles) @ (
            own["attention.dense.weight"].T
        )
        attended = _sum(attended, tp)
        if config.attn_bias:
            attended = attended + own["attention.dense.bias"]
        x = x + attended
        h = _norm(x, own["post_layernorm.weight"], config)
        h = silu(h @ own["mlp.fc.weight"].T) * (h @ own["mlp.gate.weight"].T)
        x = x + _sum(h @ own["mlp.proj.weight"].T, tp)
    last = x[torch.arange(len(x)), lengths_B - 1]
    head = weights["transformer.vocab_embedding.weight" if config.share_embedding_table else "lm_head.weight"]
    return _join(_norm(last, weights["transformer.ln_f.weight"], config) @ head.T, tp).float()


def _embed(table: torch.Tensor, tokens_BT: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    own = tokens_BT - rank * len(table)
    here = (own >= 0) & (own < len(table))
    return _sum(table[own.clamp(0, len(table) - 1)] * here.unsqueeze(-1), tp)


def _norm(x: torch.Tensor, weight: torch.Tensor, config: Any) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, config.norm_epsilon)


def _attention(config: Any, own: Weights, h: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    tp, size = config.mapping.tp_size, config.head_size
    heads, groups = config.num_attention_heads // tp, config.num_key_value_heads // tp
    joined = h @ own["attention.qkv.weight"].T
    if config.attn_bias:
        joined = joined + own["attention.qkv.bias"]
    q, k, v = (
        part.unflatten(-1, (-1, size)).transpose(1, 2)
        for part in joined.split([heads * size, groups * size, groups * size], -1)
    )
    q, k = _rotate(q, angles), _rotate(k, angles)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
    return out.transpose(1, 2).flatten(2)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], -1) * angles.sin().to(x.dtype)


def _group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def _sum(x: torch.Tensor, tp: int) -> torch.Tensor:
    if tp > 1:
        x = x.contiguous()
        torch.distributed.all_reduce(x, group=_group())
    return x


def _join(x: torch.Tensor, tp: int) -> torch.Tensor:
    if tp == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(tp)]
    torch.distributed.all_gather(parts, x.contiguous(), group=_group())
    return torch.cat(parts, -1)
