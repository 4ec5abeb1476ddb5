"""What the stages of a batch job are checked for, and what they take, before anything is submitted or started."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import ConfigError, DiskError, UserError
from nemo_ampo.output.staging import place_with_room
from nemo_ampo.overrides import dotted
from recipes.batch_recipe import TRAINING, PipelineConfig, StageConfig, makes_start, start_of
from recipes.cluster import APPTAINER, NO_CONTAINER, Site
from recipes.stages import Stage

if TYPE_CHECKING:
    from nemo_ampo.rehearse.sizes import Memory


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
    from omegaconf import OmegaConf

    from nemo_ampo.config.check import check_stage
    from nemo_ampo.config.compose import compose
    from nemo_ampo.config.stages import STAGES

    with_mpi = set()
    for stage in plan:
        name = stage.command[0].removeprefix("recipes.")
        if name not in STAGES:
            if site is not None:
                for word in stage.command[1:]:
                    _check_shown(f"stage {stage.name}: ", word, site)
            continue
        try:
            raw = compose(name, stage.command[2], stage.command[3:])
            check_stage(name, raw, ranks if name in TRAINING else 1, files=False)
            if site is not None:
                for key, value in dotted(OmegaConf.to_container(raw, resolve=True)):
                    _check_shown(f"{key}: ", value, site)
                if not site.gpus_per_node and name in TRAINING:
                    _check_cpu(raw)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
        if "rollout" in raw and raw.rollout.engine == "trtllm":
            with_mpi.add(stage.name)
    return with_mpi


def _check_shown(what: str, value: Any, site: Site) -> None:
    """Is a path the same file in the job's containers? Any text may be one; what lies nowhere on this machine is none."""
    if not isinstance(value, str) or "/" not in value or "://" in value:
        return
    path = site.root / value
    there = path.exists() or any(parent.exists() for parent in path.parents[:-1])
    if there and not site.shows(path):
        folder = path.resolve().parent
        raise ConfigError(
            f"{what}{value} is not seen in the container, which shows {site.root}"
            f"{' and ' + site.mounts if site.mounts else ''}; add {folder}:{folder} to AMPO_MOUNTS"
            + ("" if Path(value).resolve().parent == Path(value).parent else ", and name the file by its place there")
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
    """A job takes more memory or disk than there is."""


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
        filled = memory_of(name, cfg, facts, layout)
        yield f"{name}: {filled.total / GB:.1f} GB of {hardware.memory / GB:.0f} GB on the fullest {site.gpu_kind}"
        if filled.total > hardware.room:
            too_large[name] = filled
    for name, filled in too_large.items():
        config = getattr(recipe, name)
        words = ["nemo-ampo", "rehearse", name, "--config-name", config.config, "--nodes", str(site.nodes)]
        words += ["--gpus", str(site.ranks_per_node), "--gpu", site.gpu_kind, "--search"]
        words += [] if makes_start(recipe) else ["--model", str(start_of(recipe))]
        raise DoesNotFitError(
            f"stage {name}: does not fit a GPU with a tenth to spare; {memory_cure(name, filled, hardware.room)}, or see "
            f"`{shlex.join([*words, *config.overrides])}`; --force submits all the same"
        )


def memory_cure(stage: str, filled: Memory, room: float) -> str:
    """What makes a stage fit that fills more than ``room`` bytes, by the part that takes them."""
    held = filled.weights + filled.gradients + filled.optimizer
    if held > room:
        return (
            f"weights, gradients and optimizer alone are {held / 1e9:.0f} GB: raise {stage}.model."
            "tensor_model_parallel_size or pipeline_model_parallel_size, or take more nodes"
        )
    if filled.engine > max(filled.activations + filled.loss, filled.scoring):
        return f"the engine takes {filled.engine / 1e9:.0f} GB: lower {stage}.rollout.batch_size"
    return f"lower {stage}.model.tokens_per_micro_batch"


def check_submission(recipe: PipelineConfig, only: Sequence[str], site: Site) -> None:
    """What a job would miss that this machine can already tell: keys of the judge, images.

    Raises:
        ConfigError: naming the variable.
    """
    from nemo_ampo.config.compose import compose

    for name in ("ampo", "evaluate"):
        stage: StageConfig = getattr(recipe, name)
        if only and name not in only:
            continue
        variable = compose(name, stage.config, stage.overrides).judge.api_key_env
        if variable and not os.environ.get(variable, "").strip():
            raise ConfigError(
                f"stage {name}: judge.api_key_env: environment variable {variable} is not set; export it before you "
                f"submit, or say {name}.judge.api_key_env= where the judge wants no key"
            )
    for variable, image in (("AMPO_IMAGE", site.image), ("AMPO_JUDGE_IMAGE", site.judge_image)):
        is_path = image.startswith(("/", ".")) or image.endswith((".sqsh", ".sif"))
        if site.container != NO_CONTAINER and is_path and not (site.root / image).exists():
            raise ConfigError(f"{variable}: {image} does not exist; docs/slurm.md says how it is made")
        if site.container == APPTAINER and image.endswith(".sqsh"):
            raise ConfigError(f"{variable}: {image} is an image of enroot's; Apptainer takes a .sif")


def check_disk(recipe: PipelineConfig, site: Site) -> None:
    """Is there room for what the run may still write?

    Raises:
        DoesNotFitError: there is not.
    """
    needed = bytes_to_come(recipe) if site.min_free_gb is None else site.min_free_gb * 1e9
    try:
        place_with_room([site.root / recipe.run_dir], int(needed), f"run_dir {recipe.run_dir}")
    except DiskError as error:
        raise DoesNotFitError(f"{error} (AMPO_MIN_FREE_GB asks for less; --force submits all the same)") from None
