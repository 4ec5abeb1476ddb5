"""Child processes by fork: they start with everything the parent has imported."""

from __future__ import annotations

import os
import secrets
import socket
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


def fork_ranks(function: Callable[[], None], ranks: int) -> list[int]:
    """Pids of children that run ``function``, each in the environment that torchrun would give it."""
    port = meeting_port()

    def as_rank(rank: int) -> None:
        os.environ |= torchrun_environment(rank, ranks, port)
        function()

    return [fork(lambda rank=rank: as_rank(rank)) for rank in range(ranks)]  # type: ignore[misc]


def meeting_port() -> int:
    """A free port for the ranks of a job to meet at, which nothing else will be given before they do.

    Whoever asks for any port, as each connection and each of gloo's listeners does, gets one from 32768 on (Linux' default).
    """
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a worker of a job on one node finds."""
    size = str(ranks)
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0"}
    return places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
