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
from recipes.pipeline import THREADS, Stage, exit_status, hold_folder, remember_settings, run_folder, run_stages


def stages(root: Path, judge_url: str, seed: int, ranks: int, bc: Sequence[str], ampo: Sequence[str]) -> list[Stage]:
    """The pipeline of one run folder.

    Args:
        root: run folder.
        judge_url: of a running demo judge.
        seed: of world, model and training.
        ranks: data-parallel processes of the AMPO stage.
        bc, ampo: further Hydra overrides of the two training stages.
    """
    world, heldout = root / "world", root / "world" / "rl_heldout.jsonl"
    judge = override("judge.base_url", judge_url)

    def evaluate(name: str) -> Stage:
        return Stage(
            f"evaluate {name}",
            (
                *(
                    "recipes.evaluate",
                    "--config-name",
                    "tiny",
                    override("run.dir", root / "evaluate"),
                    override("run.name", name),
                ),
                *(
                    override("run.checkpoint", root / "hf" / name),
                    override("data.turns", heldout),
                    f"run.seed={seed}",
                    judge,
                ),
            ),
            root / "evaluate" / f"{name}.json",
        )

    def export(name: str) -> Stage:
        return Stage(
            f"export {name}",
            ("converters.nemo_to_hf", "--input", str(root / name / "policy.nemo"), "--output", str(root / "hf" / name)),
            root / "hf" / name,
        )

    base = root / "nemo" / "base.nemo"
    return [
        Stage(
            "make world",
            ("nemo_ampo.world", "--out", str(world), "--seed", str(seed)),
            world / "pack.json",
        ),
        Stage(
            "make checkpoint",
            ("nemo_ampo.world.tiny_model", "--pack", str(world), "--out", str(root / "hf" / "base"), "--seed", str(seed)),
            root / "hf" / "base",
        ),
        Stage(
            "convert",
            ("converters.hf_to_nemo", "--input", str(root / "hf" / "base"), "--output", str(base)),
            base,
        ),
        Stage(
            "clone modes (BC)",
            (
                *("recipes.bc", "--config-name", "tiny", override("run.dir", root / "bc"), override("run.init_from", base)),
                *(
                    f"run.seed={seed}",
                    override("data.train", world / "bc_train.jsonl"),
                    override("data.heldout", world / "bc_heldout.jsonl"),
                ),
                *bc,
            ),
            root / "bc" / "policy.nemo",
        ),
        export("bc"),
        Stage(
            "train (AMPO)",
            (
                *("recipes.ampo", "--config-name", "tiny", override("run.dir", root / "ampo"), f"run.seed={seed}"),
                *(
                    override("run.init_from", root / "bc" / "policy.nemo"),
                    override("data.train", world / "rl_train.jsonl"),
                    judge,
                    *ampo,
                ),
            ),
            root / "ampo" / "policy.nemo",
            ranks,
        ),
        export("ampo"),
        *(evaluate(name) for name in ("base", "bc", "ampo")),
    ]


def finish(root: Path) -> None:
    """Table on the terminal and ``report.html``."""
    from nemo_ampo.report.training.inputs import read_evaluation
    from nemo_ampo.report.training.page import write_report
    from nemo_ampo.report.training.tables import evaluation_table

    names = ("base", "bc", "ampo")
    show(evaluation_table([read_evaluation(root / "evaluate" / f"{name}.json") for name in names]), columns=80)
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
