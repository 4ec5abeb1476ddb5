"""Signals end a run at the next step boundary, with a checkpoint.

Slurm's warning before the time limit (SIGUSR1), preemption and ``scancel`` (SIGTERM) and Ctrl-C (SIGINT) all ask for the
same. Schedulers repeat themselves, so that only a second Ctrl-C, a person's, interrupts at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from nemo_ampo.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While active, a signal only sets :attr:`requested`; a second Ctrl-C interrupts at once.

    Outside of the main thread, which alone hears signals, there is nothing to request.

    Args:
        then: called at the first signal, wherever the main thread is: it may wait for nothing.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._then = then
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            if self._then is not None:
                self._then()


def stop_after_calls(ask_no_more: Callable[[], object]) -> StopRequest:
    """For a job that lets the calls under way come to their end, since they are paid for.

    Args:
        ask_no_more: may wait for nothing.
    """

    def first() -> None:
        # Past Python's own buffers: a signal may come in the middle of their work.
        os.write(2, b"stopping after the calls under way; a second Ctrl-C stops at once\n")
        ask_no_more()

    return StopRequest(first)


def stop_while_nothing_is_lost() -> None:
    """Outside a training loop SIGUSR1 raises :class:`Stopped`: all that was done is in the last checkpoint already."""
    signal.signal(signal.SIGUSR1, _raise_stopped)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped
