"""Which rows does step ``s`` train on? A pure function of seed and step, whatever was resumed and however many ranks."""

from __future__ import annotations

import random


def rows_of_step(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row indices of one step: epochs are seeded permutations, an incomplete last batch of an epoch is dropped.

    Args:
        num_rows: rows of the data set, at least ``batch_size``.
        batch_size: distinct rows of one step.
        step: 0-based.
        seed: of the run.
    """
    epoch, position = divmod(step, num_rows // batch_size)
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[position * batch_size : (position + 1) * batch_size]


class SizedBatches:
    """Stands for the data loader in the constructors of NeMo-Aligner's trainers, which only ask how long an epoch is."""

    drop_last = True

    def __init__(self, num_rows: int, batch_size: int) -> None:
        self.total_samples = num_rows
        self.global_batch_size = batch_size

    @property
    def batch_sampler(self) -> SizedBatches:
        """Itself: sizes are all that is read."""
        return self

    def __len__(self) -> int:
        return self.total_samples // self.global_batch_size
