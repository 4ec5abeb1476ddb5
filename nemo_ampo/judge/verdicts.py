"""Verdicts on their way: asked for while the engine draws, waited for once, asked for again when too many failed.

A verdict that could not be had stays a missing value (:class:`Judged` with an ``error``); nothing here invents a score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from nemo_ampo.algo.guard import GuardConfig, too_many_failed
from nemo_ampo.chat.broker import BrokerLostError
from nemo_ampo.errors import JudgeError, JudgeOutageError, UserError
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.ranks import Ranks
from nemo_ampo.types import JudgeRequest, Verdict

LOOK_S = 1.0
"""How often a wait looks whether the run was asked to stop, seconds."""
StopAsked = Callable[[], bool]
"""Whether this process was asked to end the run."""


class VerdictSource(Protocol):
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
        hopeless: what the judge said, if the same question would fail again until somebody acts.
    """

    verdict: Verdict | None = None
    error: str | None = None
    stop: str | None = None
    latency_s: float | None = None
    hopeless: str | None = None


TOO_LATE = "too_late"
"""Kind of failure of a verdict that had not come after ``guard.max_wait_s``."""
GIVEN_UP = "given_up"
"""Kind of failure of a verdict that was no longer waited for, because the run was asked to stop."""


class PendingVerdict:
    """A verdict on its way; the question can be asked again."""

    def __init__(self, judge: VerdictSource | None = None, request: JudgeRequest | None = None) -> None:
        self._judge, self._request = judge, request
        self._begin = time.monotonic()
        self._end: float | None = None
        self._future: Future[Verdict] | None = None
        self._too_late = False
        self.ask()

    def ask(self) -> None:
        """Put the question, for the first time or once more."""
        if self._judge is not None and self._request is not None:
            if self._future is not None:
                self._future.cancel()  # one that came too late must not be paid for twice
            self._too_late = False
            self._future = self._judge.submit(self._request)
            self._future.add_done_callback(self._stop_clock)

    def _stop_clock(self, future: Future[Verdict]) -> None:
        self._end = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Asked, and neither answered nor failed yet."""
        return self._future is not None and not self._future.done()

    def wait(self, seconds: float) -> None:
        """Until it is answered or has failed, at most so long."""
        if self._future is not None:
            wait_for([self._future], seconds)

    def no_longer(self) -> None:
        """It is not waited for any more, because it came too late."""
        self._too_late = self.is_open

    def result(self) -> Judged:
        """What became of it; a failed call is a missing value, and so is one that has not ended."""
        if self._future is None:
            return Judged()
        if self._too_late:
            return Judged(error=TOO_LATE)
        if self.is_open:
            return Judged(error=GIVEN_UP)
        try:
            verdict = self._future.result()
        except JudgeError as error:
            return Judged(error=error.kind, hopeless=str(error) if error.permanent else None)
        except BrokerLostError:
            raise  # by this process alone: the others may be gone
        except UserError as error:
            return Judged(error="stopped", stop=str(error))
        return Judged(verdict, latency_s=(self._end or time.monotonic()) - self._begin)


def all_verdicts(
    pending: list[PendingVerdict], ranks: Ranks, guard: GuardConfig, stop: StopAsked
) -> tuple[list[Judged], int]:
    """Wait for the verdicts of this replica; while too many of the whole job failed, ask for the failed ones again.

    Only the verdicts that failed are asked for again: the replies and the verdicts at hand stay as they are. A request to
    stop on any rank ends an outage at once; a judge that answers is heard out, for ``guard.retry_pause_s`` at most.

    Returns:
        What became of each response, on every rank of the replica, and how many further rounds of asking it took.

    Raises:
        UserError: no further verdict may be asked for, or more than ``guard.max_failed_fraction`` failed in a way that
            asking again cannot mend (a refused parameter, a reply cut at the token limit); on every rank.
        JudgeOutageError: more than ``guard.max_failed_fraction`` still failed after ``guard.step_retries`` rounds, or
            failed and the run was asked to stop, or some were no longer waited for; on every rank.
    """
    for rounds in count():
        mine: list[Judged] = ranks.share(_outcomes(pending, guard, stop) if ranks.is_leader else None)
        asked = [judged for judged in ranks.gather(mine) if judged.verdict is not None or judged.error is not None]
        spent = next((judged.stop for judged in asked if judged.stop is not None), None)
        if spent is not None:
            raise UserError(spent)
        failed = [judged.error for judged in asked if judged.error is not None]
        # To train on the rest would make a run that was stopped another one than a run that was not.
        given_up = GIVEN_UP in failed
        if not given_up and not too_many_failed(len(failed), len(asked), guard):
            return mine, rounds
        hopeless = [judged.hopeless for judged in asked if judged.hopeless is not None]
        if not given_up and too_many_failed(len(hopeless), len(asked), guard):
            raise UserError(
                f"judge: {len(hopeless)} of {len(asked)} verdicts could not be had, and asking again would end the same: "
                f"{max(hopeless, key=hopeless.count)}"
            )
        missing = f"{len(failed)} of {len(asked)} verdicts could not be had, "
        kind = max(failed, key=failed.count)
        if not given_up and rounds == guard.step_retries:
            raise JudgeOutageError(
                f"{missing}although asked for {rounds + 1} times (mostly: {kind}); more than "
                f"guard.max_failed_fraction={guard.max_failed_fraction}"
            )
        if given_up or _stopped_during(guard.retry_pause_s, ranks, stop):
            raise JudgeOutageError(f"{missing}and the run was asked to stop (mostly: {kind})")
        for verdict, judged in zip(pending, mine, strict=True):
            if judged.error is not None and judged.hopeless is None:
                verdict.ask()
    raise AssertionError("unreachable: the loop ends by return or raise")


def _outcomes(pending: Sequence[PendingVerdict], guard: GuardConfig, stop: StopAsked) -> list[Judged]:
    """Of every verdict.

    After ``guard.max_wait_s`` those on their way are too late; once asked to stop, those that are still on their way
    ``guard.retry_pause_s`` later are given up.
    """
    late_at, give_up_at = time.monotonic() + guard.max_wait_s, math.inf
    for verdict in pending:
        while verdict.is_open and (now := time.monotonic()) < min(late_at, give_up_at):
            verdict.wait(min(LOOK_S, late_at - now))
            if stop():
                give_up_at = min(give_up_at, time.monotonic() + guard.retry_pause_s)
    if time.monotonic() >= late_at and not stop():
        for verdict in pending:
            verdict.no_longer()
    return [verdict.result() for verdict in pending]


def _stopped_during(pause_s: float, ranks: Ranks, stop: StopAsked) -> bool:
    """Wait; True, on every rank and at once, when one of them was asked to stop."""
    # Counted, not timed: every rank must come to the same number of exchanges.
    looks = math.ceil(pause_s / LOOK_S)
    for _ in range(looks):
        if ranks.any(stop()):
            return True
        time.sleep(pause_s / looks)
    return ranks.any(stop())
