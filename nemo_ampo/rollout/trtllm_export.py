"""NeMo's TensorRT-LLM exporter with what it leaves out put back in. [nemo]

NeMo 2.2.1 and Megatron-core 0.11.0 convert a live Megatron model into an engine and refit it in place, but for two
families the engine is another model than the trainer's, without an error:

- Qwen2.5: the bias of query, key and value is converted and then ignored, because the engine's config never says that it
  exists (:func:`repair_config`); once it does, the engine also wants a bias behind the attention, which is zero
  (:func:`repair_weights`).
- Llama 3.1: the scaling of the rotary embedding is not passed on (:func:`repair_config`).

And upstream's refit only warns of weights that one side lacks, and ignores that TensorRT refused a tensor;
:func:`strict_refit` stops on either.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorrt as trt
import tensorrt_llm
import torch
from megatron.core import parallel_state
from megatron.core.export.model_type import ModelType
from megatron.core.export.trtllm.trtllm_helper import TRTLLMHelper
from nemo.export.tensorrt_llm import TensorRTLLM
from nemo.export.trt_llm import tensorrt_llm_run
from nemo.export.trt_llm.converter.utils import init_model_parallel_from_nemo
from nemo.export.utils import torch_dtype_from_precision

from nemo_ampo.errors import ConfigError
from nemo_ampo.rollout.collective import refuse_together
from nemo_ampo.rollout.engine import WeightMismatchError

_BUFFERS = ("embed_positions", "rotary_inv_freq")
"""Named constants of an engine that follow from its config: TensorRT-LLM lists them as refittable, training never changes
them."""


def rotary_scaling(model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's frequency scaling as TensorRT-LLM spells it, or None for a model without one."""
    if not model_config.get("scale_positional_embedding"):
        return None
    return {
        "type": "llama3",
        "factor": float(model_config.get("scale_factor", 8)),
        "low_freq_factor": float(model_config.get("low_freq_factor", 1)),
        "high_freq_factor": float(model_config.get("high_freq_factor", 4)),
        "original_max_position_embeddings": int(model_config.get("old_context_len", 8192)),
    }


def repair_config(engine_config: Any, model_config: Mapping[str, Any]) -> None:
    """Tell the engine's config of the attention bias and the rotary scaling that Megatron-core's helper leaves out."""
    if model_config.get("qkv_bias"):
        engine_config.attn_bias = True
    scaling = rotary_scaling(model_config)
    if scaling is not None:
        engine_config.rotary_scaling = scaling


def repair_weights(weights: dict[str, torch.Tensor], model_config: Mapping[str, Any]) -> None:
    """Add the zero bias behind the attention, which an engine with attention biases requires in every layer."""
    if not model_config.get("qkv_bias"):
        return
    for layer in range(int(model_config["num_layers"])):
        name = f"transformer.layers.{layer}.attention.dense"
        if f"{name}.weight" in weights:
            weights.setdefault(f"{name}.bias", torch.zeros_like(weights[f"{name}.weight"][:, 0]).contiguous())


def check_exportable(model_config: Mapping[str, Any], tensor_parallel: int) -> int:
    """The rows of the engine's embedding, after checking what the exporter would get wrong or assert on later.

    Raises:
        ConfigError: naming the key of the model.
    """
    for key in ("rotary_base", "num_query_groups", "hf_vocab_size"):
        if model_config.get(key) is None:
            raise ConfigError(f"model.{key}: the checkpoint does not say; convert it again with converters.hf_to_nemo")
    if model_config.get("seq_len_interpolation_factor") is not None:
        raise ConfigError("model.seq_len_interpolation_factor: linear rotary interpolation is not supported by the engine")
    if int(model_config["num_query_groups"]) % tensor_parallel:
        raise ConfigError(
            f"model.tensor_model_parallel_size: {tensor_parallel} does not divide the "
            f"{model_config['num_query_groups']} key/value heads"
        )
    # The checkpoint's own rows: the tokenizer's length can be less (Qwen), Megatron's padded table more.
    rows = int(model_config["hf_vocab_size"])
    if rows % tensor_parallel:
        raise ConfigError(f"model.tensor_model_parallel_size: {tensor_parallel} does not divide the vocabulary of {rows}")
    return rows


