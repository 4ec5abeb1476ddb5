"""The whole job on a laptop: ``python -m recipes.quickstart`` (or ``make quickstart``).

Makes the embedded world and a tiny Hugging Face checkpoint, converts it, clones the four modes, trains with AMPO against a
judge behind HTTP, exports, evaluates before and after, and writes ``report.html``. Interrupted, it goes on at the first
unfinished stage.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_ampo.output.terminal import show
from nemo_ampo.overrides import override, typed_path
from recipes.pipeline import THREADS, exit_status, hold_folder, remember_settings, run_folder, run_stages
from recipes.stages import Stage, Stages

POLICIES = ("base", "bc", "ampo")


def stages(root: Path, judge_url: str, seed: int, ranks: int, bc: Sequence[str], ampo: Sequence[str]) -> list[Stage]:
    """The pipeline of one run folder.

    Args:
        root: run folder.
        judge_url: of a running demo judge.
        seed: of world, model and training.
        ranks: data-parallel processes of the AMPO stage.
        bc, ampo: further Hydra overrides of the two training stages.
    """
    all_of = Stages(root, (override("judge.base_url", judge_url),), seed)
    return [
        all_of.world(),
        all_of.tiny_checkpoint(all_of.hf("base")),
        all_of.convert(all_of.hf("base")),
        all_of.clone("tiny", all_of.rows("bc_train"), all_of.rows("bc_heldout"), *bc),
        all_of.export("bc"),
        all_of.train("tiny", override("data.train", all_of.rows("rl_train")), *ampo, ranks=ranks),
        all_of.export("ampo"),
        *(all_of.evaluate(name, "tiny", all_of.rows("rl_heldout")) for name in POLICIES),
    ]


def finish(root: Path) -> None:
    """Table on the terminal and ``report.html``."""
    from nemo_ampo.report.training.inputs import read_evaluation
    from nemo_ampo.report.training.page import write_report
    from nemo_ampo.report.training.tables import evaluation_table

    show(evaluation_table([read_evaluation(root / "evaluate" / f"{name}.json") for name in POLICIES]), columns=80)
    print(f"report: {write_report(root)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; exit status 0 when everything is done."""
    parser = argparse.ArgumentParser(prog="python -m recipes.quickstart", description=__doc__)
    parser.add_argument("--dir", type=typed_path, default=Path("runs/quickstart"), help="run folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel processes of the AMPO stage")
    parser.add_argument("--bc", nargs="*", default=[], metavar="key=value", help="overrides of the BC stage")
    parser.add_argument("--ampo", nargs="*", default=[], metavar="key=value", help="overrides of the AMPO stage")
    args = parser.parse_args(argv)
    args.dir = run_folder(args.dir)

    from nemo_ampo.world.judge_server import demo_judge_process

    def pipeline() -> None:
        begin = time.monotonic()
        with hold_folder(args.dir):
            remember_settings(args.dir, {"seed": args.seed, "ranks": args.ranks, "bc": args.bc, "ampo": args.ampo})
            with demo_judge_process() as judge_url:
                plan = stages(args.dir, judge_url, args.seed, args.ranks, args.bc, args.ampo)
                run_stages(plan, THREADS)
            finish(args.dir)
        print(f"finished in {(time.monotonic() - begin) / 60:.1f} minutes")

    return exit_status(pipeline)


if __name__ == "__main__":
    sys.exit(main())
