from __future__ import annotations

from collections import Counter

from nemo_ampo.training.sampler import SizedBatches, rows_of_step


def test_an_epoch_visits_every_row_once_and_drops_the_rest() -> None:
    epoch = [i for step in range(3) for i in rows_of_step(10, 3, step, seed=5)]
    assert len(epoch) == 9 and max(Counter(epoch).values()) == 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = rows_of_step(10, 5, 0, 1)
    assert first == rows_of_step(10, 5, 0, 1)
    assert first != rows_of_step(10, 5, 0, 2)
    assert sorted(first + rows_of_step(10, 5, 1, 1)) == list(range(10))
    assert first + rows_of_step(10, 5, 1, 1) != rows_of_step(10, 5, 2, 1) + rows_of_step(10, 5, 3, 1)


def test_sizes_for_upstream() -> None:
    batches = SizedBatches(10, 3)
    assert len(batches) == 3 and batches.batch_sampler.total_samples == 10
