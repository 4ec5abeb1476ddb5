"""One AMPO step, in the paper's order: roll out, log-probabilities while the judge reads, score, advantage, update.

This is the file to read first. It knows engines, judge and policy only by what they promise, so the same lines run on a
laptop, on a cluster and in tests. Legend: B samples of this replica, T tokens, G responses per prompt (one *group*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from nemo_ampo.algo.algorithm import AlgorithmConfig, JudgeFailure
from nemo_ampo.algo.credit import assign_credit, kl_penalties, mode_token_span
from nemo_ampo.algo.guard import GuardConfig, small_groups
from nemo_ampo.algo.mismatch import importance_weights, mismatch, mismatch_metrics
from nemo_ampo.algo.mode_choice import choice_metrics
from nemo_ampo.algo.rewards import RewardConfig, scored_reply
from nemo_ampo.judge.verdicts import Judged, PendingVerdict, StopAsked, VerdictSource, all_verdicts
from nemo_ampo.ranks import Ranks, slice_for
from nemo_ampo.reply.grammar import answer_of
from nemo_ampo.reply.modes import NO_MODE
from nemo_ampo.rollout.config import RolloutConfig
from nemo_ampo.rollout.engine import Engine, Request, Response, SamplingSpec, UnavailableError, request_seed
from nemo_ampo.rollout.packing import PackedRollouts, pack
from nemo_ampo.rollout.probe import Probe, duplicate_fraction, released_after, sync_and_probe
from nemo_ampo.run.clock import Clock, Gpus
from nemo_ampo.run.metrics import guard_metrics, step_metrics
from nemo_ampo.types import DialogueTurn, JudgeRequest, Policy, Prompt, Sample, Tokenizer, TrainBatch, Updated

T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """What a step works with besides the policy it improves."""

    engine: Engine
    judge: VerdictSource
    tokenizer: Tokenizer
    ranks: Ranks
    rollout: RolloutConfig
    reward: RewardConfig
    algorithm: AlgorithmConfig
    stop_token_ids: tuple[int, ...]
    pad_id: int
    seed: int
    guard: GuardConfig = field(default_factory=GuardConfig)
    probe: Probe | None = None
    gpus: Gpus | None = None


@dataclass(frozen=True)
class StepResult:
    """Metrics of the step and every sample of the job with its advantage."""

    metrics: dict[str, float]
    samples: list[Sample]
    advantages: list[float]


def ampo_step(
    step: int, prompts: Sequence[Prompt], policy: Policy, parts: Parts, stop: StopAsked = lambda: False
) -> StepResult:
    """Draw, judge, compare within groups, and improve the policy once.

    Args:
        step: 0-based; decides the seeds.
        prompts: of the whole job, the same on every rank.
        policy: the model being trained.
        parts: engine, judge and settings.
        stop: whether this process was asked to end the run; a step that can still end well ends first.

    Returns:
        Metrics and samples of the whole job, the same on every rank.

    Raises:
        JudgeOutageError: on every rank, when too many verdicts could not be had; nothing was trained on.
        UnavailableError: on every rank, when the engine of a replica was not there; nothing was trained on.
    """
    clock = Clock(parts.gpus)
    requests, turns = expand(step, prompts, parts)

    def draw() -> tuple[list[Response], list[PendingVerdict]]:
        with released_after(parts.engine):
            with clock("sync"):
                sync_and_probe(parts.engine, step, policy.logprobs, parts.probe)
            with clock("rollout"):
                return roll_out(requests, turns, parts)

    responses, pending = by_all_or_none(draw, parts.ranks)
    packed = pack(requests, responses, parts.pad_id)
    with clock("logprobs"):  # the judge goes on reading
        old_logprobs_BT = old_logprobs(packed, policy, parts)
    with clock("reference"):
        ref_logprobs_BT = policy.reference_logprobs(packed.tokens_BT, packed.mask_BT)
    with clock("judge_wait"):
        verdicts, rounds = all_verdicts(pending, parts.ranks, parts.guard, stop)
    samples = [
        score(turn, request, response, judged, parts)
        for turn, request, response, judged in zip(turns, requests, responses, verdicts, strict=True)
    ]
    everyone = without_small_groups(parts.ranks.gather(samples), parts)
    penalties_B = parts.ranks.gather(kl_penalties(old_logprobs_BT, ref_logprobs_BT, packed.mask_BT, parts.algorithm))
    credit = assign_credit(everyone, penalties_B, parts.algorithm)
    mine = credit.share(parts.ranks)
    weights_BT = importance_weights(old_logprobs_BT, packed.sampling_logprobs_BT, packed.mask_BT, parts.algorithm)
    batch = TrainBatch(
        tokens_BT=packed.tokens_BT,
        mask_BT=packed.mask_BT & mine.trained_B[:, None],
        advantages_BT=mine.per_token(packed.mask_BT) * weights_BT,
        old_logprobs_BT=old_logprobs_BT,
        ref_logprobs_BT=ref_logprobs_BT,
        sampling_logprobs_BT=packed.sampling_logprobs_BT,
    )
    with clock("update"):
        # Without a single sample to learn from, an optimizer step would only apply momentum and weight decay.
        updated = policy.update(batch) if credit.shares.trained_B.any() else Updated({}, old_logprobs_BT)
    metrics = (
        step_metrics(everyone, credit.advantages, credit.report)
        | guard_metrics(everyone, rounds, parts.algorithm.judge_failure)
        | choice_and_gap(everyone, packed, batch.mask_BT, updated.logprobs_BT, parts)
        | {"engine/duplicate_fraction": duplicate_fraction(requests, responses)}
        | credit.metrics()
        | updated.metrics
        | clock.time_metrics(sum(s.num_tokens for s in everyone))
        | clock.gpu_metrics([n for n, trained in zip(packed.lengths, mine.trained_B, strict=True) if trained], parts.ranks)
    )
    return StepResult(metrics, everyone, credit.advantages.tolist())


def expand(step: int, prompts: Sequence[Prompt], parts: Parts) -> tuple[list[Request], list[DialogueTurn]]:
    """G requests per prompt, numbered over the whole job; this replica's share of them."""
    size = parts.rollout.group_size
    everything = [
        (
            Request(
                request_id=index * size + sample,
                prompt_ids=prompt.token_ids,
                seed=request_seed(parts.seed, step, prompt.turn.row_id, sample),
            ),
            prompt.turn,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(size)
    ]
    mine = slice_for(everything, parts.ranks.data_rank, parts.ranks.data_size)
    return [request for request, _ in mine], [turn for _, turn in mine]


def by_all_or_none(work: Callable[[], T], ranks: Ranks) -> T:
    """The result of ``work``, which each replica does with an engine of its own.

    Raises:
        UnavailableError: on every rank, when one replica's engine was not there; the others would wait for it for ever.
    """
    outage: UnavailableError | None = None
    try:
        result = work()
    except UnavailableError as error:
        outage = error
    met = next((other for other in ranks.gather([outage]) if other is not None), None)
    if met is not None:
        raise met
    return result


def old_logprobs(packed: PackedRollouts, policy: Policy, parts: Parts) -> torch.Tensor | None:
    """The policy's log-probabilities before the update; None where its own first pass gives them early enough."""
    if policy.updates_once and not parts.algorithm.reads_old_logprobs:
        return None
    return policy.logprobs(packed.tokens_BT, packed.mask_BT)


def roll_out(
    requests: list[Request], turns: list[DialogueTurn], parts: Parts
) -> tuple[list[Response], list[PendingVerdict]]:
    """Draw all responses; each valid one goes to the judge the moment it ends, while the others are still being drawn.

    Only the replica's leader asks the judge. A reply that breaks the grammar is not judged: its reward is fixed.
    """
    index = {request.request_id: i for i, request in enumerate(requests)}
    pending = [PendingVerdict() for _ in requests]

    def on_finish(response: Response) -> None:
        i = index[response.request_id]
        answer = answer_of(decode(response, parts.tokenizer), strict=parts.reward.strict_format)
        if answer is not None and parts.ranks.is_leader:
            pending[i] = PendingVerdict(parts.judge, JudgeRequest.about(turns[i], answer))

    rollout = parts.rollout
    sampling = SamplingSpec(
        rollout.max_new_tokens, parts.stop_token_ids, rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
    )
    return parts.engine.generate(requests, sampling, on_finish), pending


def without_small_groups(samples: list[Sample], parts: Parts) -> list[Sample]:
    """The samples, those of groups below ``guard.min_valid`` marked as not valid; their rewards stay for the log.

    Where a failed judge means reward 0 (``algorithm.judge_failure=zero``) every sample has a reward and no group is small.
    """
    if parts.algorithm.judge_failure == JudgeFailure.zero:
        return samples
    small = small_groups([s.group for s in samples], [s.parts.valid for s in samples], parts.guard)
    return [replace(s, parts=replace(s.parts, valid=False)) if s.group in small else s for s in samples]


def score(turn: DialogueTurn, request: Request, response: Response, judged: Judged, parts: Parts) -> Sample:
    """Reward of one response, and its place in the step."""
    text, tokens = decode(response, parts.tokenizer), response.token_ids
    scored = scored_reply(turn, text, len(tokens), judged.verdict, judged.error, parts.tokenizer, parts.reward)
    return Sample(
        **vars(scored),
        group=request.request_id // parts.rollout.group_size,
        turn=turn.turn,
        finish=response.finish,
        mode_tokens=mode_token_span(tokens, text, scored.parts.mode, parts.tokenizer),
        judge_latency_s=judged.latency_s,
    )


def choice_and_gap(
    everyone: Sequence[Sample], packed: PackedRollouts, mask_BT: torch.Tensor, logprobs_BT: torch.Tensor | None, parts: Parts
) -> dict[str, float]:
    """Entropy of the policy's choice of mode, and how far the engine was from the trainer, the same on every rank.

    Args:
        everyone: samples of the job.
        packed: this replica's.
        mask_BT: tokens that were trained on.
        logprobs_BT: of these before the update; None where nothing was trained on, and nothing is told.
        parts: settings.
    """
    if logprobs_BT is None:
        return {}
    mine: list[float | None] = []
    for row, sample in enumerate(slice_for(everyone, parts.ranks.data_rank, parts.ranks.data_size)):
        # logprobs_BT[:, t] belongs to token t + 1; the last token that names the mode is the one that decides it.
        column = int(packed.prompt_lengths_B[row]) - 1 + sample.mode_tokens[1] - 1
        known = sample.parts.mode != NO_MODE and bool(mask_BT[row, column])
        mine.append(float(logprobs_BT[row, column]) if known else None)
    gaps = mismatch(logprobs_BT, packed.sampling_logprobs_BT, mask_BT, parts.algorithm)
    choice = choice_metrics([s.group for s in everyone], [s.parts.mode for s in everyone], parts.ranks.gather(mine))
    return choice | mismatch_metrics(parts.ranks.gather([gaps]))


def decode(response: Response, tokenizer: Tokenizer) -> str:
    """Text of a response without special tokens."""
    return tokenizer.decode(response.token_ids, skip_special_tokens=True)
