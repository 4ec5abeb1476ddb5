"""The judge's answers that led to no scores yet: kept, so that a killed run repeats no answered call.

An episode's scores are recorded when an answer could be read. Until then an unreadable one would exist in memory only; here
it stands on the disk as long as its question is open. Once the outcome is recorded it is forgotten, so that an episode
without scores is asked about afresh by the next run, and the file stays as small as what is under way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from nemo_ampo.chat.cache import ReplyFile
from nemo_ampo.chat.completion import Completion
from nemo_ampo.errors import ChatError, DiskError

_log = logging.getLogger(__name__)


class RepliesUnderWay:
    """A :class:`~nemo_ampo.chat.cache.Cache` whose replies last as long as their question is open.

    Args:
        file: where they are kept; closed with this.
    """

    def __init__(self, file: ReplyFile) -> None:
        self._file = file
        self._settled: list[str] = []
        self._told = False
        self._asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)

    @contextmanager
    def question(self) -> Iterator[None]:
        """Everything asked inside belongs to one question, which is settled when the block ends without an error."""
        keys: list[str] = []
        token = self._asked.set(keys)
        try:
            yield
        finally:
            self._asked.reset(token)
        self._settled += keys
        try:
            self._file.forget(self._settled)
        except DiskError as error:  # an alarm: no score depends on it, and the next question's end tries again
            if not self._told:
                self._told = True
                _log.warning("%s; before episodes without scores are to be judged again, remove it", error)
        else:
            self._settled.clear()

    async def get(self, key: str, *, failures: bool = False) -> Completion | None:
        """See :class:`~nemo_ampo.chat.cache.Cache`."""
        keys = self._asked.get()
        if keys is not None:
            keys.append(key)
        return await self._file.get(key, failures=failures)

    async def put(self, key: str, outcome: Completion | ChatError) -> Completion | None:
        """See :class:`~nemo_ampo.chat.cache.Cache`."""
        return await self._file.put(key, outcome)

    async def aclose(self) -> None:
        """See :class:`~nemo_ampo.chat.cache.Cache`."""
        await self._file.aclose()
