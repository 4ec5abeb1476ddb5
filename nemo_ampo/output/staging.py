"""Outputs that appear whole or not at all: built in a folder of one's own beside their place, then given their name.

Whoever writes an output holds it (:func:`nemo_ampo.output.lock.hold_output`). What a killed process left behind is removed
by the next one that works in that place; a folder whose owner lives is told by its lock, so that nothing in use is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_ampo.errors import DiskError, UserError
from nemo_ampo.files import disk_errors, place_of
from nemo_ampo.output.lock import Lock, hold_output

_OWNER = ".running"
_GRACE_S = 60.0
_FULL_BYTES = 1 << 20
_EXCHANGE, _HERE = 2, -100  # renameat2's RENAME_EXCHANGE and AT_FDCWD


@contextlib.contextmanager
def scratch_folder(place: Path, name: str) -> Iterator[Path]:
    """A folder of one's own for work in progress, gone afterwards; those of killed processes go too.

    Args:
        place: folder to make it in, created if absent.
        name: of what is worked on.

    Raises:
        DiskError: it cannot be made, or the disk filled up or broke in the block, whatever a library made of that.
    """
    prefix = f".{name[:60]}.tmp-"
    with disk_errors(f"cannot write in {place}"):
        place.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(place, prefix)
        owner, folder = _own_folder(place, prefix)
    try:
        yield folder
    except UserError:
        raise
    except Exception as error:
        told = _of_the_disk(error, folder)
        if told is None:
            raise
        raise told from error
    finally:
        _remove(folder)
        owner.release()


@contextlib.contextmanager
def staged(output: Path, option: str) -> Iterator[Path]:
    """Hold ``output`` and build it elsewhere: yields the path, of the same name, to write; :func:`publish` ends the work.

    Args:
        output: file or folder, as the user names it; a symbolic link stands for what it points to.
        option: which says so, for the message.

    Raises:
        UserError: another command writes it.
        DiskError: its folder cannot be written to, or its name is that of a device.
    """
    with hold_output(output, option):
        place = place_of(output)
        with scratch_folder(place.parent, place.name) as folder:
            yield folder / place.name


def publish(built: Path, output: Path) -> None:
    """Give a finished file or folder its name, in place of what bears it now, in one step where the system has such a step.

    Raises:
        DiskError: it cannot be done; what was there before is still there.
    """
    with disk_errors(f"cannot write {output}"):
        target = place_of(output)
        if not (built.is_dir() and target.is_dir()):
            built.replace(target)
        elif not _exchanged(built, target):
            old = built.with_name(f"{built.name}.old")
            target.replace(old)
            try:
                built.replace(target)
            except OSError:
                old.replace(target)
                raise


def place_with_room(places: Sequence[Path], needed: int, what: str) -> Path:
    """The first folder that can be written to and has room.

    Args:
        places: in order of preference; absent ones are made when they are used.
        needed: bytes.
        what: they are for.

    Raises:
        DiskError: none will do, with what each lacks.
    """
    reasons = []
    for place in places:
        there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
            reasons.append(f"{place} cannot be written to")
        elif free < needed:
            reasons.append(f"{place} has {_size(free)} free")
        else:
            return place
    raise DiskError(errno.ENOSPC, f"{what} needs {_size(needed)} of disk, but {' and '.join(reasons)}")


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _own_folder(place: Path, prefix: str) -> tuple[Lock, Path]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            owner = Lock(folder / _OWNER, str(folder))
            folder.chmod(0o755)  # all ranks of a job read there, whoever they run as
        except OSError:
            if folder.exists():
                raise
        except UserError:
            pass  # another process took it for one left behind, before it was locked
        else:
            return owner, folder


def _remove_left_behind(place: Path, prefix: str) -> None:
    for folder in [path for path in place.iterdir() if path.name.startswith(prefix)]:
        # Others may remove the same one at this moment, or it may belong to another user.
        with contextlib.suppress(OSError, UserError):
            if (folder / _OWNER).exists():
                # Held until the folder is gone: its owner may only be about to lock it.
                with Lock(folder / _OWNER, str(folder)) as lock:
                    if lock.guards:
                        _remove(folder)
            elif time.time() - folder.stat().st_mtime > _GRACE_S:  # else it is just being made
                folder.rmdir()


def _remove(folder: Path) -> None:
    """The lock goes last, so that a removal that is cut short can be ended by another."""
    for path in folder.iterdir():
        if path.name != _OWNER:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _exchanged(built: Path, target: Path) -> bool:
    """Swap two folders in one step. False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return swap(_HERE, os.fsencode(built), _HERE, os.fsencode(target), _EXCHANGE) == 0


def _of_the_disk(error: Exception, place: Path) -> DiskError | None:
    """What the system said, from below what libraries raise in its place; some only say that writing failed."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno:
            return DiskError(below.errno, f"{below.filename or place.parent}: {below.strerror}")
        below = below.__cause__ or below.__context__
    if "No space left" in str(error) or shutil.disk_usage(place).free < _FULL_BYTES:
        return DiskError(errno.ENOSPC, f"{place.parent}: {os.strerror(errno.ENOSPC)}")
    return None
