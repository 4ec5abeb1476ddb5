"""Engines that every model-parallel rank runs: do all ranks ask for the same? [nemo]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from nemo_ampo.rollout.engine import Request, RequestError, SamplingSpec, requests_digest


def check_equal_on_replica(requests: Sequence[Request], sampling: SamplingSpec) -> None:
    """Every rank of the replica raises if one asks for something else; nobody hangs in a half-entered collective.

    Raises:
        RequestError: naming how many different calls were made.
    """
    group = parallel_state.get_model_parallel_group()
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return
    digests: list[str] = [""] * size
    torch.distributed.all_gather_object(digests, requests_digest(requests, sampling), group=group)
    if len(set(digests)) > 1:
        raise RequestError(f"the {size} model-parallel ranks of a replica made {len(set(digests))} different calls")
