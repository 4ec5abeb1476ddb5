"""When a step goes wrong: who is left out, when the judge is asked again, when a run stops. Pure rules, no side effects.

Three kinds of trouble, three answers. A verdict that could not be had is a missing value: the sample is left out. Many of
them are an outage: the failed ones are asked for again, then the run stops at a checkpoint and the same command goes on.
A policy that drifts away from its rollout engine, or whose gradients are not finite, step after step, is an error: the run
ends with status 2 and leaves the last checkpoint as it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nemo_ampo.ranges import check_numbers, number, seconds
from nemo_ampo.ranks import COLLECTIVE_TIMEOUT_S
from nemo_ampo.reply.modes import MODES

MISMATCH = "mismatch/kl"
SKIPPED = "policy/skipped_updates"


@dataclass(frozen=True)
class GuardConfig:
    """Limits of a healthy run.

    Attributes:
        min_valid: a group with fewer samples that have a reward is left out of the step. A broken reply has a reward (a
            bad one), a sample whose judge failed has none.
        max_failed_fraction: of the verdicts a step asks for, 0..1; above it the failed ones are asked for again.
        step_retries: how often they are, before the run stops at a checkpoint.
        retry_pause_s: wait before each time, seconds; the judge's own retries come on top. A run that was asked to stop
            waits no longer than this for the verdicts on their way, and asks for none again.
        max_wait_s: longest wait for the verdicts of a step, seconds, whatever the endpoint asks for (``Retry-After``); what
            has not come by then has failed. The other ranks wait in a collective meanwhile, which gives up by itself after
            :data:`nemo_ampo.ranks.COLLECTIVE_TIMEOUT_S`.
        max_mismatch_kl: limit of ``mismatch/kl`` (rollout engine against trainer), nats per token; null for none.
        abort_steps: so many steps in a row over ``max_mismatch_kl``, or with a skipped update, end the run.
        min_mode_share: a mode with a smaller share of the samples is about to die out, 0..1.
        collapse_steps: so many steps in a row under ``min_mode_share`` raise the alarm.
        stop_on_collapse: end the run at that alarm instead of warning.
    """

    min_valid: int = number(2, least=1)
    max_failed_fraction: float = number(0.25, least=0, most=1)
    step_retries: int = number(3, least=0)
    retry_pause_s: float = seconds(30, above=False)
    max_wait_s: float = number(900.0, 0, COLLECTIVE_TIMEOUT_S, above=True, below=True)
    max_mismatch_kl: float | None = number(0.1, least=0, above=True)
    abort_steps: int = number(5, least=1)
    min_mode_share: float = number(0.01, least=0, most=1)
    collapse_steps: int = number(20, least=1)
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        check_numbers("guard", self)


def too_many_failed(failed: int, asked: int, config: GuardConfig) -> bool:
    """More than ``max_failed_fraction`` of the verdicts asked for could not be had."""
    return failed > config.max_failed_fraction * asked


def small_groups(groups_B: Sequence[int], valid_B: Sequence[bool], config: GuardConfig) -> set[int]:
    """Groups with fewer than ``min_valid`` valid samples."""
    valid = Counter(group for group, is_valid in zip(groups_B, valid_B, strict=True) if is_valid)
    return {group for group in groups_B if valid[group] < config.min_valid}


@dataclass(frozen=True)
class Streaks:
    """For how many steps in a row, up to now, something has been wrong.

    A metric that a step does not have is no trouble, so it ends a streak.

    Attributes:
        mismatch: over ``max_mismatch_kl``.
        skipped: with a skipped update.
        low_share: under ``min_mode_share``, by mode.
    """

    mismatch: int = 0
    skipped: int = 0
    low_share: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, history: Iterable[Mapping[str, float]], config: GuardConfig) -> Streaks:
        """After the steps of a log, so that a resumed run counts on."""
        streaks = cls()
        for metrics in history:
            streaks = streaks.after(metrics, config)
        return streaks

    def after(self, metrics: Mapping[str, float], config: GuardConfig) -> Streaks:
        """With one more step, given its metrics."""
        limit = math.inf if config.max_mismatch_kl is None else config.max_mismatch_kl
        # NaN is over every limit: `not <=` on purpose.
        mismatched = MISMATCH in metrics and not metrics[MISMATCH] <= limit
        return Streaks(
            mismatch=self.mismatch + 1 if mismatched else 0,
            skipped=self.skipped + 1 if metrics.get(SKIPPED, 0) > 0 else 0,
            low_share={
                k: self.low_share.get(k, 0) + 1 if metrics.get(f"mode/{k}/share", 1.0) < config.min_mode_share else 0
                for k in MODES
            },
        )

    def collapsed(self, config: GuardConfig) -> list[int]:
        """Modes under alarm, ascending."""
        return [k for k, steps in sorted(self.low_share.items()) if steps >= config.collapse_steps]

    def abort_reason(self, config: GuardConfig) -> str | None:
        """One line on why the run must not go on, naming the key; None if it may."""
        if self.mismatch >= config.abort_steps:
            return (
                f"guard.max_mismatch_kl: {MISMATCH} has been above {config.max_mismatch_kl} for {self.mismatch} steps in a "
                "row; the rollout engine no longer samples from the policy that is trained"
            )
        if self.skipped >= config.abort_steps:
            return (
                f"guard.abort_steps: {self.skipped} steps in a row had an update skipped because its gradient was not "
                "finite; lower model.optim.lr or look at the data"
            )
        if config.stop_on_collapse and (modes := self.collapsed(config)):
            return f"guard.stop_on_collapse: {_collapse_words(modes, config)}"
        return None

    def new_alarm(self, before: Streaks, config: GuardConfig) -> str | None:
        """A warning, at the step at which a mode comes under alarm; None otherwise."""
        new = sorted(set(self.collapsed(config)) - set(before.collapsed(config)))
        return f"guard.min_mode_share: {_collapse_words(new, config)}" if new else None

    def metrics(self, config: GuardConfig) -> dict[str, float]:
        """The ``guard/`` metrics of the streaks."""
        return {
            "guard/mismatch_steps": float(self.mismatch),
            "guard/skipped_update_steps": float(self.skipped),
            **{f"guard/mode_{k}_low_steps": float(self.low_share.get(k, 0)) for k in MODES},
            "guard/collapsed_modes": float(len(self.collapsed(config))),
        }


def _collapse_words(modes: Sequence[int], config: GuardConfig) -> str:
    names = " and ".join(f"mode {k}" for k in modes)
    return (
        f"{names}: under {config.min_mode_share:.2%} of the samples for {config.collapse_steps} steps in a row; "
        "AMPO cannot compare a mode that is no longer drawn"
    )
