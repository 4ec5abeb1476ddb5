"""Waiting for leave to call: the limiter of one process. :mod:`nemo_ampo.chat.broker` is the one for a whole job."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from nemo_ampo.chat.limits import Lease, Ledger, Limits, Spent
from nemo_ampo.errors import DataError, DiskError
from nemo_ampo.files import disk_errors, write_once

_log = logging.getLogger(__name__)


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


SAVE_INTERVAL_S = 1.0
"""A process that dies forgets what was spent since the last save."""


class SpentFile:
    """What a job has spent, kept over its runs. Written complete or not at all.

    A disk that cannot be written is an alarm, said once: this process goes on counting, but a later one counts from the last
    figures that could be written.

    Attributes:
        failures: how often it could not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved_at = 0.0
        self.failures = 0

    def load(self) -> Spent:
        """The last saved figures; zeros before the first.

        Raises:
            DataError: the file is damaged.
            DiskError: it cannot be read.
        """
        if not self.path.exists():
            return Spent()
        with disk_errors(f"cannot read {self.path}"):
            text = self.path.read_bytes()
        try:
            record = json.loads(text)
            spent = Spent(int(record["calls"]), float(record["usd"]))
            if spent.calls < 0 or not 0 <= spent.usd < math.inf:
                raise ValueError
            return spent
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            raise DataError(f"{self.path}: not a record of calls and usd; correct it or start in a new run folder") from None

    def save(self, spent: Spent, *, now: bool = False) -> None:
        """Write the figures, unless they were written a moment ago."""
        if not now and time.monotonic() < self._saved_at + SAVE_INTERVAL_S:
            return
        self._saved_at = time.monotonic()
        try:
            write_once(self.path, json.dumps({"calls": spent.calls, "usd": spent.usd}) + "\n")
        except DiskError as error:
            self.failures += 1
            if self.failures == 1:
                _log.warning("%s; spending is counted on, but a run that is started again would not know of it", error)


class LocalLimiter:
    """First come, first served, within one event loop.

    Args:
        limits: what is allowed.
        spent_file: remembers what earlier runs of the job spent.
    """

    def __init__(self, limits: Limits, spent_file: SpentFile | None = None) -> None:
        self._file = spent_file
        self.ledger = Ledger(limits, spent_file.load() if spent_file else None)
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
        if self._file is not None:
            self._file.save(self.ledger.spent)
        self._serve()

    def end(self) -> None:
        """Give leave to nobody any more, those who wait included: they get an :class:`AskedToStopError`."""
        self.ledger.ended = True
        self._serve()

    async def aclose(self) -> None:
        """See :class:`Limiter`."""
        if self._timer is not None:
            self._timer.cancel()
        if self._file is not None:
            self._file.save(self.ledger.spent, now=True)

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
