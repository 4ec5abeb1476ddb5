"""What a Slurm job runs: one small recipe file becomes a list of stages, which ``slurm/*.sh`` start one after the other.

    python -m recipes.slurm plan configs/pipeline/tiny.yaml --ranks 2 run_dir=runs/mine ampo.rollout.group_size=32

prints one line per stage, fields separated by tabs: name, ``one`` or ``all`` (processes), MPI or not, output, command. A
stage is finished when its output exists. Everything a user can get wrong is said here, before anything is started.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.job.attempts import AttemptLog, PlannedStage, Standing, write_plan
from nemo_ampo.output.lock import hold_run
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from recipes.batch_recipe import TRAINING, JudgeMode, PipelineConfig, StageConfig, makes_start, read_recipe, start_of
from recipes.pipeline import remember
from recipes.stages import Stage, stages_of


@dataclass(frozen=True)
class RolloutLimits:
    """What a rollout server must be able to hold: tokens of a prompt, and of prompt and response together."""

    max_prompt: int
    max_total: int

    @property
    def options(self) -> str:
        """As ``slurm/rollout_server.sh`` takes them."""
        return f"--max-prompt {self.max_prompt} --max-total {self.max_total}"


def own_rollout_server(recipe: PipelineConfig) -> RolloutLimits | None:
    """Limits of the rollout server the job must start itself; None when the AMPO stage needs none or names its URL.

    Raises:
        ConfigError: the stage's configuration is wrong, naming the key.
    """
    from nemo_ampo.config.compose import compose

    try:
        rollout = compose("ampo", recipe.ampo.config, recipe.ampo.overrides).rollout
    except ConfigError as error:
        raise ConfigError(f"stage ampo: {error}") from None
    if rollout.engine != "trtllm_server" or rollout.trtllm_server.url:
        return None
    return RolloutLimits(rollout.max_prompt_tokens, rollout.max_prompt_tokens + rollout.max_new_tokens)


def bytes_to_come(recipe: PipelineConfig) -> float:
    """At most so much the pipeline will still write into its run folder: converted checkpoint and exports, and for each
    training stage its checkpoints and its starting policy unpacked, less what the folder already holds.

    Raises:
        ConfigError: a stage's configuration or the starting checkpoint is wrong.
    """
    from nemo_ampo.config.compose import compose
    from nemo_ampo.job.plan import checkpoint_bytes, kept_bytes, model_of

    if makes_start(recipe):
        return 1e9  # the job itself makes the checkpoint, a small one; there is nothing to count yet
    try:
        facts = model_of(start_of(recipe), "")
    except UserError as error:
        raise ConfigError(f"checkpoint: {str(error).removeprefix('--model ')}") from None
    total = 0.0
    for name in TRAINING:
        stage: StageConfig = getattr(recipe, name)
        try:
            cfg = compose(name, stage.config, stage.overrides)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}") from None
        _, weights = checkpoint_bytes(facts, bool(cfg.model.megatron_amp_O2))
        total += kept_bytes(cfg, facts) + weights * (1 + (name == "bc") + (name in recipe.evaluate.policies))
    written = sum(path.stat().st_size for path in Path(recipe.run_dir).rglob("*") if path.is_file())
    return max(0.0, total - written)


def check_stage_configs(plan: Sequence[Stage], ranks: int) -> set[str]:
    """Compose the configuration of every stage, so that a wrong key stops the job before anything runs, not hours later.

    Args:
        plan: stages to check.
        ranks: processes of a training stage.

    Returns:
        Names of the stages that must be started through MPI: TensorRT-LLM finds its peers that way.

    Raises:
        ConfigError: naming stage and key.
    """
    from nemo_ampo.config.check import check_stage
    from nemo_ampo.config.compose import compose
    from nemo_ampo.config.stages import STAGES

    with_mpi = set()
    for stage in plan:
        name = stage.command[0].removeprefix("recipes.")
        if name not in STAGES:
            continue
        try:
            raw = compose(name, stage.command[2], stage.command[3:])
            check_stage(name, raw, ranks if name in TRAINING else 1, files=False)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
        if "rollout" in raw and raw.rollout.engine == "trtllm":
            with_mpi.add(stage.name)
    return with_mpi


def memory_command(args: argparse.Namespace) -> None:
    """Print what each training stage fills of a GPU. Status 2 when one does not fit."""
    from nemo_ampo.config.compose import compose
    from nemo_ampo.job.plan import model_of
    from nemo_ampo.rehearse.sizes import GB, MODELS, check_layout, hardware_of, layout_of, memory_of

    hardware, too_large = hardware_of(args.gpu), {}
    recipe = read_recipe(args.recipe, args.overrides)
    facts = MODELS["tiny"] if makes_start(recipe) else model_of(start_of(recipe), "")
    for name in TRAINING:
        if args.only and name not in args.only:
            continue
        stage: StageConfig = getattr(recipe, name)
        cfg = compose(name, stage.config, stage.overrides)
        layout = layout_of(name, cfg, args.ranks)
        check_layout(facts, layout.tensor, layout.pipeline, args.ranks)
        total = memory_of(name, cfg, facts, layout).total
        print(f"{name}: {total / GB:.1f} GB of {hardware.memory / GB:.0f} GB on the fullest {args.gpu}")
        if total > hardware.room:
            too_large[name] = stage.config
    for name, config in too_large.items():
        raise ConfigError(
            f"stage {name}: does not fit a GPU with a tenth to spare; lower {name}.model.tokens_per_micro_batch, or see "
            f"`nemo-ampo rehearse {name} --config-name {config} --search`; --force submits all the same"
        )


def line_of(stage: Stage, with_mpi: bool) -> str:
    """Name, processes, MPI, output and command of a stage, separated by tabs."""
    width = "all" if stage.name in TRAINING else "one"
    return "\t".join((stage.name, width, "mpi" if with_mpi else "plain", str(stage.output), *stage.command))


def plan_command(args: argparse.Namespace) -> None:
    """Print the stages; with ``--record`` also write the run folder's plan."""
    recipe = read_recipe(args.recipe, args.overrides)
    judge_url = args.judge_url or recipe.judge.base_url or "http://judge.invalid/v1"
    plan = stages_of(recipe, judge_url, args.rollout_url)
    if args.only:
        plan = [stage for stage in plan if stage.name.split("-")[0] in args.only]
    with_mpi = check_stage_configs(plan, args.ranks)
    if args.record:
        record(recipe)
    print("\n".join(line_of(stage, stage.name in with_mpi) for stage in plan))


