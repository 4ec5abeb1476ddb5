"""Padded vocabulary rows must not take part in any softmax. [nemo]

Megatron pads the embedding so that it divides over tensor-parallel ranks. The extra rows are no tokens: without a mask
they draw probability from real ones in training, could be sampled, and the exported checkpoint (which has no such
rows) would be another distribution than the trained one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

MASKED_LOGIT = -1e4
"""Far below any real logit, finite so that p * log p stays 0 and not NaN, and representable in bf16 and fp16."""


def vocab_size(model: Any) -> int:
    """Rows of the Hugging Face embedding the model came from: ids at or above it are padding."""
    return int(model.cfg.get("hf_vocab_size") or model.tokenizer.vocab_size)


def mask_padded_vocab(model: Any) -> None:
    """Make the output layer of a NeMo ``MegatronGPTModel`` answer :data:`MASKED_LOGIT` for every padded id."""
    if not parallel_state.is_pipeline_last_stage():
        return
    for module in model.get_model_module_list():
        module.output_layer.register_forward_hook(_hook(vocab_size(model)))


def _hook(size: int) -> Any:
    def hook(layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        width = logits.size(-1)
        first = 0
        if not layer.gather_output:
            first = parallel_state.get_tensor_model_parallel_rank() * width
        keep = size - first
        if keep < width:
            logits = torch.cat(
                (
                    logits[..., : max(keep, 0)],
                    logits.new_full((*logits.shape[:-1], width - max(keep, 0)), MASKED_LOGIT),
                ),
                dim=-1,
            )
        return logits, bias

    return hook
