"""Files as every part writes and reads them: whole or not at all, errors in one line, hashes, JSON lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_ampo.errors import DataError, DiskError


def shipped(folder: str) -> Path:
    """``configs`` or ``slurm``: inside an installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what the system says about a file into one line.

    Args:
        doing: what the block does, such as ``cannot write DIR/config.yaml``.

    Raises:
        DiskError: the block raised an ``OSError``: full, read-only, not allowed, a folder where a file should be, ...
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(error.errno or 0, f"{doing}: {error.strerror or error}") from error


def write_once(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write through a temporary name of its own beside ``path``: a reader never sees half a file, two writers never mix.

    Args:
        path: its folder is created if absent.
        content: text as UTF-8, without translating its line ends, or bytes.
        private: only the owner may read it (a token stands in it).

    Raises:
        DiskError: it cannot be written; what was there before is still there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with disk_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            if not private:
                Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    """The process's, which the system tells only to those who set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a torn last one (the process died while writing) is left out. No file, no lines.

    Raises:
        DataError: a line that was written whole is no JSON object.
    """
    if not path.exists():
        return []
    with disk_errors(f"cannot read {path}"):
        *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object; the file was damaged or edited")
        rows.append(row)
    return rows


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, in hex.

    Raises:
        DiskError: it cannot be read.
    """
    with disk_errors(f"cannot read {path}"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
