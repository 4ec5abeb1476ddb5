"""Rollout engines: one Protocol (:mod:`nemo_ampo.rollout.engine`), one file per engine, one table of names."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.output.staging import place_with_room, scratch_folder
from nemo_ampo.rollout.config import EngineName

if TYPE_CHECKING:
    from nemo_ampo.ranks import Ranks
    from nemo_ampo.rollout.config import RolloutConfig, TrtLlmConfig
    from nemo_ampo.rollout.engine import Decode, Engine


@dataclass(frozen=True)
class EngineSetup:
    """What an engine may need of a run.

    Attributes:
        model: the NeMo model being trained.
        rollout: the run's ``rollout`` section.
        decode: tokens to text, for stop strings.
        ranks: this process's place in the job.
        run_dir: run folder, where an engine without a folder of its own puts its files.
        publish: writes the model's current weights as a Hugging Face folder; called by every rank of the job.
    """

    model: Any
    rollout: RolloutConfig
    decode: Decode
    ranks: Ranks
    run_dir: Path
    publish: Callable[[Any, Path], None]


def _megatron(setup: EngineSetup) -> Engine:
    from nemo_ampo.rollout.megatron import MegatronEngine

    return MegatronEngine(setup.model, setup.rollout.batch_size, setup.decode)


def _trtllm(setup: EngineSetup) -> Engine:
    from nemo_ampo.rollout.trtllm_refit import TrtLlmRefitEngine

    own = setup.rollout.trtllm
    return TrtLlmRefitEngine(
        setup.model,
        engine_dir=Path(own.engine_dir) if own.engine_dir else _local_folder(),
        max_batch=setup.rollout.batch_size,
        max_prompt=setup.rollout.max_prompt_tokens,
        max_new_tokens=setup.rollout.max_new_tokens,
        unload_during_training=own.unload_during_training,
        max_num_tokens=own.max_num_tokens,
        decode=setup.decode,
    )


def _local_folder() -> Path:
    """On this node's own disk, for as long as the process lives: a rank reads no engine but the one it wrote."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder(Path(tempfile.gettempdir()), "trtllm_engine"))


def _trtllm_server(setup: EngineSetup) -> Engine:
    from nemo_ampo.rollout.trtllm_server import TrtLlmServerEngine

    own = setup.rollout.trtllm_server
    return TrtLlmServerEngine(
        own,
        publish=lambda folder: setup.publish(setup.model, folder),
        weights_dir=Path(own.weights_dir) if own.weights_dir else setup.run_dir / "rollout_weights",
        ranks=setup.ranks,
        max_batch=setup.rollout.batch_size,
        decode=setup.decode,
    )


ENGINES: dict[EngineName, Callable[[EngineSetup], Engine]] = {
    EngineName.megatron: _megatron,
    EngineName.trtllm: _trtllm,
    EngineName.trtllm_server: _trtllm_server,
}
"""Name in ``rollout.engine`` to what makes it."""


def make_engine(setup: EngineSetup) -> Engine:
    """The engine the run's config names."""
    return ENGINES[EngineName(setup.rollout.engine)](setup)


def require_engine(name: str) -> None:
    """Refuse, before any model loads, an engine this machine cannot run.

    Raises:
        ConfigError: saying what is missing.
    """
    if name == "trtllm":
        from nemo_ampo.rollout.trtllm_version import require_mpi_ranks, require_tensorrt_llm

        require_tensorrt_llm()
        require_mpi_ranks(os.environ)


def require_engine_room(own: TrtLlmConfig, parameters: int, tensor: int) -> None:
    """Refuse, before any model loads, a disk that does not hold the TensorRT engines of this node's ranks.

    Args:
        own: keys of the engine.
        parameters: of the whole model, two bytes each.
        tensor: tensor-parallel size.

    Raises:
        DiskError: naming the folder and what it lacks.
    """
    place = Path(own.engine_dir) if own.engine_dir else Path(tempfile.gettempdir())
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    what = "rollout.trtllm.engine_dir (null: TMPDIR): the engines of this node"
    place_with_room([place], ranks * 2 * parameters // tensor, what)
