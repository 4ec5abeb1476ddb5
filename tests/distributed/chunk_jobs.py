"""Run with two ranks: what each data-parallel rank would train on, upstream's way and ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from nemo_ampo.compat import setup


def main(out: Path) -> None:
    setup("cpu")
    import nemo_aligner.algorithms.reinforce as reinforce
    from megatron.core import parallel_state

    from nemo_ampo.compat.cpu import destroy_groups
    from nemo_ampo.ranks import MegatronRanks, slice_for

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    ranks = MegatronRanks()
    mine = slice_for(list(range(8)), ranks.data_rank, ranks.data_size)
    local = reinforce.ReinforceRolloutBatch(
        {"response_tokens": torch.tensor([[i] for i in mine]), "rewards": torch.tensor([float(i) for i in mine])}
    )
    gathered = local.gather_and_balance_globally()
    upstream = gathered.chunk(rank=ranks.data_rank, split_size=ranks.data_size, seed=0)
    result = {
        "upstream": sorted(upstream["rewards"].int().tolist()),
        "ours": mine,
        "gathered": ranks.gather(mine),
        "shared": ranks.share(f"from {torch.distributed.get_rank()}"),
        "any": [ranks.any(ranks.data_rank == 1), ranks.any(False)],
        "main": ranks.is_main,
    }
    file = out / f"{torch.distributed.get_rank()}.json"
    destroy_groups()  # as the exit of every rank does
    result["threads"] = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
