"""A recipe of ``configs/pipeline`` on this machine: ``python -m recipes.pipeline RECIPE [key=value ...]``.

Stages in a row, each the command a user would type, each skipped when its output is already there. Every command writes its
output under a temporary name and renames it, so an output that exists is complete: an interrupted pipeline goes on at the
first stage without one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_ampo.config.compose import CONFIGS
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.files import full_or_read_only, read_record, write_once
from nemo_ampo.output.lock import hold_run
from nemo_ampo.output.terminal import printable_output, show
from nemo_ampo.overrides import typed_path
from recipes.batch_recipe import TRAINING, JudgeMode, PipelineConfig, read_recipe
from recipes.stages import Stage, stages_of

THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
"""Environment of every stage on a shared CPU: waiting threads must not spin, and no hub is asked for anything."""


class StageError(UserError):
    """A stage failed; its own message is already on the terminal.

    Attributes:
        status: its exit status.
    """

    def __init__(self, stage: Stage, status: int) -> None:
        super().__init__(f"stage {stage.name} ended with status {status}; the same command continues there")
        self.status = status


def run_stages(stages: Sequence[Stage], environment: Mapping[str, str]) -> dict[str, float]:
    """Run what is not done yet, in order.

    Args:
        stages: in order.
        environment: added to this process's.

    Returns:
        Seconds per stage that was run.

    Raises:
        StageError: a command failed, or left no output.
    """
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        label = f"[{number}/{len(stages)}] {stage.name}"
        if stage.output.exists():
            print(f"{label}: done before ({stage.output})", flush=True)
            continue
        print(f"{label}: {shlex.join(stage.command)}", flush=True)
        begin = time.monotonic()
        status = run_command(stage.command, environment, stage.ranks)
        seconds[stage.name] = time.monotonic() - begin
        if status:
            raise StageError(stage, status)
        if not stage.output.exists():
            raise UserError(f"stage {stage.name} finished without writing {stage.output}")
        print(f"{label}: {seconds[stage.name]:.0f} s", flush=True)
    return seconds


def run_command(command: Sequence[str], environment: Mapping[str, str], ranks: int = 1) -> int:
    """``python -m command`` in a process of its own; Ctrl-C reaches it and is waited for, so that it can save.

    Returns:
        Its exit status.
    """
    starter = [sys.executable, "-m"]
    if ranks > 1:
        starter += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    process = subprocess.Popen([*starter, *command], env=os.environ | dict(environment))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the child got the signal too and ends at its next step boundary


@printable_output()
def exit_status(pipeline: Callable[[], None]) -> int:
    """Exit status of a command that runs a pipeline: 0, a failed stage's own, or 2 with one line for the user."""
    try:
        with full_or_read_only():
            pipeline()
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def remember(recipe: PipelineConfig) -> None:
    """A folder continues only the recipe it was made by. Where it lies and where its servers are may change meanwhile.

    Raises:
        ConfigError: the folder was made with other settings, naming the first that differs.
    """
    folder = Path(recipe.run_dir)
    settings: Any = OmegaConf.to_container(OmegaConf.structured(recipe), enum_to_str=True)
    for place in ("run_dir", "judge", "rollout"):
        settings.pop(place)
    path = folder / "settings.json"
    if path.exists():
        before = read_record(path)
        before.pop("run_dir", None)  # which earlier versions kept
        for key in sorted(set(before) | set(settings)):
            if before.get(key) != settings.get(key):
                raise ConfigError(
                    f"{folder} was made with {key}={before.get(key)}, now {settings.get(key)}; "
                    "choose another folder or remove this one"
                )
        return
    write_once(path, json.dumps(settings, indent=1))


def run_recipe(recipe: PipelineConfig, ranks: int) -> None:
    """Every stage of a recipe that is not done yet, and at the end what came of them.

    Args:
        recipe: checked.
        ranks: data-parallel processes of the AMPO stage.

    Raises:
        UserError: a stage failed, another pipeline runs in the folder, or it was made with other settings.
    """
    begin, folder, judge = time.monotonic(), Path(recipe.run_dir), _judge_of(recipe)
    with hold_run(folder, patience_s=0), judge as judge_url:
        remember(recipe)
        run_stages(stages_of(recipe, judge_url, ranks=ranks), THREADS)
        results = [folder / "evaluate" / f"{name}.json" for name in recipe.evaluate.policies]
        if results:
            from nemo_ampo.report.training.inputs import read_evaluation
            from nemo_ampo.report.training.page import write_report
            from nemo_ampo.report.training.tables import evaluation_table

            show(evaluation_table([read_evaluation(file) for file in results]), columns=80)
            print(f"report: {write_report(folder)}")
    print(f"finished in {(time.monotonic() - begin) / 60:.1f} minutes")


def _judge_of(recipe: PipelineConfig) -> AbstractContextManager[str]:
    if recipe.judge.mode is JudgeMode.hetjob:
        raise ConfigError("judge.mode: hetjob is for a batch job (slurm/ampo.sh); here it can be demo or external")
    if recipe.judge.mode is JudgeMode.external:
        return nullcontext(str(recipe.judge.base_url))
    from nemo_ampo.world.judge_server import demo_judge_process

    return demo_judge_process()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; exit status 0 when everything is done."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pipeline", description=__doc__)
    parser.add_argument("recipe", type=typed_path, help="such as configs/pipeline/quickstart.yaml")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel processes of the AMPO stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    return exit_status(lambda: run_recipe(read_recipe(args.recipe, args.overrides), args.ranks))


def run_shipped(name: str, args: argparse.Namespace, *overrides: str) -> int:
    """A recipe of ours under the options of its own command, ``--dir``, ``--ranks``, ``--bc`` and ``--ampo``."""

    def pipeline() -> None:
        recipe = read_recipe(CONFIGS / "pipeline" / f"{name}.yaml", overrides)
        # The stages' command lines take it as it is, where its name would read as an option or as a home folder too.
        odd = str(args.dir).startswith(("-", "~"))
        recipe = replace(recipe, run_dir=str(args.dir.absolute() if odd else args.dir))
        recipe.bc.overrides.extend(args.bc)
        recipe.ampo.overrides.extend(args.ampo)
        run_recipe(recipe, args.ranks)

    return exit_status(pipeline)


def shipped_options(name: str, description: str | None, ranks: int) -> argparse.ArgumentParser:
    """The options that :func:`run_shipped` reads."""
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{name}", description=description)
    parser.add_argument("--dir", type=typed_path, default=Path("runs", name), help="run folder (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=ranks, help="data-parallel processes of the AMPO stage")
    for stage in TRAINING:
        parser.add_argument(f"--{stage}", nargs="*", default=[], metavar="key=value", help=f"overrides of the {stage} stage")
    return parser


if __name__ == "__main__":
    sys.exit(main())
