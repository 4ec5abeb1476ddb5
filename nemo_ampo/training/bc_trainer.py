"""Behaviour cloning: NeMo-Aligner's supervised trainer with our loop, row order and validation. [nemo]

Validation answers two questions per mode: how surprised is the model by held-out replies, and what does it reply itself?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.utils.trainer_utils import check_progress

from nemo_ampo.data.bc import BcExample
from nemo_ampo.data.collate import BcDataset, collate_bc, whole_rows
from nemo_ampo.data.config import BcDataConfig
from nemo_ampo.errors import FormatError
from nemo_ampo.megatron.forward import token_logprobs
from nemo_ampo.megatron.micro_batches import by_rows, by_tokens
from nemo_ampo.ranks import Ranks, slice_for
from nemo_ampo.reply.grammar import parse_reply
from nemo_ampo.reply.modes import MODES, NO_MODE
from nemo_ampo.rollout.engine import Engine, Request, SamplingSpec, request_seed
from nemo_ampo.run.clock import Clock, Gpus
from nemo_ampo.run.deadline import Deadline
from nemo_ampo.run.interrupt import StopRequest
from nemo_ampo.run.metrics import mean
from nemo_ampo.run.progress import Progress
from nemo_ampo.run.runlog import RunLog
from nemo_ampo.training.optimise import optimise
from nemo_ampo.training.sampler import SizedBatches, rows_of_step


@dataclass(frozen=True)
class BcParts:
    """What the stage works with besides Aligner's own objects."""

    train: Sequence[BcExample]
    heldout: Sequence[BcExample]
    tokenizer: Any
    engine: Engine
    ranks: Ranks
    run_log: RunLog
    data: BcDataConfig
    stop_token_ids: tuple[int, ...]
    pad_id: int
    seed: int
    gpus: Gpus | None = None


