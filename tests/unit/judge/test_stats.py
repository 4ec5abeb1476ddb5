"""The judge's metrics: exact names, sums over ranks, and a trip from rank to rank."""

from __future__ import annotations

import pickle

import pytest

from nemo_ampo.chat.stats import ChatStats, StatsRecorder
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.run.metrics import DESCRIPTIONS


def recorded(latencies_s: list[float]) -> ChatStats:
    recorder = StatsRecorder()
    for latency_s in latencies_s:
        recorder.asked()
        recorder.called()
        recorder.answered(latency_s, 100, 10, 0.5)
    recorder.solved()
    recorder.hit()
    recorder.unreadable()
    recorder.repeated("parse")
    recorder.failed("timeout")
    return recorder.snapshot()


def test_names_and_values() -> None:
    assert JudgeStats.of([recorded([1.0, 2.0, 9.0])]).metrics() == {
        "judge/requests": 3, "judge/verdicts": 1, "judge/calls": 3, "judge/retries/parse": 1,
        "judge/failures/timeout": 1, "judge/parse_failures": 1, "judge/cache_hits": 1, "judge/prompt_tokens": 300,
        "judge/completion_tokens": 30, "judge/cost_usd": 1.5, "judge/latency_p50_s": 2.0, "judge/latency_p95_s": 9.0,
    }  # fmt: skip


def test_every_name_is_described() -> None:
    patterns = {name.replace("{cause}", "parse").replace("{kind}", "timeout") for name in DESCRIPTIONS}
    assert JudgeStats.of([recorded([1.0])]).metrics().keys() <= patterns


def test_the_sum_of_all_ranks() -> None:
    both = JudgeStats.of(pickle.loads(pickle.dumps([recorded([1.0, 3.0]), recorded([2.0])])))
    assert (both.requests, both.verdicts, both.calls, both.prompt_tokens) == (3, 2, 3, 300)
    assert (both.failures, both.retries, both.cost_usd) == ({"timeout": 2}, {"parse": 2}, pytest.approx(1.5))
    assert both.latency_p50_s == 2.0


def test_before_the_first_answer_there_is_no_latency() -> None:
    assert not [name for name in JudgeStats.of([]).metrics() if "latency" in name]
