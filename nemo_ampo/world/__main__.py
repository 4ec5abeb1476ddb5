"""Command: write the embedded world as data files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nemo_ampo.errors import UserError
from nemo_ampo.files import full_or_read_only
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.world.pack import NUM_BC, NUM_HELDOUT, NUM_RL, make_pack


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Write the embedded world as data files, and say how far one gets there without understanding."""
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.world", description=main.__doc__)
    parser.add_argument("--out", type=typed_path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of all draws (default %(default)s)")
    parser.add_argument("--num-bc", type=int, default=NUM_BC, help="cloning rows (default %(default)s)")
    parser.add_argument("--num-rl", type=int, default=NUM_RL, help="dialogues to train on (default %(default)s)")
    parser.add_argument(
        "--num-heldout", type=int, default=NUM_HELDOUT, help="rows of each held-out file (default %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        with full_or_read_only():
            summary = make_pack(args.out, args.seed, args.num_bc, args.num_rl, args.num_heldout)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for name, rows in summary.rows.items():
        sys.stdout.write(f"{rows:6d} rows  {args.out}/{name}\n")
    sys.stdout.write("right replies in held-out hard scenes, without understanding:\n")
    for strategy, share in summary.baselines.items():
        sys.stdout.write(f"{share:6.1%}  {strategy}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