def record(recipe: PipelineConfig) -> None:
    """The run folder's settings, and its plan for ``nemo-ampo status``."""
    folder = Path(recipe.run_dir)
    with hold_run(folder):
        remember(recipe)
        write_plan(folder, [PlannedStage(s.name, str(s.output), s.name in TRAINING) for s in stages_of(recipe, "")])


def show_command(args: argparse.Namespace) -> None:
    """Print the resolved recipe as YAML."""
    recipe = read_recipe(args.recipe, args.overrides)
    print(OmegaConf.to_yaml(OmegaConf.structured(recipe)), end="")


def get_command(args: argparse.Namespace) -> None:
    """Print what the shell needs to know of the recipe, one ``NAME=value`` a line."""
    recipe = read_recipe(args.recipe, args.overrides)
    if recipe.judge.mode is JudgeMode.demo:
        raise ConfigError("judge.mode: demo is for python -m recipes.pipeline; in a batch job it can be hetjob or external")
    limits = own_rollout_server(recipe)
    facts = {
        "RUN": recipe.run_dir,
        "RUN_GB": math.ceil(bytes_to_come(recipe) / 1e9),
        "JUDGE_MODE": recipe.judge.mode.value,
        "JUDGE_URL": recipe.judge.base_url or "",
        "JUDGE_PORT": recipe.judge.port,
        "JUDGE_START_S": recipe.judge.start_s,
        "ROLLOUT_MODEL": start_of(recipe) if limits else "",
        "ROLLOUT_PORT": recipe.rollout.port,
        "ROLLOUT_START_S": recipe.rollout.start_s,
        "ROLLOUT_LIMITS": limits.options if limits else "",
    }
    print("\n".join(f"{name}={value}" for name, value in facts.items()))


def begin_command(args: argparse.Namespace) -> None:
    """Note the start of an attempt; refuse one that would only repeat what failed."""
    AttemptLog(Path(args.run_dir)).begin(args.job, args.restart, args.max_restarts, Standing.of(Path(args.run_dir)))


def end_command(args: argparse.Namespace) -> None:
    """Note the end of an attempt and print ``requeue`` or why not."""
    folder = Path(args.run_dir)
    log = AttemptLog(folder)
    log.end(args.status, args.reason, Standing.of(folder))
    print(log.decide(args.max_restarts))


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line for the shell scripts; exit status 2 for what the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.slurm", description=__doc__.splitlines()[0] if __doc__ else None
    )
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    for name, function in (
        ("plan", plan_command),
        ("show", show_command),
        ("get", get_command),
        ("memory", memory_command),
    ):
        sub = command(name, function)
        sub.add_argument("recipe", type=typed_path)
        sub.add_argument("overrides", nargs="*", metavar="key=value")
        if name in ("plan", "memory"):
            sub.add_argument("--ranks", type=int, default=1, help="processes of a training stage")
            sub.add_argument("--only", nargs="*", help="stages, exports and evaluations without their policy's name")
        if name == "memory":
            sub.add_argument("--gpu", default="h100", help="kind of GPU")
        if name == "plan":
            sub.add_argument("--judge-url", default="", help="of a judge inside the job")
            sub.add_argument("--rollout-url", default="", help="of a rollout server inside the job")
            sub.add_argument("--record", action=argparse.BooleanOptionalAction, help="write the plan into the run folder")
    begin, end = command("begin", begin_command), command("end", end_command)
    for sub in (begin, end):
        sub.add_argument("run_dir")
        sub.add_argument("--max-restarts", type=int, default=20)
    begin.add_argument("--job", required=True)
    begin.add_argument("--restart", type=int, required=True)
    end.add_argument("--status", type=int, required=True)
    end.add_argument("--reason", required=True)
    # Overrides may stand behind options, where argparse leaves them over.
    args, more = parser.parse_known_args(argv)
    if more and ("overrides" not in args or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.overrides += more
    try:
        args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
