"""What NeMo 2.2.1, Megatron-core 0.11.0 and NeMo-Aligner 0.7.0 get wrong on every machine, a GPU's included.

As in :mod:`nemo_ampo.compat.cpu`, each function replaces one upstream symbol and says why.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from typing import Any

from nemo_ampo.compat.registry import Table

STUBS = Table()
FRAMEWORKS = Table()
TABLES = (STUBS, FRAMEWORKS)

_TRT_LLM = "nemo_aligner.utils.trt_llm"


def before_imports() -> None:
    """Stubs; must be there before the first import of NeMo-Aligner."""
    STUBS.apply_all()


def after_imports() -> None:
    """Patches on the imported frameworks."""
    FRAMEWORKS.apply_all()


def stub_module(name: str, **attributes: Any) -> None:
    """Put a module of this name, with these members, where an import looks first."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


@STUBS.add(
    _TRT_LLM,
    "nemo-aligner 0.7.0",
    "the actor imports tensorrt_llm through it, which may be absent or start MPI; only rollout.engine=trtllm needs it",
)
def _no_trt_llm() -> None:
    class GPTGenerateTRTLLM:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the actor's own TensorRT-LLM is not used; set rollout.engine=trtllm")

    stub_module(_TRT_LLM, GPTGenerateTRTLLM=GPTGenerateTRTLLM)


def load_trt_llm() -> Any:
    """NeMo-Aligner's own ``utils.trt_llm``, which imports TensorRT-LLM.

    Raises:
        ImportError: there is none.
    """
    loaded = sys.modules.get(_TRT_LLM)
    if loaded is None or loaded.__spec__ is None:
        # NeMo refuses to load an engine where TensorRT-LLM may choose the device; Aligner sets this only after its import.
        os.environ.setdefault("DISABLE_TORCH_DEVICE_SET", "1")
        sys.modules.pop(_TRT_LLM, None)
        loaded = importlib.import_module(_TRT_LLM)
    return loaded


@FRAMEWORKS.add(
    "MegatronGPTModel._{reset,restore}_sequence_parallelism_args",
    "nemo 2.2.1",
    "an embedding keeps reduce_scatter_embeddings from its construction: with sequence_parallel every pass without "
    "gradients scatters its input, and the layers behind it do not expect that",
)
def _whole_sequences_without_gradients() -> None:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    reset, restore = MegatronGPTModel._reset_sequence_parallelism_args, MegatronGPTModel._restore_sequence_parallelism_args

    @functools.wraps(reset)
    def reset_too(self: Any) -> None:
        reset(self)
        for part in _embeddings(self):
            part.scatters_in_training = part.reduce_scatter_embeddings
            part.reduce_scatter_embeddings = False

    @functools.wraps(restore)
    def restore_too(self: Any) -> None:
        restore(self)
        for part in _embeddings(self):
            part.reduce_scatter_embeddings = part.scatters_in_training

    MegatronGPTModel._reset_sequence_parallelism_args = reset_too
    MegatronGPTModel._restore_sequence_parallelism_args = restore_too


def _embeddings(model: Any) -> list[Any]:
    """The modules that scatter embeddings over the sequence: the vocabulary's, and the block around it."""
    modules = (part for module in model.get_model_module_list() for part in module.modules())
    return [part for part in modules if hasattr(part, "reduce_scatter_embeddings")]


@FRAMEWORKS.add(
    "megatron.core.dist_checkpointing.load",
    "megatron-core 0.11.0",
    "Transformer Engine's attention asks for an extra state that a checkpoint written without it does not hold, and that "
    "only fp8 needs; a weight that is missing still is an error",
)
def _optional_extra_states() -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    upstream = dist_checkpointing.load

    @functools.wraps(upstream)
    def load(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        held = load_sharded_metadata(str(checkpoint_dir))

        def absent(entry: object) -> bool:
            return isinstance(entry, ShardedObject) and "_extra_state" in entry.key and entry.unique_key not in held

        _, wanted = extract_matching_values(sharded_state_dict, absent)
        return upstream(wanted, checkpoint_dir, *args, **kwargs)

    dist_checkpointing.load = load


@FRAMEWORKS.add(
    "ModelPT.setup_megatron_optimization",
    "nemo 2.2.1",
    "hands Megatron's optimizer lr, decay and betas, but not eps, so that model.optim.eps would change nothing",
)
def _adam_eps() -> None:
    from nemo.core.classes.modelPT import ModelPT

    upstream = ModelPT.setup_megatron_optimization

    @functools.wraps(upstream)
    def setup(self: Any, optim_config: Any) -> Any:
        config = upstream(self, optim_config)
        config.adam_eps = float(optim_config.get("eps", config.adam_eps))
        return config

    ModelPT.setup_megatron_optimization = setup
