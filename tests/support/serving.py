"""A real HTTP server for a rollout backend, in a thread, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from nemo_ampo.rollout.server_api import Backend, make_app


@contextmanager
def served(backend: Backend) -> Iterator[str]:
    """URL of the running server."""
    server = uvicorn.Server(uvicorn.Config(make_app(backend), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
