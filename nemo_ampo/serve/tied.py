"""Run a command that dies with its parent: ``python tied.py PARENT_PID COMMAND ...``.

A server that is still loading does not look after its parent, and servers that are not ours never do. So the kernel is
asked to send SIGTERM when the parent ends, however it ends; the request survives the exec that turns this process into
the command. Set here and not between fork and exec of the parent, where no Python may safely run. Imports nothing of the
project, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    """Become ``command``, unless the parent is gone already. Elsewhere than on Linux nothing is tied.

    Raises:
        SystemExit: the parent is gone, or the command cannot be started.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit("the parent is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise SystemExit(f"{command[0]}: {error.strerror}") from None


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
