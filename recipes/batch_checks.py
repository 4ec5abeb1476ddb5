"""What the stages of a batch job are checked for, and what they take, before anything is submitted or started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.overrides import dotted
from recipes.batch_recipe import TRAINING, PipelineConfig, StageConfig, makes_start, start_of
from recipes.cluster import Site
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


def check_stage_configs(plan: Sequence[Stage], ranks: int, site: Site | None = None) -> set[str]:
    """Compose the configuration of every stage, so that a wrong key stops the job before anything runs, not hours later.

    Args:
        plan: stages to check.
        ranks: processes of a training stage.
        site: the cluster, where it is known: whether it has GPUs, and which files its containers show.

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
            if site is not None:
                _check_shown(raw, site)
                if not site.gpus_per_node and name in TRAINING:
                    _check_cpu(raw)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
        if "rollout" in raw and raw.rollout.engine == "trtllm":
            with_mpi.add(stage.name)
    return with_mpi


def _check_shown(raw: Any, site: Site) -> None:
    from omegaconf import OmegaConf

    for key, value in dotted(OmegaConf.to_container(raw, resolve=True)):
        if not (isinstance(value, str) and value.startswith("/")):
            continue
        path = Path(value)
        if not site.shows(path) and (path.exists() or key == "run.dir"):
            raise ConfigError(
                f"{key}: {value} is not seen in the container, which shows {site.root}"
                f"{' and ' + site.mounts if site.mounts else ''}; add {path.parent.resolve()}:{path.parent} to AMPO_MOUNTS"
            )


def _check_cpu(raw: Any) -> None:
    from nemo_ampo.config.stages import check_device

    try:
        check_device(raw, "cpu")
    except ConfigError as error:
        raise ConfigError(f"{error}; or is AMPO_GPUS_PER_NODE missing?") from None


def check_demo_judge(recipe: PipelineConfig) -> None:
    """The embedded judge answers for no other model.

    Raises:
        ConfigError: a stage asks for one.
    """
    from nemo_ampo.config.compose import compose
    from nemo_ampo.world import DEMO_JUDGE

    for name, stage in (("ampo", recipe.ampo), ("evaluate", recipe.evaluate)):
        model = recipe.judge.model or compose(name, stage.config, stage.overrides).judge.model
        if model != DEMO_JUDGE:
            raise ConfigError(
                f"stage {name}: judge.model: without AMPO_JUDGE_COMMAND the demo judge runs, which is not {model}; set that "
                f"command, or judge.model={DEMO_JUDGE}"
            )


class DoesNotFitError(ConfigError):
    """A stage takes more memory than its GPUs have."""


def memory(recipe: PipelineConfig, only: Sequence[str], site: Site) -> Iterator[str]:
    """What each training stage fills of a GPU, a line each; the same as ``nemo-ampo plan``.

    Args:
        recipe: checked.
        only: stages asked for; empty for all.
        site: the cluster.

    Raises:
        DoesNotFitError: behind the last line, when a stage does not.
        ConfigError: its layout does not divide the model, or there is no such GPU.
    """
    from nemo_ampo.config.compose import compose
    from nemo_ampo.job.plan import model_of
    from nemo_ampo.rehearse.sizes import GB, HARDWARE, MODELS, check_layout, layout_of, memory_of

    if site.gpu_kind not in HARDWARE:
        raise ConfigError(f"AMPO_GPU_KIND: expected one of {', '.join(HARDWARE)}, got {site.gpu_kind!r}")
    hardware, ranks, too_large = HARDWARE[site.gpu_kind], site.nodes * site.ranks_per_node, {}
    facts = MODELS["tiny"] if makes_start(recipe) else model_of(start_of(recipe), "")
    for name in TRAINING:
        if only and name not in only:
            continue
        stage: StageConfig = getattr(recipe, name)
        cfg = compose(name, stage.config, stage.overrides)
        layout = layout_of(name, cfg, ranks)
        try:
            check_layout(facts, layout.tensor, layout.pipeline, ranks)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}") from None
        total = memory_of(name, cfg, facts, layout).total
        yield f"{name}: {total / GB:.1f} GB of {hardware.memory / GB:.0f} GB on the fullest {site.gpu_kind}"
        if total > hardware.room:
            too_large[name] = stage.config
    for name, config in too_large.items():
        layout_options = f"--nodes {site.nodes} --gpus {site.ranks_per_node} --gpu {site.gpu_kind}"
        raise DoesNotFitError(
            f"stage {name}: does not fit a GPU with a tenth to spare; lower {name}.model.tokens_per_micro_batch, or see "
            f"`nemo-ampo rehearse {name} --config-name {config} {layout_options} --search`; --force submits all the same"
        )
