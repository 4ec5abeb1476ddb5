"""What stands between an engine and training: a greedy probe after each sync, memory released whatever happens.

An engine that holds its own copy of the weights can hold the wrong ones: a bias nobody passed on, a rotary scaling that
got lost, a layer that was not refitted. None of that raises. So after every sync it answers fixed prompts greedily and
the trainer scores the same tokens; what the engine says of its own tokens must be what the trainer says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nemo_ampo.rollout.engine import Engine, EngineError, Request, Response, SamplingSpec, StaleWeightsError, SyncReport
from nemo_ampo.rollout.packing import pack

Logprobs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens [B, T] and a mask [B, T-1] of next tokens to the trainer's log-probability of each of these, [B, T-1]."""


class ProbeError(EngineError):
    """The engine is not the trainer's model; nothing it drew may be used."""


@dataclass(frozen=True)
class Probe:
    """Fixed prompts and the largest gap that passes.

    Attributes:
        prompts: token ids, the same in every step.
        new_tokens: drawn greedily for each.
        max_gap: of the mean |log-probability of engine - of trainer|.
        stop_token_ids, pad_id: of the policy.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    max_gap: float
    stop_token_ids: tuple[int, ...]
    pad_id: int


def probe_gap(engine: Engine, logprobs: Logprobs, probe: Probe) -> float:
    """Mean |log-probability of engine - of trainer| over the tokens the engine draws greedily."""
    sampling = SamplingSpec(probe.new_tokens, probe.stop_token_ids, greedy=True)
    requests = [Request(i, prompt, 0) for i, prompt in enumerate(probe.prompts)]
    packed = pack(requests, engine.generate(requests, sampling), probe.pad_id)
    gap_BT = (packed.sampling_logprobs_BT - logprobs(packed.tokens_BT, packed.mask_BT).float().cpu()).abs()
    return float(gap_BT[packed.mask_BT].mean())


def sync_and_probe(engine: Engine, weight_version: int, logprobs: Logprobs, probe: Probe | None) -> SyncReport:
    """Bring the weights over and believe nothing before the probe has passed.

    Args:
        engine: any.
        weight_version: number of the weights, the step.
        logprobs: of the trainer.
        probe: None, or an engine that shares the trainer's weights, skips the comparison.

    Raises:
        StaleWeightsError: the engine reports another version.
        ProbeError: the gap is above the limit or not a number.
    """
    report = engine.sync(weight_version)
    if report.weight_version != weight_version:
        raise StaleWeightsError(f"the engine holds weights {report.weight_version}, expected {weight_version}")
    if probe is not None and engine.caps.own_weights:
        gap = probe_gap(engine, logprobs, probe)
        if not gap <= probe.max_gap:
            raise ProbeError(
                f"after the sync of weights {weight_version} the engine's log-probabilities differ from the trainer's by "
                f"{gap:.4f} on average over {len(probe.prompts)} greedy answers, allowed {probe.max_gap} "
                "(rollout.probe.max_gap); `nemo-ampo rollout-doctor` tells more"
            )
    return report


@contextmanager
def released_after(engine: Engine) -> Iterator[Engine]:
    """The engine gives its memory back at the end of the block, also when drawing failed."""
    try:
        yield engine
    finally:
        engine.release()


def duplicate_fraction(requests: Sequence[Request], responses: Sequence[Response]) -> float:
    """Share of responses that repeat another one of the same prompt token by token.

    Short answers repeat by chance; a share near 1 means that the engine ignores seeds and a group compares nothing.
    """
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    repeated = 0
    for request, response in zip(requests, responses, strict=True):
        key = (request.prompt_ids, response.token_ids)
        repeated += key in seen
        seen.add(key)
    return repeated / max(len(responses), 1)
