"""Megatron's schedule over micro-batches, and log-probabilities of given tokens through it. [nemo]"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo_aligner.utils.train_utils import set_sync_funcs

from nemo_ampo.algo.loss import Totals
from nemo_ampo.megatron.micro_batches import MicroBatch, by_rows, by_tokens, joined, needed_tokens
from nemo_ampo.megatron.vocab_parallel import next_token_logits, next_token_logprobs


@contextmanager
def inference_mode(model: Any) -> Iterator[None]:
    """Aligner's paired hooks as one block: dropout off, activation checkpointing and sequence parallelism suspended."""
    model.prepare_for_inference()
    try:
        yield
    finally:
        model.finish_inference()


def split_of_update(model: Any, mask_BT: torch.Tensor) -> list[MicroBatch]:
    """Micro-batches of one optimizer step, by ``model.tokens_per_micro_batch`` or ``model.micro_batch_size``.

    As many on every replica, a collective decision: the average over micro-batches is then one over the job.

    Args:
        model: an Aligner model.
        mask_BT: tokens that count, [B, T-1], this replica's rows; equally many on every replica.
    """
    budget, lengths = model.cfg.get("tokens_per_micro_batch"), needed_tokens(mask_BT)
    if not budget:
        return by_rows(lengths, int(model.cfg.micro_batch_size))
    count = torch.tensor(len(by_tokens(lengths, budget)), device=torch.cuda.current_device())
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return by_tokens(lengths, budget, int(count))


def totals_of_job(mask_BT: torch.Tensor) -> Totals:
    """Tokens and sequences in the masks of all replicas."""
    own = Totals.of(mask_BT)
    counts = torch.tensor([own.tokens, own.sequences], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return Totals(*counts.tolist())


def accumulate(
    model: Any,
    forward_step: Callable[..., Any],
    batch: Mapping[str, torch.Tensor],
    split: Sequence[MicroBatch],
    forward_only: bool,
) -> list[Any]:
    """Gradients of the micro-batches, averaged; what the loss function reported of each, on the last pipeline stage."""
    configs = [module.config for module in model.get_model_module_list()]
    for config in configs:
        # Stages of a pipeline then tell each other the shape of every tensor; Megatron takes all to be of the first's.
        config.variable_seq_lengths = len({(len(part.rows), part.width) for part in split}) > 1
    try:
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=model._make_data_iterator_list(iter([part.of(batch) for part in split])),
            model=model.model,
            num_microbatches=len(split),
            forward_only=forward_only,
            seq_length=split[0].width,
            micro_batch_size=len(split[0].rows),
        )
    finally:
        for config in configs:
            config.variable_seq_lengths = False
    return outputs


@torch.no_grad()
def token_logprobs(model: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, size: int) -> torch.Tensor:
    """Log-probability of the tokens of the mask, each given all tokens before it.

    Args:
        model: an Aligner model (actor or SFT).
        tokens_BT: right-padded ids, equal on all ranks of the replica.
        mask_BT: [B, T-1], True at those of ``tokens_BT[:, 1:]`` that are asked for.
        size: rows of a pass where no ``model.tokens_per_micro_batch`` decides them.

    Returns:
        float32 [B, T-1] on every rank of the replica, 0 outside the mask.
    """
    set_sync_funcs(model, forward_only=True)
    budget, lengths = model.cfg.get("tokens_per_micro_batch"), needed_tokens(mask_BT)
    split = by_tokens(lengths, budget) if budget else by_rows(lengths, size, in_order=False)
    batch = {"tokens_BT": tokens_BT, "mask_BT": mask_BT}
    with inference_mode(model):
        logprobs_BT = joined([_logprobs_of(model, **part.of(batch)) for part in split], split, mask_BT)
    return torch.zeros(mask_BT.shape, device=torch.cuda.current_device()) if logprobs_BT is None else logprobs_BT


def _logprobs_of(model: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    def forward_step(data_iterator: Iterator[Any], module: Any) -> Any:
        tokens, mask = tokens_BT.cuda(non_blocking=True), mask_BT.cuda(non_blocking=True)

        def logprobs(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return next_token_logprobs(output, tokens, mask, entropy=False)[0]

        return next_token_logits(module, tokens, mask), logprobs

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
    return from_last_stage(outputs[0] if outputs else None, (tokens_BT.size(0), tokens_BT.size(1) - 1))


def from_last_stage(logprobs_BT: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
    """What only the last pipeline stage has, float32, on all stages; they know its shape."""
    if logprobs_BT is None:
        logprobs_BT = torch.empty(tuple(shape), dtype=torch.float32, device=torch.cuda.current_device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(logprobs_BT, last, parallel_state.get_pipeline_model_parallel_group())
    return logprobs_BT
