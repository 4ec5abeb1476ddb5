"""Behaviour of the classes and functions that stand in for TensorRT-LLM and TensorRT."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import enum
import io
import json
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stand_in.network import expected_shapes, next_logits

WARNINGS: list[str] = []
"""What the real package would only have logged."""


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def mpi_rank() -> int:
    return int(os.environ.get("STAND_IN_MPI_RANK", _rank()))  # under torchrun every process is MPI's rank 0


def mpi_world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def mpi_barrier() -> None:
    torch.distributed.barrier()


class Communicator:
    def Split(self, color: int, key: int) -> Communicator:  # noqa: N802  (mpi4py's name)
        return self

    def Get_rank(self) -> int:  # noqa: N802
        return _rank()


def mpi_comm() -> Communicator:
    return Communicator()


# --- TensorRT ---------------------------------------------------------------------------------------------------------


class DataType(enum.Enum):
    FLOAT = "float32"
    BF16 = "bfloat16"
    HALF = "float16"


class TensorLocation(enum.Enum):
    HOST = 0
    DEVICE = 1


class Logger:
    ERROR = 1

    def __init__(self, min_severity: Any = None) -> None: ...


class Weights:
    def __init__(self, type: Any = None, ptr: int = 0, count: int = 0) -> None:
        self.dtype, self.ptr, self.size = type, ptr, count


class CudaEngine:
    """Holds and executes the weights. One more named constant than weights, as the real one lists its rotary table."""

    refittable = True
    constants = ("transformer.embed_positions_for_gpt_attention",)

    def __init__(self, weights: dict[str, torch.Tensor], dtype: DataType) -> None:
        self.weights, self.dtype = weights, dtype


class Refitter:
    def __init__(self, engine: CudaEngine, logger: Logger) -> None:
        self._engine = engine
        self._given: dict[str, torch.Tensor] = {}

    def get_all_weights(self) -> list[str]:
        return [*self._engine.weights, *self._engine.constants]

    def get_weights_prototype(self, weights_name: str) -> Weights:
        return Weights(self._engine.dtype, 0, self._engine.weights[weights_name].numel())

    def set_named_weights(self, name: str, weights: Weights, location: Any = None) -> bool:
        current = self._engine.weights.get(name)
        if current is None or weights.size != current.numel() or weights.dtype != self._engine.dtype:
            return False
        raw = (ctypes.c_char * (weights.size * current.element_size())).from_address(weights.ptr)
        self._given[name] = torch.frombuffer(bytearray(raw), dtype=current.dtype).reshape(current.shape)
        return True

    def refit_cuda_engine(self) -> bool:
        self._engine.weights.update(self._given)
        return True


# --- dtypes and small helpers ------------------------------------------------------------------------------------------

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def str_dtype_to_torch(dtype: str) -> torch.dtype:
    return _TORCH[dtype]


def torch_dtype_to_trt(dtype: torch.dtype) -> DataType:
    return DataType(str(dtype).removeprefix("torch."))


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    return -(-vocab_size // tp_size) * tp_size


def numpy_to_torch(x: Any) -> torch.Tensor:
    return torch.from_numpy(x)


def torch_to_numpy(x: torch.Tensor) -> Any:
    return x.numpy()


def check_max_num_tokens(**limits: Any) -> tuple[int, int]:
    tokens = limits["max_num_tokens"] or limits["max_batch_size"] * limits["max_seq_len"]
    return tokens, limits["opt_num_tokens"] or limits["max_batch_size"]


def non_gated_version(activation: str) -> str:
    return {"swiglu": "silu", "fast-swiglu": "silu", "geglu": "gelu"}.get(activation, activation)


class MoeConfig:
    class ExpertScaleNormalizationMode(enum.IntEnum):
        NONE = 0
        RENORMALIZE = 1


class Mapping:
    def __init__(self, world_size: int = 1, rank: int = 0, gpus_per_node: int = 8, **sizes: int) -> None:
        self.world_size, self.rank = world_size, rank
        self.tp_size, self.pp_size = sizes.get("tp_size", 1), sizes.get("pp_size", 1)
        assert self.tp_size * self.pp_size == world_size, "world_size must equal tp_size * pp_size"
        self.tp_rank = rank % self.tp_size

    def to_dict(self) -> dict[str, int]:
        return {"world_size": self.world_size, "tp_size": self.tp_size, "pp_size": self.pp_size}


# --- config and model --------------------------------------------------------------------------------------------------


class PretrainedConfig:
    """Unknown keys become attributes and are otherwise without effect, as in the real class."""

    known: dict[str, Any] = {"share_embedding_table": False, "head_size": None, "mapping": None}

    def __init__(self, *, architecture: str, dtype: str, hidden_size: int, num_attention_heads: int, **given: Any) -> None:
        self.architecture, self.dtype, self.hidden_size = architecture, dtype, hidden_size
        self.num_attention_heads = num_attention_heads
        for key, value in (self.known | given).items():
            setattr(self, key, value)
        self.mapping = self.mapping or Mapping()
        self.head_size = self.head_size or hidden_size // num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k != "mapping"}
        return plain | {"mapping": self.mapping.to_dict(), "mapping_rank": self.mapping.rank}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> PretrainedConfig:
        rank = plain.pop("mapping_rank")
        return cls(**plain | {"mapping": Mapping(rank=rank, **plain["mapping"])})


class LLaMAConfig(PretrainedConfig):
    known = PretrainedConfig.known | {"attn_bias": False, "mlp_bias": False, "rotary_base": 10000.0, "rotary_scaling": None}


class LLaMAForCausalLM:
    def __init__(self, config: LLaMAConfig) -> None:
        self.config = config
        self.weights: dict[str, torch.Tensor] = {}

    @classmethod
    def from_config(cls, config: LLaMAConfig) -> LLaMAForCausalLM:
        return cls(config)

    def load(self, weights: dict[str, torch.Tensor], from_pruned: bool = False) -> None:
        shapes = expected_shapes(self.config)
        if missing := set(shapes) - set(weights):
            raise RuntimeError(f"Required but not provided tensors:{missing}")
        if extra := set(weights) - set(shapes):
            WARNINGS.append(f"Provided but not expected tensors: {sorted(extra)}")
        for name, shape in shapes.items():
            assert tuple(weights[name].shape) == shape, (name, tuple(weights[name].shape), shape)
        self.weights = {name: weights[name].clone() for name in shapes}


def optimize_model(model: Any, **options: Any) -> Any:
    return model


def preprocess_weights(weights: Any, model_config: Any) -> None: ...


class PluginConfig:
    context_fmha = True

    def enable_paged_kv_cache(self, tokens_per_block: int = 64) -> None: ...


class BuildConfig:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @classmethod
    def from_dict(cls, config: dict[str, Any], plugin_config: Any = None) -> BuildConfig:
        return cls(dict(config))


@dataclasses.dataclass
class EngineConfig:
    pretrained_config: PretrainedConfig
    build_config: BuildConfig

    def to_dict(self) -> dict[str, Any]:
        return {"pretrained_config": self.pretrained_config.to_dict(), "build_config": self.build_config.values}


class Engine:
    """Saved and loaded through a file, so that an unloaded engine comes back with the weights it was *built* with."""

    def __init__(self, config: EngineConfig, engine: CudaEngine) -> None:
        self.config, self.engine = config, engine

    def save(self, engine_dir: str) -> None:
        Path(engine_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.engine.weights, Path(engine_dir) / f"rank{self.config.pretrained_config.mapping.rank}.engine")

    @classmethod
    def from_buffer(cls, engine_buffer: bytearray, json_config_str: str, rank: int = 0) -> Engine:
        plain = json.loads(json_config_str)
        config = LLaMAConfig.from_plain(plain["pretrained_config"])
        weights = torch.load(io.BytesIO(engine_buffer))
        return cls(EngineConfig(config, BuildConfig(plain["build_config"])), CudaEngine(weights, DataType(config.dtype)))


def build(model: LLaMAForCausalLM, build_config: BuildConfig) -> Engine:
    assert build_config.values["use_refit"], "built without refit support"
    if build_config.values["max_num_tokens"] * model.config.hidden_size > 2**31 - 1:
        raise RuntimeError("a tensor of the network has more than 2^31 - 1 elements")
    return Engine(EngineConfig(model.config, build_config), CudaEngine(model.weights, DataType(model.config.dtype)))


class GptJsonConfig:
    @staticmethod
    def parse_file(path: Path) -> Any:
        plain = json.loads(Path(path).read_text())
        limits = {name: plain["build_config"][name] for name in ("max_batch_size", "max_input_len")}
        return types.SimpleNamespace(
            model_config=types.SimpleNamespace(**limits),
            tensor_parallelism=plain["pretrained_config"]["mapping"]["tp_size"],
        )


class MpiComm:
    @staticmethod
    def split(color: int, key: int) -> None: ...


# --- runtime -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SamplingConfig:
    end_id: int
    pad_id: int
    max_new_tokens: int = 20
    output_sequence_lengths: bool = False
    return_dict: bool = False
    stop_words_list: Any = None
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    random_seed: Any = dataclasses.field(init=False, default=None)
    output_cum_log_probs: bool = dataclasses.field(init=False, default=False)
    output_log_probs: bool = dataclasses.field(init=False, default=False)

    def update(self, **values: Any) -> dict[str, Any]:
        for key, value in values.items():
            if hasattr(self, key):
                setattr(self, key, value)
        return {key: value for key, value in values.items() if not hasattr(self, key)}


class ModelRunner:
    """Draws with the project's own sampler: equal (seed, logits) give equal tokens in every engine of the suite."""

    @classmethod
    def from_engine(cls, engine: Engine, **options: Any) -> ModelRunner:
        runner = cls()
        runner.config = engine.config
        dtype = str_dtype_to_torch(engine.config.pretrained_config.dtype)
        runner.session = types.SimpleNamespace(runtime=types.SimpleNamespace(engine=engine.engine), dtype=dtype)
        return runner

    def generate(
        self, batch_input_ids: list[torch.Tensor], sampling_config: SamplingConfig, streaming: bool = False
    ) -> dict[str, torch.Tensor]:
        sampling = copy.deepcopy(sampling_config)
        rows, longest = len(batch_input_ids), max(map(len, batch_input_ids))
        self._check_inputs(rows, longest, sampling)
        if sum(map(len, batch_input_ids)) > self.config.build_config.values["max_num_tokens"]:
            raise RuntimeError("the prompts have more tokens together than the engine's max_num_tokens")
        width = longest + sampling.max_new_tokens
        ids = torch.full((rows, width), sampling.pad_id, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in batch_input_ids])
        for row, prompt in enumerate(batch_input_ids):
            ids[row, : len(prompt)] = prompt
        logprobs = torch.zeros(rows, width)
        self._fill(ids, lengths, logprobs, sampling)
        output = {"output_ids": ids.int().unsqueeze(1), "sequence_lengths": lengths.int().unsqueeze(1)}
        return output | ({"log_probs": logprobs.unsqueeze(1)} if sampling.output_log_probs else {})

    def _check_inputs(self, rows: int, longest: int, sampling: SamplingConfig) -> None:
        limits = self.config.build_config.values
        if rows > limits["max_batch_size"]:
            raise RuntimeError(f"Input batch size ({rows}) exceeds the engine limit ({limits['max_batch_size']})")
        if longest > limits["max_input_len"]:
            raise RuntimeError(f"Maximum input length ({longest}) exceeds the engine limit ({limits['max_input_len']})")
        if longest + sampling.max_new_tokens > limits["max_seq_len"]:
            raise RuntimeError("Maximum input length plus maximum new tokens exceeds the engine limit")
        assert sampling.random_seed.dtype == torch.int64 and sampling.random_seed.shape == (rows,)
        words = sampling.stop_words_list
        assert isinstance(words, np.ndarray) and words.dtype == np.int32 and words.shape[:2] == (rows, 2)

    def _fill(self, ids: torch.Tensor, lengths: torch.Tensor, logprobs: torch.Tensor, sampling: SamplingConfig) -> None:
        from nemo_ampo.rollout.engine import SamplingSpec
        from nemo_ampo.rollout.sampling import draw, uniform_draws

        config, weights = self.config.pretrained_config, self.session.runtime.engine.weights
        draws = uniform_draws(sampling.random_seed.tolist(), sampling.max_new_tokens)
        greedy = sampling.top_k == 1
        spec = SamplingSpec(1, (0,), 1.0, sampling.top_p or 1.0, 0 if greedy else sampling.top_k, greedy)
        stops = _stop_words(sampling.stop_words_list[0])
        running = torch.ones(len(ids), dtype=torch.bool)
        rows = torch.arange(len(ids))
        for step in range(sampling.max_new_tokens):
            logits = next_logits(config, weights, ids[:, : int(lengths.max())].clamp(min=0), lengths)
            # The kernels' log-probabilities are those after temperature, before top-k and top-p.
            tokens, values = draw(logits / sampling.temperature, draws[:, step], spec)
            living = rows[running]
            ids[living, lengths[living]] = tokens[living]
            logprobs[living, lengths[living]] = values[living]
            lengths[living] += 1
            for row in living.tolist():
                tail = ids[row, : int(lengths[row])].tolist()
                running[row] = not any(tail[-len(word) :] == word for word in stops)
            if not running.any():
                return


def _stop_words(table: Any) -> list[list[int]]:
    ids, ends = table.tolist()
    ends = [end for end in ends if end >= 0]
    return [ids[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
