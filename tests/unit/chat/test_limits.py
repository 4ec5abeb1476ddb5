"""Admission worked by hand, with the clock passed in."""

from __future__ import annotations

import random

import pytest

from nemo_ampo.chat.limits import WINDOW_S, Lease, Ledger, Limits, Spent
from nemo_ampo.errors import BudgetError


def admit(ledger: Ledger, now: float, tokens: int = 10, usd: float = 0.0) -> Lease:
    lease = ledger.admit(now, tokens, usd)
    assert isinstance(lease, Lease), lease
    return lease


def test_concurrency_is_freed_by_settling_and_only_once() -> None:
    ledger = Ledger(Limits(max_concurrency=2))
    first, _ = admit(ledger, 0), admit(ledger, 0)
    assert ledger.admit(0, 10, 0) is None
    ledger.settle(first, 10, 0)
    ledger.settle(first, 10, 0)
    assert ledger.in_flight == 1
    admit(ledger, 0)
    assert ledger.admit(0, 10, 0) is None


def test_requests_a_minute() -> None:
    ledger = Ledger(Limits(max_concurrency=9, requests_per_minute=2))
    admit(ledger, 0.0)
    admit(ledger, 10.0)
    assert ledger.admit(15.0, 10, 0) == 45.0, "until the first one is a minute old"
    admit(ledger, 60.0)
    assert ledger.admit(60.0, 10, 0) == 10.0


def test_tokens_a_minute_count_what_was_used_once_it_is_known() -> None:
    ledger = Ledger(Limits(max_concurrency=9, tokens_per_minute=100))
    lease = admit(ledger, 0.0, tokens=80)
    assert ledger.admit(1.0, 30, 0) == 59.0
    ledger.settle(lease, 50, 0)
    admit(ledger, 1.0, tokens=50)
    assert ledger.admit(2.0, 1, 0) == 58.0


def test_a_call_larger_than_the_allowance_goes_alone() -> None:
    ledger = Ledger(Limits(max_concurrency=9, tokens_per_minute=100))
    admit(ledger, 0.0, tokens=500)
    assert isinstance(ledger.admit(1.0, 1, 0), float)
    admit(ledger, 60.0, tokens=500)


@pytest.mark.parametrize("seed", range(5))
def test_no_sixty_seconds_ever_hold_more_than_allowed(seed: int) -> None:
    draw = random.Random(seed)
    ledger = Ledger(Limits(max_concurrency=10**6, requests_per_minute=7, tokens_per_minute=300))
    now, sent = 0.0, list[tuple[float, int]]()
    for _ in range(400):
        tokens = draw.randrange(1, 90)
        granted = ledger.admit(now, tokens, 0)
        if isinstance(granted, Lease):
            sent.append((now, tokens))
            ledger.settle(granted, tokens, 0)
        now += draw.random() * 5
    for start, _ in sent:
        window = [tokens for at, tokens in sent if start <= at < start + WINDOW_S]
        assert len(window) <= 7 and sum(window) <= 300
    assert len(sent) > 50, "and it does let calls through"


def test_calls_in_total() -> None:
    ledger = Ledger(Limits(max_concurrency=9, max_calls=5, section="judge"), Spent(calls=3))
    admit(ledger, 0), admit(ledger, 0)
    with pytest.raises(BudgetError, match=r"^judge\.max_calls: the 5 calls"):
        ledger.admit(0, 1, 0)


def test_money_is_reserved_while_calls_are_in_flight() -> None:
    ledger = Ledger(Limits(max_concurrency=9, max_usd=1.0, section="judge"))
    first, second = admit(ledger, 0, usd=0.4), admit(ledger, 0, usd=0.4)
    assert ledger.admit(0, 1, 0.4) is None, "the two may cost less than reserved"
    ledger.settle(first, 1, 0.1)
    third = admit(ledger, 0, usd=0.4)
    ledger.settle(second, 1, 0.4)
    ledger.settle(third, 1, 0.4)
    assert ledger.spent == Spent(3, pytest.approx(0.9))
    with pytest.raises(BudgetError, match=r"^judge\.max_usd: \$0\.9000 of \$1 are spent"):
        ledger.admit(0, 1, 0.4)


def test_money_spent_by_an_earlier_run_counts() -> None:
    ledger = Ledger(Limits(max_concurrency=9, max_usd=1.0), Spent(100, 0.95))
    with pytest.raises(BudgetError):
        ledger.admit(0, 1, 0.1)
