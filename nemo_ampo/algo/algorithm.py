"""What the policy is optimised for: every knob of the algorithm once, and the named presets over them.

A preset is nothing but values of the knobs; the step, the loss and the trainer read the knobs and never a preset's name.
``algorithm.preset=dapo algorithm.clip_high=0.3`` takes DAPO's values and changes one of them. Each knob's formula
stands beside the function that computes it: :mod:`nemo_ampo.algo.advantage`, :mod:`nemo_ampo.algo.loss`,
:mod:`nemo_ampo.algo.mismatch`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import Switch, check_numbers, number


class ModeLevel(StrEnum):
    """Which advantage function compares the samples of a group."""

    ampo = "ampo"
    ampo_paper = "ampo_paper"
    ampo_robust = "ampo_robust"
    grpo = "grpo"


class Baseline(StrEnum):
    """What a reward is compared with."""

    group_mean = "group_mean"
    leave_one_out = "leave_one_out"


class Scale(StrEnum):
    """What the difference to the baseline is divided by."""

    group_std = "group_std"
    batch_std = "batch_std"
    none = "none"


class JudgeFailure(StrEnum):
    """What a sample is that the judge could not score."""

    mask = "mask"
    zero = "zero"


class ModeCredit(StrEnum):
    """Which tokens of a response carry the mode-level term."""

    whole_sequence = "whole_sequence"
    mode_tokens = "mode_tokens"


class Ratio(StrEnum):
    """Whose probability ratio the loss clips."""

    token = "token"
    sequence = "sequence"


class Aggregate(StrEnum):
    """How tokens become one loss."""

    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    constant = "constant"


class AggregateOver(StrEnum):
    """The tokens or sequences that one mean runs over."""

    micro_batch = "micro_batch"
    batch = "batch"


class Kl(Switch):
    """Where the distance to the reference policy is paid."""

    in_loss = "in_loss"
    in_reward = "in_reward"
    off = "off"


class KlKind(StrEnum):
    """Which estimator of the KL divergence."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Correction(Switch):
    """What is done about tokens that engine and trainer find differently likely."""

    off = "off"
    truncate = "truncate"
    mask = "mask"


@dataclass
class AlgorithmConfig:
    """What the policy is optimised for; the defaults are the preset ``ampo``.

    Attributes:
        preset: a key of :data:`PRESETS`; decides every key below that is not given.
        advantage: ``grpo`` sample level only; ``ampo`` plus the mode level; ``ampo_paper`` the same in the reference's
            float32 arithmetic, where modes tie only if their means are equal to the last bit; ``ampo_robust`` plus a mode
            level that any two modes of a group are enough for.
        tie_tolerance: ``ampo_robust`` only: spread of mode rewards at which reward and length weigh the same.
        baseline: ``group_mean``, or ``leave_one_out``, the mean of the group's other samples.
        scale: ``group_std``, ``batch_std`` (of all differences of the step) or ``none``.
        judge_failure: ``mask`` leaves a reply without a verdict out of everything; ``zero`` gives it reward 0 and no mode.
        drop_decided_groups: leave groups out of the loss whose samples all have the same goal component.
        mode_credit: the mode-level term on the ``whole_sequence``, or on the ``mode_tokens`` (``Thinking Level: K``) alone.
        ratio: probability ratio of each ``token``, or the ``sequence``'s geometric mean (GSPO).
        clip_low, clip_high: the probability ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: largest loss of a bad token, as a multiple of its -advantage; above 1; null switches it off.
        aggregate: ``token_mean``, ``sequence_mean`` (mean of sequences' token means) or ``constant`` (sum of a sequence's
            tokens over ``constant_tokens``, mean over sequences).
        aggregate_over: means over each ``micro_batch``, as the reference takes them, or over the whole ``batch`` of an
            update, all replicas included.
        constant_tokens: divisor of ``constant``, tokens; usually ``rollout.max_new_tokens``.
        kl: ``in_loss``; ``in_reward``, the response's summed estimate is subtracted from its reward; or ``off``.
        kl_coef: weight of the KL term; 0 switches the reference policy off.
        kl_kind: ``k1``, ``k2`` or ``k3``.
        entropy_coef: weight of the entropy bonus.
        mismatch: ``off``; ``truncate`` or ``mask`` weighs tokens by trainer over engine probability, cut at
            ``mismatch_high`` or zero outside [``mismatch_low``, ``mismatch_high``].
        mismatch_level: that ratio of each ``token``, or the product over the ``sequence``.
        mismatch_low, mismatch_high: limits of the ratio.
    """

    preset: str = "ampo"
    advantage: ModeLevel = ModeLevel.ampo
    tie_tolerance: float = number(0.02, least=1e-6)
    baseline: Baseline = Baseline.group_mean
    scale: Scale = Scale.group_std
    judge_failure: JudgeFailure = JudgeFailure.mask
    drop_decided_groups: bool = False
    mode_credit: ModeCredit = ModeCredit.whole_sequence
    ratio: Ratio = Ratio.token
    clip_low: float = number(0.2, least=0, most=1, below=True)
    clip_high: float = number(0.2, least=0)
    dual_clip: float | None = number(None, least=1, above=True, whole=False)
    aggregate: Aggregate = Aggregate.token_mean
    aggregate_over: AggregateOver = AggregateOver.micro_batch
    constant_tokens: int = number(2048, least=1)
    kl: Kl = Kl.in_loss
    kl_coef: float = number(0.001, least=0)
    kl_kind: KlKind = KlKind.k3
    entropy_coef: float = number(0.001, least=0)
    mismatch: Correction = Correction.off
    mismatch_level: Ratio = Ratio.token
    mismatch_low: float = number(0.5, least=0, most=1, below=True)
    mismatch_high: float = number(2.0, least=1)

    @property
    def reads_old_logprobs(self) -> bool:
        """Does anything before the update read the policy's own log-probabilities?"""
        return self.kl == Kl.in_reward or self.mismatch != Correction.off

    @property
    def uses_reference(self) -> bool:
        """Does anything read the reference policy's log-probabilities?"""
        return self.kl != Kl.off and self.kl_coef != 0


