"""What every rollout engine promises: prompts in; sampled tokens, their log-probabilities and the reason to stop out.

An engine never pads, never decides rewards and never sees a group: it gets independent :class:`Request` records, each
with a seed of its own, and gives back one :class:`Response` per request. :func:`pack` turns both into the tensors a
trainer needs. Legend: B samples, T tokens of the longest prompt plus response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from nemo_ampo.errors import EngineError

Finish = Literal["eos", "length"]


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: a response is cut here; it then has ``finish="length"``.
        stop_token_ids: a response ends with the first of these, which stays in it.
        temperature: logits are divided by it; above 0.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0


@dataclass(frozen=True)
class Request:
    """One response to draw.

    Attributes:
        request_id: unique within a call.
        prompt_ids: unpadded prompt.
        seed: decides every draw of this response; see :func:`request_seed`.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Response:
    """One drawn response.

    Attributes:
        request_id: of the request it answers.
        token_ids: drawn tokens, the stop token included.
        logprobs: log-probability of each token under the sampling distribution (after temperature), float32 [len].
        finish: ``eos`` when a stop token was drawn, ``length`` when the limit cut it.
    """

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: torch.Tensor
    finish: Finish


OnFinish = Callable[[Response], None]


class Engine(Protocol):
    """A rollout engine. On several model-parallel ranks every rank calls with equal requests and gets equal responses."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        """Draw one response per request, in request order.

        Args:
            requests: with distinct ``request_id``.
            sampling: shared by all requests of the call.
            on_finish: called as soon as a response is complete, while others are still being drawn.

        Raises:
            EngineError: empty or too long prompt, duplicate id, token outside the vocabulary.
        """
        ...


def request_seed(run_seed: int, step: int, prompt: str, sample: int) -> int:
    """A 63-bit seed from what the response *is*, never from the rank that happens to draw it.

    So a run draws the same responses on one process, two data-parallel ranks, or after a resume.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_requests(requests: Sequence[Request], sampling: SamplingSpec, max_total: int, vocab_size: int) -> None:
    """Refuse a call that could not be answered faithfully.

    Args:
        requests: of one ``generate`` call.
        sampling: of the same call.
        max_total: longest prompt plus response the model can hold, tokens.
        vocab_size: ids at or above it do not exist.

    Raises:
        EngineError: naming the request and the limit.
    """
    if sampling.temperature <= 0:
        raise EngineError(f"temperature must be above 0, got {sampling.temperature}")
    if not sampling.stop_token_ids:
        raise EngineError("no stop token: every response would run to max_new_tokens")
    if len({r.request_id for r in requests}) != len(requests):
        raise EngineError("request ids of one call must be distinct")
    for r in requests:
        if not r.prompt_ids:
            raise EngineError(f"request {r.request_id}: empty prompt")
        if len(r.prompt_ids) + sampling.max_new_tokens > max_total:
            raise EngineError(
                f"request {r.request_id}: prompt of {len(r.prompt_ids)} tokens plus {sampling.max_new_tokens} new ones "
                f"exceeds the model's {max_total} (rollout.max_prompt_tokens, rollout.max_new_tokens)"
            )
        if max(r.prompt_ids) >= vocab_size or min(r.prompt_ids) < 0:
            raise EngineError(f"request {r.request_id}: token id outside the vocabulary of {vocab_size}")


@dataclass(frozen=True)
class PackedRollouts:
    """Right-padded tensors of one rank's rollouts.

    Attributes:
        tokens_BT: prompt then response then padding, int64.
        prompt_lengths_B, response_lengths_B: tokens, int64.
        mask_BT: True where ``tokens_BT[:, 1:]`` is a response token, so it lines up with log-probabilities [B, T-1].
        sampling_logprobs_BT: the engine's log-probability of ``tokens_BT[:, 1:]``, 0 outside the mask, float32 [B, T-1].
    """

    tokens_BT: torch.Tensor
    prompt_lengths_B: torch.Tensor
    response_lengths_B: torch.Tensor
    mask_BT: torch.Tensor
    sampling_logprobs_BT: torch.Tensor


def pack(requests: Sequence[Request], responses: Sequence[Response], pad_id: int, multiple_of: int = 8) -> PackedRollouts:
    """Pad prompts and responses into one batch.

    Args:
        requests, responses: in the same order.
        pad_id: written behind each response.
        multiple_of: T is rounded up to this.

    Raises:
        EngineError: order or counts differ, a log-probability is missing, positive or not finite.
    """
    if [r.request_id for r in requests] != [r.request_id for r in responses]:
        raise EngineError("responses do not line up with requests")
    for r in responses:
        if len(r.logprobs) != len(r.token_ids) or not r.token_ids:
            raise EngineError(f"response {r.request_id}: {len(r.token_ids)} tokens, {len(r.logprobs)} log-probs")
        if not torch.isfinite(r.logprobs).all() or (r.logprobs > 1e-4).any():
            raise EngineError(f"response {r.request_id}: a log-probability is positive or not finite")
    prompt_lengths = [len(r.prompt_ids) for r in requests]
    response_lengths = [len(r.token_ids) for r in responses]
    longest = max(p + n for p, n in zip(prompt_lengths, response_lengths, strict=True))
    width = -(-longest // multiple_of) * multiple_of
    tokens = torch.full((len(requests), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(requests), width - 1), dtype=torch.bool)
    logprobs = torch.zeros((len(requests), width - 1), dtype=torch.float32)
    for row, (request, response) in enumerate(zip(requests, responses, strict=True)):
        begin, end = prompt_lengths[row], prompt_lengths[row] + response_lengths[row]
        tokens[row, :end] = torch.tensor(request.prompt_ids + response.token_ids)
        mask[row, begin - 1 : end - 1] = True
        logprobs[row, begin - 1 : end - 1] = response.logprobs
    return PackedRollouts(
        tokens_BT=tokens,
        prompt_lengths_B=torch.tensor(prompt_lengths),
        response_lengths_B=torch.tensor(response_lengths),
        mask_BT=mask,
        sampling_logprobs_BT=logprobs,
    )
