"""Every metric of an AMPO step: its name once, what it means, and how it follows from the samples.

Names are ``<group>/<quantity>``. They are written to ``metrics.jsonl``, copied to TensorBoard, W&B and MLflow, and read back
by the report. ``{braces}`` stand for a name that varies.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_ampo.reply.modes import MODES

if TYPE_CHECKING:
    import torch

    from nemo_ampo.algo.advantage import GroupReport
    from nemo_ampo.algo.algorithm import JudgeFailure
    from nemo_ampo.types import Sample

DESCRIPTIONS: dict[str, str] = {
    "reward/mean": "mean reward of samples with a valid reward (format failures included)",
    "reward/goal": "mean goal component of judged samples, 0..1, 0.5 means the judge saw no change",
    "reward/length": "mean answer-length component of judged samples, 0..1",
    "reward/std_within_group": "mean over groups of the standard deviation of rewards",
    "format/failed_fraction": "share of samples that break the grammar",
    "format/failed_{rule}": "samples that break the grammar, by the rule they break first",
    "format/cut_fraction": "share of samples cut at the token limit",
    "judge/failed_fraction": "share of the step's verdicts that could not be had",
    "judge/failed_{kind}": "the step's verdicts that could not be had, by kind",
    "judge/wait_p50_s": "median seconds from the end of a reply to its verdict, retries and queueing included",
    "judge/wait_p95_s": "95th percentile of the same",
    "judge/requests": "verdicts asked for since the run began",
    "judge/verdicts": "verdicts that came since the run began",
    "judge/calls": "HTTP calls to the judge since the run began",
    "judge/retries/{cause}": "of these, repetitions, by cause",
    "judge/failures/{kind}": "verdicts that could not be had since the run began, by kind",
    "judge/parse_failures": "replies of the judge that held no readable verdict, since the run began",
    "judge/cache_hits": "verdicts taken from the cache since the run began",
    "judge/cache_failures": "verdicts that the cache's file could not keep since the run began; absent without any",
    "judge/spent_failures": "times that judge_spent.json could not be written since the start; absent without any",
    "judge/prompt_tokens": "tokens sent to the judge since the run began",
    "judge/completion_tokens": "tokens of its replies since the run began",
    "judge/cost_usd": "their price, dollars, since the run began",
    "judge/latency_p50_s": "median seconds of one HTTP call, over the latest answered calls",
    "judge/latency_p95_s": "95th percentile of the same",
    "judge/second_samples": "replies the second judge scored too, in the steps it is asked (judge.second.every)",
    "judge/second_failed": "replies it gave no verdict on",
    "judge/second_rank_correlation": "Spearman's, between the two judges' scores of the speaker",
    "judge/second_mean_gap": "mean of the second judge's score minus the first's, points of 10",
    "judge/second_mean_absolute_gap": "mean size of that difference",
    "judge/second_cost_usd": "what the second judge has cost, dollars, since this process began",
    "guard/masked_samples": "samples left out of the step because their judge failed",
    "guard/skipped_groups": "groups left out because too few of their samples have a reward (guard.min_valid)",
    "guard/skipped_samples": "samples with a reward in these groups, left out with them",
    "guard/judge_rounds": "how often the step's failed verdicts were asked for again (guard.step_retries)",
    "guard/mismatch_steps": "steps in a row over guard.max_mismatch_kl",
    "guard/skipped_update_steps": "steps in a row with a skipped update",
    "guard/mode_{k}_low_steps": "steps in a row with mode k under guard.min_mode_share",
    "guard/collapsed_modes": "modes under alarm: so for guard.collapse_steps steps",
    "advantage/mean": "mean advantage of valid samples",
    "advantage/std": "its standard deviation",
    "mode_term/active_fraction": "share of groups whose mode-level advantage was active",
    "mode_term/{reason}": "groups by why the mode-level term was or was not active",
    "mode_term/branch_{branch}": "active groups by what told the modes apart: reward or length",
    "mode/{k}/share": "share of mode k among all samples",
    "mode/{k}/reward": "mean reward of mode k",
    "mode/{k}/tokens": "mean response tokens of mode k",
    "mode/{k}/advantage": "mean advantage of mode k",
    "mode/entropy": "entropy of the policy's choice of mode for one prompt, mean over prompts, nats; at most 1.386",
    "mode/entropy_overall": "entropy of its choice over all prompts of the step, nats",
    "mode/adaptivity": "difference of the two: how much the prompt decides the mode, nats",
    "turn/{turn}/samples": "samples that answer at this turn of a dialogue",
    "turn/{turn}/mode/{k}/share": "share of mode k among them",
    "tag/{tag}/reward": "mean reward of prompts with this label",
    "tag/{tag}/mode/{k}/share": "share of mode k on prompts with this label",
    "tokens/response": "mean response tokens, stop token included",
    "tokens/answer": "mean tokens of the spoken answer",
    "policy/loss": "loss of the update",
    "policy/pg_loss": "its clipped policy-gradient part",
    "policy/kl": "estimated KL divergence from the reference policy per token; absent without one",
    "policy/entropy": "mean entropy of the policy per token, nats",
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "policy/capped_fraction": "share of tokens whose loss the dual clip capped",
    "policy/skipped_updates": "optimizer updates of the step skipped because a gradient was not finite",
    "policy/ratio_max": "largest ratio of new to old policy",
    "policy/grad_norm": "gradient norm before clipping",
    "policy/lr": "learning rate of the update",
    "engine/logprob_gap": "mean |log-probability of engine - of trainer| on drawn tokens",
    "engine/duplicate_fraction": "share of responses that repeat another one of their prompt, on this replica",
    "mismatch/error": "mean exp|log-probability of trainer - of engine| on drawn tokens, 1 when they agree",
    "mismatch/kl": "estimated KL divergence of the trainer from the engine per drawn token, nats (k3)",
    "mismatch/sequence_max": "largest mean error of one response",
    "mismatch/weight": "mean importance weight of the drawn tokens",
    "mismatch/changed_fraction": "share of drawn tokens whose importance weight was cut or set to 0",
    "train/decided_groups": "groups whose outcomes are all the same (algorithm.drop_decided_groups leaves them out)",
    "train/decided_fraction": "share of samples in them",
    "train/sample_fraction": "share of samples that the loss was taken over",
    "checkpoint/save_s": "seconds that the checkpoint before this step took",
    "checkpoint/bytes": "its size",
    "checkpoint/failed_saves": "checkpoints in a row that could not be written",
    "time/{phase}_s": "seconds of a phase",
    "throughput/rollout_tokens_per_s": "generated tokens per second of the whole job",
    "throughput/tokens_per_s_per_gpu": "tokens trained on, prompts included, per second of the step and GPU; on a GPU only",
    "throughput/update_mfu": "share of the card's dense bf16 FLOP/s, 6 FLOP per parameter and token; on a known GPU only",
    "memory/{phase}_gb": "most memory that torch held in a phase on any GPU, GB, without an engine's own; on a GPU only",
}


def guard_metrics(samples: Sequence[Sample], rounds: int, judge_failure: JudgeFailure) -> dict[str, float]:
    """How many samples and groups a step leaves out, and how often it asked the judge again."""
    left_out = [s for s in samples if not s.parts.valid] if judge_failure == "mask" else []
    masked = [s for s in left_out if s.parts.reward is None]
    return {
        "guard/masked_samples": float(len(masked)),
        "guard/skipped_samples": float(len(left_out) - len(masked)),
        "guard/skipped_groups": float(len({s.group for s in left_out} - {s.group for s in samples if s.parts.valid})),
        "guard/judge_rounds": float(rounds),
    }


JUDGE_TOTALS = tuple(
    f"judge/{name}"
    for name in (
        *("requests", "verdicts", "calls", "retries/", "failures/", "parse_failures", "cache_hits"),
        *("prompt_tokens", "completion_tokens", "cost_usd"),
    )
)
"""Metrics that count from the beginning of the run, or the beginnings of their names."""


def step_metrics(samples: Sequence[Sample], advantages_B: torch.Tensor, report: GroupReport) -> dict[str, float]:
    """All metrics that follow from the scored samples of a step.

    Args:
        samples: of the whole job.
        advantages_B: in the same order.
        report: what the advantage did in each group.
    """
    values = advantages_B.tolist()
    valid = [s for s in samples if s.parts.valid]
    judged = [s for s in valid if s.parts.mode]
    out = {
        "reward/mean": mean(s.parts.reward for s in valid),
        "reward/goal": mean(s.parts.goal for s in judged),
        "reward/length": mean(s.parts.length for s in judged),
        "reward/std_within_group": _std_within_group(valid),
        "format/failed_fraction": mean(float(s.parts.format_rule is not None) for s in samples),
        "format/cut_fraction": mean(float(s.finish == "length") for s in samples),
        "tokens/response": mean(float(s.num_tokens) for s in samples),
        "tokens/answer": mean(float(s.answer_tokens) for s in judged),
        "advantage/mean": mean(a for a, s in zip(values, samples, strict=True) if s.parts.valid),
        "advantage/std": _std([a for a, s in zip(values, samples, strict=True) if s.parts.valid]),
    }
    out |= {f"format/failed_{k}": float(n) for k, n in Counter(s.parts.format_rule for s in samples).items() if k}
    out |= _judge_metrics(samples)
    out |= _mode_metrics("mode", samples, values)
    for tag in sorted({s.tag for s in samples if s.tag}):
        tagged = [s for s in samples if s.tag == tag]
        out[f"tag/{tag}/reward"] = mean(s.parts.reward for s in tagged if s.parts.valid)
        out |= {f"tag/{tag}/mode/{k}/share": _share(tagged, k) for k in MODES}
    for turn in sorted({s.turn for s in samples}):
        at_turn = [s for s in samples if s.turn == turn]
        out[f"turn/{turn}/samples"] = float(len(at_turn))
        out |= {f"turn/{turn}/mode/{k}/share": _share(at_turn, k) for k in MODES}
    return out | _mode_term_metrics(report)


def _judge_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    asked = [s for s in samples if s.verdict is not None or s.judge_error is not None]
    latencies = sorted(s.judge_latency_s for s in asked if s.judge_latency_s is not None)
    out = {"judge/failed_fraction": mean(float(s.judge_error is not None) for s in asked)}
    out |= {f"judge/failed_{k}": float(n) for k, n in Counter(s.judge_error for s in asked).items() if k}
    if latencies:
        out["judge/wait_p50_s"] = latencies[len(latencies) // 2]
        out["judge/wait_p95_s"] = latencies[min(int(len(latencies) * 0.95), len(latencies) - 1)]
    return out


def continued(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """The judge's counts since the run began, of a run that was resumed.

    Args:
        before: last logged metrics of the earlier start; only cumulative ``judge/`` counts are read.
        now: :meth:`JudgeStats.metrics` of this start, which counts from zero.
    """
    earlier = {name: value for name, value in before.items() if name.startswith(JUDGE_TOTALS)}
    return earlier | {
        name: value + earlier.get(name, 0.0) if name.startswith(JUDGE_TOTALS) else value for name, value in now.items()
    }


def _mode_metrics(prefix: str, samples: Sequence[Sample], advantages: Sequence[float]) -> dict[str, float]:
    out: dict[str, float] = {}
    for k in MODES:
        of_mode = [(s, a) for s, a in zip(samples, advantages, strict=True) if s.parts.mode == k]
        out[f"{prefix}/{k}/share"] = _share(samples, k)
        if of_mode:
            out[f"{prefix}/{k}/reward"] = mean(s.parts.reward for s, _ in of_mode if s.parts.valid)
            out[f"{prefix}/{k}/tokens"] = mean(float(s.num_tokens) for s, _ in of_mode)
            out[f"{prefix}/{k}/advantage"] = mean(a for _, a in of_mode)
    return out


def _mode_term_metrics(report: GroupReport) -> dict[str, float]:
    reasons = Counter(report.reasons)
    branches = Counter(b for b in report.branches if b)
    return (
        {"mode_term/active_fraction": reasons["active"] / max(len(report.reasons), 1)}
        | {f"mode_term/{reason}": float(n) for reason, n in sorted(reasons.items())}
        | {f"mode_term/branch_{branch}": float(n) for branch, n in sorted(branches.items())}
    )


def _share(samples: Sequence[Sample], mode: int) -> float:
    return mean(float(s.parts.mode == mode) for s in samples)


def _std_within_group(samples: Sequence[Sample]) -> float:
    groups: dict[int, list[float]] = {}
    for s in samples:
        if s.parts.reward is not None:
            groups.setdefault(s.group, []).append(s.parts.reward)
    return mean(_std(rewards) for rewards in groups.values())


def mean(values: Iterable[float | None]) -> float:
    """Mean of the values that exist; NaN of nothing, so that an absent quantity never looks like a score."""
    present = [v for v in values if v is not None]
    return statistics.fmean(present) if present else float("nan")


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
