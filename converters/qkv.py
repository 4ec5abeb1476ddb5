"""How Megatron joins projections that Hugging Face keeps apart. Pure tensor functions, exact both ways.

Attention: for every query group (one key/value head) its query heads, then its key head, then its value head,
    so that a
tensor-parallel rank that owns a group owns all it needs. MLP: all gate rows, then all up rows. ``rest`` below
is ``[hidden]`` for a weight and empty for a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Join projections group by group: ``[q heads, k, v]`` of group 0, then of group 1, ...

    Args:
        q: ``[num_heads * head_dim, *rest]``.
        k: ``[num_groups * head_dim, *rest]``.
        v: as ``k``.
        num_groups: number of key/value heads; divides ``num_heads``.

    Returns:
        ``[(num_heads + 2 * num_groups) * head_dim, *rest]``.
    """
    rest = q.shape[1:]
    grouped = [t.reshape(num_groups, -1, *rest) for t in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def split_qkv(qkv: Tensor, num_heads: int, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undo :func:`interleave_qkv`.

    Returns:
        q ``[num_heads * head_dim, *rest]``, k and v ``[num_groups * head_dim, *rest]``.
    """
    rest = qkv.shape[1:]
    rows_of_group = [num_heads // num_groups * head_dim, head_dim, head_dim]
    q, k, v = qkv.reshape(num_groups, sum(rows_of_group), *rest).split(rows_of_group, dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """``[ffn, hidden]`` twice to ``[2 * ffn, hidden]``: gate rows first."""
    return torch.cat((gate, up), dim=0)


def split_gate_up(joined: Tensor) -> tuple[Tensor, Tensor]:
    """Undo :func:`join_gate_up`."""
    gate, up = joined.chunk(2, dim=0)
    return gate, up


def pad_rows(weight: Tensor, num_rows: int) -> Tensor:
    """Append zero rows to ``[vocab, hidden]`` until there are ``num_rows``."""
    missing = num_rows - weight.shape[0]
    if missing == 0:
        return weight
    return torch.cat((weight, weight.new_zeros(missing, *weight.shape[1:])), dim=0)
