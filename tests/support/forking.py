"""Child processes by fork: they start with everything the parent has imported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from nemo_ampo.serve.local import free_port


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
    port = free_port("127.0.0.1")

    def as_rank(rank: int) -> None:
        os.environ |= torchrun_environment(rank, ranks, port)
        function()

    return [fork(lambda rank=rank: as_rank(rank)) for rank in range(ranks)]  # type: ignore[misc]


def torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a worker of a job on one node finds."""
    size = str(ranks)
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0"}
    return places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
