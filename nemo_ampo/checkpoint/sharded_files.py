"""Megatron's distributed checkpoint format, written so that a full disk on one rank is an error on all of them. [nemo]

``megatron.core.dist_checkpointing.save`` raises on the rank whose write failed while the others wait for it in a
collective, for ever. The steps here are the same, in the same order, with the ranks agreeing after each one that
touches the disk. The files are the same too: ``dist_checkpointing.load`` and NeMo read them.
"""

from __future__ import annotations

import os
import queue
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")
WRITERS_PER_RANK = 2


class SaveFailedError(RuntimeError):
    """A checkpoint could not be written; every rank raises it with the same message."""


def agree(error: str | None) -> None:
    """Every rank reports how its part went.

    Raises:
        SaveFailedError: on all ranks if there was an error on one.
    """
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    failed = [(rank, e) for rank, e in enumerate(errors) if e is not None]
    if failed:
        raise SaveFailedError(f"rank {failed[0][0]}: {failed[0][1]}")


def together(work: Callable[[], T]) -> T:
    """Run ``work``, which touches files but no other rank, and agree on how it went.

    Raises:
        SaveFailedError: on all ranks if it failed on one.
    """
    result, error = None, None
    try:
        result = work()
    except (OSError, RuntimeError) as problem:  # torch's writers turn a full disk into a RuntimeError
        error = f"{type(problem).__name__}: {problem}"
    agree(error)
    return result  # type: ignore[return-value]


def write_shards(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state dict, every rank its part; replicas share the work.

    Args:
        state: with Megatron's sharded tensors; what is not sharded must be equal on all ranks and goes to one file.
        folder: absent or empty, seen by all ranks.

    Raises:
        SaveFailedError: on all ranks.
    """
    main = torch.distributed.get_rank() == 0
    sharded, common = save_preprocess(state)
    together(lambda: _write_common(common, folder) if main else None)
    strategy = FullyParallelSaveStrategyWrapper(
        _AgreeingWriter("torch_dist", 1, thread_count=WRITERS_PER_RANK),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    request = strategy.async_save(sharded, folder)
    device_is_done()
    together(request.async_fn)
    for finish in request.finalize_fns:
        finish()
    together(lambda: save_config(CheckpointingConfig("torch_dist", 1), folder) if main else None)


def device_is_done() -> None:
    """Wait until the copies to pinned memory have arrived, which Megatron's planning only starts.

    Upstream waits where it starts a writing process; here is none.
    """
    torch.cuda.synchronize()


def read_shards(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a folder written under any parallel layout."""
    return dist_checkpointing.load(state, str(folder))


def verify_shards(state: dict[str, Any], folder: Path) -> None:
    """Read a few tensors of what :func:`write_shards` wrote back and compare them with those in memory, bit for bit.

    Three names on each rank: the smallest, and two on the way to the one of middle size.

    The hashes of a checkpoint say that its files have not changed; this, that they hold what the device held.

    Raises:
        SaveFailedError: on all ranks if they differ on one.
    """
    tensors = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor) and entry.data is not None]
    bytes_of: Counter[str] = Counter()  # one name for the same tensor of all layers, which are read together
    for entry in tensors:
        bytes_of[entry.key] += entry.data.nbytes
    names = sorted(bytes_of, key=lambda name: (bytes_of[name], name))
    chosen = {names[0], names[len(names) // 4], names[len(names) // 2]}
    sample = [entry for entry in tensors if entry.key in chosen]
    wanted = {str(i): replace(entry, data=torch.empty_like(entry.data)) for i, entry in enumerate(sample)}
    try:
        found = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    except CheckpointException as error:  # torch has every rank raise it, with the failures of all
        raise SaveFailedError(f"cannot be read back: {str(error).splitlines()[-1]}") from None
    bad = [entry.key for i, entry in enumerate(sample) if not _same_bits(found[str(i)], entry.data)]
    agree(f"{bad[0]} on the disk is not what it is in memory" if bad else None)


def _same_bits(read: torch.Tensor, held: torch.Tensor) -> bool:
    """NaN in memory is the training's matter; that it arrived is this file's."""
    return torch.equal(read.detach().cpu().view(torch.uint8), held.detach().cpu().contiguous().view(torch.uint8))


def _write_common(common: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / COMMON_STATE_FNAME).open("wb") as file:
        torch.save(common, file)
        file.flush()
        os.fsync(file.fileno())


class _AgreeingWriter(TorchDistSaveShardedStrategy):
    """Upstream's planning and file format; the writing and the end of a save are ours."""

    def _get_save_and_finalize_callbacks(self, writer: Any, plan: Any) -> AsyncRequest:
        _, metadata, ranks = plan
        written: list[Any] = []

        def finish() -> None:
            everyone = ranks.gather_object(written)
            together(lambda: writer.finish(metadata, everyone) if ranks.is_coordinator else None)

        return AsyncRequest(lambda: written.extend(_write_buckets(writer.write_buckets)), (), [finish])


def _write_buckets(buckets: Sequence[Any]) -> list[Any]:
    """Write this rank's files, each flushed to the disk, in threads.

    Upstream forks a process per file. A fork of a trainer that is then killed stays behind for ever, waiting on a queue
    whose other end is gone, with the trainer's memory and open files.
    """

    def write(index: int, bucket: Any) -> list[Any]:
        results: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(index, bucket, results, running, True)
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with ThreadPoolExecutor(WRITERS_PER_RANK) as pool:
        return [result for part in pool.map(write, range(len(buckets)), buckets) for result in part]