class BcTrainer(SupervisedTrainer):
    """Clones until ``trainer.sft.max_steps``.

    Args:
        parts: data and tools.
        upstream: the remaining arguments of :class:`SupervisedTrainer` (cfg, model, optimizer, scheduler, logger,
            ckpt_callback, run_timer).
    """

    def __init__(self, *, parts: BcParts, **upstream: Any) -> None:
        batch_size = int(upstream["model"].cfg.global_batch_size)
        super().__init__(
            train_dataloader=SizedBatches(len(parts.train), batch_size),
            val_dataloader=SizedBatches(len(parts.heldout), 1),
            test_dataloader=None,
            **upstream,
        )
        self.parts = parts
        self._rows = BcDataset(parts.train)

    def fit(self) -> bool:
        """Train to the last step.

        Returns:
            True when all steps are done; False when a signal or the time limit ended the run at a checkpoint.
        """
        self.run_timer.start_time()
        ranks, shown = self.parts.ranks, {}
        deadline = Deadline.of_job()
        log, bar = self.parts.run_log, Progress("BC", self.step, self.max_steps, ranks.is_main)
        with log, StopRequest() as stop, bar as progress:
            while self.step < self.max_steps:
                clock, rows = Clock(self.parts.gpus), self._rows_of_step()
                with clock("update"):
                    metrics = optimise(self, self._batch(rows), self.cfg.gradient_clip_val)
                self._log(metrics, "train", clock.gpu_metrics([len(row["tokens"]) for row in rows], ranks))
                self.step += 1
                self.consumed_samples += self.train_dataloader.global_batch_size
                ended = ranks.any(stop.requested or deadline.is_near()) or self.run_timer.is_finished()
                validate, save, _ = check_progress(
                    self.step, self.max_steps, self.val_check_interval, self.cfg.save_interval, 1.0, ended
                )
                scores: dict[str, float] = {}
                if validate and not ended:
                    clock = Clock(self.parts.gpus)
                    with clock("validate"):
                        shown = scores = self.validate()
                    self._log(shown, "val", clock.gpu_metrics([], ranks))
                progress.step(self.step, {k: v for k, v in (metrics | shown).items() if k in ("loss", "valid_replies")})
                if save:
                    self.save({f"bc/{name}": value for name, value in (metrics | scores).items()})
                if ended and self.step < self.max_steps:
                    return False
        self.logger.finalize()
        return True

    def validate(self) -> dict[str, float]:
        """Loss on held-out replies and grammar of the model's own, overall and per mode."""
        return self._heldout_loss() | self._heldout_replies()

    def _rows_of_step(self) -> list[dict[str, torch.Tensor]]:
        """This replica's rows of the step; their order is that of the job, whatever its layout."""
        sizes, ranks = self.train_dataloader, self.parts.ranks
        rows = rows_of_step(len(self._rows), sizes.global_batch_size, self.step, self.parts.seed)
        return [self._rows[i] for i in slice_for(rows, ranks.data_rank, ranks.data_size)]

    def _batch(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = collate_bc(rows, self.parts.pad_id)
        return {name: tensor for name, tensor in batch.items() if name != "modes"}

    def _my_heldout(self, limit: int | None = None) -> list[tuple[int, BcExample]]:
        rows = list(enumerate(self.parts.heldout))[:limit]
        return rows[self.parts.ranks.data_rank :: self.parts.ranks.data_size]

    def _heldout_loss(self) -> dict[str, float]:
        """Mean negative log-likelihood per reply token, nats."""
        rows = BcDataset([example for _, example in self._my_heldout()])
        sums: list[tuple[int, float, int]] = []
        budget, size = self.model.cfg.get("tokens_per_micro_batch"), int(self.model.cfg.data.validation_ds.micro_batch_size)
        lengths = [len(example.tokens) for example in rows.examples]
        for part in by_tokens(lengths, budget) if budget else by_rows(lengths, size):
            batch = collate_bc([rows[i] for i in part.rows], self.parts.pad_id)
            tokens_BT = whole_rows(batch["tokens"], batch["labels"])
            logprobs_BT = token_logprobs(self.model, tokens_BT, batch["loss_mask"].bool(), len(part.rows)).cpu()
            tokens_B = batch["loss_mask"].sum(dim=1)
            sums += zip(batch["modes"].tolist(), logprobs_BT.sum(dim=1).tolist(), tokens_B.int().tolist(), strict=True)
        everyone = self.parts.ranks.gather(sums)
        return {"val_loss": _nll(everyone)} | {f"val_loss_mode_{k}": _nll([s for s in everyone if s[0] == k]) for k in MODES}

    def _heldout_replies(self) -> dict[str, float]:
        """Sampled replies to held-out prompts at temperature 1: share that obeys the grammar, and the modes chosen."""
        requests = [
            Request(i, example.tokens[: example.prompt_len], request_seed(self.parts.seed, 0, "heldout", i))
            for i, example in self._my_heldout(self.parts.data.heldout_replies)
        ]
        if not self.parts.heldout[: self.parts.data.heldout_replies]:
            return {}
        # A replica without a prompt of its own still takes part in what all do.
        sampling = SamplingSpec(self.parts.data.max_new_tokens, self.parts.stop_token_ids)
        responses = self.parts.engine.generate(requests, sampling) if requests else []
        texts = [self.parts.tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in responses]
        modes = self.parts.ranks.gather([_mode(text) for text in texts])
        return {"valid_replies": mean(float(m != NO_MODE) for m in modes)} | {
            f"mode_{k}_share": mean(float(m == k) for m in modes) for k in MODES
        }

    def _log(self, metrics: dict[str, float], kind: str, gpu: dict[str, float]) -> None:
        named = {f"bc/{name}": value for name, value in metrics.items()} | self.ckpt_callback.take_metrics() | gpu
        self.parts.run_log.metrics(self.step, named, kind)
        self.logger.log_metrics(named, step=self.step)


def _nll(sums: Sequence[tuple[int, float, int]]) -> float:
    tokens = sum(s[2] for s in sums)
    return -sum(s[1] for s in sums) / tokens if tokens else float("nan")


def _mode(text: str) -> int:
    try:
        return parse_reply(text).mode
    except FormatError:
        return NO_MODE
