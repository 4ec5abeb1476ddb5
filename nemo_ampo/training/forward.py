"""Log-probabilities of given tokens under a NeMo model, through its pipeline schedule. [nemo]"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_pp
from nemo_aligner.utils.train_utils import set_sync_funcs

from nemo_ampo.training.vocab_parallel import narrow_logits, next_token_logprobs


@contextmanager
def inference_mode(model: Any) -> Iterator[None]:
    """Aligner's paired hooks as one block: dropout off, activation checkpointing and sequence parallelism suspended."""
    model.prepare_for_inference()
    try:
        yield
    finally:
        model.finish_inference()


@torch.no_grad()
def token_logprobs(model: Any, tokens_BT: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
    """Log-probability of ``tokens_BT[:, 1:]``, each given all tokens before it.

    Args:
        model: an Aligner model (actor or SFT).
        tokens_BT: right-padded ids, equal on all ranks of the replica.
        micro_batch_size: rows per forward pass; B need not be a multiple.

    Returns:
        float32 [B, T-1] on every rank of the replica.
    """
    set_sync_funcs(model, forward_only=True)
    with inference_mode(model):
        parts = [
            _logprobs_of_chunk(model, tokens_BT[begin : begin + micro_batch_size])
            for begin in range(0, len(tokens_BT), micro_batch_size)
        ]
    return torch.cat(parts)


def _logprobs_of_chunk(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    def forward_step(data_iterator: Iterator[Any], module: Any) -> Any:
        tokens = tokens_BT.cuda(non_blocking=True)
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        logits = narrow_logits(module, tokens, positions, None)

        def logprobs(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return next_token_logprobs(output, tokens, entropy=False)[0]

        return logits, logprobs

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=model.model,
        num_microbatches=1,
        forward_only=True,
        seq_length=tokens_BT.size(1),
        micro_batch_size=tokens_BT.size(0),
        collect_non_loss_data=True,
    )
    return broadcast_2d_tensor_within_pp(outputs[0] if outputs else None)
