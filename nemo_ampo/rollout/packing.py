"""Responses of a step as one padded batch, as the trainer takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_ampo.rollout.engine import ReplyError, Request, Response, check_logprobs


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

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row without padding."""
        lengths: list[int] = (self.prompt_lengths_B + self.response_lengths_B).tolist()
        return lengths


def pack(requests: Sequence[Request], responses: Sequence[Response], pad_id: int, multiple_of: int = 8) -> PackedRollouts:
    """Pad prompts and responses into one batch.

    Args:
        requests, responses: in the same order.
        pad_id: written behind each response.
        multiple_of: T is rounded up to this.

    Raises:
        ReplyError: order or counts differ, a log-probability is missing, positive or not finite.
    """
    if [r.request_id for r in requests] != [r.request_id for r in responses]:
        raise ReplyError("responses do not line up with requests")
    for r in responses:
        count = 0 if r.logprobs is None else len(r.logprobs)
        if r.logprobs is None or count != len(r.token_ids) or not r.token_ids:
            raise ReplyError(f"response {r.request_id}: {len(r.token_ids)} tokens, {count} log-probs")
        check_logprobs(f"response {r.request_id}", r.logprobs)
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
        assert response.logprobs is not None  # checked above
        logprobs[row, begin - 1 : end - 1] = response.logprobs
    return PackedRollouts(
        tokens_BT=tokens,
        prompt_lengths_B=torch.tensor(prompt_lengths),
        response_lengths_B=torch.tensor(response_lengths),
        mask_BT=mask,
        sampling_logprobs_BT=logprobs,
    )
