"""Two jobs in one run folder would overwrite each other's logs and checkpoints: the second one waits, then gives up."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from nemo_ampo.errors import UserError

LOCK_FILE = ".running"
PATIENCE_S = 30.0
"""Processes of a job that was just killed may take so long to go."""


def hold(run_dir: Path, patience_s: float = PATIENCE_S) -> IO[str]:
    """Claim the folder for as long as the returned file is open.

    The kernel lets go when the process dies, however it dies; processes it forked do not hold the folder.

    Args:
        run_dir: created if absent.
        patience_s: how long to wait for another job to end, seconds.

    Raises:
        UserError: another job is still there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK_FILE).open("a+")
    deadline = time.monotonic() + patience_s
    while not _locked(file.fileno()):
        if time.monotonic() > deadline:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(f"run.dir: {run_dir} is in use by another job ({holder})")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _locked(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print("run.dir: this file system has no locks; nothing guards against a second job in it", file=sys.stderr)
    return True
