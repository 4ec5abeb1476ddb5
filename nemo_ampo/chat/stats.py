"""What an endpoint was asked, what it cost, how it failed: locked counters, read as a frozen snapshot."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

LATENCY_WINDOW = 4096
"""Latency figures describe the last this many answered calls."""


@dataclass(frozen=True)
class ChatStats:
    """A snapshot; counts run from the construction of the client.

    Attributes:
        requests: questions asked that want a readable answer.
        answers: of these, how many got one so far.
        failures: of these, how many failed for good, by ``ChatError.kind``.
        calls: HTTP calls sent, repetitions included.
        retries: calls that repeat an earlier one, by cause: ``timeout``, ``connection``, ``rate_limit``,
            ``server_error``, ``refused`` (asked elsewhere), ``body`` (an answer that is no chat completion),
            ``structured`` (without the schema the endpoint refused), ``empty``, ``parse``.
        parse_failures: replies that could not be read, those asked for again included.
        cache_hits: replies taken from the cache instead of a call.
        cache_failures: how often the cache could not be written or read; the replies counted all the same.
        spent_failures: how often the record of what the job spent could not be written; its main rank counts them.
        prompt_tokens, completion_tokens: as reported by the endpoint, also for replies that could not be read.
        cost_usd: their price, dollars; 0 without a price table.
        latencies_s: of the last answered calls, seconds, ascending.
    """

    requests: int = 0
    answers: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    calls: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)
    parse_failures: int = 0
    cache_hits: int = 0
    cache_failures: int = 0
    spent_failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    latencies_s: tuple[float, ...] = ()

    @property
    def latency_p50_s(self) -> float | None:
        """Median latency, seconds; None before the first answer."""
        return nearest_rank(self.latencies_s, 0.50)

    @property
    def latency_p95_s(self) -> float | None:
        """95th percentile of the latency, seconds; None before the first answer."""
        return nearest_rank(self.latencies_s, 0.95)


class StatsRecorder:
    """Counts; written from the client's event loop, read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._cost_usd = 0.0
        self._latencies_s: deque[float] = deque(maxlen=LATENCY_WINDOW)

    def asked(self) -> None:
        """A question is to be answered."""
        self._add("requests")

    def solved(self) -> None:
        """A question got a readable answer."""
        self._add("answers")

    def failed(self, kind: str) -> None:
        """A question stays without an answer."""
        with self._lock:
            self._failures[kind] += 1

    def called(self) -> None:
        """An HTTP call is being sent."""
        self._add("calls")

    def unreadable(self) -> None:
        """A reply could not be read."""
        self._add("parse_failures")

    def hit(self) -> None:
        """A reply came from the cache."""
        self._add("cache_hits")

    def cache_failed(self) -> None:
        """The cache's file could not be used."""
        self._add("cache_failures")

    def repeated(self, cause: str) -> None:
        """A call will be repeated because of ``cause``."""
        with self._lock:
            self._retries[cause] += 1

    def answered(self, latency_s: float, prompt_tokens: int, completion_tokens: int, cost_usd: float = 0.0) -> None:
        """An HTTP call brought a chat completion."""
        with self._lock:
            self._latencies_s.append(latency_s)
            self._counts["prompt_tokens"] += prompt_tokens
            self._counts["completion_tokens"] += completion_tokens
            self._cost_usd += cost_usd

    def snapshot(self) -> ChatStats:
        """The counts now."""
        with self._lock:
            return ChatStats(
                **self._counts,
                failures=dict(self._failures),
                retries=dict(self._retries),
                cost_usd=self._cost_usd,
                latencies_s=tuple(sorted(self._latencies_s)),
            )

    def _add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def total(parts: Iterable[ChatStats]) -> ChatStats:
    """The counts of several clients together, as those of all ranks of a job."""
    parts = list(parts)
    failures: Counter[str] = Counter()
    retries: Counter[str] = Counter()
    for part in parts:
        failures.update(part.failures)
        retries.update(part.retries)
    names = [f.name for f in fields(ChatStats) if f.type == "int"]
    return ChatStats(
        **{name: sum(getattr(part, name) for part in parts) for name in names},
        failures=dict(failures),
        retries=dict(retries),
        cost_usd=math.fsum(part.cost_usd for part in parts),
        latencies_s=tuple(sorted(latency for part in parts for latency in part.latencies_s)),
    )


def nearest_rank(ordered: tuple[float, ...] | list[float], share: float) -> float | None:
    """The smallest value that ``share`` (in (0, 1]) of ``ordered`` does not exceed; None of an empty list."""
    if not ordered:
        return None
    return ordered[math.ceil(share * len(ordered)) - 1]
