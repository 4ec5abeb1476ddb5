"""Log-probabilities and entropies of the tokens that count, of a vocabulary split over tensor-parallel ranks. [nemo]

The logits are the largest tensor of a training step: 152,064 tokens times every position. Here the output layer sees only
the positions before a token that counts, which for replies to long prompts are few; what it answers is read in the type it
has, a stretch of positions at a time, and its gradient is computed from it and two numbers per position. Nothing of its size
is kept or gathered, besides the gradient.
Legend: B sequences, T positions, N tokens that count, V vocabulary of this tensor-parallel rank, H width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module

from nemo_ampo.megatron import STRETCH_ELEMENTS


def next_token_logits(model: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Logits from which the tokens of the mask are drawn, [N, V], in the type the model computes in.

    Args:
        model: one of NeMo's modules; Megatron's half-precision wrapper would copy its logits to fp32 and is left out.
        tokens_BT: right-padded ids; causality alone keeps padding out.
        mask_BT: [B, T-1], True at the tokens of ``tokens_BT[:, 1:]`` that count.

    Returns:
        on the last pipeline stage; on others their hidden states.
    """
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = model.module
    positions_BT = torch.arange(tokens_BT.size(1), device=tokens_BT.device).expand_as(tokens_BT)
    if not model.post_process:
        hidden: torch.Tensor = model(tokens_BT, positions_BT, None, labels=None)
        return hidden
    with _output_layer_sees(model.output_layer, mask_BT):
        logits: torch.Tensor = model(tokens_BT, positions_BT, None, labels=None)
    return logits[0]


@contextmanager
def _output_layer_sees(layer: Any, mask_BT: torch.Tensor) -> Iterator[None]:
    """The layer gets N of the hidden states [T, B, H] as [N, 1, H], once a sequence split over ranks is whole again.

    Megatron's layer would make it whole itself. As it does not then, it must leave its part of the gradient unreduced, as
    with ``sequence_parallel``: the way back through the gathering adds the parts up.
    """
    row_N, column_N = mask_BT.nonzero().unbind(1)
    kept = {name: getattr(layer, name) for name in ("sequence_parallel", "disable_grad_reduce")}

    def choose(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_TBH = inputs[0]
        if kept["sequence_parallel"]:
            hidden_TBH = gather_from_sequence_parallel_region(hidden_TBH)
        chosen_NH = hidden_TBH.flatten(0, 1).index_select(0, column_N * len(mask_BT) + row_N)
        return (chosen_NH[:, None], *inputs[1:])

    handle = layer.register_forward_pre_hook(choose)
    if kept["sequence_parallel"]:
        layer.sequence_parallel, layer.disable_grad_reduce = False, True
    try:
        yield
    finally:
        handle.remove()
        for name, value in kept.items():
            setattr(layer, name, value)


def next_token_logprobs(
    logits_NV: torch.Tensor, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each token of the mask, and entropy of the distribution it was drawn from, nats.

    Args:
        logits_NV: of :func:`next_token_logits`, this rank's part of the vocabulary, of any floating type.
        tokens_BT: ids, of the whole vocabulary.
        mask_BT: [B, T-1].
        entropy: compute it.

    Returns:
        float32 [B, T-1] each, 0 outside the mask, equal on all tensor-parallel ranks; the entropy is None if it was not
        asked for.
    """
    logprobs_N, entropy_N = _NextToken.apply(logits_NV, tokens_BT[:, 1:][mask_BT], entropy)
    nothing_BT = torch.zeros(mask_BT.shape, device=logits_NV.device)
    logprobs_BT = nothing_BT.masked_scatter(mask_BT, logprobs_N)
    return logprobs_BT, nothing_BT.masked_scatter(mask_BT, entropy_N) if entropy else None


class _NextToken(torch.autograd.Function):
    """With z the logits, p their softmax, t the next token: log p_t and H = -sum p log p.

    Backward: d log p_t / dz_i = [i = t] - p_i and dH / dz_i = -p_i (log p_i + H).
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, next_N: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = logits_NV.size(-1)
        place_N = next_N - parallel_state.get_tensor_model_parallel_rank() * width
        is_mine_N = (place_N >= 0) & (place_N < width)
        place_N = place_N.where(is_mine_N, 0)
        largest_N = logits_NV.amax(-1).float()
        _over_ranks(largest_N, torch.distributed.ReduceOp.MAX)
        # Sums over this rank's vocabulary: of exp(z - largest), of the same times (z - largest), and the next token's own.
        sums = torch.zeros((3, *next_N.shape), dtype=torch.float32, device=logits_NV.device)
        for at in _stretches(logits_NV):
            above_NV = logits_NV[at].float() - largest_N[at, None]
            sums[2, at] = above_NV.gather(-1, place_N[at, None])[:, 0].where(is_mine_N[at], 0.0)
            weights_NV = above_NV.exp()
            sums[0, at] = weights_NV.sum(-1)
            if entropy:
                # 0 * log 0 is 0 in the limit but NaN in floating point.
                sums[1, at] = above_NV.masked_fill_(weights_NV == 0, 0.0).mul_(weights_NV).sum(-1)
        _over_ranks(sums, torch.distributed.ReduceOp.SUM)
        log_sum_N = sums[0].log()
        logprobs_N, entropy_N = sums[2] - log_sum_N, log_sum_N - sums[1] / sums[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_NV, place_N, is_mine_N, largest_N + log_sum_N, entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_logprobs_N: torch.Tensor | None, of_entropy_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None]:
        logits_NV, place_N, is_mine_N, normaliser_N, entropy_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for at in _stretches(logits_NV):
            log_p_NV = logits_NV[at].float() - normaliser_N[at, None]
            p_NV = log_p_NV.exp()
            slope_NV: torch.Tensor | float = 0.0
            if of_entropy_N is not None:
                slope_NV = (log_p_NV.masked_fill_(p_NV == 0, 0.0) + entropy_N[at, None]) * of_entropy_N[at, None]
            if of_logprobs_N is not None:
                slope_NV = slope_NV + of_logprobs_N[at, None]
            found_NV = p_NV.mul_(slope_NV).neg_()
            if of_logprobs_N is not None:
                own_N = of_logprobs_N[at].where(is_mine_N[at], 0.0)
                found_NV.scatter_add_(-1, place_N[at, None], own_N[:, None].to(found_NV.dtype))
            gradient_NV[at] = found_NV
        return gradient_NV, None, None


def _stretches(logits_NV: torch.Tensor) -> Iterator[slice]:
    count, width = logits_NV.shape
    size = max(1, STRETCH_ELEMENTS // max(width, 1))
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def _over_ranks(values: torch.Tensor, how: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(values, how, group=parallel_state.get_tensor_model_parallel_group())
