"""Which rows of a batch go through the model together: so many rows, or as many as a budget of tokens holds.

Legend: B rows, T positions of the whole batch, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_ampo.megatron import WIDTH_MULTIPLE


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one pass.

    Attributes:
        rows: their places in the batch.
        width: positions of each, padding included.
    """

    rows: tuple[int, ...]
    width: int

    def of(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """These rows of a batch of tensors [B, T] and [B, T-1], cut to the width."""
        whole = max(tensor.size(1) for tensor in batch.values())
        rows = list(self.rows)
        return {name: tensor[rows, : tensor.size(1) - whole + self.width] for name, tensor in batch.items()}


def joined(values: Sequence[torch.Tensor], split: Sequence[MicroBatch], mask_BT: torch.Tensor) -> torch.Tensor | None:
    """What micro-batches gave for their tokens, as one tensor like the mask, float32, 0 elsewhere; None of nothing."""
    if not values:
        return None
    whole_BT = torch.zeros(mask_BT.shape, device=values[0].device)
    for part, value in zip(split, values, strict=True):
        whole_BT[list(part.rows), : value.size(1)] = value
    return whole_BT


def by_rows(lengths: Sequence[int], size: int, in_order: bool = True) -> list[MicroBatch]:
    """``size`` rows each, the last with what is left, as wide as the longest of them.

    Args:
        lengths: tokens of each row without padding.
        size: rows.
        in_order: the rows as they come; else the longest first, which leaves less padding.
    """
    rows = range(len(lengths)) if in_order else _longest_first(lengths)
    parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return [MicroBatch(tuple(part), _width(lengths[row] for row in part)) for part in parts]


def by_tokens(lengths: Sequence[int], budget: int, at_least: int = 0) -> list[MicroBatch]:
    """Rows by length, the longest first, each micro-batch with as many as rows x width <= budget allows.

    Args:
        lengths: tokens of each row without padding.
        budget: tokens, padding included; a row that is longer goes alone.
        at_least: micro-batches wanted, at most as many as rows: those with most tokens are halved.
    """

    def width(part: Sequence[int]) -> int:
        return _width(lengths[row] for row in part)

    left = _longest_first(lengths)
    assert at_least <= len(left)
    parts: list[list[int]] = []
    while left:
        size = max(1, budget // width(left))
        parts.append(left[:size])
        left = left[size:]
    while len(parts) < at_least:
        at = max((i for i, part in enumerate(parts) if len(part) > 1), key=lambda i: len(parts[i]) * width(parts[i]))
        half = -(-len(parts[at]) // 2)
        parts[at : at + 1] = [parts[at][:half], parts[at][half:]]
    return [MicroBatch(tuple(part), width(part)) for part in parts]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def _width(lengths: Iterable[int]) -> int:
    return -(-max(lengths) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def needed_tokens(mask_BT: torch.Tensor) -> list[int]:
    """Tokens of each row up to the last one that counts in a loss over next tokens; 1 where none does.

    Args:
        mask_BT: [B, T-1], column t is about token t + 1.
    """
    columns_T = torch.arange(1, mask_BT.size(1) + 1, device=mask_BT.device)
    return ((mask_BT.bool() * columns_T).amax(1) + 1).tolist()
