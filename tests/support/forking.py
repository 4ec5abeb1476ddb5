"""A child process by fork: it starts with everything the parent has imported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork(function: Callable[[], None]) -> int:
    """Pid of a child that runs ``function`` and ends with status 1, and the traceback on stderr, when it raises."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid
