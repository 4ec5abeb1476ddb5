"""A real disk of a few kilobytes that fills up or cannot be written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave not a byte."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 512):
                    pass
            except OSError:
                pass

    def free(self) -> None:
        """Undo :meth:`fill`."""
        (self.path / "filler").unlink()

    def make_read_only(self) -> None:
        """Nobody can write any more, not even root."""
        _mount("-o", "remount,ro", str(self.path))


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[SmallDisk]:
    """Mount one at ``path``, or skip the test where that is not allowed."""
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    said = _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path))
    if said is not None:
        pytest.skip(f"a small tmpfs cannot be mounted here: {said}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def _mount(*arguments: str) -> str | None:
    """What went wrong."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None
