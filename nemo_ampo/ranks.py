"""Who am I among the processes of this job, and the few collectives an RL step needs.

A *replica* is one copy of the model (its tensor- and pipeline-parallel ranks). Replicas draw and train on different
samples; inside a replica every rank must hold equal data, which its *leader* decides.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nemo_ampo.errors import ConfigError

T = TypeVar("T")
COLLECTIVE_TIMEOUT_S = 1800
"""After so long a collective that a rank does not join ends the job, seconds; set for every process group."""
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, ``slurm/rank.sh`` and every other starter of ranks set, all of them."""
_OF_A_STARTER = re.compile(
    "|".join(_OF_A_RANK) + r"|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|TORCHELASTIC_\w+"
    r"|SLURM_(STEP_)?(NTASKS|NPROCS|NUM_TASKS|TASKS_PER_NODE|NTASKS_PER_NODE|PROCID|LOCALID|NODEID)"
    r"|OMPI_COMM_WORLD_\w+|PMIX?_\w+|MPI_LOCAL\w+|MV2_COMM_WORLD_\w+|JSM_NAMESPACE_\w+|FLUX_TASK_\w+"
)


def settle_ranks(environment: MutableMapping[str, str] | None = None, *, alone: bool = False) -> None:
    """Decide, once per process and before any framework looks, whether it is a rank of a job or a program of its own.

    It is a rank when a starter of ranks gave it number, size and meeting point. Otherwise what an allocation or a stale
    shell says (``SLURM_NTASKS``, ``WORLD_SIZE``, ...) is about others: it is removed, since Lightning, NeMo and Megatron
    would each believe another part of it.

    Args:
        environment: ``os.environ`` if None.
        alone: for a program that never is a rank.

    Raises:
        ConfigError: a rank's number or the number of ranks is none.
    """
    env = os.environ if environment is None else environment
    if alone or not all(env.get(name) for name in _OF_A_RANK):
        for name in [name for name in env if _OF_A_STARTER.fullmatch(name)]:
            del env[name]
        return
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not (env[name].isascii() and env[name].isdigit()):
            raise ConfigError(f"{name}={env[name]}: expected a number, as torchrun and slurm/rank.sh set it")
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        raise ConfigError(f"RANK={env['RANK']}: must be below WORLD_SIZE={env['WORLD_SIZE']}")
    # Lightning would take its own Slurm, MPI or Kubernetes support, with other ideas of rank and size, without it.
    env.setdefault("TORCHELASTIC_RUN_ID", f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}")


class Ranks(Protocol):
    """Position in the job plus object collectives."""

    @property
    def data_rank(self) -> int:
        """Index of this replica."""
        ...

    @property
    def data_size(self) -> int:
        """Number of replicas."""
        ...

    @property
    def is_leader(self) -> bool:
        """True on the one rank of a replica that talks to the outside (judge, files)."""
        ...

    @property
    def is_main(self) -> bool:
        """True on one rank of the whole job."""
        ...

    def gather(self, rows: list[Any]) -> list[Any]:
        """Rows of all replicas, in replica order, on every rank."""
        ...

    def share(self, value: Any) -> Any:
        """The leader's value, on every rank of the replica."""
        ...

    def variants(self, value: str) -> int:
        """How many different values the ranks of this replica hold."""
        ...

    def any(self, flag: bool) -> bool:
        """True on every rank of the job if it is true on one."""
        ...

    def highest(self, values: list[int]) -> list[int]:
        """Of each value the largest among all ranks of the job, on every rank."""
        ...


def slice_for(rows: Sequence[T], data_rank: int, data_size: int) -> list[T]:
    """The contiguous share of one replica.

    Raises:
        ValueError: the rows cannot be shared equally.
    """
    if len(rows) % data_size:
        raise ValueError(f"{len(rows)} rows cannot be shared equally by {data_size} data-parallel ranks")
    share = len(rows) // data_size
    return list(rows[data_rank * share : (data_rank + 1) * share])


@dataclass(frozen=True)
class OneProcess:
    """The trivial job: one process, nothing to communicate."""

    data_rank: int = 0
    data_size: int = 1
    is_leader: bool = True
    is_main: bool = True

    def gather(self, rows: list[Any]) -> list[Any]:
        """See :class:`Ranks`."""
        return list(rows)

    def share(self, value: Any) -> Any:
        """See :class:`Ranks`."""
        return value

    def variants(self, value: str) -> int:
        """See :class:`Ranks`."""
        return 1

    def any(self, flag: bool) -> bool:
        """See :class:`Ranks`."""
        return flag

    def highest(self, values: list[int]) -> list[int]:
        """See :class:`Ranks`."""
        return values


class MegatronRanks:
    """The job as Megatron's initialised process groups describe it. [nemo]"""

    def __init__(self) -> None:
        import torch
        from megatron.core import parallel_state

        self._state = parallel_state
        self._dist = torch.distributed
        self.data_rank: int = parallel_state.get_data_parallel_rank()
        self.data_size: int = parallel_state.get_data_parallel_world_size()
        self._leader: int = parallel_state.get_model_parallel_src_rank()
        self.is_leader: bool = torch.distributed.get_rank() == self._leader
        self.is_main: bool = torch.distributed.get_rank() == 0

    def gather(self, rows: list[Any]) -> list[Any]:
        """See :class:`Ranks`."""
        parts: list[list[Any]] = [[] for _ in range(self.data_size)]
        self._dist.all_gather_object(parts, rows, group=self._state.get_data_parallel_group())
        return [row for part in parts for row in part]

    def share(self, value: Any) -> Any:
        """See :class:`Ranks`."""
        box = [value]
        self._dist.broadcast_object_list(box, self._leader, group=self._state.get_model_parallel_group())
        return box[0]

    def variants(self, value: str) -> int:
        """See :class:`Ranks`."""
        group = self._state.get_model_parallel_group()
        values = [""] * self._dist.get_world_size(group)
        self._dist.all_gather_object(values, value, group=group)
        return len(set(values))

    def any(self, flag: bool) -> bool:
        """See :class:`Ranks`."""
        flags: list[bool] = [False] * self._dist.get_world_size()
        self._dist.all_gather_object(flags, flag)
        return any(flags)

    def highest(self, values: list[int]) -> list[int]:
        """See :class:`Ranks`."""
        everyone: list[list[int]] = [[] for _ in range(self._dist.get_world_size())]
        self._dist.all_gather_object(everyone, values)
        return [max(column) for column in zip(*everyone, strict=True)]
