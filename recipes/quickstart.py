"""The whole job on a laptop: ``python -m recipes.quickstart`` (or ``make quickstart``).

Makes the embedded world and a tiny Hugging Face checkpoint, converts it, clones the four modes, trains with AMPO against a
judge behind HTTP, exports, evaluates before and after, and writes ``report.html``: ``configs/pipeline/quickstart.yaml``.
Interrupted, it goes on at the first unfinished stage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.pipeline import run_shipped, shipped_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; exit status 0 when everything is done."""
    parser = shipped_options("quickstart", __doc__, ranks=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    return run_shipped("quickstart", args, f"seed={args.seed}")


if __name__ == "__main__":
    sys.exit(main())
