"""Cloning examples as tensors: a data set of unpadded rows and the function that pads a batch of them.

Legend: B examples, T positions. Position t holds token t and is trained to predict token t + 1, so a row of n
tokens fills n - 1 positions and the first trained one is the last of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from nemo_ampo.data.bc import BcExample
from nemo_ampo.errors import ConfigError, DataError


class BcDataset(Dataset[dict[str, torch.Tensor]]):
    """Encoded examples; item i is ``{"tokens": int64 [n], "prompt_len": int64 [], "mode": int64 []}``."""

    def __init__(self, examples: Sequence[BcExample]) -> None:
        self.examples = tuple(examples)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One example, unpadded."""
        example = self.examples[index]
        return {
            "tokens": torch.tensor(example.tokens, dtype=torch.int64),
            "prompt_len": torch.tensor(example.prompt_len),
            "mode": torch.tensor(example.mode),
        }


def whole_rows(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Rows whose log-probabilities of ``[:, 1:]`` line up with labels and loss mask, [B, T + 1].

    The label of a row's last position is its last token, which is not among ``tokens_BT``: padding stands there.
    """
    return torch.cat((tokens_BT[:, :1], labels_BT), dim=1)


def collate_bc(
    batch: Sequence[dict[str, torch.Tensor]], pad_id: int, seq_multiple: int = 8, max_len: int | None = None
) -> dict[str, Any]:
    """Pad examples on the right and line labels and loss mask up with the positions that predict them.

    Args:
        batch: items of :class:`BcDataset`.
        pad_id: token written behind each example; never trained on.
        seq_multiple: T is rounded up to a multiple of this (sequence parallelism and fast kernels need it).
        max_len: largest T the model takes, a multiple of ``seq_multiple``; None for no limit.

    Returns:
        ``tokens`` [B, T] int64; ``labels`` [B, T] int64, the next token; ``loss_mask`` [B, T] float32, 1
        where the label is a reply token or its end-of-sequence token; ``position_ids`` [B, T] int64; ``modes``
        [B] int64. Right padding and causal attention need no mask.

    Raises:
        ConfigError: ``max_len`` is no multiple of ``seq_multiple``.
        DataError: an example has more positions than ``max_len``.
    """
    if max_len is not None and max_len % seq_multiple:
        raise ConfigError(f"max_len {max_len} must be a multiple of seq_multiple {seq_multiple}")
    positions = [len(item["tokens"]) - 1 for item in batch]
    if max_len is not None and max(positions) > max_len:
        raise DataError(f"an example fills {max(positions)} positions, the limit is {max_len}")
    width = -(-max(positions) // seq_multiple) * seq_multiple
    tokens_BT = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    labels_BT = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    loss_mask_BT = torch.zeros((len(batch), width), dtype=torch.float32)
    for row, (item, length) in enumerate(zip(batch, positions, strict=True)):
        tokens_BT[row, :length] = item["tokens"][:-1]
        labels_BT[row, :length] = item["tokens"][1:]
        loss_mask_BT[row, int(item["prompt_len"]) - 1 : length] = 1.0
    return {
        "tokens": tokens_BT,
        "labels": labels_BT,
        "loss_mask": loss_mask_BT,
        "position_ids": torch.arange(width).repeat(len(batch), 1),
        "modes": torch.stack([item["mode"] for item in batch]),
    }
