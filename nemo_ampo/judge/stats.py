"""What the judge was asked, what it cost, how it failed: locked counters, read as a frozen snapshot."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

LATENCY_WINDOW = 4096
"""Latency figures describe the last this many answered calls."""


@dataclass(frozen=True)
class JudgeStats:
    """A snapshot; counts run from the construction of the judge.

    Attributes:
        requests: dialogues the judge was asked to score.
        verdicts: of these, how many got a verdict so far.
        failures: of these, how many failed for good, by ``JudgeError.kind``.
        calls: HTTP calls sent, repetitions included.
        retries: calls that repeat an earlier one, by cause: ``timeout``, ``connection``, ``rate_limit``,
            ``server_error``, ``body`` (an answer that is no chat completion), ``empty``, ``parse``.
        prompt_tokens, completion_tokens: as reported by the endpoint, also for replies that could not be
            read.
        latency_mean_s, latency_p50_s, latency_p95_s: of answered calls, seconds; None before the first.
    """

    requests: int
    verdicts: int
    failures: Mapping[str, int]
    calls: int
    retries: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    latency_mean_s: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None


class StatsRecorder:
    """Counts; written from the judge's event loop, read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._latencies_s: deque[float] = deque(maxlen=LATENCY_WINDOW)

    def asked(self) -> None:
        """A dialogue is to be scored."""
        self._add("requests")

    def scored(self) -> None:
        """A dialogue got its verdict."""
        self._add("verdicts")

    def failed(self, kind: str) -> None:
        """A dialogue stays without a verdict."""
        with self._lock:
            self._failures[kind] += 1

    def called(self) -> None:
        """An HTTP call is being sent."""
        self._add("calls")

    def repeated(self, cause: str) -> None:
        """A call will be repeated because of ``cause``."""
        with self._lock:
            self._retries[cause] += 1

    def answered(self, latency_s: float, prompt_tokens: int, completion_tokens: int) -> None:
        """An HTTP call brought a chat completion."""
        with self._lock:
            self._latencies_s.append(latency_s)
            self._counts["prompt_tokens"] += prompt_tokens
            self._counts["completion_tokens"] += completion_tokens

    def snapshot(self) -> JudgeStats:
        """The counts now."""
        with self._lock:
            latencies = sorted(self._latencies_s)
            return JudgeStats(
                requests=self._counts["requests"],
                verdicts=self._counts["verdicts"],
                failures=dict(self._failures),
                calls=self._counts["calls"],
                retries=dict(self._retries),
                prompt_tokens=self._counts["prompt_tokens"],
                completion_tokens=self._counts["completion_tokens"],
                latency_mean_s=math.fsum(latencies) / len(latencies) if latencies else None,
                latency_p50_s=nearest_rank(latencies, 0.50),
                latency_p95_s=nearest_rank(latencies, 0.95),
            )

    def _add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def nearest_rank(ordered: list[float], share: float) -> float | None:
    """The smallest value that ``share`` (in (0, 1]) of ``ordered`` does not exceed; None of an empty list."""
    if not ordered:
        return None
    return ordered[math.ceil(share * len(ordered)) - 1]
