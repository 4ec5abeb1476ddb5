"""The AMPO trainer: NeMo-Aligner's REINFORCE trainer with its loop replaced by :func:`nemo_ampo.step.ampo_step`. [nemo]

Kept from upstream: counters, resume through the checkpoint callback, saving, the time limit. Replaced: one step (all G
rollouts in one batch, group advantages, each replica on its own rows) and the prompt order, which follows from the step
number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split
from nemo_aligner.algorithms.reinforce import ReinforceTrainer
from nemo_aligner.utils.trainer_utils import check_progress
from nemo_aligner.utils.utils import clear_memory

from nemo_ampo.algo.guard import Streaks
from nemo_ampo.errors import JudgeOutageError, UserError
from nemo_ampo.judge.second import FirstOpinion, SecondJudge
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.reply.grammar import answer_of
from nemo_ampo.rollout.engine import UnavailableError
from nemo_ampo.run.deadline import Deadline
from nemo_ampo.run.interrupt import StopRequest
from nemo_ampo.run.metrics import continued
from nemo_ampo.run.progress import Progress
from nemo_ampo.run.runlog import RunLog
from nemo_ampo.step import Parts, StepResult, ampo_step
from nemo_ampo.training.optimise import optimise
from nemo_ampo.training.sampler import SizedBatches, rows_of_step
from nemo_ampo.types import Prompt, TrainBatch, Updated


class AmpoTrainer(ReinforceTrainer):
    """Runs AMPO steps until ``trainer.reinforce.max_steps``.

    Args:
        prompts: the data set.
        parts: what a step works with; the policy is this trainer itself.
        run_log: JSONL files of the run folder.
        log_rollouts: samples written per step, -1 for all.
        second: scores some of the samples too, for the log; None for none.
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
        second: SecondJudge | None = None,
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
        self.second = second
        self._saved_step = 0
        self._judge_before: dict[str, float] = {}
        self._streaks = self._streaks_before = Streaks()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Counters of the checkpoint a resumed run continues from; what has been counted over steps counts on."""
        super().load_state_dict(state_dict)
        self._saved_step = self.step
        ranks = self.parts.ranks
        # One reading for all: the main rank's, which belongs to the first replica.
        history = ranks.gather([ranks.share(self.run_log.history() if ranks.is_leader else None)])[0]
        self._judge_before = history[-1] if history else {}
        self._streaks = Streaks.of(history, self.parts.guard)

    def set_max_steps(self) -> None:
        """Exactly what the config says; upstream would also stop at the end of its epochs."""
        self.max_steps = int(self.cfg.max_steps)

    def fit(self) -> bool:
        """Train to the last step.

        Returns:
            True when all steps are done; False when a signal, the time limit or an outage of the judge or of the rollout
            server ended the run at a checkpoint.

        Raises:
            UserError: the judge's budget is spent (after a checkpoint), or ``guard`` found the training broken.
        """
        self.run_timer.start_time()
        ranks = self.parts.ranks
        deadline = Deadline.of_job()
        with self.run_log, StopRequest() as stop, Progress("AMPO", self.step, self.max_steps, ranks.is_main) as progress:
            metrics: dict[str, float] = {}
            while self.step < self.max_steps:
                try:
                    result = ampo_step(self.step, self._prompts_of_step(), self, self.parts, lambda: stop.requested)
                except (JudgeOutageError, UnavailableError) as outage:
                    self._keep_progress(metrics)
                    progress.say(f"judge: {outage}" if isinstance(outage, JudgeOutageError) else str(outage))
                    return False
                except UserError:
                    self._keep_progress(metrics)
                    raise
                metrics = self._watched(result)
                self._log(result, metrics)
                self.step += 1
                self.consumed_samples += len(result.samples)
                progress.step(self.step, _shown(metrics))
                self._stop_if_wrong(progress)
                ended = ranks.any(stop.requested or deadline.is_near()) or self.run_timer.is_finished()
                _, save, _ = check_progress(self.step, self.max_steps, 0, self.cfg.save_interval, 0, run_time_exceeded=ended)
                if save:
                    self._save(metrics)
                if ended and self.step < self.max_steps:
                    return False
        self.logger.finalize()
        return True

    def logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """See :class:`nemo_ampo.types.Policy`."""
        return self.model.get_inference_log_probs(tokens_BT.cuda(), mask_BT).cpu()

    def reference_logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """See :class:`nemo_ampo.types.Policy`. Without a KL term the reference is not needed and zeros are returned."""
        if not self.parts.algorithm.uses_reference:
            return torch.zeros(tokens_BT.size(0), tokens_BT.size(1) - 1)
        return self.model.get_init_policy_logprobs(tokens_BT.cuda(), mask_BT).cpu()

    @property
    def updates_once(self) -> bool:
        """See :class:`nemo_ampo.types.Policy`."""
        rollout = self.parts.rollout
        return rollout.prompts_per_step * rollout.group_size == int(self.model.cfg.global_batch_size)

    def update(self, batch: TrainBatch) -> Updated:
        """One optimizer step per ``model.global_batch_size`` samples; see :class:`nemo_ampo.types.Policy`."""
        if torch.cuda.is_available():
            clear_memory()
        tensors = {k: tensor for k, tensor in vars(batch).items() if tensor is not None and k != "sampling_logprobs_BT"}
        self.model.prepare_for_training()
        rows_per_update = get_num_microbatches() * self.model.cfg.micro_batch_size
        updates = []
        for rows in get_iterator_k_split(tensors, len(batch.tokens_BT) // rows_per_update):
            updates.append(optimise(self, rows, self.cfg.gradient_clip_val))
            self.reinforce_optimization_step += 1
        self.model.finish_training()
        self.optimizer.zero_grad()
        means = {f"policy/{name}": sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        skipped = {"policy/skipped_updates": sum(u["skipped_updates"] for u in updates)}
        old_BT = batch.old_logprobs_BT
        return Updated(means | skipped, self.model.logprobs_of_update_BT.cpu() if old_BT is None else old_BT)

    def _prompts_of_step(self) -> list[Prompt]:
        size = self.parts.rollout.prompts_per_step
        return [self.prompts[i] for i in rows_of_step(len(self.prompts), size, self.step, self.parts.seed)]

    def _save(self, metrics: dict[str, float]) -> None:
        self.save(metrics)
        self._saved_step = self.ckpt_callback.last_step or 0

    def _keep_progress(self, metrics: dict[str, float]) -> None:
        """Save the steps done since the last checkpoint; the one that failed is done again by the next start."""
        if self.step > self._saved_step:
            self._save(metrics)

    def _watched(self, result: StepResult) -> dict[str, float]:
        """The step's metrics with the judge's counts of the whole job and the guard's."""
        ranks, guard = self.parts.ranks, self.parts.guard
        counts = ranks.gather([ranks.share(self.parts.judge.stats if ranks.is_leader else None)])
        metrics = continued(self._judge_before, JudgeStats.of(counts).metrics()) | result.metrics
        metrics |= self._second_opinion(result)
        self._streaks_before, self._streaks = self._streaks, self._streaks.after(metrics, guard)
        return metrics | self._streaks.metrics(guard) | self.ckpt_callback.take_metrics()

    def _second_opinion(self, result: StepResult) -> dict[str, float]:
        """``judge/second_*`` on the main rank, in the steps that are compared."""
        if self.second is None or not self.parts.ranks.is_main or not self.second.is_due(self.step):
            return {}
        prompts, strict = self._prompts_of_step(), self.parts.reward.strict_format
        opinions = [
            FirstOpinion.of(prompts[sample.group].turn, answer_of(sample.text, strict=strict), sample.verdict)
            for sample in result.samples
            if sample.verdict is not None
        ]
        return self.second.compare(self.step, opinions, self.parts.guard.max_wait_s)

    def _stop_if_wrong(self, progress: Progress) -> None:
        """Warn of a mode that dies out.

        Raises:
            UserError: on every rank, when the last steps went wrong in a row.
        """
        guard = self.parts.guard
        alarm, reason = self._streaks.new_alarm(self._streaks_before, guard), self._streaks.abort_reason(guard)
        if alarm is not None:
            progress.say(f"warning: {alarm}")
        if reason is not None:
            # No checkpoint on the way out: the last one is from before the trouble, or nearer to it.
            last = f"the last checkpoint is from step {self._saved_step}" if self._saved_step else "there is no checkpoint"
            raise UserError(f"step {self.step}: {reason}; {last}")

    def _log(self, result: StepResult, metrics: dict[str, float]) -> None:
        self.run_log.metrics(self.step, metrics)
        self.logger.log_metrics(metrics, step=self.step)
        scored = zip(result.samples, result.advantages, strict=True)
        rows = [sample.row() | {"advantage": advantage} for sample, advantage in scored]
        self.run_log.rollouts(self.step, rows if self.log_rollouts < 0 else rows[: self.log_rollouts])


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    shown = {
        "reward": metrics["reward/mean"],
        "tokens": metrics["tokens/response"],
        "format": 1 - metrics["format/failed_fraction"],
        "s/step": metrics["time/step_s"],
    }
    return shown | ({"unjudged": metrics["guard/masked_samples"]} if metrics["guard/masked_samples"] else {})
