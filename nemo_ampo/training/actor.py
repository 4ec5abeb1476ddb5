"""The AMPO policy: NeMo-Aligner's REINFORCE actor with our loss, reference policy and metrics. [nemo]

Only what differs is overridden. Legend: B sequences of a micro-batch, T positions, N tokens in the mask, V vocabulary of
this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.parts.utils_funcs import get_last_rank
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils.train_utils import set_sync_funcs
from nemo_aligner.utils.utils import cpu_weight_swap

from nemo_ampo.algo.algorithm import AggregateOver, AlgorithmConfig
from nemo_ampo.algo.loss import (
    filled_micro_batches,
    token_loss,
    update_weights,
    weighted_sum,
)
from nemo_ampo.megatron.forward import accumulate, from_last_stage, split_of_update, token_logprobs, totals_of_job
from nemo_ampo.megatron.micro_batches import joined
from nemo_ampo.megatron.vocab_parallel import next_token_logits, next_token_logprobs

LOSS_TERMS = ("loss", "pg_loss")
"""Sum over the micro-batches of a job, each token with its weight in the loss."""

TOKEN_MEANS = ("kl", "entropy", "clip_fraction", "capped_fraction")
"""Means over all tokens of the job in the mask, each counting the same."""


class AmpoActor(MegatronGPTReinforceActorModel):
    """Set :attr:`algorithm` after construction; NeMo builds the object from its own config.

    Attributes:
        algorithm: knobs.
        logprobs_of_update_BT: of the tokens in the mask, float32 [B, T-1], from the last call of
            :meth:`get_loss_and_metrics` whose batch did not bring ``old_logprobs_BT``; on every rank of the replica.
    """

    algorithm: AlgorithmConfig
    logprobs_of_update_BT: torch.Tensor

    def get_inference_log_probs(self, response_tokens: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probability of each next token under the weights in place, float32 [B, T-1], on every rank.

        Args:
            response_tokens: right-padded ids [B, T].
            mask_BT: of the tokens that are asked for, [B, T-1]; 0 stands at the others. None asks for all.
        """
        if mask_BT is None:
            mask_BT = torch.ones_like(response_tokens[:, 1:], dtype=torch.bool)
        return token_logprobs(self, response_tokens, mask_BT, self.forward_micro_batch_size)

    def get_init_policy_logprobs(self, response_tokens: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The same under the weights that the stage started from."""
        with cpu_weight_swap(self, self.init_policy_state_dict, megatron_amp_O2=self.megatron_amp_O2):
            return self.get_inference_log_probs(response_tokens, mask_BT)

    def get_actor_forward_output_and_loss_func(self) -> Callable[..., Any]:
        """One micro-batch: forward, then clipped policy loss + KL to the reference - entropy bonus, token by token.

        Each token's part is multiplied by ``batch["weights_BT"]`` and summed, so all means are in those weights.
        """
        algorithm = self.algorithm

        def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
            batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
            tokens_BT, mask_BT, weights_BT = batch["tokens_BT"], batch["mask_BT"], batch["weights_BT"]

            def loss_func(logits_NV: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                logprobs_BT, entropy_BT = next_token_logprobs(logits_NV, tokens_BT, mask_BT)
                assert entropy_BT is not None
                if algorithm.entropy_coef == 0:
                    entropy_BT = entropy_BT.detach()
                old = {"old_logprobs_BT": logprobs_BT.detach()}  # where this pass is the first since the tokens were drawn
                tokens = token_loss(logprobs_BT, entropy_BT, old | batch, algorithm)
                loss = weighted_sum(tokens.loss_BT, weights_BT)
                terms = torch.stack([loss, weighted_sum(tokens.policy.loss_BT, weights_BT)]).detach().double()
                per_token = (tokens.kl_BT, entropy_BT, tokens.policy.clipped_BT, tokens.policy.capped_BT)
                sums = torch.stack([v.detach().double()[mask_BT].sum() for v in per_token] + [mask_BT.sum().double()])
                ratio_max = torch.where(mask_BT, tokens.policy.ratio_BT, 0.0).max().double()
                return loss, {"terms": terms, "sums": sums, "ratio_max": ratio_max, **old}

            return next_token_logits(model, tokens_BT, mask_BT), loss_func

        return forward_step

    def get_loss_and_metrics(self, batch: dict[str, torch.Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Accumulate gradients over the micro-batches of one optimizer step.

        Megatron's schedule divides by the number of micro-batches it really ran and the data-parallel reduction averages
        over replicas. With ``aggregate_over=micro_batch`` the gradient is therefore that of the mean over all micro-batches
        of the job; with ``batch`` the weights undo both divisions, and no split of the batch changes the result: neither
        ``model.micro_batch_size`` nor ``model.tokens_per_micro_batch``, which is refused without it.

        Args:
            batch: fields of :class:`nemo_ampo.types.TrainBatch`, this replica's rows.
            forward_only: no gradients.

        Returns:
            the loss, and the metrics of the whole job: :data:`LOSS_TERMS`, :data:`TOKEN_MEANS` and ``ratio_max``; no
            ``kl`` without a reference policy.
        """
        set_sync_funcs(self, forward_only)
        split = split_of_update(self, batch["mask_BT"])
        batch = batch | {"weights_BT": self._weights(batch["mask_BT"], len(split))}
        outputs = accumulate(self, self.get_actor_forward_output_and_loss_func(), batch, split, forward_only)
        values = _metrics_of_job(outputs)
        if "old_logprobs_BT" not in batch:
            rows = [output["old_logprobs_BT"] for output in outputs]
            self.logprobs_of_update_BT = from_last_stage(joined(rows, split, batch["mask_BT"]), batch["mask_BT"].shape)
        if not self.algorithm.uses_reference:
            del values["kl"]  # there was nothing to measure it against
        return values["loss"], values

    def _weights(self, mask_BT: torch.Tensor, micro_batches: int) -> torch.Tensor:
        """Weight of each token in the loss of its micro-batch, float32 [B, T-1]."""
        totals = totals_of_job(mask_BT) if self.algorithm.aggregate_over == AggregateOver.batch else None
        replicas = parallel_state.get_data_parallel_world_size()
        weights_BT = update_weights(mask_BT, micro_batches, self.algorithm, totals, replicas)
        if totals is None:
            # A micro-batch whose samples are all left out is no part of the mean over micro-batches.
            filled = torch.tensor(filled_micro_batches(mask_BT, micro_batches), device=torch.cuda.current_device())
            torch.distributed.all_reduce(filled, group=parallel_state.get_data_parallel_group())
            weights_BT = weights_BT * micro_batches * replicas / max(int(filled), 1)
        return weights_BT.float()


def _metrics_of_job(outputs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Join the micro-batches of all replicas; ``outputs`` is empty on all but the last pipeline stage."""
    device = torch.cuda.current_device()
    means = torch.zeros(len(LOSS_TERMS) + len(TOKEN_MEANS) + 1, dtype=torch.float64, device=device)
    if outputs:
        group = parallel_state.get_data_parallel_group()
        terms = torch.stack([o["terms"] for o in outputs]).mean(0)
        sums = torch.stack([o["sums"] for o in outputs]).sum(0)
        ratio_max = torch.stack([o["ratio_max"] for o in outputs]).max()
        joined = torch.cat([terms / parallel_state.get_data_parallel_world_size(), sums])
        torch.distributed.all_reduce(joined, group=group)
        torch.distributed.all_reduce(ratio_max, torch.distributed.ReduceOp.MAX, group=group)
        terms, sums, tokens = joined.split([len(LOSS_TERMS), len(TOKEN_MEANS), 1])
        means = torch.cat([terms, sums / tokens.clamp(min=1), ratio_max[None]])
    torch.distributed.broadcast(means, get_last_rank())
    return dict(zip((*LOSS_TERMS, *TOKEN_MEANS, "ratio_max"), means.tolist(), strict=True))
