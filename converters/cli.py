"""What the converter commands share: one process whatever started it, error line, exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from nemo_ampo.errors import UserError
from nemo_ampo.files import full_or_read_only
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.ranks import settle_ranks
from nemo_ampo.text import one_line

OK, DIFFERENT, MISUSED = 0, 1, 2


@printable_output()
def run(command: Callable[[], int]) -> int:
    """Exit status of a command; something the user can cure becomes one line and status 2."""
    try:
        with full_or_read_only():
            settle_ranks(alone=True)
            return command()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else one_line(str(error), 400)
    print(f"error: {message}", file=sys.stderr)
    return MISUSED


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Options of the two commands that write a model."""
    parser.add_argument("--no-verify", action="store_true", help="skip the parity check")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
