"""The limiter and cache of a job: its own for a single process, the main rank's for many.

The main rank writes where its broker listens to ``judge_broker.json`` in the run folder, and removes it at the end. The
others believe the file only when a broker that knows the token in it answers there: a killed start leaves its file behind,
and what identifies a start (address, port, run id) is often the same for the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.chat.broker import Broker, BrokerClient, is_there
from nemo_ampo.chat.cache import Cache
from nemo_ampo.chat.client import open_cache
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.limiter import Limiter, LocalLimiter, SpentFile
from nemo_ampo.chat.limits import Limits
from nemo_ampo.errors import UserError
from nemo_ampo.files import disk_errors, write_once

RENDEZVOUS_TIMEOUT_S = 120.0
_POLL_S = 0.1
_START_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)


@dataclass(frozen=True)
class Shared:
    """What a client needs to act as one with the others of its job."""

    limiter: Limiter
    cache: Cache | None
    is_main: bool = True
    others: BrokerClient | None = None
    """To speak with the other ranks; None for a process alone."""
    spent_file: SpentFile | None = None
    """Where the main rank notes what was spent."""


@contextmanager
def shared(
    config: EndpointConfig,
    run_dir: str | Path,
    recording: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    timeout_s: float = RENDEZVOUS_TIMEOUT_S,
) -> Iterator[Shared]:
    """Limiter and cache for one client of this process; spending is remembered in the run folder.

    Args:
        config: of the endpoint.
        run_dir: folder all processes of the job see.
        recording: settings that decide what is asked, see :class:`~nemo_ampo.chat.client.ChatClient`.
        environment: who this process is, as torchrun says; ``os.environ`` if None.
        timeout_s: how long to wait for the main rank, seconds.

    Raises:
        ConfigError: the cache cannot be used.
        UserError: the main rank does not appear.
    """
    env = os.environ if environment is None else environment
    folder, name = Path(run_dir), config.section
    world, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
    notice = folder / f"{name}_broker.json"
    start = {variable: env.get(variable, "") for variable in _START_VARIABLES}
    if rank > 0:
        yield _of_many(_wait_for(notice, start, timeout_s), config, None)
        return
    with disk_errors(f"cannot remove {notice}"):
        notice.unlink(missing_ok=True)  # of a start that was killed
    spent_file = SpentFile(folder / f"{name}_spent.json")
    limiter = LocalLimiter(Limits.of(config), spent_file)
    cache = open_cache(config, recording)
    if world == 1:
        yield Shared(limiter, cache, spent_file=spent_file)
        return
    one_machine = int(env.get("LOCAL_WORLD_SIZE", str(world))) == world
    token = secrets.token_hex(16)
    broker = Broker(limiter, cache, token, "127.0.0.1" if one_machine else "0.0.0.0", world)
    host = "127.0.0.1" if one_machine else env["MASTER_ADDR"]
    content = json.dumps({"host": host, "port": broker.port, "token": token, "start": start})
    try:
        write_once(notice, content, private=True)
        yield _of_many(BrokerClient("127.0.0.1", broker.port, token), config, spent_file)
    finally:
        with contextlib.suppress(OSError):
            if notice.read_text(encoding="utf-8") == content:
                notice.unlink()
        broker.close()


def _of_many(client: BrokerClient, config: EndpointConfig, spent_file: SpentFile | None) -> Shared:
    cache = client if config.cache is not None or config.replay is not None else None
    return Shared(client, cache, is_main=spent_file is not None, others=client, spent_file=spent_file)


def _wait_for(notice: Path, start: dict[str, str], timeout_s: float) -> BrokerClient:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if notice.is_file():
            try:
                found = json.loads(notice.read_bytes())
                place = str(found["host"]), int(found["port"]), str(found["token"])
                ours = found["start"] == start and is_there(*place)
            except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
                ours = False  # being replaced on a file system without atomic rename
            if ours:
                return BrokerClient(*place)
        time.sleep(_POLL_S)
    raise UserError(
        f"{notice}: the main rank did not write it within {timeout_s:g} s, or does not answer at the address in it; is the "
        "run folder shared by all nodes?"
    )
