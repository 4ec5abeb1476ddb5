"""Our own configuration keys: a closed, typed tree. NeMo's ``trainer``, ``model`` and ``exp_manager`` pass through.

A recipe's YAML has our sections beside NeMo's. :func:`read_config` merges ours into the dataclasses below, where each
default stands once with its unit, so that a misspelt key or a wrong type stops the run before anything is loaded.
Section classes owned by a part (algorithm, judge, reward) are defined beside that part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_ampo.algorithm import KNOBS, AggregateOver, AlgorithmConfig, JudgeFailure, check_algorithm, preset_named
from nemo_ampo.checkpoint.config import CheckpointConfig
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import check_folder, file_name_problem, is_file, missing, no_model_folder
from nemo_ampo.guard import GuardConfig
from nemo_ampo.judge import JudgeConfig
from nemo_ampo.modes import bias_problem
from nemo_ampo.nemo_keys import check_nemo, check_schedule
from nemo_ampo.ranges import LARGEST_SEED, as_yaml, check_numbers, number, seconds
from nemo_ampo.rewards import RewardConfig
from nemo_ampo.rollout.config import RolloutConfig, check_rollout
from nemo_ampo.sotopia.config import SotopiaConfig
from nemo_ampo.training import WIDTH_MULTIPLE

NEMO_SECTIONS = ("trainer", "model", "exp_manager")
DEVICES = ("auto", "cpu", "gpu")
MOST_TOKENS = ("rollout.max_prompt_tokens", "rollout.max_new_tokens")
"""Of a row of the RL stage, together."""
SWITCHES = ("structured",)
"""Keys with the words `on` and `off`, which a bare YAML reads as truth values and their sections read back."""


@dataclass
class RunConfig:
    """Where a run lives and how it behaves.

    Attributes:
        dir: run folder; everything the run writes goes below it.
        seed: decides prompts, sampling and shuffling.
        device: auto, cpu or gpu.
        verbose: show the frameworks' own log lines.
        init_from: the ``.nemo`` the stage starts from.
        log_rollouts: samples written to ``rollouts.jsonl`` per step; -1 writes all of them.
        allow_changed: keys or sections in which a resumed run may differ from its checkpoint, such as
            ``[algorithm.kl_coef]``; see docs/checkpoints.md.
        wandb: copy the metrics to Weights & Biases; see :mod:`nemo_ampo.trackers`.
        mlflow: copy the metrics to MLflow.
        rank_timeout_s: seconds after which a rank that gives no sign of life, because its process is stopped or gone, is
            named and ends the job; computing and writing however long is no silence. 0 leaves it to torch's limits; see
            :mod:`nemo_ampo.watchdog`.
    """

    dir: str = MISSING
    seed: int = number(1, least=1, most=LARGEST_SEED)
    device: str = "auto"
    verbose: bool = False
    init_from: str = MISSING
    log_rollouts: int = number(-1, least=-1)
    allow_changed: list[str] = field(default_factory=list)
    wandb: bool = False
    mlflow: bool = False
    rank_timeout_s: float = seconds(300, above=False)


class OnTooLong(StrEnum):
    """What happens to a row longer than the limit."""

    error = "error"
    drop = "drop"


@dataclass
class BcDataConfig:
    """Rows of the behaviour-cloning stage.

    Attributes:
        train, heldout: JSON or JSONL with system, instruction, input, output.
        max_tokens: longest prompt plus reply, tokens.
        on_too_long: ``error`` or ``drop`` (counted in the log).
        heldout_replies: held-out prompts answered by the model at each validation to measure the share of valid replies.
        max_new_tokens: limit of those replies, tokens.
        allow_evaluation_scenarios: train on rows of SOTOPIA's evaluation situations all the same.
    """

    train: str = MISSING
    heldout: str = MISSING
    max_tokens: int = number(8192, least=1)
    on_too_long: OnTooLong = OnTooLong.error
    heldout_replies: int = number(64, least=0)
    max_new_tokens: int = number(2048, least=1)
    allow_evaluation_scenarios: bool = False


@dataclass
class AmpoDataConfig:
    """Dialogue turns of the RL stage.

    Attributes:
        train: rows in the published layout (JSON, JSONL or Parquet).
        sotopia_dir: a SOTOPIA folder; its opening turns become the rows when ``train`` is null.
        system_prompt: text file for rows without a ``system`` column; null takes the one stored with the BC checkpoint,
            or else the project's own.
        allow_evaluation_scenarios: train on rows of SOTOPIA's evaluation situations all the same.
    """

    train: str | None = None
    sotopia_dir: str | None = None
    system_prompt: str | None = None
    allow_evaluation_scenarios: bool = False


@dataclass
class EvaluateDataConfig:
    """Held-out turns to answer.

    Attributes:
        turns: rows in the published RL layout.
        limit: the first so many rows; -1 takes all.
        samples: answers drawn per row.
        system_prompt: as in the AMPO stage.
    """

    turns: str = MISSING
    limit: int = number(-1, least=1, or_else=(-1,))
    samples: int = number(1, least=1)
    system_prompt: str | None = None


@dataclass
class GenerateConfig:
    """How an exported checkpoint answers during evaluation.

    Attributes:
        max_new_tokens: limit, tokens.
        temperature: 0 takes the most likely token.
        batch_size: rows at once.
        mode_bias: the mode dial: mode to a number added to the logit of its digit where the mode is chosen; null for none.
    """

    max_new_tokens: int = number(2048, least=1)
    temperature: float = number(0.7, least=0, most=100)
    batch_size: int = number(64, least=1)
    mode_bias: dict[int, float] | None = number(None, least=-1e6, most=1e6, whole=False)


@dataclass
class EvaluateRunConfig:
    """Where an evaluation lives.

    Attributes:
        dir: results are written below it.
        name: label of the checkpoint in tables.
        checkpoint: Hugging Face folder.
        seed: of the sampling.
        device: auto, cpu or gpu.
    """

    dir: str = MISSING
    name: str = MISSING
    checkpoint: str = MISSING
    seed: int = number(1, least=0, most=LARGEST_SEED)
    device: str = "auto"


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


@dataclass
class EvaluateConfig:
    """Evaluation of an exported checkpoint."""

    run: EvaluateRunConfig
    data: EvaluateDataConfig
    generate: GenerateConfig
    reward: RewardConfig
    judge: JudgeConfig


STAGES: dict[str, type[Any]] = {"bc": BcConfig, "ampo": AmpoConfig, "evaluate": EvaluateConfig, "sotopia": SotopiaConfig}


C = TypeVar("C", BcConfig, AmpoConfig, EvaluateConfig, SotopiaConfig)


def read_config(raw: DictConfig, schema: type[C]) -> C:
    """Our sections of a composed Hydra config as typed objects.

    Args:
        raw: composed config; NeMo's sections are left alone.
        schema: one of the stage classes.

    Raises:
        ConfigError: unknown section or key, wrong type, or a required key without a value.
    """
    ours = {f.name for f in fields(schema)}
    unknown = sorted(set(map(str, raw)) - ours - set(NEMO_SECTIONS))
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: unknown section; this stage has {', '.join(sorted(ours))} and NeMo's {', '.join(NEMO_SECTIONS)}"
        )
    return schema(**{f.name: read_section(f.name, f.type, raw.get(f.name)) for f in fields(_resolved(schema))})


def read_section(name: str, section: Any, given: Any) -> Any:
    """One section as an object, its numbers within their ranges.

    Raises:
        ConfigError: as :func:`read_config`.
    """
    _no_endless_integer(name, given)
    try:
        values = _section(name, section, given)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or name)
        # Inside a list OmegaConf forgets where it is.
        where = key if key.partition(".")[0] == name else f"{name}, {key}"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
    check_numbers(name, values)
    return values


def _no_endless_integer(key: str, value: Any) -> None:
    """Python's integers have no end; one that is no float ends OmegaConf with an error that names no key."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _no_endless_integer(f"{key}.{name}", inner)
    elif isinstance(value, int) and abs(value) > 2**64:
        raise ConfigError(f"{key}: a number of {len(str(abs(value)))} digits is too large")


def default_keys(schema: type[Any]) -> dict[str, Any]:
    """Every key of a stage with its default, ``???`` where a value is required; the YAML files build on this."""
    keys: dict[str, Any] = {
        f.name: OmegaConf.to_container(OmegaConf.structured(f.type), enum_to_str=True) for f in fields(_resolved(schema))
    }
    if "algorithm" in keys:
        # Whatever is written over these wins over the preset, wherever the preset is named.
        keys["algorithm"] |= {knob: f"${{algorithm_preset:{knob}}}" for knob in KNOBS}
    return keys


def _knob_of_preset(knob: str, *, _root_: DictConfig) -> Any:
    value = getattr(preset_named(_root_.algorithm.preset), knob)
    return value.value if isinstance(value, StrEnum) else value


OmegaConf.register_new_resolver("algorithm_preset", _knob_of_preset, replace=True)


def fill_preset(cfg: DictConfig) -> None:
    """Put the preset's values where a composed config names none, in place, so that whoever prints it sees numbers.

    Raises:
        ConfigError: unknown preset.
    """
    if "algorithm" in cfg:
        preset_named(cfg.algorithm.preset)
        OmegaConf.resolve(cfg.algorithm)


def _section(name: str, section: Any, given: Any) -> Any:
    given = given if given is not None else {}
    if section is AlgorithmConfig:
        given = dict(given)
        section = preset_named(given.get("preset", section.preset))
        # YAML reads a bare `off` as false.
        given |= {key: "off" for key in ("kl", "mismatch") if given.get(key) is False}
    typed = OmegaConf.create({name: OmegaConf.structured(section)})
    _refuse_numbers_as_text(name, section if isinstance(section, type) else type(section), given)
    # Frozen classes come out read-only; they are frozen again once they are objects.
    OmegaConf.set_readonly(typed[name], False)
    merged = OmegaConf.merge(typed, {name: given})
    missing = OmegaConf.missing_keys(merged)
    if missing:
        raise ConfigError(f"{sorted(missing)[0]}: a value is required")
    return OmegaConf.to_object(merged)[name]  # type: ignore[index, call-overload]


def _refuse_numbers_as_text(name: str, section: Any, given: Any) -> None:
    """YAML reads ``2024_01`` as 202401 and ``yes`` as true, which as text are other words than those that were written."""
    hints = get_type_hints(section)
    plain: Any = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    for key, value in plain.items() if isinstance(plain, dict) else ():
        hint = hints.get(str(key))
        if is_dataclass(hint):
            _refuse_numbers_as_text(f"{name}.{key}", hint, value)
        elif (
            isinstance(value, int | float)
            and hint in (str, str | None)
            and not (isinstance(value, bool) and key in SWITCHES)
        ):
            raise ConfigError(f"{name}.{key}: YAML reads {as_yaml(value)} where text is expected; put quotes around it")


def _resolved(schema: type[Any]) -> type[Any]:
    """The class with its annotations as types instead of strings."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        f.type = hints[f.name]
    return schema


def check_bc(config: BcConfig, nemo: DictConfig, world_size: int) -> None:
    """Rules between keys of the BC stage; see :func:`check_ampo` for the arguments.

    Raises:
        ConfigError: naming the key.
    """
    _check_training(config.run, config.checkpoint, nemo, "bc")
    data_parallel_size(nemo, world_size)
    sft = nemo.trainer.sft
    check_steps(nemo, None if isinstance(sft.limit_train_batches, float) else sft.limit_train_batches)
    _file("run.init_from", config.run.init_from)
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
    _file("run.init_from", config.run.init_from)
    if (config.data.train is None) == (config.data.sotopia_dir is None):
        raise ConfigError("data.train, data.sotopia_dir: give exactly one of the two")
    if config.data.train is not None:
        _file("data.train", config.data.train)
    if config.data.system_prompt is not None:
        _file("data.system_prompt", config.data.system_prompt)
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
    for key, path in (("run.dir", run.dir), ("run.init_from", run.init_from)):
        if "${" in path:
            raise ConfigError(f"{key}: {path} holds ${{, which NeMo would take for an interpolation; choose another name")
    if checkpoint.dir is not None:
        check_folder("checkpoint.dir", checkpoint.dir)
    if nemo.model.megatron_amp_O2 and not str(nemo.trainer.precision).startswith("bf16"):
        raise ConfigError(
            f"model.megatron_amp_O2: keeps the weights in half precision; set it to false with "
            f"trainer.precision={nemo.trainer.precision}"
        )
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
        _file("data.system_prompt", config.data.system_prompt)
    if not is_file(Path(config.run.checkpoint) / "config.json"):
        raise ConfigError(f"run.checkpoint: {no_model_folder(config.run.checkpoint)}")
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
    if isinstance(config, AmpoConfig):
        longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
        if longest > model["max_position_embeddings"]:
            raise ConfigError(
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the model's "
                f"{model['max_position_embeddings']} positions"
            )


def _file(key: str, path: str) -> None:
    if not is_file(path):
        raise ConfigError(f"{key}: {missing(path)}")
