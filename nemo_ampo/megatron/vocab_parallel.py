"""Log-probabilities and entropies of a vocabulary split over tensor-parallel ranks, without its logits in fp32. [nemo]

The logits are the largest tensor of a training step: 152,064 tokens times every position. They are read in the type they
have, a stretch of positions at a time, and their gradient is computed from them and two numbers per position. Nothing of
their size is kept or gathered, besides the gradient.
Legend: B sequences, T positions, V vocabulary of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from nemo_ampo.megatron import STRETCH_ELEMENTS


def narrow_logits(model: Any, *inputs: Any, **settings: Any) -> torch.Tensor:
    """Output of the model in the type it computes in: Megatron's half-precision wrapper would copy logits to fp32."""
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = model.module
    output: torch.Tensor = model(*inputs, **settings)
    return output


def next_token_logprobs(
    logits_BTV: torch.Tensor, tokens_BT: torch.Tensor, entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each next token, and entropy of each next-token distribution, nats.

    Args:
        logits_BTV: this rank's part of the vocabulary, of any floating type.
        tokens_BT: ids, of the whole vocabulary.
        entropy: compute it.

    Returns:
        float32 [B, T-1] each, equal on all tensor-parallel ranks; the entropy is None if it was not asked for.
    """
    logprobs_BT, entropy_BT = _NextToken.apply(logits_BTV, tokens_BT[:, 1:], entropy)
    return logprobs_BT, entropy_BT if entropy else None


class _NextToken(torch.autograd.Function):
    """With z the logits, p their softmax, t the next token: log p_t and H = -sum p log p.

    Backward: d log p_t / dz_i = [i = t] - p_i and dH / dz_i = -p_i (log p_i + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: torch.Tensor, next_BT: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = logits_BTV.size(-1)
        place_BT = next_BT - parallel_state.get_tensor_model_parallel_rank() * width
        is_mine_BT = (place_BT >= 0) & (place_BT < width)
        place_BT = place_BT.where(is_mine_BT, 0)
        largest_BT = logits_BTV[:, :-1].amax(-1).float()
        _over_ranks(largest_BT, torch.distributed.ReduceOp.MAX)
        # Sums over this rank's vocabulary: of exp(z - largest), of the same times (z - largest), and the next token's own.
        sums = torch.zeros((3, *next_BT.shape), dtype=torch.float32, device=logits_BTV.device)
        for at in _stretches(logits_BTV):
            above_BTV = logits_BTV[:, at].float() - largest_BT[:, at, None]
            sums[2, :, at] = above_BTV.gather(-1, place_BT[:, at, None])[..., 0].where(is_mine_BT[:, at], 0.0)
            weights_BTV = above_BTV.exp()
            sums[0, :, at] = weights_BTV.sum(-1)
            if entropy:
                # 0 * log 0 is 0 in the limit but NaN in floating point.
                sums[1, :, at] = above_BTV.masked_fill_(weights_BTV == 0, 0.0).mul_(weights_BTV).sum(-1)
        _over_ranks(sums, torch.distributed.ReduceOp.SUM)
        log_sum_BT = sums[0].log()
        logprobs_BT, entropy_BT = sums[2] - log_sum_BT, log_sum_BT - sums[1] / sums[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_BTV, place_BT, is_mine_BT, largest_BT + log_sum_BT, entropy_BT)
        return logprobs_BT, entropy_BT

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_logprobs_BT: torch.Tensor | None, of_entropy_BT: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None]:
        logits_BTV, place_BT, is_mine_BT, normaliser_BT, entropy_BT = ctx.saved_tensors
        gradient_BTV = torch.empty_like(logits_BTV)
        gradient_BTV[:, -1] = 0
        for at in _stretches(logits_BTV):
            log_p_BTV = logits_BTV[:, at].float() - normaliser_BT[:, at, None]
            p_BTV = log_p_BTV.exp()
            slope_BTV: torch.Tensor | float = 0.0
            if of_entropy_BT is not None:
                slope_BTV = (log_p_BTV.masked_fill_(p_BTV == 0, 0.0) + entropy_BT[:, at, None]) * of_entropy_BT[:, at, None]
            if of_logprobs_BT is not None:
                slope_BTV = slope_BTV + of_logprobs_BT[:, at, None]
            found_BTV = p_BTV.mul_(slope_BTV).neg_()
            if of_logprobs_BT is not None:
                own_BT = of_logprobs_BT[:, at].where(is_mine_BT[:, at], 0.0)
                found_BTV.scatter_add_(-1, place_BT[:, at, None], own_BT[..., None].to(found_BTV.dtype))
            gradient_BTV[:, at] = found_BTV
        return gradient_BTV, None, None


def _stretches(logits_BTV: torch.Tensor) -> Iterator[slice]:
    """All positions but the last, which has no next token."""
    rows, positions, width = logits_BTV.shape
    size = max(1, STRETCH_ELEMENTS // max(rows * width, 1))
    for begin in range(0, positions - 1, size):
        yield slice(begin, min(begin + size, positions - 1))


def _over_ranks(values: torch.Tensor, how: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(values, how, group=parallel_state.get_tensor_model_parallel_group())
