"""Which rows go together under a budget of tokens."""

from __future__ import annotations

import pytest
import torch

from nemo_ampo.megatron.micro_batches import MicroBatch, by_rows, by_tokens, needed_tokens


def test_rows_go_by_length_up_to_the_budget() -> None:
    # Widths 40, 24, 16, 8, 8: one row of 40, one of 24 beside 16 fills 48, and both short ones fit together.
    assert by_tokens([7, 40, 20, 3, 16], 48) == [
        MicroBatch((1,), 40),
        MicroBatch((2, 4), 24),
        MicroBatch((0, 3), 8),
    ]
    assert by_tokens([], 48) == []


def test_a_row_above_the_budget_goes_alone() -> None:
    assert by_tokens([100, 8], 48) == [MicroBatch((0,), 104), MicroBatch((1,), 8)]


@pytest.mark.parametrize("at_least", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("budget", [8, 64, 100, 4096])
def test_every_row_is_in_one_micro_batch_within_the_budget(budget: int, at_least: int) -> None:
    lengths = torch.randint(1, 60, (8,), generator=torch.Generator().manual_seed(budget)).tolist()
    parts = by_tokens(lengths, budget, at_least)
    assert sorted(row for part in parts for row in part.rows) == list(range(8))
    assert len(parts) == max(at_least, len(by_tokens(lengths, budget)))
    for part in parts:
        longest = max(lengths[row] for row in part.rows)
        assert part.width % 8 == 0 and longest <= part.width < longest + 8
        assert len(part.rows) * part.width <= budget or len(part.rows) == 1


def test_rows_without_a_budget_keep_their_order() -> None:
    assert by_rows([9, 3, 8, 1, 17], 2) == [MicroBatch((0, 1), 16), MicroBatch((2, 3), 8), MicroBatch((4,), 24)]
    assert by_rows([9, 3, 8, 1, 17], 2, in_order=False) == [
        MicroBatch((4, 0), 24),
        MicroBatch((2, 1), 8),
        MicroBatch((3,), 8),
    ]
    assert by_rows([], 2) == []


def test_a_row_is_needed_up_to_its_last_token_that_counts() -> None:
    mask_BT = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert needed_tokens(mask_BT) == [5, 6, 1]


def test_rows_are_cut_to_the_width() -> None:
    batch = {"tokens_BT": torch.arange(32).reshape(2, 16), "mask_BT": torch.arange(30).reshape(2, 15)}
    cut = MicroBatch((1,), 8).of(batch)
    assert cut["tokens_BT"].tolist() == [list(range(16, 24))]
    assert cut["mask_BT"].tolist() == [list(range(15, 22))]
