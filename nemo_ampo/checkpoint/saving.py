"""Writing and restoring a run's whole state: weights, optimizer, schedule, counters, random numbers, log positions. [nemo]

What is not here follows from the step number alone: the rows of a step, the seed of each response. See
docs/checkpoints.md.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from omegaconf import OmegaConf

from nemo_ampo.checkpoint.config import CheckpointConfig
from nemo_ampo.checkpoint.pickles import check_pickles, check_torch_file
from nemo_ampo.checkpoint.sharded_files import (
    SaveFailedError,
    agree,
    read_shards,
    together,
    verify_shards,
    write_shards,
)
from nemo_ampo.checkpoint.store import (
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    JobLayout,
    Manifest,
    Store,
    damaged,
    free_bytes,
    list_files,
    measure,
)
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.run.runlog import log_hashes, log_positions

RANDOM_STATES = "random"
SPACE_MARGIN = 1.05
"""Free space asked for, as a multiple of the expected size."""


@dataclass(frozen=True)
class Resumed:
    """Where a restored run continues.

    Attributes:
        counters: of the trainer.
        logs: bytes of each log file at that moment.
        log_hashes: sha256 of those bytes.
    """

    counters: dict[str, int]
    logs: dict[str, int]
    log_hashes: dict[str, str]


class Saver:
    """Stands where NeMo-Aligner's trainers expect a checkpoint callback; every rank calls it.

    Args:
        store: where checkpoints lie.
        config: retention and failures.
        stage: ``bc`` or ``ampo``.
        strategy: Lightning's, which owns the optimizer.
        model, optimizer, scheduler: as the trainer holds them.
        settings: see :func:`nemo_ampo.checkpoint.run_identity.identity`.
        run_dir: where the logs are.

    Attributes:
        last_step: of the newest checkpoint of this run, None without one.
    """

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        stage: str,
        strategy: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        settings: Mapping[str, Any],
        run_dir: Path,
    ) -> None:
        if not isinstance(optimizer, McoreDistributedOptimizer):
            raise ConfigError("model.optim.name: checkpoints need mcore_distributed_optim")
        self.store = store
        self._config = config
        self._stage = stage
        self._strategy = strategy
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._settings = dict(settings)
        self._run_dir = run_dir
        self._rank = torch.distributed.get_rank()
        self._last_bytes: int | None = None
        self.last_step: int | None = None
        self._failures = 0
        self._news: dict[str, float] = {}

    # --- saving -----------------------------------------------------------------------------------------------------

    def custom_save(self, monitor_candidates: Mapping[str, Any], is_train_end: bool = False) -> None:
        """Write a checkpoint and apply the retention rules.

        A failure keeps the older checkpoints and lets training go on; see ``checkpoint.max_failed_saves``.

        Args:
            monitor_candidates: the trainer's counters as tensors and the step's metrics as numbers.
            is_train_end: Aligner passes it; a last checkpoint is like any other.

        Raises:
            UserError: too many saves failed in a row.
        """
        counters = {k: int(v) for k, v in monitor_candidates.items() if isinstance(v, torch.Tensor)}
        metrics = {k: float(v) for k, v in monitor_candidates.items() if not isinstance(v, torch.Tensor)}
        begin = time.monotonic()
        try:
            self._check_space()
            checkpoint = self._write(counters, metrics)
        except SaveFailedError as error:
            self._alarm(counters["step"], str(error))
        else:
            self._failures = 0
            self._last_bytes, self.last_step = checkpoint.manifest.bytes, checkpoint.step
            self._news = {
                "checkpoint/save_s": time.monotonic() - begin,
                "checkpoint/bytes": float(checkpoint.manifest.bytes),
                "checkpoint/failed_saves": 0.0,
            }

    def take_metrics(self) -> dict[str, float]:
        """``checkpoint/`` metrics of the save since the last call; empty if there was none."""
        news, self._news = self._news, {}
        return news

    def _write(self, counters: dict[str, int], metrics: dict[str, float]) -> Checkpoint:
        main, folder = self._rank == 0, [""]
        folder[0] = str(together(lambda: self.store.begin(counters["step"]) if main else Path()))
        torch.distributed.broadcast_object_list(folder)
        path = Path(folder[0])
        write_shards(self._model.sharded_state_dict(), path / WEIGHTS)
        if self._config.verify:
            verify_shards(self._model.sharded_state_dict(), path / WEIGHTS)
        write_shards(self._optimizer_state(is_loading=False), path / OPTIMIZER)
        together(lambda: _save_random_states(path / RANDOM_STATES / f"rank-{self._rank:05d}.pt"))
        together(lambda: OmegaConf.save(self._model.cfg, path / "model_config.yaml") if main else None)
        files = self._measure(path)
        memory = fullest(held_bytes(self._model, self._optimizer))
        manifest = Manifest(
            stage=self._stage,
            step=counters["step"],
            counters=counters,
            layout=layout(),
            config=self._settings,
            score=metrics.get(self._config.best_metric),
            logs={},
            files=files,
            memory=memory,
        )
        published: list[Any] = [together(lambda: self._publish(path, manifest) if main else None)]
        torch.distributed.broadcast_object_list(published)
        return published[0]

    def _measure(self, path: Path) -> dict[str, dict[str, Any]]:
        """Hashes are shared out over the ranks: one process would read a large checkpoint for minutes."""
        size = torch.distributed.get_world_size()
        mine = together(lambda: measure(path, list_files(path)[self._rank :: size]))
        parts: list[dict[str, dict[str, Any]]] = [{} for _ in range(size)]
        torch.distributed.all_gather_object(parts, mine)
        return dict(sorted((name, record) for part in parts for name, record in part.items()))

    def _publish(self, path: Path, manifest: Manifest) -> Checkpoint:
        if manifest.score is None and self._config.keep_best:
            print(f"checkpoint.best_metric: step {manifest.step} has no {self._config.best_metric}", file=sys.stderr)
        logs = log_positions(self._run_dir)
        log_state = replace(manifest, logs=logs, log_hashes=log_hashes(self._run_dir, logs))
        checkpoint = self.store.publish(path, log_state)
        self.store.prune(self._config)
        return checkpoint

    def _check_space(self) -> None:
        needed = int(SPACE_MARGIN * (self._last_bytes or expected_bytes(self._model)))

        def look() -> None:
            free = free_bytes(self.store.folder)
            if free < needed:
                raise OSError(f"{self.store.folder}: {free / 1e9:.3g} GB free, a checkpoint needs {needed / 1e9:.3g} GB")

        together(look)

    def _alarm(self, step: int, reason: str) -> None:
        self._failures += 1
        self._news = {"checkpoint/failed_saves": float(self._failures)}
        stays = "there is none yet" if self.last_step is None else f"the one of step {self.last_step} stays"
        limit = self._config.max_failed_saves
        free = free_bytes(self.store.folder) / 1e9
        # All ranks wait here: the next save must find the room that the half-written files took.
        together(lambda: self.store.sweep() if self._rank == 0 else None)
        if self._rank == 0:
            print(
                f"ALARM: checkpoint of step {step} not written ({reason}; {free:.3g} GB were free then); {stays}; failed "
                f"saves in a row: {self._failures} of {limit}",
                file=sys.stderr,
                flush=True,
            )
        if self._failures >= limit:
            raise UserError(
                f"checkpoint.max_failed_saves: {self._failures} saves in a row failed ({reason}); stopped at step {step}, "
                f"{stays}. Make room, then the same command continues"
            )

    # --- restoring --------------------------------------------------------------------------------------------------

    def restore(self) -> Resumed | None:
        """Put the newest intact checkpoint in place. The run folder is held by then.

        Returns:
            where the run continues, or None without a checkpoint.

        Raises:
            UserError: all checkpoints are damaged, or the one to continue from cannot be loaded under this layout.
        """
        checkpoint = self._choose()
        if checkpoint is None:
            return None
        written, here = checkpoint.manifest.layout, layout()
        self._check_pickles(checkpoint)
        try:
            weights = read_shards(self._model.sharded_state_dict(), checkpoint.path / WEIGHTS)
            state = read_shards(self._optimizer_state(is_loading=True), checkpoint.path / OPTIMIZER)
        except CheckpointingException as error:
            raise UserError(
                f"{checkpoint.path}: written by {written}, cannot be loaded by {here}: {str(error).splitlines()[0]}"
            ) from None
        self._model.on_load_checkpoint({"state_dict": weights})
        self._strategy.load_optimizer_state_dict({"optimizer_states": [state["optimizer"]]})
        if state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if written == here:
            _load_random_states(checkpoint.path / RANDOM_STATES / f"rank-{self._rank:05d}.pt")
        elif self._rank == 0:
            print(f"resume: written by {written}, continued by {here}", file=sys.stderr)
        self._last_bytes, self.last_step = checkpoint.manifest.bytes, checkpoint.step
        return Resumed(checkpoint.manifest.counters, checkpoint.manifest.logs, checkpoint.manifest.log_hashes)

    def _check_pickles(self, checkpoint: Checkpoint) -> None:
        """Each rank looks at its own random numbers, the first one at what is shared."""
        problem = None
        try:
            if self._rank == 0:
                check_pickles(checkpoint.path / WEIGHTS)
                check_pickles(checkpoint.path / OPTIMIZER)
            if checkpoint.manifest.layout == layout():
                check_torch_file(checkpoint.path / RANDOM_STATES / f"rank-{self._rank:05d}.pt")
        except UserError as error:
            problem = str(error)
        try:
            agree(problem)
        except SaveFailedError as error:
            raise UserError(str(error)) from None

    def _choose(self) -> Checkpoint | None:
        """The newest one whose files have their hashes; what was passed over is said."""
        main = self._rank == 0
        found: list[Any] = [[], False]
        if main:
            self.store.sweep()
            complete, incomplete = self.store.scan()
            for bad in incomplete:
                print(f"resume: {bad.path.name} is incomplete and ignored ({bad.reason})", file=sys.stderr)
            found = [self.store.resumable(), bool(complete or incomplete)]
        torch.distributed.broadcast_object_list(found)
        candidates, run_exists = found
        size = torch.distributed.get_world_size()
        for checkpoint in candidates:
            names = sorted(checkpoint.manifest.files)
            try:
                bad_files = together(lambda c=checkpoint, n=names: damaged(c.path, c.manifest, n[self._rank :: size]))  # type: ignore[misc]
                agree(f"content of {bad_files[0]} differs from its hash" if bad_files else None)
            except SaveFailedError as error:
                if main:
                    print(f"resume: {checkpoint.path.name} is damaged and ignored ({error})", file=sys.stderr)
                continue
            if main:
                print(f"resume: continuing from {checkpoint.path}", file=sys.stderr)
            return checkpoint
        if run_exists:
            # Starting anew would wipe the logs of a run somebody may still want to save.
            raise UserError(
                f"{self.store.folder}: none of its checkpoints can be continued from; move it away to start anew"
            )
        return None

    def _optimizer_state(self, is_loading: bool) -> dict[str, Any]:
        weights = {k: v for k, v in self._model.sharded_state_dict().items() if not k.endswith("_extra_state")}
        # The one kind of sharding that can be read under another tensor-, pipeline- or data-parallel size.
        optimizer = self._optimizer.sharded_state_dict(weights, is_loading=is_loading, dist_ckpt_parallel_save=True)
        has_schedule = hasattr(self._scheduler, "state_dict")
        return {"optimizer": optimizer, "scheduler": self._scheduler.state_dict() if has_schedule else None}


def layout() -> JobLayout:
    """Of this job."""
    return JobLayout(
        world=torch.distributed.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
    )


def held_bytes(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of training state on this rank; what :mod:`nemo_ampo.job.plan` predicts."""
    inner = optimizer.mcore_optimizer
    parts = getattr(inner, "chained_optimizers", [inner])
    moments = [t for part in parts for state in part.optimizer.state.values() for t in state.values()]
    masters = [t for part in parts for group in part.shard_fp32_from_float16_groups for t in group]
    wrapped = model.model if isinstance(model.model, list) else [model.model]
    gradients = [buffer.grad_data for module in wrapped for buffer in (*module.buffers, *module.expert_parallel_buffers)]
    weights = {p.data_ptr(): p for m in model.get_model_module_list() for p in m.parameters()}
    return {
        "weights": sum(p.nbytes for p in weights.values()),
        "gradients": sum(g.nbytes for g in gradients),
        "optimizer": sum(t.nbytes for t in (*moments, *masters) if isinstance(t, torch.Tensor)),
    }


def fullest(mine: dict[str, int]) -> dict[str, int]:
    """The largest value of each entry over all ranks."""
    everyone: list[dict[str, int]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, mine)
    return {name: max(ranks[name] for ranks in everyone) for name in mine}


def expected_bytes(model: Any) -> int:
    """Size of a first checkpoint, bytes: weights as they are, plus fp32 master weights and two Adam moments."""
    parameters = [p for m in model.get_model_module_list() for p in m.parameters()]
    mine = sum(p.numel() * (p.element_size() + 12) for p in parameters)
    total = torch.tensor([mine], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total.item()) // parallel_state.get_data_parallel_world_size()


def _save_random_states(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "model_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    torch.save(states, path)


def _load_random_states(path: Path) -> None:
    # Python's and numpy's states are more than weights; _check_pickles has seen that they are only data.
    states = torch.load(path, weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["model_parallel"])
