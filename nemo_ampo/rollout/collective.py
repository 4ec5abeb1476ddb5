"""Engines that every model-parallel rank runs: do all ranks ask for the same? [nemo]"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_ampo.ranks import MegatronRanks
from nemo_ampo.rollout.engine import Request, SamplingSpec, check_equal_calls


def check_equal_on_replica(requests: Sequence[Request], sampling: SamplingSpec) -> None:
    """See :func:`nemo_ampo.rollout.engine.check_equal_calls`."""
    check_equal_calls(requests, sampling, MegatronRanks().variants)
