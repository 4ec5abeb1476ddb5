"""Ranks that look after each other: the silent one is named, and the job ends instead of waiting for it.

A collective waits for a rank that is stopped, hung or gone until torch's own limit, half an hour later, and does not say
which one it was. So a thread of each rank gives a sign of life at the job's meeting point, however long the rank's main
thread computes, and reads those of the others. The signs say where the main thread stands. A rank is given up

- when no sign came from it for ``silence_s``: its process is stopped or gone; until the first one it may take
  :data:`FIRST_SIGN_S`, since one node may load its libraries long after the others;
- when the meeting point is silent for as long: rank 0 holds it, or torchrun, which is missed only when it is gone;
- when it ended with an error while the others went on waiting, a minute later;
- when its main thread did nothing at all for :data:`HANG_S` while all others did nothing but wait in a collective: it hangs.

Whatever is on the disk is complete by then or will be ignored (see :mod:`nemo_ampo.checkpoint.store`), so the processes
just end, with the status that says that the same command continues.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

STATUS = 75
"""As of a stage that stopped at a checkpoint (EX_TEMPFAIL)."""
HANG_S = 1500.0
"""A little less than torch's own limit, which would end the job as well, but name nobody."""
FIRST_SIGN_S = 600.0
_IDLE_SHARE = 0.02
"""A main thread that needs less of a processor than this does nothing."""
_LEAVE_S = 60.0
_LONGEST_BEAT_S = 5.0
_LET_THE_SPEAKER_FIRST_S = 3.0
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        count: goes up with each sign.
        who: host and process.
        where: innermost place of the main thread, for people.
        waits: the main thread is inside a collective.
        still_s: for so long the main thread has been at that place.
        left: exit status of a rank that has ended.
    """

    count: int
    who: str
    where: str = ""
    waits: bool = False
    still_s: float = 0.0
    left: int | None = None


def verdict(
    signs: Mapping[int, Sign], silent_s: Mapping[int, float], own_rank: int, silence_s: float, hang_s: float = HANG_S
) -> dict[int, str]:
    """The ranks to give up and why; empty while all is well.

    Args:
        signs: the last one of each rank heard so far.
        silent_s: seconds since a rank's last sign was new, for every rank.
        own_rank: never given up.
        silence_s, hang_s: see the module's docstring.
    """
    found = {}
    for rank, silent in silent_s.items():
        sign = signs.get(rank)
        if rank == own_rank or (sign is not None and sign.left == 0):
            continue
        if sign is not None and sign.left is not None:
            if silent >= min(silence_s, _LEAVE_S):
                found[rank] = f"ended with status {sign.left}, and the others still wait for it"
        elif silent >= (limit := silence_s if sign is not None else max(silence_s, FIRST_SIGN_S)):
            last = f", last seen at {sign.where}" if sign is not None and sign.where else ""
            found[rank] = f"gave no sign of life for {limit:g} s{last}"
    if found:
        return found
    hanging = {rank: sign for rank, sign in signs.items() if not sign.waits and sign.left is None}
    everybody = len(signs) == len(silent_s)
    if everybody and 0 < len(hanging) < len(signs) and all(s.still_s >= hang_s for s in signs.values()):
        return {r: f"stands still at {s.where} for {s.still_s:.0f} s, and all others wait" for r, s in hanging.items()}
    return {}


class Watchdog:
    """Two threads of a rank: one talks to the meeting point, one judges what it heard.

    Args:
        connect: opens a connection to the meeting point that nobody else uses.
        rank, size: of the job.
        silence_s, hang_s: see the module's docstring.
        end: called with the line to say, by the thread that found it; the rank that is to say it gets it first.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        size: int,
        silence_s: float,
        hang_s: float,
        end: Callable[[str, bool], None],
    ) -> None:
        self._connect, self._rank, self._size, self._end = connect, rank, size, end
        self._silence_s, self._hang_s = silence_s, hang_s
        self._period_s = min(_LONGEST_BEAT_S, silence_s / 8)
        self._main = threading.main_thread().ident or 0
        self._main_clock = time.pthread_getcpuclockid(self._main)
        self._who = f"{socket.gethostname()}, pid {os.getpid()}"
        self._signs: dict[int, Sign] = {}
        self._news = dict.fromkeys(range(size), time.monotonic())
        self._reached: float | None = None
        self._place = (0, 0)
        self._still_since = self._worked_until = 0.0
        self._parent = os.getppid()
        self._left: int | None = None
        self._over = threading.Event()
        self._said = threading.Event()
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name="rank-watchdog", daemon=True).start()

    def leave(self, status: int) -> None:
        """Tell the others that this rank ends, and watch no longer. Takes a moment at most."""
        self._left = status
        self._over.set()
        self._said.wait(timeout=2.0)

    def _talk(self) -> None:
        count = 0
        while not self._over.is_set():
            try:
                store = self._connect()
                while True:
                    leaving = self._over.is_set()
                    count += 1
                    self._exchange(store, count)
                    self._reached = time.monotonic()
                    if leaving:
                        self._said.set()
                        return
                    self._over.wait(self._period_s)
            except (RuntimeError, OSError, ValueError):  # the meeting point is not there yet, or no longer
                self._over.wait(self._period_s)
        self._said.set()

    def _exchange(self, store: Any, count: int) -> None:
        store.set(_key(self._rank), json.dumps(vars(self._own_sign(count))))
        for rank in range(self._size):
            if store.check([_key(rank)]):
                sign = Sign(**json.loads(store.get(_key(rank))))
                if sign != self._signs.get(rank):
                    self._signs[rank] = sign
                    self._news[rank] = time.monotonic()

    def _own_sign(self, count: int) -> Sign:
        frame = sys._current_frames().get(self._main)
        # By its number only: to hold the frame would keep what its variables hold, such as a GPU's memory.
        place = (id(frame), frame.f_lasti) if frame is not None else (0, 0)
        now, worked = time.monotonic(), time.clock_gettime(self._main_clock)
        if place != self._place or worked - self._worked_until > 1.0 + _IDLE_SHARE * (now - self._still_since):
            self._place, self._still_since, self._worked_until = place, now, worked
        where, waits = "", False
        while frame is not None:
            file = frame.f_code.co_filename
            where = where or f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
            waits = waits or _COLLECTIVES in file
            frame = frame.f_back
        return Sign(count, self._who, where, waits, now - self._still_since, self._left)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._period_s):
            now = time.monotonic()
            if now - before > self._silence_s / 2:
                # This process itself did not run: what it did not hear meanwhile says nothing of the others.
                self._news = dict.fromkeys(self._news, now)
                self._reached = now if self._reached is not None else None
            before = now
            if self._reached is not None and now - self._reached >= self._silence_s and self._needs_meeting_point():
                self._end(self._lost(), True)
                return
            if self._reached is None or now - self._reached > 2 * self._period_s:
                # Nobody can be heard, so that silence says nothing of anybody.
                self._news = dict.fromkeys(self._news, now)
                continue
            silent = {rank: now - heard for rank, heard in self._news.items()}
            found = verdict(dict(self._signs), silent, self._rank, self._silence_s, self._hang_s)
            if found:
                speaker = min(set(range(self._size)) - set(found), default=self._rank)
                self._end(self._line(found), speaker == self._rank)
                return

    def _needs_meeting_point(self) -> bool:
        """Whether its silence says that the job stands.

        It is torchrun's, which somebody may have stopped while its ranks compute on; without torchrun it is rank 0's.
        """
        return not _of_torchrun() or os.getppid() != self._parent

    def _lost(self) -> str:
        why = f"does not answer at the meeting point for {self._silence_s:g} s"
        return _ending(f"torchrun {why}") if _of_torchrun() else self._line({0: why})

    def _line(self, found: Mapping[int, str]) -> str:
        signs = self._signs
        named = (f"rank {r} ({signs[r].who if r in signs else 'never heard of'}) {why}" for r, why in found.items())
        return _ending("; ".join(named))


