"""The one door to the terminal: what a model, a judge or a file name says must not move the cursor or turn text around.

A command runs inside :func:`printable_output`. Whatever it writes to stdout or stderr there, libraries and tracebacks
included, passes :func:`nemo_ampo.text.printable`; only what draws on purpose (:func:`show`, a progress bar on
:func:`undisguised`) has the stream itself. Where the log of a job lies on a full disk, words are lost and the work goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.text import printable

if TYPE_CHECKING:
    from rich.table import Table

FILE_COLUMNS = 120
"""A file has room for columns that 80 would fold."""


class _Lasting:
    """A text stream that a full disk does not end: what cannot be written is lost, which is said once where it can be."""

    def __init__(self, stream: Any, name: str, other: Any) -> None:
        self.stream, self._name, self._other = stream, name, other
        self._told = False

    def write(self, text: str) -> int:
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self.stream.flush()

    def settle(self) -> None:
        """At the end: the interpreter would make an exit status of its own of what still cannot be written."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            pass
        except OSError:
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # whoever read this has gone, and the work is not wanted any more
            raise
        except OSError as error:
            if not self._told:
                self._told = True
                with contextlib.suppress(OSError):
                    self._other.write(f"{self._name}: {error.strerror}; what is said there is lost, the work goes on\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Printable:
    """A text stream whose control characters are shown as escapes; anything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """All of ``text``, also where the stream's encoding lacks some of it. A carriage return begins a new line."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = printable(text.replace("\r\n", "\n").replace("\r", "\n"))
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As :meth:`write`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """For the length of the block, or of the function it decorates, stdout and stderr show control characters as escapes."""
    if isinstance(sys.stdout, _Printable) and isinstance(sys.stderr, _Printable):
        yield
        return
    before = sys.stdout, sys.stderr
    lasting = _Lasting(sys.stdout, "stdout", sys.stderr), _Lasting(sys.stderr, "stderr", sys.stdout)
    sys.stdout, sys.stderr = map(_Printable, lasting)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in lasting:
            stream.settle()


def undisguised(stream: Any) -> Any:
    """The stream behind, for what moves the cursor on purpose and shows no text of others."""
    return stream.stream if isinstance(stream, _Printable) else stream


def show(table: Table, columns: int = FILE_COLUMNS) -> None:
    """Print a table; the text of its cells is made printable, its style is not.

    Args:
        table: of rich.
        columns: of output that is not a terminal.
    """
    from rich.console import Console
    from rich.segment import Segment, Segments

    file = undisguised(sys.stdout)
    console = Console(file=file, width=None if file.isatty() or "COLUMNS" in os.environ else columns)
    console.print(Segments(Segment(printable(s.text), s.style) for s in console.render(table) if not s.control), end="")
