"""What the converter commands share: error line, exit status, a place for work in progress."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_ampo.errors import UserError
from nemo_ampo.files import full_or_read_only
from nemo_ampo.terminal import printable_output

OK, DIFFERENT, MISUSED = 0, 1, 2


@printable_output()
def run(command: Callable[[], int]) -> int:
    """Exit status of a command; something the user can cure becomes one line and status 2."""
    try:
        with full_or_read_only():
            return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSED


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Options of the two commands that write a model."""
    parser.add_argument("--no-verify", action="store_true", help="skip the parity check")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` for work in progress, removed at the end."""
    folder = output.with_name(f".{output.name}.converting")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there ({error})") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
