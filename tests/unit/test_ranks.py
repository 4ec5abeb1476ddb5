from __future__ import annotations

import random

import pytest

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranks import settle_ranks, slice_for


def test_slices_cover_everything_once() -> None:
    rows = list(range(12))
    assert [slice_for(rows, r, 3) for r in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="10 rows cannot be shared equally by 4"):
        slice_for(list(range(10)), 0, 4)


def rank(number: int, size: int) -> dict[str, str]:
    """As torchrun says it, but for its own variables."""
    places = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}


ALLOCATION = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "convert", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"},
    **{"SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4(x2)"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "8"},
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "PMI_RANK": "3", "PMI_SIZE": "8", "PMIX_RANK": "3"},
    **{"JSM_NAMESPACE_SIZE": "8", "MV2_COMM_WORLD_RANK": "3", "FLUX_TASK_RANK": "1", "MPI_LOCALRANKID": "3"},
    **{
        "SLURM_JOB_END_TIME": "1900000000",
        "SLURM_RESTART_COUNT": "1",
        "PATH": "/bin",
        "MY_RANK": "5",
    },
}
KEPT = {"SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_JOB_END_TIME", "SLURM_RESTART_COUNT"}
KEPT |= {"PATH", "MY_RANK"}


def test_a_program_in_an_allocation_is_one_process_whatever_the_allocation_or_a_stale_shell_says() -> None:
    draw = random.Random(1)
    said = ALLOCATION | rank(3, 8) | {"NODE_RANK": "1", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "old"}
    for _ in range(500):
        environment = {name: said[name] for name in draw.sample(sorted(said), draw.randrange(len(said)))}
        whole = all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
        kept = {name: environment[name] for name in environment if name in KEPT}
        settle_ranks(environment, alone=whole)
        assert environment == kept


def test_a_rank_keeps_its_place_and_what_mpi_says() -> None:
    environment = ALLOCATION | rank(1, 2)
    settle_ranks(environment)
    assert environment == ALLOCATION | rank(1, 2) | {"TORCHELASTIC_RUN_ID": "127.0.0.1:4711"}
    environment["TORCHELASTIC_RUN_ID"] = "of torchrun"
    settle_ranks(environment)
    assert environment["TORCHELASTIC_RUN_ID"] == "of torchrun"


@pytest.mark.parametrize(("name", "text"), [("RANK", "x"), ("WORLD_SIZE", "-1"), ("LOCAL_RANK", "1.0"), ("RANK", "2")])
def test_a_place_that_is_none_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}={text}: "):
        settle_ranks(rank(0, 2) | {name: text})
