"""What numbers a stage's keys may hold, one table per stage; asked before anything is divided by them or loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The values of one key.

    Attributes:
        key: dotted, as in the composed config.
        least: smallest allowed value.
        whole: integers only; otherwise any finite number.
        above: ``least`` itself is not allowed.
    """

    key: str
    least: float
    whole: bool = True
    above: bool = False

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return math.isfinite(value) and (value > self.least if self.above else value >= self.least)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'of at least'} {self.least:g}"


_TRAINING = (
    Range("run.log_rollouts", -1),
    Range("run.rank_timeout_s", 0, whole=False),
    Range("model.tensor_model_parallel_size", 1),
    Range("model.pipeline_model_parallel_size", 1),
    Range("model.micro_batch_size", 1),
    Range("model.global_batch_size", 1),
    Range("model.optim.lr", 0, whole=False),
    Range("model.optim.weight_decay", 0, whole=False),
)

BC = (
    *_TRAINING,
    Range("data.max_tokens", 1),
    Range("data.heldout_replies", 0),
    Range("trainer.sft.max_epochs", 1),
    Range("trainer.sft.val_check_interval", 0, whole=False),
    Range("trainer.sft.save_interval", 0),
    Range("trainer.sft.gradient_clip_val", 0, whole=False, above=True),
)

AMPO = (
    *_TRAINING,
    Range("rollout.prompts_per_step", 1),
    Range("rollout.max_prompt_tokens", 1),
    Range("rollout.max_new_tokens", 1),
    Range("rollout.batch_size", 1),
    Range("model.reinforce.forward_micro_batch_size", 1),
    Range("trainer.reinforce.max_steps", 1),
    Range("trainer.reinforce.save_interval", 0),
    Range("trainer.reinforce.gradient_clip_val", 0, whole=False, above=True),
)

EVALUATE = (
    Range("data.limit", -1),
    Range("data.samples", 1),
    Range("generate.max_new_tokens", 1),
    Range("generate.temperature", 0, whole=False),
    Range("generate.batch_size", 1),
)


def check_ranges(cfg: DictConfig, ranges: Iterable[Range]) -> None:
    """Hold a composed config to a table.

    Raises:
        ConfigError: naming the first key whose value is not allowed, and what would be.
    """
    for allowed in ranges:
        value = OmegaConf.select(cfg, allowed.key)
        if not allowed.holds(value):
            raise ConfigError(f"{allowed.key}: must be {allowed}, got {value!r}")