_AMPO = AlgorithmConfig()
# What the presets on outcomes alone share: neither a reference policy nor an entropy bonus.
_OUTCOME = replace(
    _AMPO, advantage=ModeLevel.grpo, aggregate_over=AggregateOver.batch, kl=Kl.off, kl_coef=0.0, entropy_coef=0.0
)

PRESETS: dict[str, AlgorithmConfig] = {
    name: replace(values, preset=name)
    for name, values in {
        "ampo-paper": replace(_AMPO, advantage=ModeLevel.ampo_paper, judge_failure=JudgeFailure.zero),
        "ampo": _AMPO,
        "ampo-robust": replace(_AMPO, advantage=ModeLevel.ampo_robust, aggregate_over=AggregateOver.batch),
        "grpo": replace(_AMPO, advantage=ModeLevel.grpo),
        "dr-grpo": replace(_OUTCOME, scale=Scale.none, aggregate=Aggregate.constant),
        "dapo": replace(_OUTCOME, clip_high=0.28, drop_decided_groups=True),
        "gspo": replace(_OUTCOME, ratio=Ratio.sequence, clip_low=3e-4, clip_high=4e-4, aggregate=Aggregate.sequence_mean),
        "rloo": replace(
            _OUTCOME,
            baseline=Baseline.leave_one_out,
            scale=Scale.none,
            aggregate=Aggregate.constant,
            kl=Kl.in_reward,
            kl_coef=0.001,
            kl_kind=KlKind.k1,
        ),
    }.items()
}
"""Values of the knobs by name; sources and reasons in docs/algorithm.md."""


def preset_named(name: object) -> AlgorithmConfig:
    """The knobs of a preset.

    Raises:
        ConfigError: no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"algorithm.preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


_MEANINGLESS_WITHOUT: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("tie_tolerance",), "advantage", ("ampo_robust",)),
    (("mode_credit",), "advantage", ("ampo", "ampo_paper", "ampo_robust")),
    (("constant_tokens",), "aggregate", ("constant",)),
    (("mismatch_level", "mismatch_high"), "mismatch", ("truncate", "mask")),
    (("mismatch_low",), "mismatch", ("mask",)),
)
"""Keys, and the key and values without which setting them would change nothing."""


def check_algorithm(config: AlgorithmConfig) -> None:
    """Rules between the knobs.

    Raises:
        ConfigError: naming the key.
    """
    preset_named(config.preset)
    check_numbers("algorithm", config)
    for keys, needed, values in _MEANINGLESS_WITHOUT:
        for key in keys:
            if getattr(config, needed) not in values and getattr(config, key) != getattr(_AMPO, key):
                raise ConfigError(
                    f"algorithm.{key}: {getattr(config, key)} has no effect with algorithm.{needed}="
                    f"{getattr(config, needed)}; it needs {' or '.join(values)}"
                )
    if config.kl == Kl.off and config.kl_coef != 0:
        raise ConfigError(
            f"algorithm.kl_coef: {config.kl_coef} has no effect with algorithm.kl=off; "
            "set algorithm.kl_coef=0, or algorithm.kl to in_loss or in_reward"
        )
    if not config.uses_reference and config.kl_kind != _AMPO.kl_kind:
        raise ConfigError(f"algorithm.kl_kind: {config.kl_kind} has no effect while algorithm.kl_coef is 0")
    if config.advantage == ModeLevel.ampo_paper and (config.baseline, config.scale) != (_AMPO.baseline, _AMPO.scale):
        raise ConfigError(
            "algorithm.advantage: ampo_paper knows only algorithm.baseline=group_mean and algorithm.scale=group_std, "
            f"got {config.baseline} and {config.scale}"
        )


KNOBS = tuple(f.name for f in fields(AlgorithmConfig) if f.name != "preset")
"""Keys of ``algorithm`` that a preset decides."""
