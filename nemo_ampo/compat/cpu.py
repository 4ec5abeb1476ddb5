"""NeMo 2.2.1, Megatron-core 0.11.0 and NeMo-Aligner 0.7.0 on a CPU over gloo.

Those frameworks assume a GPU and several compiled extensions. Each function below replaces one upstream symbol and says
why; nothing here knows about AMPO. The order matters: torch first, then stubs for modules that cannot be imported, then
patches on the imported frameworks, and last torch's factory functions (TorchScript code compiled while the frameworks
are imported must still see the builtins).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import inspect
import os
import queue
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_ampo.compat.common import stub_module
from nemo_ampo.compat.registry import Table
from nemo_ampo.compat.stream import InertStream

device = torch.device("cpu")
"""Where the frameworks' tensors go instead of to a GPU: here, unless a rehearsal puts one without memory in its place."""

TORCH = Table()
STUBS = Table()
FRAMEWORKS = Table()
FACTORIES = Table()
TABLES = (TORCH, STUBS, FRAMEWORKS, FACTORIES)


def install() -> None:
    """Apply all substitutes. Must run before the first import of NeMo, Megatron-core or NeMo-Aligner."""
    with _no_collections():
        for table in TABLES:
            table.apply_all()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Imports make a million objects that stay; walking them again and again takes one or two seconds of every start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


# --- torch -------------------------------------------------------------------------------------------------------


@TORCH.add("torch.cuda.current_device", "torch 2.13", "used as `device=` everywhere; raises without a driver")
def _current_device() -> None:
    torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None


@TORCH.add("torch.cuda RNG state", "torch 2.13", "Megatron forks CUDA generators for dropout and initialisation")
def _cuda_rng() -> None:
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.manual_seed = manual_seed
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state


@TORCH.add("torch.cuda.*Tensor", "torch 2.13", "isinstance checks and constructors of NeMo's clipping and generation")
def _cuda_tensor_types() -> None:
    for name in ("Float", "Long", "Half", "BFloat16", "Int", "Byte", "Double", "Bool"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


@TORCH.add("torch.cuda streams", "torch 2.13", "Megatron's DDP builds side streams unconditionally")
def _cuda_streams() -> None:
    torch.cuda.Stream = torch.cuda.Event = InertStream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: InertStream()  # type: ignore
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment, return-value]


@TORCH.add(
    "torch.Tensor.cuda",
    "torch 2.13",
    "a copy, never the tensor itself: NeMo's generation writes into the result and would overwrite the prompts",
)
def _tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(device, copy=device.type == "cpu")  # type: ignore[method-assign, assignment]


