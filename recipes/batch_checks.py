"""What the stages of a batch job are checked for, and what they take, before anything is submitted or started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_ampo.errors import ConfigError, UserError
from recipes.batch_recipe import TRAINING, PipelineConfig, StageConfig, makes_start, start_of
from recipes.stages import Stage


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


def memory(recipe: PipelineConfig, only: Sequence[str], ranks: int, gpu: str) -> Iterator[str]:
    """What each training stage fills of a GPU, a line each; the same as ``nemo-ampo plan``.

    Args:
        recipe: checked.
        only: stages asked for; empty for all.
        ranks: processes of a training stage.
        gpu: kind of GPU.

    Raises:
        ConfigError: behind the last line, when a stage does not fit.
    """
    from nemo_ampo.config.compose import compose
    from nemo_ampo.job.plan import model_of
    from nemo_ampo.rehearse.sizes import GB, MODELS, check_layout, hardware_of, layout_of, memory_of

    hardware, too_large = hardware_of(gpu), {}
    facts = MODELS["tiny"] if makes_start(recipe) else model_of(start_of(recipe), "")
    for name in TRAINING:
        if only and name not in only:
            continue
        stage: StageConfig = getattr(recipe, name)
        cfg = compose(name, stage.config, stage.overrides)
        layout = layout_of(name, cfg, ranks)
        check_layout(facts, layout.tensor, layout.pipeline, ranks)
        total = memory_of(name, cfg, facts, layout).total
        yield f"{name}: {total / GB:.1f} GB of {hardware.memory / GB:.0f} GB on the fullest {gpu}"
        if total > hardware.room:
            too_large[name] = stage.config
    for name, config in too_large.items():
        raise ConfigError(
            f"stage {name}: does not fit a GPU with a tenth to spare; lower {name}.model.tokens_per_micro_batch, or see "
            f"`nemo-ampo rehearse {name} --config-name {config} --search`; --force submits all the same"
        )
