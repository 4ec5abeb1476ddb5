"""Counters and percentiles."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_ampo.chat.stats import LATENCY_WINDOW, StatsRecorder, nearest_rank


def test_nearest_rank() -> None:
    twenty = [float(value) for value in range(1, 21)]
    assert nearest_rank(twenty, 0.50) == 10.0  # half of the 20 values do not exceed 10
    assert nearest_rank(twenty, 0.95) == 19.0
    assert nearest_rank([3.0], 0.95) == 3.0
    assert nearest_rank([1.0, 2.0, 9.0], 0.50) == 2.0
    assert nearest_rank([], 0.50) is None


def test_a_snapshot_is_frozen_and_does_not_move() -> None:
    recorder = StatsRecorder()
    before = recorder.snapshot()
    assert before.latency_p50_s is None and before.latency_p95_s is None
    recorder.asked()
    recorder.repeated("timeout")
    for latency_s in (1.0, 2.0, 6.0):
        recorder.called()
        recorder.answered(latency_s, prompt_tokens=10, completion_tokens=1)
    after = recorder.snapshot()
    assert (before.requests, before.calls, before.retries) == (0, 0, {})
    assert (after.requests, after.calls, after.retries) == (1, 3, {"timeout": 1})
    assert (after.latency_p50_s, after.latency_p95_s) == (2.0, 6.0)
    assert (after.prompt_tokens, after.completion_tokens) == (30, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.calls = 0  # type: ignore[misc]


def test_latencies_are_of_the_latest_calls() -> None:
    recorder = StatsRecorder()
    recorder.answered(1000.0, 0, 0)
    for _ in range(LATENCY_WINDOW):
        recorder.answered(1.0, 0, 0)
    assert recorder.snapshot().latency_p95_s == 1.0
