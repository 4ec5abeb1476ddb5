from __future__ import annotations

from collections import Counter

import pytest

from nemo_ampo.output.outcome import Outcome


def test_all_of_the_whole_plan_is_complete() -> None:
    outcome = Outcome(4, begun=4, done=4)
    assert outcome.complete and outcome.status == 0
    assert outcome.line() == "complete: 4 of 4 situations begun, 4 finished"


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (Outcome(0), 75, "0 of 0"),
        (
            Outcome(4, begun=4, done=3, missing=Counter(timeout=1)),
            75,
            "4 of 4 situations begun, 3 finished; missing: timeout 1",
        ),
        (Outcome(4, begun=4, done=4, reasons=["a limited run"]), 75, "4 finished; a limited run"),
        (
            Outcome(4, begun=2, done=2, stopped="max_calls: spent"),
            2,
            "2 of 4 situations begun, 2 finished; max_calls: spent",
        ),
        (Outcome(4, begun=4, done=4, stopped="max_calls: spent"), 2, "4 finished; max_calls: spent"),
    ],
)
def test_anything_less_is_partial_and_has_a_status(outcome: Outcome, status: int, said: str) -> None:
    assert not outcome.complete and outcome.status == status
    assert outcome.line().startswith("PARTIAL: ") and said in outcome.line()


def test_failures_are_counted_and_the_first_few_kept() -> None:
    outcome = Outcome(9)
    for number in range(9):
        outcome.miss("timeout", f"row {number}")
    assert outcome.missing == {"timeout": 9} and outcome.failures == [f"row {n}" for n in range(5)]
