"""Which TensorRT-LLM is installed, and is it the one whose calls we know? Nothing of it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from nemo_ampo.errors import ConfigError

REFIT_SERIES = "0.17"
"""NeMo 2.2.1 passes ``multi_block_mode`` to ``ModelRunner.from_engine``, which 0.13 refuses and 0.17 takes; later
releases drop the engine API that NeMo's exporter builds on."""
_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Set by what starts processes through MPI: ``mpirun``, ``srun --mpi=pmix`` or ``pmi2``."""
SERVER_MINIMUM = (1, 2)
"""The first series whose ``AsyncLLM`` can reload weights in place."""


def installed_version() -> str | None:
    """Version of the installed TensorRT-LLM, or None."""
    for name in ("tensorrt-llm", "tensorrt_llm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def require_tensorrt_llm() -> str:
    """The installed version, if the refit engine was written for it.

    Raises:
        ConfigError: none, or another series.
    """
    found = installed_version()
    advice = "use the NeMo container that brings it, or set rollout.engine=megatron"
    if found is None:
        raise ConfigError(f"rollout.engine: trtllm needs TensorRT-LLM {REFIT_SERIES}.x, which is not installed; {advice}")
    if found.split(".")[:2] != REFIT_SERIES.split("."):
        raise ConfigError(f"rollout.engine: trtllm needs TensorRT-LLM {REFIT_SERIES}.x, found {found}; {advice}")
    return found


def require_mpi_ranks(environment: Mapping[str, str]) -> None:
    """Several ranks must have been started through MPI, which TensorRT-LLM asks for its rank.

    Answered alike on every rank, before anything is loaded.

    Raises:
        ConfigError: they were not, such as under torchrun, where each would be MPI's rank 0.
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1 and not any(name in environment for name in _MPI_RANK):
        raise ConfigError(
            "rollout.engine: trtllm asks MPI for each process's rank, and these were not started through MPI; start them "
            "with `srun --mpi=pmix` (slurm/ampo.sh) or `mpirun`, or set rollout.engine=megatron, which torchrun can start"
        )


def require_server_version(version: str) -> None:
    """Can a TensorRT-LLM of this version reload weights?

    Raises:
        ConfigError: it is older than :data:`SERVER_MINIMUM`, or its version cannot be read.
    """
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise ConfigError(f"rollout server: cannot read TensorRT-LLM's version {version!r}") from None
    if (major, minor) < SERVER_MINIMUM:
        wanted = ".".join(map(str, SERVER_MINIMUM))
        raise ConfigError(f"rollout server: needs TensorRT-LLM {wanted} or later, found {version}")
