"""Signals end a run at the next step boundary, with a checkpoint.

Slurm's warning before the time limit (SIGUSR1), preemption and ``scancel`` (SIGTERM) and Ctrl-C (SIGINT) all ask for the
same. Schedulers repeat themselves, so that only a second Ctrl-C, a person's, interrupts at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from nemo_ampo.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While active, a signal only sets :attr:`requested`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def stop_while_nothing_is_lost() -> None:
    """Outside a training loop SIGUSR1 raises :class:`Stopped`: all that was done is in the last checkpoint already."""
    signal.signal(signal.SIGUSR1, _raise_stopped)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped
