"""What NeMo's own keys may hold: one rule for each key of ``configs/<stage>/base.yaml``.

What NeMo, Lightning or Megatron would refuse after the model is loaded, or never read, is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.config.typed import plain
from nemo_ampo.errors import ConfigError
from nemo_ampo.overrides import dotted
from nemo_ampo.ranges import LARGEST_SEED, Range, as_yaml, check_leaf, told


class Rule(Protocol):
    """The values of one key; as text it completes "must be"."""

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""


@dataclass(frozen=True)
class Choice:
    """One of a few values, of the same type."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)

    def __str__(self) -> str:
        return " or ".join(as_yaml(value) for value in self.values)


@dataclass(frozen=True)
class Only:
    """One value; any other would be overwritten or never read."""

    value: Any
    because: str

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        return bool(value == self.value) and (
            type(value) is type(self.value) or (value == 0 and not isinstance(value, bool))
        )

    def __str__(self) -> str:
        return f"{as_yaml(self.value)} ({self.because})"


@dataclass(frozen=True)
class SameAs:
    """The value of another key, which is the one to set.

    Attributes:
        key: the other one.
        rule: what NeMo needs of it, where text that reads as a number is not enough.
    """

    key: str
    rule: Rule | None = None


@dataclass(frozen=True)
class Share:
    """Steps: so many, or as a float that part of an epoch.

    Attributes:
        least: smallest number of steps.
    """

    least: int

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        return Range(self.least).holds(value) or (isinstance(value, float) and 0 < value <= 1)

    def __str__(self) -> str:
        return f"a whole number of at least {self.least} (steps), or a part of an epoch, 0.0 to 1.0"


@dataclass(frozen=True)
class Pair:
    """A list of two numbers."""

    each: Range

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        return isinstance(value, list) and len(value) == 2 and all(map(self.each.holds, value))

    def __str__(self) -> str:
        return f"two of {self.each}"


@dataclass(frozen=True)
class Duration:
    """Text that Lightning and NeMo-Aligner both read as a time."""

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        if value is None:
            return True
        parts = re.fullmatch(r"([0-9]{1,5}):([0-9]{2}):([0-9]{2}):([0-9]{2})", value) if isinstance(value, str) else None
        return parts is not None and any(map(int, parts.groups()))

    def __str__(self) -> str:
        return "null or days:hours:minutes:seconds with two digits each, such as '00:03:50:00', quoted in a file"


_FLAG = Choice((True, False))
_OURS = "our run log and trackers do this"
_LAYOUT = "torchrun and run.device decide it"
_POSITIVE = Range(0, whole=False, above=True)

_TRAINING: dict[str, Rule | SameAs] = {
    "trainer.num_nodes": Only(1, _LAYOUT),
    "trainer.devices": Only(1, _LAYOUT),
    "trainer.accelerator": Only("cpu", _LAYOUT),
    "trainer.precision": Choice((32, "32", "32-true", "bf16", "bf16-mixed")),
    "trainer.logger": Only(False, _OURS),
    "trainer.enable_checkpointing": Only(False, "section checkpoint does this"),
    "trainer.use_distributed_sampler": Only(False, "our batches are spread already"),
    "trainer.max_time": Only(None, "exp_manager.max_time_per_run is what ends a run"),
    "exp_manager.explicit_log_dir": Only(None, "run.dir decides it"),
    "exp_manager.exp_dir": Only(None, "run.dir decides it"),
    "exp_manager.create_tensorboard_logger": _FLAG,
    "exp_manager.create_wandb_logger": Only(False, "run.wandb does this"),
    "exp_manager.resume_if_exists": Only(False, "section checkpoint does this"),
    "exp_manager.create_checkpoint_callback": Only(False, "section checkpoint does this"),
    "exp_manager.create_preemption_callback": Only(False, "the recipe handles signals itself"),
    "exp_manager.log_step_timing": Only(False, _OURS),
    "exp_manager.log_tflops_per_sec_per_gpu": Only(False, _OURS),
    "exp_manager.max_time_per_run": Duration(),
    "model.seed": SameAs("run.seed", Range(1, LARGEST_SEED)),
    "model.tensor_model_parallel_size": Range(1, 65536),
    "model.pipeline_model_parallel_size": Range(1, 65536),
    "model.context_parallel_size": Only(1, "these recipes do not split sequences"),
    "model.sequence_parallel": _FLAG,
    "model.micro_batch_size": Range(1),
    "model.tokens_per_micro_batch": Range(0, or_else=(None,)),
    "model.global_batch_size": Range(1),
    "model.megatron_amp_O2": _FLAG,
    "model.precision": SameAs("trainer.precision"),
    "model.get_attention_mask_from_fusion": Only(True, "batches carry no mask"),
    "model.activations_checkpoint_granularity": Choice((None, "full", "selective")),
    "model.activations_checkpoint_method": Choice((None, "uniform", "block")),
    "model.activations_checkpoint_num_layers": Range(1, or_else=(None,)),
    "model.peft.peft_scheme": Only("none", "these recipes train all weights"),
    "model.peft.restore_from_path": Only(None, "these recipes train all weights"),
    "model.optim.name": Only("mcore_distributed_optim", "checkpoints hold its states"),
    "model.optim.lr": Range(0, whole=False),
    "model.optim.weight_decay": Range(0, whole=False),
    "model.optim.betas": Pair(Range(0, 1, whole=False, below=True)),
    "model.overwrite_base_config.optim": Only(True, "the checkpoint's own training must not leak in"),
}

BC: dict[str, Rule | SameAs] = _TRAINING | {
    "trainer.gradient_clip_val": SameAs("trainer.sft.gradient_clip_val"),
    "trainer.max_epochs": SameAs("trainer.sft.max_epochs"),
    "trainer.max_steps": SameAs("trainer.sft.max_steps"),
    "trainer.sft.max_epochs": Range(1),
    "trainer.sft.max_steps": Range(1, or_else=(-1,)),
    "trainer.sft.val_check_interval": Share(0),
    "trainer.sft.save_interval": Range(0),
    "trainer.sft.limit_train_batches": Share(1),
    "trainer.sft.limit_val_batches": Only(1.0, "all held-out rows are read; data.heldout_replies limits the replies"),
    "trainer.sft.gradient_clip_val": _POSITIVE,
    "exp_manager.name": Only("bc", "checkpoints are found by it"),
    "model.data.train_ds.micro_batch_size": SameAs("model.micro_batch_size"),
    "model.data.train_ds.global_batch_size": SameAs("model.global_batch_size"),
    "model.data.validation_ds.micro_batch_size": Range(1),
    "model.data.validation_ds.global_batch_size": Range(1),
}

AMPO: dict[str, Rule | SameAs] = _TRAINING | {
    "trainer.gradient_clip_val": SameAs("trainer.reinforce.gradient_clip_val"),
    "trainer.max_epochs": Only(-1, "trainer.reinforce.max_steps decides"),
    "trainer.max_steps": SameAs("trainer.reinforce.max_steps"),
    "trainer.reinforce.max_epochs": Only(1, "trainer.reinforce.max_steps decides"),
    "trainer.reinforce.max_steps": Range(1),
    "trainer.reinforce.val_check_interval": Only(0, "evaluation is a stage of its own"),
    "trainer.reinforce.save_interval": Range(0),
    "trainer.reinforce.gradient_clip_val": _POSITIVE,
    "trainer.reinforce.initial_policy_kl_penalty": Only(0.0, "algorithm.kl_coef is the weight of the KL term"),
    "trainer.reinforce.rollout_batch_seq_length": Only(None, "rollout.max_new_tokens limits responses"),
    "exp_manager.name": Only("ampo", "checkpoints are found by it"),
    "model.reinforce.forward_micro_batch_size": Range(1),
    "model.reinforce.offload_adam_states": Only(False, "Megatron's distributed optimizer has nothing of the kind"),
    "model.reinforce.sampling_params": Only({}, "section rollout decides"),
    "model.reinforce.length_params": Only({}, "section rollout decides"),
    "model.reinforce.trt_llm.enable": Only(False, "rollout.engine decides"),
    "model.optim.eps": _POSITIVE,
}

NEMO: dict[str, dict[str, Rule | SameAs]] = {"bc": BC, "ampo": AMPO}
"""Rules of the keys in ``configs/<stage>/base.yaml``, by stage; all of these keys must be there."""

_WARMUP = ("warmup_steps", "warmup_ratio")
_CONSTANT = ("constant_steps", "constant_ratio")
_HOLD = ("hold_steps", "hold_ratio")
SCHEDULES: dict[str, tuple[str, ...]] = {
    "CosineAnnealing": (*_WARMUP, *_CONSTANT, "min_lr"),
    "WarmupPolicy": (*_WARMUP, "min_lr"),
    "WarmupHoldPolicy": (*_WARMUP, *_HOLD, "min_lr"),
    "SquareAnnealing": (*_WARMUP, "min_lr"),
    "SquareRootAnnealing": (*_WARMUP, "min_lr"),
    "WarmupAnnealing": (*_WARMUP, "min_lr"),
    "InverseSquareRootAnnealing": (*_WARMUP, "min_lr"),
    "PolynomialDecayAnnealing": (*_WARMUP, "min_lr", "power", "cycle"),
    "PolynomialHoldDecayAnnealing": (*_WARMUP, *_HOLD, "min_lr", "power", "cycle"),
}
"""NeMo's learning-rate schedules that need nothing but these keys of ``model.optim.sched``."""
_DECAYS_AFTER_HOLD = ("PolynomialHoldDecayAnnealing",)

GPU_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_add_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)
"""Keys of ``model`` that need compiled extensions and change nothing but the speed."""
OPTIONAL: dict[str, Rule | SameAs] = {
    "trainer.deterministic": _FLAG,
    "trainer.benchmark": _FLAG,
    **{f"model.{key}": _FLAG for key in GPU_FUSIONS},
    "model.optim.eps": _POSITIVE,
    "model.optim.overlap_grad_sync": _FLAG,
    "model.optim.overlap_param_sync": _FLAG,
    "model.optim.align_grad_reduce": _FLAG,
    "model.optim.align_param_gather": _FLAG,
    "model.optim.average_in_collective": _FLAG,
    "model.optim.check_for_nan_in_grad": _FLAG,
    "model.optim.grad_sync_dtype": Choice(("fp32", "bf16")),
    "model.optim.ddp_bucket_size": Range(1, or_else=(None,)),
    "model.optim.sched.name": Choice(tuple(SCHEDULES)),
    "model.optim.sched.max_steps": Range(1),
    "model.optim.sched.min_lr": Range(0, whole=False),
    "model.optim.sched.power": _POSITIVE,
    "model.optim.sched.cycle": _FLAG,
    **{f"model.optim.sched.{kind}_steps": Range(0, or_else=(None,)) for kind in ("warmup", "constant", "hold")},
    **{
        f"model.optim.sched.{kind}_ratio": Range(0, 1, whole=False, or_else=(None,))
        for kind in ("warmup", "constant", "hold")
    },
}
"""Keys that may be missing or be added."""


def check_nemo(cfg: DictConfig, stage: str) -> None:
    """Hold NeMo's sections of a composed config to the stage's table; a number without a rule must be finite.

    Raises:
        ConfigError: naming the first key whose value is not allowed, and what would be.
    """
    sections = ("trainer", "model", "exp_manager")
    given = {key: value for name in sections for key, value in dotted(plain(OmegaConf.select(cfg, name), name), name)}
    rules = NEMO[stage] | {key: rule for key, rule in OPTIONAL.items() if key in given}
    # A key that others follow is held to its own range first.
    for key, rule in sorted(rules.items(), key=lambda pair: isinstance(pair[1], SameAs)):
        if key not in given:
            raise ConfigError(f"{key}: a value is required")
        value = given[key]
        if isinstance(rule, SameAs):
            wanted = OmegaConf.select(cfg, rule.key)
            if value != wanted or type(value) is not type(wanted):
                raise ConfigError(
                    f"{key}: must be that of {rule.key}={as_yaml(wanted)}, got {as_yaml(value)}; set only {rule.key}"
                )
            rule = rule.rule or Only(value, "")
        if not rule.holds(value):
            raise ConfigError(f"{key}: must be {told(rule, value)}")
    if given.get("model.optim.overlap_param_sync") and not given.get("model.optim.overlap_grad_sync"):
        raise ConfigError("model.optim.overlap_param_sync: needs model.optim.overlap_grad_sync=true")
    steps, laid = given["trainer.max_steps"], given.get("model.optim.sched.max_steps")
    if laid is not None and steps > 0:
        raise ConfigError(
            f"model.optim.sched.max_steps: {laid} has no effect beside trainer.max_steps={steps}; leave it out"
        )
    for key, value in given.items():
        check_leaf(key, value)


def check_schedule(optim: Mapping[str, Any], max_steps: int | None) -> None:
    """Rules between the keys of ``model.optim.sched``, which is laid over ``max_steps`` (None: not known yet).

    Raises:
        ConfigError: naming the key.
    """
    sched = optim.get("sched")
    if sched is None:
        return
    section = "model.optim.sched"
    if not isinstance(sched, Mapping) or sched.get("name") is None:
        raise ConfigError(
            f"{section}.name: a value is required, {' or '.join(SCHEDULES)}; null for {section} is no schedule"
        )
    for key, value in sched.items():
        if isinstance(value, Mapping):
            raise ConfigError(f"{section}.{key}: must be a single value, got a section")
    known = ("name", "max_steps", *SCHEDULES[sched["name"]])
    for key in sched:
        if key not in known:
            raise ConfigError(f"{section}.{key}: {sched['name']} has no such key; remove it with '~{section}.{key}'")
    for steps, ratio in (_WARMUP, _CONSTANT, _HOLD):
        if sched.get(steps) is not None and sched.get(ratio) is not None:
            raise ConfigError(f"{section}.{ratio}: stands beside {steps}; give one, and null for the other")
    least = sched.get("min_lr") or 0
    if least > optim["lr"]:
        raise ConfigError(f"{section}.min_lr: {least} is above model.optim.lr={optim['lr']}")
    laid = sched.get("max_steps") or max_steps
    if laid is None:
        return
    warmup, constant, hold = (_steps(sched, *names, laid) for names in (_WARMUP, _CONSTANT, _HOLD))
    for name, length in (("constant_steps", constant), ("hold_steps", hold if sched["name"] in _DECAYS_AFTER_HOLD else 0)):
        if length and length + warmup >= laid:
            raise ConfigError(f"{section}.{name}: {length} and {warmup} of warm-up leave none of the {laid} steps")
    if constant and least == optim["lr"]:
        raise ConfigError(f"{section}.constant_steps: {constant} need a min_lr below model.optim.lr={optim['lr']}")


def _steps(sched: Mapping[str, Any], steps: str, ratio: str, laid: int) -> int:
    return int(sched[steps]) if sched.get(steps) is not None else int((sched.get(ratio) or 0) * laid)
