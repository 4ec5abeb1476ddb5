"""From logits to a token: one function for every engine that lets us draw. Legend: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_ampo.rollout.engine import SamplingSpec


def uniform_draws(seeds: Sequence[int], count: int) -> torch.Tensor:
    """``count`` uniform numbers in [0, 1) per seed, float64 [B, count]; a row depends on its own seed alone."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


def draw(logits_BV: torch.Tensor, draws_B: torch.Tensor, sampling: SamplingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: the token whose cumulative probability interval holds the uniform draw.

    The outcome depends on the row's own logits and draw alone, never on what else is in the batch.

    Args:
        logits_BV: float32.
        draws_B: uniform in [0, 1), float64.
        sampling: temperature, truncation or greedy.

    Returns:
        token ids int64 [B] and their log-probabilities under softmax(logits), float32 [B]: the policy's own, whatever
        the sampling.
    """
    raw_BV = torch.log_softmax(logits_BV, dim=-1)
    if sampling.greedy:
        tokens_B = raw_BV.argmax(dim=-1)
    else:
        scaled_BV = raw_BV if sampling.temperature == 1 else torch.log_softmax(logits_BV / sampling.temperature, dim=-1)
        cdf_BV = _truncate(scaled_BV, sampling).exp().cumsum(dim=-1, dtype=torch.float64)
        tokens_B = torch.searchsorted(cdf_BV, (draws_B * cdf_BV[:, -1]).unsqueeze(1), right=True).squeeze(1)
        tokens_B = tokens_B.clamp(max=logits_BV.size(-1) - 1)
    return tokens_B, raw_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)


def _truncate(logprobs_BV: torch.Tensor, sampling: SamplingSpec) -> torch.Tensor:
    """-inf outside the top_k tokens and outside the smallest set that holds top_p of the mass."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return logprobs_BV
    ordered_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True)
    drop_BV = torch.zeros_like(ordered_BV, dtype=torch.bool)
    if sampling.top_k:
        drop_BV[:, sampling.top_k :] = True
    # A token stays while the mass before it is below top_p, so that the most likely one always does.
    probabilities_BV = ordered_BV.masked_fill(drop_BV, -torch.inf).softmax(dim=-1)
    drop_BV |= probabilities_BV.cumsum(dim=-1) - probabilities_BV >= sampling.top_p
    return logprobs_BV.masked_fill(drop_BV.gather(1, order_BV.argsort(dim=-1)), -torch.inf)
