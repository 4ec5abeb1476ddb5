"""The cloned policy: NeMo-Aligner's supervised model, with logits of the reply tokens only. [nemo]

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.parts.utils_funcs import get_last_rank
from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
from nemo_aligner.utils.train_utils import set_sync_funcs

from nemo_ampo.algo.loss import token_weights, weighted_sum
from nemo_ampo.data.collate import whole_rows
from nemo_ampo.megatron import WIDTH_MULTIPLE
from nemo_ampo.megatron.forward import accumulate, split_of_update, totals_of_job
from nemo_ampo.megatron.vocab_parallel import next_token_logits, next_token_logprobs


class BcModel(GPTSFTModel):
    """The same loss from the reply tokens alone, and micro-batches by a budget of tokens."""

    def get_loss_and_metrics(self, batch: dict[str, torch.Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Accumulate gradients over the micro-batches of one optimizer step.

        As upstream, the loss is the mean over all micro-batches of each one's mean negative log-likelihood per reply token.
        With ``model.tokens_per_micro_batch`` it is the one of ``micro_batch_size=1``, a mean over rows, for any split.

        Args:
            batch: of :func:`nemo_ampo.data.collate.collate_bc`, this replica's rows.
            forward_only: no gradients.

        Returns:
            the loss of the whole job, and the same as ``loss``.
        """
        set_sync_funcs(self, forward_only)
        rows = next_token_rows(batch["tokens"], batch["labels"], batch["loss_mask"])
        mask_BT, split = rows["mask_BT"], split_of_update(self, rows["mask_BT"])
        if self.cfg.get("tokens_per_micro_batch"):
            # Undoes the averages over micro-batches and replicas that the frameworks take.
            averages = len(split) * parallel_state.get_data_parallel_world_size()
            weights_BT = token_weights(mask_BT, "sequence_mean", totals_of_job(mask_BT)) * averages
        else:
            weights_BT = torch.cat([token_weights(mask_BT[list(part.rows)], "token_mean") for part in split])
        rows["weights_BT"] = weights_BT.float()
        loss = _mean_of_job(accumulate(self, _forward_step, rows, split, forward_only))
        return loss, {"loss": loss}


def next_token_rows(tokens_BT: torch.Tensor, labels_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whole rows instead of inputs and labels, T rounded up: ``tokens_BT`` [B, T] and ``mask_BT`` [B, T-1]."""
    whole_BT = whole_rows(tokens_BT, labels_BT)
    more = -whole_BT.size(1) % WIDTH_MULTIPLE
    return {
        "tokens_BT": torch.nn.functional.pad(whole_BT, (0, more)),
        "mask_BT": torch.nn.functional.pad(loss_mask_BT.bool(), (0, more)),
    }


def _forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    tokens_BT, mask_BT = batch["tokens_BT"], batch["mask_BT"]

    def loss_func(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_BT, _ = next_token_logprobs(logits_NV, tokens_BT, mask_BT, entropy=False)
        loss = -weighted_sum(logprobs_BT, batch["weights_BT"])
        return loss, loss.detach().double()

    return next_token_logits(model, tokens_BT, mask_BT), loss_func


def _mean_of_job(losses: Sequence[torch.Tensor]) -> float:
    """Mean over micro-batches and replicas; ``losses`` is empty on all but the last pipeline stage."""
    mean = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    if losses:
        mean = torch.stack(list(losses)).mean() / parallel_state.get_data_parallel_world_size()
        torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    torch.distributed.broadcast(mean, get_last_rank())
    return float(mean)
