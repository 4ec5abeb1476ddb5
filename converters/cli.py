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
LOGITS_UP_TO = 6e9
"""Bytes of weights up to which logits are compared unless somebody says otherwise: both models compute in fp32, which takes
minutes for 7B on a few cores."""


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


def with_logits(asked: str, weights: int) -> bool:
    """Whether logits are compared too, for ``--verify``; that ``auto`` leaves them out is said.

    Args:
        asked: ``auto``, ``full`` or ``weights``.
        weights: bytes of them.
    """
    if asked == "auto" and weights > LOGITS_UP_TO:
        print(
            f"logits are not compared, for {weights / 1e9:.3g} GB of weights it takes long; --verify full compares them, "
            "one layer in memory at a time",
            file=sys.stderr,
        )
        return False
    return asked != "weights"


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Options of the two commands that write a model."""
    parser.add_argument(
        "--verify",
        choices=("auto", "full", "weights", "none"),
        default="auto",
        help="what to compare before the output gets its name: weights and files, with full the logits of both models in "
        f"fp32 as well; auto is full up to {LOGITS_UP_TO / 1e9:.0f} GB of weights (%(default)s)",
    )
    parser.add_argument("--no-verify", dest="verify", action="store_const", const="none", help="--verify none")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
