"""Engines that every rank runs: do all ranks ask for the same, and can all of them? [nemo]"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranks import MegatronRanks
from nemo_ampo.rollout.engine import Request, SamplingSpec, check_equal_calls


def check_equal_on_replica(requests: Sequence[Request], sampling: SamplingSpec) -> None:
    """See :func:`nemo_ampo.rollout.engine.check_equal_calls`."""
    check_equal_calls(requests, sampling, MegatronRanks().variants)


def refuse_together(problem: str | None) -> None:
    """Every rank says what is wrong on it, before a collective that only some of them would enter.

    Raises:
        ConfigError: on every rank, with the first problem.
    """
    problems: list[str | None] = [problem]
    if torch.distributed.is_initialized():
        problems *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ConfigError(f"rank {rank}: {found}" if len(problems) > 1 else found)
