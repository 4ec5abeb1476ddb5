"""pyreqwest 0.15.1 in threads, and at the end of a process."""

from __future__ import annotations

import atexit
import functools
import time

_LAST_WAKE_UP_S = 0.05


@functools.cache
def rest_before_exit() -> None:
    """Let the thread that talks return from its last wake-up of the event loop before the interpreter ends.

    It is still inside the interpreter for a moment when the awaited answer is already there. CPython 3.11 aborts a process
    that ends in this moment ("PyGILState_Release: thread state ... must be current when releasing"): about one of five that
    end right after a call. The library cannot be told to wait for its thread, nor can others that are built on PyO3
    (pyo3-async-runtimes, issue 40).
    """
    atexit.register(time.sleep, _LAST_WAKE_UP_S)


def import_here() -> None:
    """Import it in the thread that makes a client, not in the one that first talks.

    A thread that imports it and ends leaves something of its own in the library: the next client, in another thread, ends
    the process with a segmentation fault. Judges are made in the main thread and talk in one of their own.
    """
    import pyreqwest.client
    import pyreqwest.exceptions
    import pyreqwest.proxy  # noqa: F401