class RepairedHelper(TRTLLMHelper):
    """Megatron-core's conversion helper, with :func:`repair_config` behind its config."""

    def __init__(self, model_config: Mapping[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._model_config = model_config

    def _get_trtllm_config(self, *args: Any, **kwargs: Any) -> Any:
        config = super()._get_trtllm_config(*args, **kwargs)
        repair_config(config, self._model_config)
        return config


class RepairedExporter(TensorRTLLM):
    """NeMo's exporter for one model: build once, then refit strictly.

    Args:
        engine_dir: where the engine is written; each replica takes a folder of its own below it.
        model_config: of the NeMo model.
        max_prompt, max_new_tokens, max_batch: what the engine is built for.
        max_num_tokens: prompt tokens of one batch together.
    """

    def __init__(
        self, engine_dir: Path, model_config: Any, max_prompt: int, max_new_tokens: int, max_batch: int, max_num_tokens: int
    ) -> None:
        super().__init__(str(engine_dir), load_model=False)
        self.model_dir: str = str(engine_dir)
        self._config = {k: v for k, v in model_config.items() if not (k == "num_moe_experts" and v is None)}
        self._dtype = torch_dtype_from_precision(model_config.precision)
        self._limits = (max_prompt, max_new_tokens, max_batch, max_num_tokens)
        self._helper: RepairedHelper | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._own_decoder: Any = None
        self.gpus_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or 1))

    @property
    def is_built(self) -> bool:
        """True once :meth:`build_engine` succeeded."""
        return bool(self._shapes)

    @property
    def decoder(self) -> Any:
        """The loaded ``ModelRunner``, or None. NeMo keeps one per process; another exporter's does not count."""
        loaded = tensorrt_llm_run.tensorrt_llm_worker_context.decoder
        return loaded if loaded is self._own_decoder else None

    def build_engine(self, model: Any) -> dict[str, torch.Tensor]:
        """Convert the model's weights, build the engine from them, write and load it. Returns the converted weights.

        Raises:
            ConfigError: on every rank, when the processes of one were not started through MPI, or when the exporter cannot
                convert this model at this layout.
        """
        refuse_together(self._problem())
        reshard = parallel_state.get_pipeline_model_parallel_world_size() > 1
        self.mp_rank, dp_rank, self.tp_size, self.pp_size, dp_size = init_model_parallel_from_nemo(reshard)
        if dp_size > 1:
            self.model_dir = str(Path(self.model_dir) / f"replica_{dp_rank}")
        self._helper = self._make_helper()
        weights, config = self._first_conversion(model)
        _make_room()
        if reshard:
            config.pp_size, config.world_size = 1, self.tp_size
            config.mapping = tensorrt_llm.Mapping(
                world_size=self.tp_size, rank=self.mp_rank, tp_size=self.tp_size, pp_size=1
            )
        max_prompt, max_new_tokens, max_batch, max_num_tokens = self._limits
        engine = self._helper.build_and_save_engine(
            engine_dir=self.model_dir,
            trtllm_model_weights=weights,
            trtllm_model_config=config,
            max_input_len=max_prompt,
            max_output_len=max_new_tokens,
            max_seq_len=max_prompt + max_new_tokens,
            max_batch_size=max_batch,
            # Without it an engine takes max_batch x max_seq_len tokens: more elements than an int32 counts for a 7B model.
            max_num_tokens=max_num_tokens,
            use_refit=True,
        )
        torch.distributed.barrier()
        self._write_config(engine)
        self._load()
        self._shapes = {name: tensor.shape for name, tensor in weights.items()}
        check_names(weights, engine_weights(self.decoder))
        return weights

    def _problem(self) -> str | None:
        """Why no engine can be built on this rank."""
        mine, mpi = torch.distributed.get_rank(), tensorrt_llm.mpi_rank()
        if mpi != mine:
            return (
                f"rollout.engine: TensorRT-LLM sees MPI rank {mpi} where torch has {mine}: start the job with "
                "`srun --mpi=pmix` or `mpirun`, torchrun gives no MPI ranks"
            )
        try:
            check_exportable(self._config, parallel_state.get_tensor_model_parallel_world_size())
        except ConfigError as error:
            return str(error)
        return None

    def refit_engine(self, model: Any) -> dict[str, torch.Tensor]:
        """Load the engine if it was unloaded and give it the model's current weights, all of them. Returns the weights.

        Raises:
            WeightMismatchError: see :func:`strict_refit`.
        """
        assert self._helper is not None
        weights = self._convert(model)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        changed = [name for name in shapes if name in self._shapes and shapes[name] != self._shapes[name]]
        if changed:
            raise WeightMismatchError(
                f"refit: {changed[0]} is {list(shapes[changed[0]])}, the engine was built with "
                f"{list(self._shapes[changed[0]])}"
            )
        _make_room()
        self._load()
        strict_refit(self.decoder, weights)
        return weights

    def unload(self) -> None:
        """Free the engine's memory; the next :meth:`refit_engine` loads it from disk again."""
        if self.decoder is not None:
            self._own_decoder = None
            self.unload_engine()
            gc.collect()

    def _make_helper(self) -> RepairedHelper:
        config = self._config
        return RepairedHelper(
            config,
            transformer_config=self.get_transformer_config(config),
            model_type=ModelType.llama,
            position_embedding_type=config["position_embedding_type"],
            max_position_embeddings=config["max_position_embeddings"],
            rotary_percentage=config["rotary_percentage"],
            rotary_base=config["rotary_base"],
            activation=config["activation"],
            share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
        )

    def _first_conversion(self, model: Any) -> tuple[dict[str, torch.Tensor], Any]:
        assert self._helper is not None
        state = self.gather_and_reshard_model(self._config, model, self._dtype)
        self._helper.trtllm_conversion_dict.update(self.get_nemo_to_trtllm_conversion_dict(state))
        weights, configs = self._helper.get_trtllm_pretrained_config_and_model_weights(
            model_state_dict=state,
            dtype=self.get_input_dtype(self._dtype),
            state_dict_split_by_layer_numbers=True,
            on_device_distributed_conversion=True,
            vocab_size=check_exportable(self._config, self.tp_size),
            gpus_per_node=self.gpus_per_node,
        )
        repair_weights(weights[0], self._config)
        return weights[0], configs[0]

    def _convert(self, model: Any) -> dict[str, torch.Tensor]:
        assert self._helper is not None
        state = self.gather_and_reshard_model(self._config, model, self._dtype)
        converter: Any = self._helper.weights_converter
        converter.convert(
            model_state_dict=state,
            trtllm_conversion_dict=self.get_nemo_to_trtllm_conversion_dict(state),
            tokenizer_vocab_size=check_exportable(self._config, self.tp_size),
        )
        weights: dict[str, torch.Tensor] = converter.trtllm_model_weights
        repair_weights(weights, self._config)
        return weights

    def _write_config(self, engine: Any) -> None:
        import json

        path = Path(self.model_dir) / f"config_{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(engine.config.to_dict(), indent=4), encoding="utf-8")

    def _load(self) -> None:
        context = tensorrt_llm_run.tensorrt_llm_worker_context
        if context.decoder is not None and self.decoder is None:
            self.unload_engine()  # somebody else's: NeMo would keep it and we would refit the wrong one
        with _device_as_index():
            tensorrt_llm_run.load_distributed(self.model_dir, self.mp_rank, self.gpus_per_node)
        self._own_decoder = context.decoder


