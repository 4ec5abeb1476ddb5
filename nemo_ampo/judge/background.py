"""The judge beside a synchronous loop.

Generation is synchronous and takes seconds; so does the judge. A daemon thread runs the judge's event loop,
so that a dialogue can be handed over the moment its rollout ends, and its verdict arrives while the next ones
are generated.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import threading
import time
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from nemo_ampo.chat.job import Shared
from nemo_ampo.chat.limiter import LocalLimiter
from nemo_ampo.errors import BudgetError, ConfigError, JudgeError, UserError
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.types import JudgeRequest, Verdict

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class JudgeThread:
    """Owns a :class:`Judge` and the thread it runs in, which starts at once.

    Leaving the ``with`` block, also by Ctrl-C, cancels what is unanswered, closes the judge and ends the
    thread::

        with JudgeThread(Judge(config)) as judge:
            futures = [judge.submit(request_of(rollout)) for rollout in engine.generate(prompts)]
            verdicts = [future.result() for future in futures]

    Args:
        judge: whose verdicts count.
        second: another one for comparison, in the same event loop, so that both can share one limiter.
        job: whose limiter that is, for a process of a job.
    """

    def __init__(self, judge: Judge, second: Judge | None = None, job: Shared | None = None) -> None:
        self._judge = judge
        self._second = second
        self._job = job
        self._lock = threading.Lock()
        self._open = True
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    def __enter__(self) -> JudgeThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def stats(self) -> JudgeStats:
        """Counts of the judge, at any time."""
        stats = self._judge.stats
        spent_file = self._job.spent_file if self._job is not None else None
        return stats if spent_file is None else replace(stats, spent_failures=spent_file.failures)

    @property
    def second_stats(self) -> JudgeStats | None:
        """Counts of the second judge; None without one."""
        return self._second.stats if self._second is not None else None

    def submit(self, request: JudgeRequest) -> concurrent.futures.Future[Verdict]:
        """Ask for a verdict without waiting; the future raises JudgeError, or CancelledError after closing.

        Raises:
            RuntimeError: after closing.
        """
        return self._schedule(self._judge.score(request))

    def score_all(self, requests: Iterable[JudgeRequest]) -> list[Verdict | JudgeError]:
        """Score ``requests`` concurrently and wait: one entry each, in order; no failure stops another."""
        return [_outcome(future) for future in [self.submit(request) for request in requests]]

    def score_all_by_second(
        self, requests: Iterable[JudgeRequest], max_wait_s: float = math.inf
    ) -> list[Verdict | JudgeError | BudgetError]:
        """The second judge's :meth:`score_all`. A spent budget is a failure here; the first judge reports it.

        What has not come after ``max_wait_s`` seconds has failed.
        """
        assert self._second is not None
        late_at = time.monotonic() + max_wait_s
        outcomes: list[Verdict | JudgeError | BudgetError] = []
        for future in [self._schedule(self._second.score(request)) for request in requests]:
            try:
                left = late_at - time.monotonic()
                outcomes.append(future.result(None if math.isinf(left) else max(left, 0.0)))
            except concurrent.futures.TimeoutError:
                future.cancel()
                outcomes.append(JudgeError("timeout", f"no verdict after {max_wait_s:g} s"))
            except (JudgeError, BudgetError) as error:
                outcomes.append(error)
        return outcomes

    def check(self) -> None:
        """See :meth:`Judge.check`; of both judges. The first calls, which cost, are the main rank's; the others only see
        whether they reach the judges from where they are, and hear how it went and whether a schema can be sent.

        Raises:
            UserError: on every rank, what a judge refuses; or on one, that it cannot be reached from there.
        """
        self._schedule(self._check()).result()

    def ask_no_more(self) -> None:
        """Let the calls under way come to their end; the other questions fail with AskedToStopError. For one process alone.

        Waits for nothing, so that the handler of a signal may call it.
        """
        assert self._job is not None and isinstance(self._job.limiter, LocalLimiter)
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._job.limiter.end)

    def close(self) -> None:
        """Cancel what is unanswered, close the judge, end the thread. Closing twice does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _schedule(self, work: Coroutine[Any, Any, _Result]) -> concurrent.futures.Future[_Result]:
        # Under the lock: work scheduled after the stop signal would never be cancelled, and its future never
        # end.
        with self._lock:
            if not self._open:
                work.close()
                raise RuntimeError("the judge thread is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _check(self) -> None:
        judges = [judge for judge in (self._judge, self._second) if judge is not None]
        others = self._job.others if self._job is not None else None
        if self._job is not None and others is not None and not self._job.is_main:
            try:
                for judge in judges:
                    await judge.reach()
            except UserError as error:
                _log.warning("from this rank: %s", error)  # which only the main rank's end would tell
                raise
            found = await others.hear()
            if found["refused"]:
                raise ConfigError(found["refused"])
            for judge, takes_schema in zip(judges, found["takes_schema"], strict=True):
                judge.takes_schema = takes_schema
            return
        try:
            for judge in judges:
                await judge.check()
        except UserError as error:
            if others is not None:
                await others.tell({"refused": str(error)})
            raise
        if others is not None:
            await others.tell({"refused": "", "takes_schema": [judge.takes_schema for judge in judges]})

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        await self._stop.wait()
        unanswered = asyncio.all_tasks() - {asyncio.current_task()}
        for task in unanswered:
            task.cancel()
        await asyncio.gather(*unanswered, return_exceptions=True)
        for judge in filter(None, (self._judge, self._second)):
            await judge.aclose()


def _outcome(future: concurrent.futures.Future[Verdict]) -> Verdict | JudgeError:
    try:
        return future.result()
    except JudgeError as error:
        return error
