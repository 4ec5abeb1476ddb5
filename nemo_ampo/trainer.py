"""The AMPO trainer: NeMo-Aligner's REINFORCE trainer with its loop replaced by :func:`nemo_ampo.step.ampo_step`. [nemo]

Kept from upstream: counters, resume through the checkpoint callback, saving, the time limit. Replaced: one step (all G
rollouts in one batch, group advantages, each replica on its own rows) and the prompt order, which follows from the step
number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split
from nemo_aligner.algorithms.reinforce import ReinforceTrainer
from nemo_aligner.utils.trainer_utils import check_progress
from nemo_aligner.utils.utils import clear_memory

from nemo_ampo.deadline import Deadline
from nemo_ampo.interrupt import StopRequest
from nemo_ampo.optimise import optimise
from nemo_ampo.progress import Progress
from nemo_ampo.runlog import RunLog
from nemo_ampo.sampler import SizedBatches, rows_of_step
from nemo_ampo.step import Parts, Prompt, StepResult, TrainBatch, ampo_step


class AmpoTrainer(ReinforceTrainer):
    """Runs AMPO steps until ``trainer.reinforce.max_steps``.

    Args:
        prompts: the data set.
        parts: what a step works with; the policy is this trainer itself.
        run_log: JSONL files of the run folder.
        log_rollouts: samples written per step, -1 for all.
        upstream: the remaining arguments of :class:`ReinforceTrainer` (cfg, model, optimizer, scheduler, logger,
            ckpt_callback, run_timer).
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        parts: Parts,
        run_log: RunLog,
        log_rollouts: int,
        **upstream: Any,
    ) -> None:
        batches = SizedBatches(len(prompts), parts.rollout.prompts_per_step)
        super().__init__(
            train_dataloader_builder=lambda consumed_samples: batches,
            val_dataloader_builder=None,
            collate_fn=None,
            rm=None,
            batch_iterator_cls=None,
            **upstream,
        )
        self.prompts = prompts
        self.parts = parts
        self.run_log = run_log
        self.log_rollouts = log_rollouts

    def set_max_steps(self) -> None:
        """Exactly what the config says; upstream would also stop at the end of its epochs."""
        self.max_steps = int(self.cfg.max_steps)

    def fit(self) -> bool:
        """Train to the last step.

        Returns:
            True when all steps are done; False when a signal or the time limit ended the run at a checkpoint.
        """
        self.run_timer.start_time()
        ranks = self.parts.ranks
        deadline = Deadline.of_job()
        with StopRequest() as stop, Progress("AMPO", self.step, self.max_steps, ranks.is_main) as progress:
            while self.step < self.max_steps:
                result = ampo_step(self.step, self._prompts_of_step(), self, self.parts)
                self._log(result)
                self.step += 1
                self.consumed_samples += len(result.samples)
                progress.step(self.step, {k: result.metrics[f"reward/{k}"] for k in ("mean",)} | _shown(result))
                ended = ranks.any(stop.requested or deadline.is_near()) or self.run_timer.is_finished()
                _, save, _ = check_progress(self.step, self.max_steps, 0, self.cfg.save_interval, 0, run_time_exceeded=ended)
                if save:
                    self.save(result.metrics)
                if ended and self.step < self.max_steps:
                    return False
        self.logger.finalize()
        return True

    def logprobs(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """See :class:`nemo_ampo.step.Policy`."""
        return self.model.get_inference_log_probs(tokens_BT.cuda()).cpu()

    def reference_logprobs(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """See :class:`nemo_ampo.step.Policy`. Without a KL term the reference is not needed and zeros are returned."""
        if not self.parts.algorithm.uses_reference:
            return torch.zeros(tokens_BT.size(0), tokens_BT.size(1) - 1)
        return self.model.get_init_policy_logprobs(tokens_BT.cuda()).cpu()

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step per ``model.global_batch_size`` samples; see :class:`nemo_ampo.step.Policy`."""
        if torch.cuda.is_available():
            clear_memory()
        tensors = {name: tensor for name, tensor in vars(batch).items() if name != "sampling_logprobs_BT"}
        self.model.prepare_for_training()
        rows_per_update = get_num_microbatches() * self.model.cfg.micro_batch_size
        updates = []
        for rows in get_iterator_k_split(tensors, len(batch.tokens_BT) // rows_per_update):
            updates.append(optimise(self, rows, self.cfg.gradient_clip_val))
            self.reinforce_optimization_step += 1
        self.model.finish_training()
        self.optimizer.zero_grad()
        means = {f"policy/{name}": sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        return means | {"policy/skipped_updates": sum(u["skipped_updates"] for u in updates)}

    def _prompts_of_step(self) -> list[Prompt]:
        size = self.parts.rollout.prompts_per_step
        return [self.prompts[i] for i in rows_of_step(len(self.prompts), size, self.step, self.parts.seed)]

    def _log(self, result: StepResult) -> None:
        metrics = result.metrics | self.ckpt_callback.take_metrics()
        self.run_log.metrics(self.step, metrics)
        self.logger.log_metrics(metrics, step=self.step)
        rows = [sample_row(sample, value) for sample, value in zip(result.samples, result.advantages, strict=True)]
        self.run_log.rollouts(self.step, rows if self.log_rollouts < 0 else rows[: self.log_rollouts])


def sample_row(sample: Any, advantage: float) -> dict[str, Any]:
    """One line of ``rollouts.jsonl``."""
    row = asdict(sample)
    parts, verdict = row.pop("parts"), row.pop("verdict")
    row |= parts
    row["advantage"] = advantage
    row["agent1_score"] = verdict["agent1"] if verdict else None
    row["agent2_score"] = verdict["agent2"] if verdict else None
    return row


def _shown(result: StepResult) -> dict[str, float]:
    return {
        "tokens": result.metrics["tokens/response"],
        "format": 1 - result.metrics["format/failed_fraction"],
        "s/step": result.metrics["time/step_s"],
    }