def _make_room() -> None:
    """Between a conversion and what is built or loaded from it.

    The conversion copies to pinned memory without waiting, and the engine is read from there. And an engine allocates past
    torch, whose cache holds what the trainer used last: freed after the load it would come too late.
    """
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _device_as_index() -> Any:
    """NeMo counts with ``torch.cuda.current_device()``, which is a torch.device where our CPU platform stands in."""
    before = torch.cuda.current_device
    if not isinstance(before(), int):
        torch.cuda.current_device = lambda: int(os.environ.get("LOCAL_RANK", "0"))
    try:
        yield
    finally:
        torch.cuda.current_device = before


def engine_weights(decoder: Any) -> dict[str, int]:
    """Name to number of elements of every weight the loaded engine can take."""
    refitter = trt.Refitter(engine=decoder.session.runtime.engine, logger=trt.Logger(trt.Logger.ERROR))
    names = [name for name in refitter.get_all_weights() if not name.rsplit(".", 1)[-1].startswith(_BUFFERS)]
    return {name: int(refitter.get_weights_prototype(name).size) for name in names}


def check_names(weights: Mapping[str, torch.Tensor], engine: Mapping[str, int]) -> None:
    """Trainer and engine must know the same weights in the same sizes.

    Raises:
        WeightMismatchError: naming the first few of either side, or the first of another size.
    """
    missing, extra = sorted(set(engine) - set(weights)), sorted(set(weights) - set(engine))
    if missing or extra:
        raise WeightMismatchError(
            f"refit: the engine has {len(engine)} weights, the trainer gave {len(weights)}; not given: "
            f"{', '.join(missing[:4]) or 'none'}; not in the engine: {', '.join(extra[:4]) or 'none'}"
        )
    for name, size in engine.items():
        if weights[name].numel() != size:
            raise WeightMismatchError(f"refit: {name} has {weights[name].numel()} elements, the engine's has {size}")


def strict_refit(decoder: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace every weight of a loaded engine.

    Raises:
        WeightMismatchError: a weight is missing, left over, of another size or type, or TensorRT refused one.
    """
    engine = decoder.session.runtime.engine
    if not engine.refittable:
        raise WeightMismatchError("refit: the engine was built without refit support")
    check_names(weights, engine_weights(decoder))
    refitter = trt.Refitter(engine=engine, logger=trt.Logger(trt.Logger.ERROR))
    for name, tensor in weights.items():
        kind = tensorrt_llm_run.maybe_cast_to_trt_dtype(tensor.dtype)
        expected = refitter.get_weights_prototype(name).dtype
        if kind != expected:
            raise WeightMismatchError(f"refit: {name} is {kind}, the engine's is {expected}")
        place = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
        if not refitter.set_named_weights(name, trt.Weights(kind, tensor.data_ptr(), tensor.numel()), place):
            raise WeightMismatchError(f"refit: TensorRT refused {name}")
    if not refitter.refit_cuda_engine():
        raise WeightMismatchError("refit: TensorRT did not take the weights")
