"""How much may be asked at a time, a minute and in total: the arithmetic, without clocks, tasks or sockets.

A sliding window keeps the promise of the limits literally: in no 60 seconds are more requests or tokens admitted than
allowed. A call reserves what it may cost at most, so that the money limit holds for the calls in flight too; what
it really cost replaces the reservation when it ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.errors import AskedToStopError, BudgetError

WINDOW_S = 60.0


@dataclass(frozen=True)
class Limits:
    """See the keys of the same names in :class:`~nemo_ampo.chat.config.EndpointConfig`; ``section`` names them."""

    max_concurrency: int
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_calls: int | None = None
    max_usd: float | None = None
    section: str = "endpoint"

    @classmethod
    def of(cls, config: EndpointConfig) -> Limits:
        """The limits of a config."""
        return cls(
            config.max_concurrency,
            config.requests_per_minute,
            config.tokens_per_minute,
            config.max_calls,
            config.max_usd,
            config.section,
        )


@dataclass(eq=False)
class Lease:
    """Leave to send one call.

    Attributes:
        admitted: when, seconds of the clock in use.
        tokens, usd: first what the call may take at most, then what it took.
        open: whether it is in flight.
    """

    admitted: float
    tokens: int
    usd: float
    open: bool = True


@dataclass(frozen=True)
class Spent:
    """What a job has used up.

    Attributes:
        calls: HTTP calls sent.
        usd: dollars.
    """

    calls: int = 0
    usd: float = 0.0


class Ledger:
    """Who may go, and what has been spent. Not safe for threads; times are passed in.

    Args:
        limits: what is allowed.
        spent: by earlier runs of the same job.

    Attributes:
        ended: may be set to admit nobody any more.
    """

    def __init__(self, limits: Limits, spent: Spent | None = None) -> None:
        spent = spent or Spent()
        self.limits = limits
        self.ended = False
        self._calls, self._usd = spent.calls, spent.usd
        self._reserved_usd = 0.0
        self._in_flight = 0
        self._window: deque[Lease] = deque()
        self._window_tokens = 0

    @property
    def spent(self) -> Spent:
        """So far, without what is in flight."""
        return Spent(self._calls, self._usd)

    @property
    def in_flight(self) -> int:
        """Open leases."""
        return self._in_flight

    def admit(self, now: float, tokens: int, usd: float) -> Lease | float | None:
        """Leave for one call that takes at most ``tokens`` and ``usd``.

        Returns:
            A lease; or the seconds until asking again makes sense; or None: as soon as a lease is settled.

        Raises:
            BudgetError: the job has nothing left, or is to end.
        """
        limits = self.limits
        if self.ended:
            raise AskedToStopError(f"{limits.section}: asked to stop; the same command goes on")
        self._check_budget(usd)
        if self._in_flight >= limits.max_concurrency:
            return None
        if limits.max_usd is not None and self._usd + self._reserved_usd + usd > limits.max_usd:
            return None  # Those in flight may cost less than they reserved.
        while self._window and self._window[0].admitted <= now - WINDOW_S:
            self._window_tokens -= self._window.popleft().tokens
        full = limits.requests_per_minute and len(self._window) >= limits.requests_per_minute
        # A call larger than the whole allowance has to go alone.
        dear = limits.tokens_per_minute and self._window and self._window_tokens + tokens > limits.tokens_per_minute
        if full or dear:
            return max(self._window[0].admitted + WINDOW_S - now, 1e-3)
        lease = Lease(now, tokens, usd)
        self._in_flight += 1
        self._calls += 1
        self._reserved_usd += usd
        if limits.requests_per_minute or limits.tokens_per_minute:
            self._window.append(lease)
            self._window_tokens += tokens
        return lease

    def settle(self, lease: Lease, tokens: int, usd: float) -> None:
        """A call has ended; settling twice does nothing."""
        if not lease.open:
            return
        lease.open = False
        self._in_flight -= 1
        self._reserved_usd -= lease.usd
        self._usd += usd
        if self._window and lease.admitted >= self._window[0].admitted:
            self._window_tokens += tokens - lease.tokens
        lease.tokens, lease.usd = tokens, usd

    def _check_budget(self, usd: float) -> None:
        limits = self.limits
        if limits.max_calls is not None and self._calls >= limits.max_calls:
            raise BudgetError(
                f"{limits.section}.max_calls: the {limits.max_calls} calls of this job are spent; raise it to go on"
            )
        if limits.max_usd is not None and self._in_flight == 0 and self._usd + usd > limits.max_usd:
            raise BudgetError(
                f"{limits.section}.max_usd: ${self._usd:.4f} of ${limits.max_usd:g} are spent and the next call may "
                f"cost ${usd:.4f}; raise it to go on"
            )
