"""Waiting for leave to call: the limiter of one process. :mod:`nemo_ampo.chat.broker` is the one for a whole job."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

from nemo_ampo.chat.limits import Lease, Ledger, Limits, Spent


class Limiter(Protocol):
    """Whoever says when a call may be sent."""

    async def acquire(self, tokens: int, usd: float) -> Lease:
        """Wait for leave to send a call that takes at most ``tokens`` and ``usd``.

        Raises:
            BudgetError: the job has nothing left.
        """
        ...

    def settle(self, lease: Lease, tokens: int, usd: float) -> None:
        """The call has ended and took this much."""
        ...

    async def aclose(self) -> None:
        """Release what it holds."""
        ...


class LocalLimiter:
    """First come, first served, within one event loop."""

    def __init__(self, limits: Limits, spent: Spent | None = None) -> None:
        self.ledger = Ledger(limits, spent)
        self._waiting: deque[tuple[asyncio.Future[Lease], int, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, tokens: int, usd: float) -> Lease:
        """See :class:`Limiter`."""
        leave: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiting.append((leave, tokens, usd))
        self._serve()
        try:
            return await leave
        except asyncio.CancelledError:
            # Leave may have been given between the cancellation and now.
            if leave.done() and not leave.cancelled() and leave.exception() is None:
                self.settle(leave.result(), 0, 0.0)
            raise

    def settle(self, lease: Lease, tokens: int, usd: float) -> None:
        """See :class:`Limiter`."""
        self.ledger.settle(lease, tokens, usd)
        self._serve()

    async def aclose(self) -> None:
        """See :class:`Limiter`."""
        if self._timer is not None:
            self._timer.cancel()

    def _serve(self) -> None:
        while self._waiting:
            leave, tokens, usd = self._waiting[0]
            if not leave.done():
                try:
                    granted = self.ledger.admit(time.monotonic(), tokens, usd)
                except Exception as error:  # handed to the one who waits
                    leave.set_exception(error)
                else:
                    if not isinstance(granted, Lease):
                        self._again_in(granted)
                        return
                    leave.set_result(granted)
            self._waiting.popleft()

    def _again_in(self, wait_s: float | None) -> None:
        if wait_s is not None and (self._timer is None or self._timer.when() <= asyncio.get_running_loop().time()):
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._serve)
