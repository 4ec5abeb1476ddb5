"""The AMPO policy: NeMo-Aligner's REINFORCE actor with our loss, reference policy and metrics. [nemo]

Only what differs is overridden. The attention mask is None throughout: sequences are padded on the right, so causality
alone keeps padding out. Legend: B sequences of a micro-batch, T positions, V vocabulary of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo.collections.nlp.modules.common.megatron.utils import (
    average_losses_across_data_parallel_group,
    get_iterator_k_split,
)
from nemo.collections.nlp.parts.utils_funcs import get_last_rank
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
from nemo_aligner.utils.train_utils import set_sync_funcs

from nemo_ampo.config import AlgorithmConfig
from nemo_ampo.forward import token_logprobs
from nemo_ampo.loss import AGGREGATES, entropy_from_logits, kl_estimate, policy_loss

LOSS_METRICS = ("loss", "pg_loss", "kl", "entropy", "clip_fraction", "ratio_max")


class AmpoActor(MegatronGPTReinforceActorModel):
    """Set :attr:`algorithm` after construction; NeMo builds the object from its own config."""

    algorithm: AlgorithmConfig

    def get_inference_log_probs(
        self, response_tokens: torch.Tensor, forward_micro_batch_size: int | None = None
    ) -> torch.Tensor:
        """Log-probability of each next token under the weights in place, float32 [B, T-1], on every rank."""
        return token_logprobs(self, response_tokens, forward_micro_batch_size or self.forward_micro_batch_size)

    def get_actor_forward_output_and_loss_func(self) -> Callable[..., Any]:
        """One micro-batch: forward, then clipped policy loss + KL to the reference - entropy bonus."""
        algorithm = self.algorithm
        aggregate = AGGREGATES[algorithm.aggregate]

        def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
            batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
            tokens_BT = batch["tokens_BT"]
            positions_BT = torch.arange(tokens_BT.size(1), device=tokens_BT.device).expand_as(tokens_BT)
            logits_BTV = model(tokens_BT, positions_BT, None, labels=None)

            def loss_func(logits_BTV: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                mask_BT = batch["mask_BT"]
                logprobs_BT = from_parallel_logits_to_logprobs(
                    vocab_parallel_logits=logits_BTV, target=tokens_BT, higher_stability=True
                )
                pg_loss, metrics = policy_loss(
                    logprobs_BT,
                    batch["old_logprobs_BT"],
                    batch["advantages_B"],
                    mask_BT,
                    algorithm.clip_low,
                    algorithm.clip_high,
                    algorithm.aggregate,
                )
                kl = aggregate(kl_estimate(logprobs_BT, batch["ref_logprobs_BT"], algorithm.kl_kind), mask_BT)
                with torch.set_grad_enabled(torch.is_grad_enabled() and algorithm.entropy_coef != 0):
                    entropy = aggregate(_entropy(logits_BTV), mask_BT)
                loss = pg_loss + algorithm.kl_coef * kl - algorithm.entropy_coef * entropy
                values = {
                    "loss": loss,
                    "pg_loss": pg_loss,
                    "kl": kl,
                    "entropy": entropy,
                    "clip_fraction": metrics["clip_fraction"],
                    "ratio_max": metrics["ratio_max"],
                }
                reduced = average_losses_across_data_parallel_group(
                    [torch.as_tensor(values[k], dtype=torch.float32, device=loss.device) for k in LOSS_METRICS]
                )
                return loss, {"values": reduced}

            return logits_BTV, loss_func

        return forward_step

    def get_loss_and_metrics(self, batch: dict[str, torch.Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Accumulate gradients over the micro-batches of one optimizer step.

        Megatron's schedule divides by the number of micro-batches it really ran and the data-parallel reduction averages
        over replicas, so the gradient is that of the mean over all micro-batches of the job.

        Args:
            batch: fields of :class:`nemo_ampo.step.TrainBatch`, this replica's rows.
            forward_only: no gradients.

        Returns:
            mean loss and the means of :data:`LOSS_METRICS`.
        """
        set_sync_funcs(self, forward_only)
        micro_batches = get_num_microbatches()
        outputs = get_forward_backward_func()(
            forward_step_func=self.get_actor_forward_output_and_loss_func(),
            data_iterator=self._make_data_iterator_list(get_iterator_k_split(batch, micro_batches)),
            model=self.model,
            num_microbatches=micro_batches,
            forward_only=forward_only,
            seq_length=batch["tokens_BT"].size(1),
            micro_batch_size=self.cfg.micro_batch_size,
        )
        if outputs:
            means = torch.stack([o["values"] for o in outputs]).mean(dim=0)
        else:
            means = torch.zeros(len(LOSS_METRICS), device=torch.cuda.current_device())
        torch.distributed.broadcast(means, get_last_rank())
        values = dict(zip(LOSS_METRICS, means.tolist(), strict=True))
        return values["loss"], values


def _entropy(logits_BTV: torch.Tensor) -> torch.Tensor:
    """Entropy of each next-token distribution, nats, [B, T-1]; vocabulary shards are gathered first."""
    full = tensor_parallel.gather_from_tensor_model_parallel_region(logits_BTV)[:, :-1]
    return entropy_from_logits(full.float())
