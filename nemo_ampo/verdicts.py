"""Verdicts on their way: asked for while the engine draws, waited for once, asked for again when too many failed.

A verdict that could not be had stays a missing value (:class:`Judged` with an ``error``); nothing here invents a score.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from nemo_ampo.errors import JudgeError, JudgeOutageError, UserError
from nemo_ampo.guard import GuardConfig, too_many_failed
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.ranks import Ranks
from nemo_ampo.types import JudgeRequest, Verdict


class Judge(Protocol):
    """Where verdicts come from, usable while the engine is busy."""

    def submit(self, request: JudgeRequest) -> Future[Verdict]:
        """Ask in the background.

        The future raises :class:`JudgeError` when no verdict could be had, and :class:`UserError` when no further one
        may be asked for (a budget that is spent).
        """
        ...

    @property
    def stats(self) -> JudgeStats:
        """What was asked and how it went, since this process began."""
        ...


@dataclass(frozen=True)
class Judged:
    """What became of one response's visit to the judge; all absent when it was not asked.

    Attributes:
        verdict: the scores.
        error: kind of the judge's failure.
        stop: why no further verdict may be asked for, in the user's words.
        latency_s: from the first question to the verdict, seconds.
    """

    verdict: Verdict | None = None
    error: str | None = None
    stop: str | None = None
    latency_s: float | None = None


class PendingVerdict:
    """A verdict on its way; the question can be asked again."""

    def __init__(self, judge: Judge | None = None, request: JudgeRequest | None = None) -> None:
        self._judge, self._request = judge, request
        self._begin = time.monotonic()
        self._end: float | None = None
        self._future: Future[Verdict] | None = None
        self.ask()

    def ask(self) -> None:
        """Put the question, for the first time or once more."""
        if self._judge is not None and self._request is not None:
            self._future = self._judge.submit(self._request)
            self._future.add_done_callback(self._stop_clock)

    def _stop_clock(self, future: Future[Verdict]) -> None:
        self._end = time.monotonic()

    def result(self) -> Judged:
        """Wait for the verdict; a failed call is a missing value."""
        if self._future is None:
            return Judged()
        try:
            verdict = self._future.result()
        except JudgeError as error:
            return Judged(error=error.kind)
        except UserError as error:
            return Judged(error="stopped", stop=str(error))
        return Judged(verdict, latency_s=(self._end or time.monotonic()) - self._begin)


def all_verdicts(pending: list[PendingVerdict], ranks: Ranks, guard: GuardConfig) -> tuple[list[Judged], int]:
    """Wait for the verdicts of this replica; while too many of the whole job failed, ask for the failed ones again.

    Only the verdicts that failed are asked for again: the replies and the verdicts at hand stay as they are.

    Returns:
        What became of each response, on every rank of the replica, and how many further rounds of asking it took.

    Raises:
        UserError: no further verdict may be asked for; on every rank.
        JudgeOutageError: more than ``guard.max_failed_fraction`` still failed after ``guard.step_retries`` rounds; on
            every rank.
    """
    for rounds in count():
        mine: list[Judged] = ranks.share([p.result() for p in pending] if ranks.is_leader else None)
        asked = [judged for judged in ranks.gather(mine) if judged.verdict is not None or judged.error is not None]
        stop = next((judged.stop for judged in asked if judged.stop is not None), None)
        if stop is not None:
            raise UserError(stop)
        failed = [judged.error for judged in asked if judged.error is not None]
        if not too_many_failed(len(failed), len(asked), guard):
            return mine, rounds
        if rounds == guard.step_retries:
            raise JudgeOutageError(
                f"{len(failed)} of {len(asked)} verdicts could not be had, although asked for {rounds + 1} times "
                f"(mostly: {max(failed, key=failed.count)}); more than guard.max_failed_fraction="
                f"{guard.max_failed_fraction}"
            )
        time.sleep(guard.retry_pause_s)
        for verdict, judged in zip(pending, mine, strict=True):
            if judged.error is not None:
                verdict.ask()
    raise AssertionError("unreachable: the loop ends by return or raise")