_watchdog: Watchdog | None = None


def watch_ranks(silence_s: float, hang_s: float = HANG_S) -> None:
    """Begin to look after the other ranks of this job; nothing without others, or with 0. Call it in the main thread.

    Args:
        silence_s, hang_s: see the module's docstring.
    """
    global _watchdog
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and silence_s > 0 and _watchdog is None:
        _watchdog = Watchdog(_meeting_point(), int(os.environ["RANK"]), size, silence_s, hang_s, _end)


def leave_ranks(status: int) -> None:
    """Tell the other ranks that this one ends with that exit status."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.leave(status)
        _watchdog = None


def _meeting_point() -> Callable[[], Any]:
    """Opens a connection of our own: torch's is blocked while somebody waits for a key with it.

    Without torchrun rank 0 holds the meeting point, from now on; torch shares it when it comes.
    """
    from torch.distributed import TCPStore  # in the main thread: of an import that two threads begin, one may see a half

    address, port, holds = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    limit, holds = timedelta(seconds=FIRST_SIGN_S), holds and not _of_torchrun()
    return lambda: TCPStore(address, port, None, holds, limit, wait_for_workers=False, multi_tenant=True)


def _of_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _ending(what: str) -> str:
    return f"error: {what}; the job ends here, and the same command continues from the last checkpoint"


def _key(rank: int) -> str:
    # The number of a restart by torchrun: its ranks are not those of before.
    return f"nemo_ampo/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _end(line: str, speaks: bool) -> None:
    if speaks:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    else:
        time.sleep(_LET_THE_SPEAKER_FIRST_S)
    os._exit(STATUS)  # the main thread hangs in a collective, which no exception reaches
