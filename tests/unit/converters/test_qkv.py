from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.qkv import interleave_qkv, join_gate_up, pad_rows, split_gate_up, split_qkv


def test_interleave_by_hand() -> None:
    # 4 query heads, 2 groups, heads of width 1: each group is its two query heads, its key, its value.
    q, k, v = torch.tensor([10, 11, 12, 13]), torch.tensor([20, 21]), torch.tensor([30, 31])
    assert interleave_qkv(q, k, v, num_groups=2).tolist() == [10, 11, 20, 30, 12, 13, 21, 31]


def test_interleave_keeps_the_rows_of_a_head_together() -> None:
    # 2 heads of width 2 in one group, hidden 1.
    q, k, v = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[5], [6]]), torch.tensor([[7], [8]])
    assert interleave_qkv(q, k, v, num_groups=1)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@given(
    groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    rest=st.sampled_from([(), (1,), (3,)]),
)
def test_split_undoes_interleave(groups: int, heads_per_group: int, head_dim: int, rest: tuple[int, ...]) -> None:
    heads = groups * heads_per_group
    q, k, v = (torch.randn(n * head_dim, *rest) for n in (heads, groups, groups))
    joined = interleave_qkv(q, k, v, groups)
    assert joined.shape == ((heads + 2 * groups) * head_dim, *rest)
    for original, back in zip((q, k, v), split_qkv(joined, heads, groups, head_dim), strict=True):
        assert torch.equal(original, back)


def test_gate_rows_come_first() -> None:
    gate, up = torch.tensor([[1], [2]]), torch.tensor([[3], [4]])
    joined = join_gate_up(gate, up)
    assert joined[:, 0].tolist() == [1, 2, 3, 4]
    back_gate, back_up = split_gate_up(joined)
    assert torch.equal(back_gate, gate) and torch.equal(back_up, up)


def test_padding_adds_zero_rows_of_the_same_type() -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    padded = pad_rows(weight, 5)
    assert padded.dtype == torch.bfloat16
    assert padded.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0], [0, 0]]
    assert pad_rows(weight, 3) is weight
