"""Small servers on this machine: listen, say where, stop with the parent; and the other side, start one and wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from nemo_ampo.chat.proxies import opener_for
from nemo_ampo.errors import Stopped, UserError
from nemo_ampo.files import disk_errors, write_once

_PARENT_POLL_S = 0.5
SHUTDOWN_S = 2
"""Seconds a server gives its open requests when it is told to stop."""


def run_app(
    app: Any,
    *,
    host: str,
    port: int,
    ready_file: Path | None,
    parent_pid: int | None,
    on_ready: Callable[[str], None],
) -> None:
    """Serve an ASGI application until SIGINT or SIGTERM.

    Args:
        app: the application.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        ready_file: gets the base URL once the server listens, complete or not at all; removed when it stops.
        parent_pid: stop as soon as this process is no longer the parent.
        on_ready: called with the base URL once the server listens.

    Raises:
        UserError: if the address cannot be listened on.
    """
    with _listen(host, port) as listener, _announced(ready_file) as announce:
        base_url = base_url_of(host, listener.getsockname()[1])

        def ready() -> None:
            announce(base_url)
            on_ready(base_url)

        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S, lifespan="off"
        )
        # uvicorn raises the signal that stopped it once more; by default SIGTERM would then end us before we
        # clean up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, ready, parent_pid).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it listens, and stops when its parent is gone."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], parent_pid: int | None) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._parent_pid = parent_pid
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()
        if self._parent_pid is not None:
            self._watch = asyncio.create_task(self._watch_parent(self._parent_pid))

    async def _watch_parent(self, parent_pid: int) -> None:
        while os.getppid() == parent_pid:
            await asyncio.sleep(_PARENT_POLL_S)
        self.should_exit = True


@contextlib.contextmanager
def server_process(
    command: Sequence[str],
    *,
    what: str,
    start_timeout_s: float,
    base_url: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run a server as a process of its own and yield its base URL once its ``/health`` answers.

    The process is stopped on leaving the block, and by the kernel when the thread that entered it ends in any other way.
    While the server starts, SIGTERM stops it too, unless somebody handles that signal already.

    Args:
        command: program and arguments. Without ``base_url`` it must understand ``--ready-file FILE`` and
            ``--parent-pid PID`` as :func:`run_app` does.
        what: the server's name in messages.
        start_timeout_s: seconds until it must be healthy.
        base_url: where it will listen, for a server that cannot say so itself.
        environment: of the process; this process's one, with the package importable, by default.

    Raises:
        UserError: if it does not come up, with the last line it printed.
        Stopped: SIGTERM came while it started.
    """
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        ready_file, log_file = Path(folder, "url"), Path(folder, "log")
        if base_url is None:
            command = [*command, "--parent-pid", str(os.getpid()), "--ready-file", str(ready_file)]
        with _sigterm_stops():
            process = _start(command, log_file, environment)
            try:
                url = _wait_until_healthy(process, ready_file, log_file, start_timeout_s, what, base_url)
            except BaseException:
                _stop(process)
                raise
        try:
            yield url
        finally:
            _stop(process)


def _start(command: Sequence[str], log_file: Path, environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    # -I and -S: the launcher needs neither the packages nor the settings of the environment it hands on.
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("tied.py")), str(os.getpid())]
    with log_file.open("wb") as log:
        return subprocess.Popen(
            [*launcher, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment) if environment is not None else child_environment(),
            start_new_session=True,  # Ctrl-C is for the run, which still needs the server to end its step
        )


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM raises Stopped, so that what was begun is cleaned up; a handler that is there already stays."""
    untouched = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not untouched or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with _listen(host, 0) as listener:
        return int(listener.getsockname()[1])


def base_url_of(host: str, port: int) -> str:
    """Where callers find a server."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()  # Listening everywhere is for callers on other machines.
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def child_environment() -> dict[str, str]:
    """This environment, with the package importable also when it is not installed.

    Threads of a model's server wait passively unless told otherwise: they share the machine with whoever asks them.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([package_root, *([inherited] if inherited else [])]),
    }


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on --host {host} --port {port}: {error}") from None


@contextlib.contextmanager
def _announced(ready_file: Path | None) -> Iterator[Callable[[str], None]]:
    """Yield the function that writes ``ready_file``; remove the file before and after."""
    if ready_file is None:
        yield lambda url: None
        return

    with disk_errors(f"--ready-file: cannot write {ready_file}"):
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        ready_file.unlink(missing_ok=True)
    try:
        yield lambda url: write_once(ready_file, url + "\n")
    finally:
        ready_file.unlink(missing_ok=True)


def _wait_until_healthy(
    process: subprocess.Popen[bytes], ready_file: Path, log_file: Path, timeout_s: float, what: str, base_url: str | None
) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        url = base_url or (ready_file.read_text(encoding="utf-8").strip() if ready_file.exists() else None)
        if url is not None:
            with contextlib.suppress(OSError):
                health = url.removesuffix("/v1") + "/health"
                opener_for(health).open(health, timeout=5).close()
                return url
        time.sleep(0.02)
    state = "is not ready" if process.poll() is None else f"exited with status {process.returncode}"
    printed = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    raise UserError(f"{what} {state}: {printed[-1].removeprefix('error: ')}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=2 * SHUTDOWN_S + 1)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own, with its workers
        process.wait()