@TORCH.add(
    "torch.compile",
    "torch 2.13",
    "as a decorator in NeMo and Megatron it loads the compiler, another second, and calls for a C++ compiler; eager instead",
)
def _no_compiler() -> None:
    def compile(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = compile


@TORCH.add(
    "torch.distributed.all_gather_into_tensor",
    "torch 2.13",
    "gloo refuses 0-dimensional inputs, which Aligner's rebalance_nd_tensor sends",
)
def _gather_scalars() -> None:
    upstream = torch.distributed.all_gather_into_tensor

    @functools.wraps(upstream)
    def all_gather_into_tensor(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return upstream(output, tensor.reshape(1) if tensor.dim() == 0 else tensor, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = all_gather_into_tensor


@TORCH.add(
    "gloo groups at the interpreter's exit",
    "torch 2.13",
    "nobody destroys Megatron's groups; their threads then meet a dying interpreter, and a finished rank may end in SIGABRT",
)
def _groups_end_before_the_interpreter() -> None:
    atexit.register(destroy_groups)


def destroy_groups() -> None:
    """Destroy all process groups and join their threads."""
    if not torch.distributed.is_initialized():
        return
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        state.destroy_model_parallel()
        for forgotten in ("_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP", "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO"):
            setattr(state, forgotten, None)
    torch.distributed.destroy_process_group()
    gc.collect()  # A group's threads end with its last reference.


# --- modules that cannot be imported here --------------------------------------------------------------------------


@STUBS.add(
    "apex, amp_C, transformer_engine",
    "apex 25.01, transformer-engine 1.13",
    "Megatron and NeMo take their kernels wherever they can be imported, and none runs on a CPU: hidden, everything falls "
    "back as on a machine that has none",
)
def _no_cuda_extensions() -> None:
    for name in ("apex", "amp_C", "transformer_engine"):
        sys.modules[name] = None  # type: ignore[assignment]  # Python's way of saying that it cannot be imported


@STUBS.add("nemo.core.optim.distributed_adam", "nemo 2.2.1", "NLPDDPStrategy raises 'Apex was not found' without it")
def _distributed_adam() -> None:
    class MegatronDistributedFusedAdam(torch.optim.AdamW):
        """Only its name is needed: recipes use mcore_distributed_optim."""

    stub_module("nemo.core.optim.distributed_adam", MegatronDistributedFusedAdam=MegatronDistributedFusedAdam)


@STUBS.add("NVIDIA_PYTORCH_VERSION", "nemo 2.2.1", "_enable_nvidia_optimizations matches None against a pattern")
def _pytorch_version() -> None:
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "25.01")


# --- patches on the imported frameworks ---------------------------------------------------------------------------


@FRAMEWORKS.add("nlp_model.get_megatron_pretrained_bert_models", "nemo 2.2.1", "NameError while a model is built")
def _bert_models() -> None:
    import nemo.collections.nlp.models.nlp_model as nlp_model

    nlp_model.get_megatron_pretrained_bert_models = lambda: []


@FRAMEWORKS.add("megatron_gpt_model.get_specs", "nemo 2.2.1", "builds Transformer Engine layers eagerly")
def _layer_spec() -> None:
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as gpt

    from nemo_ampo.compat.layer_spec import cpu_layer_spec

    gpt.get_specs = lambda *args, **kwargs: cpu_layer_spec()


@FRAMEWORKS.add(
    "MegatronGPTModel.get_forward_output_only_func",
    "nemo 2.2.1",
    "under DDP or O2 wrappers the full mask reaches KV-cached steps; Transformer Engine ignores it, local attention cannot",
)
def _cached_step_mask() -> None:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    upstream = MegatronGPTModel.get_forward_output_only_func

    def get_forward_output_only_func(self: Any) -> Callable[..., Any]:
        inner = upstream(self)

        def forward(iterator: Any, model: Any) -> Any:
            return inner(iterator, lambda tokens, positions, mask, **kw: model(tokens, positions, None, **kw))

        return forward

    MegatronGPTModel.get_forward_output_only_func = get_forward_output_only_func


@FRAMEWORKS.add(
    "build_model.set_defaults_if_not_set_tensor_model_parallel_attributes",
    "nemo 2.2.1",
    "the name is imported from Apex only",
)
def _parallel_attributes() -> None:
    import nemo.collections.nlp.modules.common.megatron.build_model as build_model
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes

    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )


@FRAMEWORKS.add("megatron.utils.{listify_model, norms}", "nemo 2.2.1", "names imported from Apex only")
def _apex_names() -> None:
    import nemo.collections.nlp.modules.common.megatron.utils as utils

    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    utils.FusedLayerNorm = utils.FastLayerNorm = torch.nn.LayerNorm
    utils.MixedFusedRMSNorm = torch.nn.RMSNorm


@FRAMEWORKS.add(
    "megatron.core.tensor_parallel.random._{get,set}_cuda_rng_state",
    "megatron-core 0.11.0",
    "without them the dropout generator is not forked per tensor-parallel rank, in silence",
)
def _megatron_rng() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


@FRAMEWORKS.add(
    "megatron_init._set_random_seed",
    "nemo 2.2.1",
    "skips the model-parallel generator without a GPU: 'model-parallel-rng is not added'",
)
def _model_parallel_seed() -> None:
    import nemo.collections.nlp.modules.common.megatron.megatron_init as megatron_init
    from megatron.core import tensor_parallel

    upstream = megatron_init._set_random_seed

    def set_random_seed(seed: int) -> None:
        upstream(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * megatron_init.get_pipeline_model_parallel_rank())

    megatron_init._set_random_seed = set_random_seed


@FRAMEWORKS.add("ModelPT.cuda", "nemo 2.2.1", "generate() moves the model to a GPU")
def _model_cuda() -> None:
    from nemo.core.classes.modelPT import ModelPT

    ModelPT.cuda = lambda self, *args, **kwargs: self


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """While active, ``Tensor.type()`` answers with the CUDA spelling."""
    upstream = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = upstream(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return "torch.cuda." + answer.rsplit(".", 1)[-1]
        return answer

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = upstream  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


@FRAMEWORKS.add(
    "megatron.core.optimizer parameter sorting",
    "megatron-core 0.11.0",
    "parameters are told apart by comparing type() with 'torch.cuda.FloatTensor'",
)
def _optimizer_type_names() -> None:
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    import megatron.core.optimizer.optimizer as optimizer

    for owner, name in (
        (distrib_optimizer.DistributedOptimizer, "__init__"),
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        (optimizer, "clip_grad_by_total_norm_fp32"),
    ):
        setattr(owner, name, _with_cuda_type_names(getattr(owner, name)))


@FRAMEWORKS.add(
    "megatron.core.optimizer.Adam",
    "megatron-core 0.11.0",
    "Apex or Transformer Engine only; torch's own keeps a 0-dim step per parameter that cannot be sharded on save",
)
def _adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    from nemo_ampo.compat.adam import FusedAdamLayout

    optimizer.Adam = distrib_optimizer.Adam = FusedAdamLayout
    distrib_optimizer.HAVE_APEX_OR_TE = True


@FRAMEWORKS.add(
    "distributed.param_and_grad_buffer._ParamAndGradBuffer",
    "megatron-core 0.11.0",
    "a tied embedding on a pipeline gets a bucket of its own whose start is not padded: odd sizes overlap and the "
    "distributed optimizer stops with 'each param only belongs to a single bucket'; one replica needs no such bucket",
)
def _shared_embedding_bucket() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    upstream = _ParamAndGradBuffer.__init__
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        alone = torch.distributed.get_world_size(given["data_parallel_group"]) == 1
        shared = [p for p in given["params"] if alone and getattr(p, "shared_embedding", False)]
        for p in shared:
            p.shared_embedding = False
        try:
            upstream(self, *args, **kwargs)
        finally:
            for p in shared:
                p.shared_embedding = True

    _ParamAndGradBuffer.__init__ = init


@FRAMEWORKS.add(
    "dist_checkpointing.strategies.filesystem_async._write_item",
    "megatron-core 0.11.0 with torch >= 2.7",
    "torch added two arguments: every save fails with 'Worker failure'",
)
def _write_item() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    from torch.distributed.checkpoint import filesystem

    if not hasattr(filesystem, "_StorageWriterTransforms"):
        return  # an older torch, such as the container's 2.6

    def write_item(*args: Any) -> Any:
        return filesystem._write_item(
            filesystem._StorageWriterTransforms(),
            *args[-4:],
            filesystem.SerializationFormat.TORCH_SAVE,
        )

    filesystem_async._write_item = write_item


@FRAMEWORKS.add(
    "dist_checkpointing writer processes",
    "megatron-core 0.11.0",
    "a save spawns a manager that imports the whole program again, and forks a writer; in-process is exact and quicker here",
)
def _in_process_writer() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy

    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results
    AsyncSaveShardedStrategy.save = lambda self, state, folder: self.async_save(state, folder).execute_sync()


# --- torch factories ----------------------------------------------------------------------------------------------


def _is_cuda(named: object) -> bool:
    if isinstance(named, torch.device):
        return named.type == "cuda"
    return isinstance(named, str) and named.startswith("cuda")


@FACTORIES.add(
    "torch factory functions",
    "torch 2.13",
    "device='cuda' is written out in optimizer and mask code, pin_memory=True in the weight exporter",
)
def _factories() -> None:
    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = device
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return wrapped

    for name in (
        "zeros",
        "ones",
        "empty",
        "full",
        "tensor",
        "arange",
        "as_tensor",
        "rand",
        "randn",
        "randint",
        "empty_like",
        "zeros_like",
        "ones_like",
    ):
        setattr(torch, name, on_cpu(getattr(torch, name)))
