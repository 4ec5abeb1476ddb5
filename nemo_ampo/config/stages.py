"""Our own configuration keys: a closed, typed tree. NeMo's ``trainer``, ``model`` and ``exp_manager`` pass through.

A recipe's YAML has our sections beside NeMo's. :func:`~nemo_ampo.config.reading.read_config` merges ours into the
dataclasses below. Each section stands in its room's ``config.py`` (the algorithm's beside their formulas), each default
once with its unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.algo.algorithm import AggregateOver, AlgorithmConfig, JudgeFailure, check_algorithm
from nemo_ampo.algo.guard import GuardConfig
from nemo_ampo.algo.rewards import RewardConfig
from nemo_ampo.checkpoint.config import CheckpointConfig
from nemo_ampo.config.nemo_keys import GPU_FUSIONS, check_nemo, check_schedule
from nemo_ampo.data.config import AmpoDataConfig, BcDataConfig
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.evaluate.config import EvaluateConfig
from nemo_ampo.files import check_folder, file_name_problem, is_file, is_folder, missing, no_model_folder, read_text
from nemo_ampo.judge.config import JudgeConfig, check_judge
from nemo_ampo.megatron import WIDTH_MULTIPLE
from nemo_ampo.reply.modes import bias_problem
from nemo_ampo.rollout.config import RolloutConfig, check_rollout
from nemo_ampo.run.config import RunConfig
from nemo_ampo.sotopia.config import SotopiaConfig, check_sotopia

DEVICES = ("auto", "cpu", "gpu")
MOST_TOKENS = ("rollout.max_prompt_tokens", "rollout.max_new_tokens")
"""Of a row of the RL stage, together."""


@dataclass
class BcConfig:
    """Behaviour cloning."""

    run: RunConfig
    data: BcDataConfig
    checkpoint: CheckpointConfig


@dataclass
class AmpoConfig:
    """Adaptive mode policy optimisation."""

    run: RunConfig
    data: AmpoDataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    algorithm: AlgorithmConfig
    guard: GuardConfig
    judge: JudgeConfig
    checkpoint: CheckpointConfig


def check_bc(config: BcConfig, nemo: DictConfig, world_size: int) -> None:
    """Rules between keys of the BC stage; see :func:`check_ampo` for the arguments.

    Raises:
        ConfigError: naming the key.
    """
    _check_training(config.run, config.checkpoint, nemo, "bc")
    data_parallel_size(nemo, world_size)
    sft = nemo.trainer.sft
    check_steps(nemo, None if isinstance(sft.limit_train_batches, float) else sft.limit_train_batches)
    check_start(config.run.init_from)
    _file("data.train", config.data.train)
    _file("data.heldout", config.data.heldout)


def check_ampo(config: AmpoConfig, nemo: DictConfig, world_size: int) -> None:
    """Rules between keys of the AMPO stage.

    Args:
        config: our part.
        nemo: the whole composed config, for the keys NeMo owns.
        world_size: number of ranks.

    Raises:
        ConfigError: naming the key.
    """
    _check_training(config.run, config.checkpoint, nemo, "ampo")
    check_schedule(nemo.model.optim, nemo.trainer.reinforce.max_steps)
    check_algorithm(config.algorithm)
    check_rollout(config.rollout)
    check_judge(config.judge)
    check_start(config.run.init_from)
    if (config.data.train is None) == (config.data.sotopia_dir is None):
        raise ConfigError("data.train, data.sotopia_dir: give exactly one of the two")
    if config.data.train is not None:
        _file("data.train", config.data.train)
    if config.data.system_prompt is not None:
        _text_file("data.system_prompt", config.data.system_prompt)
    rollout = config.rollout
    if rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size: {config.algorithm.advantage} compares responses within a group and needs at least 2, "
            f"got {rollout.group_size}"
        )
    if config.guard.min_valid > rollout.group_size:
        raise ConfigError(
            f"guard.min_valid: {config.guard.min_valid} exceeds rollout.group_size={rollout.group_size}; every group would "
            "be skipped"
        )
    if rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature: log-probabilities are computed at temperature 1.0, got {rollout.temperature}; the "
            "ratio of new to old policy would be wrong"
        )
    if config.algorithm.judge_failure == JudgeFailure.zero and config.guard.min_valid != GuardConfig.min_valid:
        raise ConfigError(
            f"guard.min_valid: {config.guard.min_valid} has no effect with algorithm.judge_failure=zero: every sample has a "
            "reward"
        )
    if nemo.model.tokens_per_micro_batch and config.algorithm.aggregate_over != AggregateOver.batch:
        raise ConfigError(
            f"model.tokens_per_micro_batch: with algorithm.aggregate_over={config.algorithm.aggregate_over} the loss would "
            "depend on which rows the budget puts together; set algorithm.aggregate_over=batch"
        )
    data_size = data_parallel_size(nemo, world_size)
    samples, global_batch = rollout.prompts_per_step * rollout.group_size, nemo.model.global_batch_size
    if samples % global_batch:
        raise ConfigError(
            f"model.global_batch_size: {global_batch} does not divide the {samples} samples of a step "
            "(rollout.prompts_per_step x rollout.group_size)"
        )
    forward = nemo.model.reinforce.forward_micro_batch_size
    if (samples // data_size) % forward:
        raise ConfigError(
            f"model.reinforce.forward_micro_batch_size: {forward} does not divide the {samples // data_size} samples "
            "of one data-parallel rank"
        )


def data_parallel_size(nemo: DictConfig, world_size: int) -> int:
    """Replicas of the model in this job.

    Raises:
        ConfigError: the ranks or the batch cannot be shared among them.
    """
    model = nemo.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if world_size % replica:
        raise ConfigError(
            f"model.tensor_model_parallel_size x model.pipeline_model_parallel_size = {replica} does not divide the "
            f"{world_size} ranks of this job"
        )
    data_size = world_size // replica
    _check_token_budget(nemo)
    if model.global_batch_size % (model.micro_batch_size * data_size):
        raise ConfigError(
            f"model.global_batch_size: {model.global_batch_size} is no multiple of "
            f"model.micro_batch_size={model.micro_batch_size} times {data_size} data-parallel ranks"
        )
    return data_size


def _check_token_budget(nemo: DictConfig) -> None:
    """With ``model.tokens_per_micro_batch`` no other key says how many rows go together."""
    budget = nemo.model.tokens_per_micro_batch
    if not budget:
        return
    for key in (
        "model.micro_batch_size",
        "model.reinforce.forward_micro_batch_size",
        "model.data.validation_ds.micro_batch_size",
    ):
        rows = OmegaConf.select(nemo, key)
        if rows not in (None, 1):
            raise ConfigError(f"{key}: {rows} has no effect with model.tokens_per_micro_batch={budget}; set it to 1")
    longest = sum(OmegaConf.select(nemo, key) or 0 for key in ("data.max_tokens", *MOST_TOKENS))
    needed = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if budget < needed:
        limit = "data.max_tokens" if "rollout" not in nemo else " + ".join(MOST_TOKENS)
        raise ConfigError(
            f"model.tokens_per_micro_batch: {budget} does not hold one row of {limit}; needs at least {needed}"
        )


def _check_training(run: RunConfig, checkpoint: CheckpointConfig, nemo: DictConfig, stage: str) -> None:
    """Rules that both training stages share."""
    check_nemo(nemo, stage)
    _device(run.device)
    check_folder("run.dir", run.dir)
    if checkpoint.dir is not None:
        check_folder("checkpoint.dir", checkpoint.dir)
    if nemo.model.megatron_amp_O2 and not str(nemo.trainer.precision).startswith("bf16"):
        raise ConfigError(
            f"model.megatron_amp_O2: keeps the weights in half precision; set it to false with "
            f"trainer.precision={nemo.trainer.precision}"
        )
    check_device(nemo, run.device)
    if nemo.model.sequence_parallel and nemo.model.tensor_model_parallel_size == 1:
        raise ConfigError("model.sequence_parallel: needs model.tensor_model_parallel_size of at least 2")
    granularity, method, layers = (
        nemo.model[f"activations_checkpoint_{key}"] for key in ("granularity", "method", "num_layers")
    )
    if granularity == "full" and (method is None or layers is None):
        raise ConfigError(
            "model.activations_checkpoint_granularity: full needs model.activations_checkpoint_method and "
            "model.activations_checkpoint_num_layers"
        )
    for key, value in (("method", method), ("num_layers", layers)):
        if granularity != "full" and value is not None:
            raise ConfigError(
                f"model.activations_checkpoint_{key}: {value} is for model.activations_checkpoint_granularity=full, "
                f"got {granularity}"
            )


def check_device(nemo: DictConfig, device: str) -> None:
    """Can the device do, and would it do, what NeMo's keys ask of it?

    Args:
        nemo: the whole composed config.
        device: ``cpu``, ``gpu``, or ``auto`` while that is not known.

    Raises:
        ConfigError: naming the keys.
    """
    if device == "cpu" and str(nemo.trainer.precision).startswith("bf16") and not nemo.model.megatron_amp_O2:
        raise ConfigError(
            f"trainer.precision: on a CPU, {nemo.trainer.precision} computes in 32 bits without model.megatron_amp_O2=true; "
            "set that, or trainer.precision=32"
        )
    if device == "cpu" and nemo.model.sequence_parallel:
        raise ConfigError("model.sequence_parallel: needs Transformer Engine's layers, which a CPU has not; set it to false")
    for key in GPU_FUSIONS:
        if device == "cpu" and nemo.model.get(key):
            raise ConfigError(f"model.{key}: needs extensions compiled for a GPU; leave it out on a CPU")


def check_steps(nemo: DictConfig, steps_per_epoch: int | None) -> None:
    """Rules between the intervals of the BC stage, as far as they can be known.

    Args:
        nemo: the whole composed config.
        steps_per_epoch: of the rows; None before they are read.

    Raises:
        ConfigError: naming the key.
    """
    sft = nemo.trainer.sft
    if steps_per_epoch is not None and isinstance(sft.limit_train_batches, float):
        steps_per_epoch = int(steps_per_epoch * sft.limit_train_batches)
        if steps_per_epoch < 1:
            raise ConfigError(f"trainer.sft.limit_train_batches: {sft.limit_train_batches} of an epoch is not one step")
    every = sft.val_check_interval
    if isinstance(every, float):
        if steps_per_epoch is None:
            return
        every = int(every * steps_per_epoch)
        if every < 1:
            raise ConfigError(f"trainer.sft.val_check_interval: {sft.val_check_interval} of an epoch is not one step")
    if every and sft.save_interval % every:
        raise ConfigError(
            f"trainer.sft.save_interval: {sft.save_interval} is no multiple of trainer.sft.val_check_interval={every}; what "
            "is saved must have been validated"
        )
    known = None if steps_per_epoch is None else steps_per_epoch * sft.max_epochs
    check_schedule(nemo.model.optim, sft.max_steps if sft.max_steps > 0 else known)


def _device(device: str) -> None:
    if device not in DEVICES:
        raise ConfigError(f"run.device: expected {', '.join(DEVICES)}, got {device!r}")


def check_evaluate(config: EvaluateConfig, raw: DictConfig) -> None:
    """Rules between keys of the evaluation stage.

    Args:
        config: the composed config as objects.
        raw: the composed config.

    Raises:
        ConfigError: naming the key.
    """
    _device(config.run.device)
    problem = file_name_problem(raw.run.name)
    if raw.run.name == "provenance":
        problem = "stands for another file of a run folder; choose another name"
    if problem is not None:
        raise ConfigError(f"run.name: {problem}")
    check_folder("run.dir", config.run.dir)
    _file("data.turns", config.data.turns)
    if config.data.system_prompt is not None:
        _text_file("data.system_prompt", config.data.system_prompt)
    if not is_file(Path(config.run.checkpoint) / "config.json"):
        raise ConfigError(f"run.checkpoint: {no_model_folder(config.run.checkpoint)}")
    check_judge(config.judge)
    problem = bias_problem(config.generate.mode_bias or {})
    if problem is not None:
        raise ConfigError(f"generate.mode_bias: {problem}")


def check_parallel_layout(model: dict[str, Any], tensor: int, pipeline: int) -> None:
    """Can this model be split like that?

    Args:
        model: NeMo model config of the checkpoint.
        tensor, pipeline: parallel sizes asked for.

    Raises:
        ConfigError: naming the key, the size and what it does not divide.
    """
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        count = model.get(key)
        if count is not None and int(count) % tensor:
            raise ConfigError(f"model.tensor_model_parallel_size: {tensor} does not divide {key}={count}")
    if int(model["num_layers"]) % pipeline:
        raise ConfigError(f"model.pipeline_model_parallel_size: {pipeline} does not divide num_layers={model['num_layers']}")


def check_model(config: BcConfig | AmpoConfig, nemo: DictConfig, model: dict[str, Any]) -> None:
    """Does the model that a training stage starts from fit its layout and lengths?

    Args:
        config: our part.
        nemo: the whole composed config.
        model: NeMo model config of the checkpoint.

    Raises:
        ConfigError: naming the key.
    """
    check_parallel_layout(model, nemo.model.tensor_model_parallel_size, nemo.model.pipeline_model_parallel_size)
    layers = int(model["num_layers"]) // nemo.model.pipeline_model_parallel_size
    recomputed = nemo.model.activations_checkpoint_num_layers
    if nemo.model.activations_checkpoint_method == "uniform" and layers % recomputed:
        raise ConfigError(
            f"model.activations_checkpoint_num_layers: {recomputed} does not divide the {layers} layers of a pipeline stage"
        )
    if isinstance(config, AmpoConfig):
        longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
        most = int(model["max_position_embeddings"])
        if longest > most:
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the model's {most} positions"
            )


def check_start(path: str) -> None:
    """``run.init_from``: something has to be there; what it is, its reader says.

    Raises:
        ConfigError: nothing is.
    """
    if not is_folder(path):
        _file("run.init_from", path)


def _file(key: str, path: str) -> None:
    if not is_file(path):
        raise ConfigError(f"{key}: {missing(path)}")


def _text_file(key: str, path: str) -> None:
    _file(key, path)
    try:
        read_text(Path(path))
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None


@dataclass(frozen=True)
class StageKeys:
    """What a stage's YAML may say.

    Attributes:
        schema: dataclass of our sections.
        check: rules between keys and files they name, of the typed config, the whole composed one, and the number of ranks;
            raises ConfigError.
    """

    schema: type[Any]
    check: Callable[[Any, DictConfig, int], None]


STAGES = {
    "bc": StageKeys(BcConfig, check_bc),
    "ampo": StageKeys(AmpoConfig, check_ampo),
    "evaluate": StageKeys(EvaluateConfig, lambda config, raw, _: check_evaluate(config, raw)),
    "sotopia": StageKeys(SotopiaConfig, lambda config, _raw, _ranks: check_sotopia(config)),
}
