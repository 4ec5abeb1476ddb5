"""One writer at a time, by one rule for every output: run folders, result folders, files that a command makes.

Two writers in one place would overwrite each other's work: the second one waits for a while, or is refused in one line
that names the first. The kernel lets go when a process dies, however it dies; processes it forked hold nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from nemo_ampo.errors import UserError
from nemo_ampo.files import disk_errors, place_of

RUN_PATIENCE_S = 30.0
"""Processes of a job that was just killed may take so long to go."""

_MAIN_RANK_S = 120.0
"""So much later may the main rank start than another one."""
_HEAR_S = 10.0
_HELD, _HEARD = "nemo_ampo/run.dir", "nemo_ampo/run.dir heard"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# The kernel's record locks belong to a process: they would let the same process in twice.
_mine: set[str] = set()


class Lock:
    """Held from construction to :meth:`release`, or for a ``with`` block.

    Args:
        file: stands for what is locked; created, with its folder, if absent.
        what: is locked, for the message: ``run.dir: DIR``.
        patience_s: how long to wait for another holder, seconds.
        temporary: remove ``file`` at the end, where it would stand beside a user's own files.

    Attributes:
        guards: False where the file system has no locks, so that others may be at work too.

    Raises:
        UserError: somebody else holds it.
        DiskError: the file cannot be made.
    """

    def __init__(self, file: Path, what: str, patience_s: float = 0.0, *, temporary: bool = False) -> None:
        self._path, self._temporary = file, temporary
        self.guards = True
        with disk_errors(f"cannot write {file}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._name = str(file.resolve())
            deadline = time.monotonic() + patience_s
            while not self._taken():
                if time.monotonic() > deadline:
                    raise UserError(f"{what} is in use by another job ({_holder(file)})")
                time.sleep(0.1)

    def release(self) -> None:
        """Let go. Releasing twice does nothing."""
        if self._file.closed:
            return
        if self._temporary:
            self._path.unlink(missing_ok=True)
        _mine.discard(self._name)
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _taken(self) -> bool:
        if self._name in _mine:
            return False
        file = self._path.open("a+")
        try:
            free = _locked(file.fileno())
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            where = self._path.parent
            print(f"{where}: this file system has no locks; nothing guards against a second writer", file=sys.stderr)
            free, self.guards = True, False
        if not free or not _still_there(file.fileno(), self._path):
            file.close()
            return False
        _mine.add(self._name)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        return True


def hold_run(run_dir: Path, patience_s: float = RUN_PATIENCE_S) -> Lock:
    """Claim a run folder, before anything in it is opened or written.

    Raises:
        UserError: another job is still there.
    """
    return Lock(run_dir / ".running", f"run.dir: {run_dir}", patience_s)


@contextlib.contextmanager
def hold_run_with_all_ranks(
    run_dir: Path, checkpoint_dir: str | None = None, patience_s: float = RUN_PATIENCE_S
) -> Iterator[None]:
    """As :func:`hold_run`, for a job of many processes: the main rank holds, the others open nothing before it does.

    Args:
        run_dir: of the job.
        checkpoint_dir: of its checkpoints, where they lie elsewhere.
        patience_s: how long to wait for another job, seconds.

    Raises:
        UserError: on every rank, another job is still there; or the main rank says nothing.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        with _held(run_dir, checkpoint_dir, patience_s):
            yield
        return

    import torch.distributed

    # Kept until the end: the process group meets at the same place later.
    store, *_ = next(torch.distributed.rendezvous("env://"))
    if rank == 0:
        try:
            held = _held(run_dir, checkpoint_dir, patience_s)
        except UserError as error:
            store.set(_HELD, str(error) or "refused")
            # The store may end with this process.
            _until(lambda: store.add(_HEARD, 0) == world - 1, _HEAR_S)
            raise
        with held:
            store.set(_HELD, "")
            yield
        return
    try:
        claimed = _until(lambda: store.check([_HELD]), patience_s + _MAIN_RANK_S)
        refusal = store.get(_HELD).decode() if claimed else "the main rank did not claim it"
        store.add(_HEARD, 1)
    except RuntimeError:
        refusal = "the main rank ended before it claimed it"
    if refusal:
        raise UserError(refusal if refusal.startswith(("run.dir", "checkpoint.dir")) else f"run.dir: {run_dir}: {refusal}")
    yield


def _held(run_dir: Path, checkpoint_dir: str | None, patience_s: float) -> contextlib.ExitStack:
    """All locks of a job, given back at the end of the block."""
    with contextlib.ExitStack() as locks:
        locks.enter_context(hold_run(run_dir, patience_s))
        if checkpoint_dir:
            locks.enter_context(hold_output(Path(checkpoint_dir), "checkpoint.dir", patience_s))
        return locks.pop_all()


def _until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def hold_output(output: Path, option: str, patience_s: float = 0.0) -> Lock:
    """Claim a file or folder that a command writes under its own name.

    Args:
        output: as the user names it; a symbolic link stands for what it points to.
        option: which says so, for the message, such as ``--output``.
        patience_s: how long to wait for another writer, seconds.

    Raises:
        UserError: another command writes it.
        DiskError: its name is that of a device.
    """
    with disk_errors(f"{option}: cannot write {output}"):
        path = place_of(output)
    return Lock(path.with_name(f".{path.name}.lock"), f"{option}: {output}", patience_s, temporary=True)


def _holder(file: Path) -> str:
    try:
        return file.read_text().strip() or "just started"
    except OSError:
        return "just ended"


def _still_there(handle: int, path: Path) -> bool:
    """Whoever held a temporary lock before may have removed the file between our opening and locking it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _locked(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
