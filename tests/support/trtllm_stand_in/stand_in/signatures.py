"""The calls NeMo, Megatron-core and NeMo-Aligner make into TensorRT-LLM: what the callee accepts, and where that was read.

One table, used twice: the stand-in refuses any call that does not bind to its row, and a test binds every call found in
the upstream sources to it. So a new keyword upstream breaks a test here and not a run on a cluster.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEV_0_16 = "0.16.0.dev20241126"
"""The newest snapshot whose source was read; 0.17.0 itself was not. See docs/engines.md."""


@dataclass(frozen=True)
class Row:
    """One callable.

    Attributes:
        parameters: as they stand between the parentheses of its ``def``, without ``self``.
        version: TensorRT-LLM or TensorRT release the signature was read in.
        file: inside that release.
    """

    parameters: str
    version: str
    file: str

    @property
    def signature(self) -> inspect.Signature:
        """As an object that can bind arguments."""
        namespace: dict[str, Any] = {}
        exec(f"def f({self.parameters}): pass", namespace)
        return inspect.signature(namespace["f"])


SIGNATURES: dict[str, Row] = {
    "tensorrt_llm.mpi_rank": Row("", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm.mpi_world_size": Row("", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm.mpi_barrier": Row("", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._utils.mpi_comm": Row("", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._utils.str_dtype_to_torch": Row("dtype", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._utils.torch_dtype_to_trt": Row("dtype", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._utils.pad_vocab_size": Row("vocab_size, tp_size", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._utils.numpy_to_torch": Row("x", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._utils.torch_to_numpy": Row("x", "0.13.0", "tensorrt_llm/_utils.py"),
    "tensorrt_llm._common.check_max_num_tokens": Row(
        "max_num_tokens, opt_num_tokens, max_batch_size, max_input_len, max_seq_len, max_beam_width, "
        "remove_input_padding, enable_context_fmha, tokens_per_block, multiple_profiles",
        "0.13.0",
        "tensorrt_llm/_common.py",
    ),
    "tensorrt_llm.Mapping": Row(
        "world_size=1, rank=0, gpus_per_node=8, *, cp_size=1, tp_size=1, pp_size=1, moe_tp_size=-1, moe_ep_size=-1",
        DEV_0_16,
        "tensorrt_llm/mapping.py",
    ),
    "tensorrt_llm.functional.non_gated_version": Row("activation", "0.13.0", "tensorrt_llm/functional.py"),
    "tensorrt_llm.models.modeling_utils.optimize_model": Row(
        "model, use_parallel_embedding=False, share_embedding_table=False, use_ootb_moe=False, use_fused_mlp=False, "
        "gemm_swiglu_plugin_dtype=None, low_latency_gemm_swiglu_plugin_dtype=None, use_fused_rg_lru=False, "
        "use_unfused_qkv_gemm=False, use_prompt_tuning=False, use_lora=False, max_lora_rank=None, "
        "use_fp8_context_fmha=False",
        DEV_0_16,
        "tensorrt_llm/models/modeling_utils.py",
    ),
    "tensorrt_llm.models.modeling_utils.preprocess_weights": Row(
        "weights, model_config, from_pruned=False", "0.13.0", "tensorrt_llm/models/modeling_utils.py"
    ),
    "tensorrt_llm.models.LLaMAForCausalLM.from_config": Row("config", "0.13.0", "tensorrt_llm/models/modeling_utils.py"),
    "tensorrt_llm.models.LLaMAForCausalLM.load": Row(
        "weights, from_pruned=False", "0.13.0", "tensorrt_llm/models/modeling_utils.py"
    ),
    "tensorrt_llm.plugin.PluginConfig": Row("", "0.13.0", "tensorrt_llm/plugin/plugin.py"),
    "tensorrt_llm.plugin.PluginConfig.enable_paged_kv_cache": Row(
        "tokens_per_block=64", "0.13.0", "tensorrt_llm/plugin/plugin.py"
    ),
    "tensorrt_llm.builder.BuildConfig.from_dict": Row("config, plugin_config=None", "0.13.0", "tensorrt_llm/builder.py"),
    "tensorrt_llm.builder.Engine.from_buffer": Row(
        "engine_buffer, json_config_str, rank=0", DEV_0_16, "tensorrt_llm/builder.py"
    ),
    "tensorrt_llm.builder.Engine.save": Row("engine_dir", "0.13.0", "tensorrt_llm/builder.py"),
    "tensorrt_llm.commands.build.build": Row("model, build_config", "0.13.0", "tensorrt_llm/builder.py"),
    "tensorrt_llm.logger.logger.set_level": Row("min_severity", "0.13.0", "tensorrt_llm/logger.py"),
    "tensorrt_llm.bindings.GptJsonConfig.parse_file": Row("path", "0.13.0", "cpp/tensorrt_llm/pybind/bindings.cpp"),
    "tensorrt_llm.bindings.MpiComm.split": Row("color, key", DEV_0_16, "cpp/tensorrt_llm/pybind/bindings.cpp"),
    "tensorrt_llm.runtime.SamplingConfig": Row(
        "end_id, pad_id, max_new_tokens=20, num_beams=1, num_return_sequences=None, max_attention_window_size=None, "
        "sink_token_length=None, output_sequence_lengths=False, return_dict=False, stop_words_list=None, "
        "bad_words_list=None, temperature=1.0, top_k=1, top_p=0.0, top_p_decay=None, top_p_min=None, "
        "top_p_reset_ids=None, length_penalty=1.0, early_stopping=1, repetition_penalty=1.0, min_length=1, "
        "presence_penalty=0.0, frequency_penalty=0.0, use_beam_hyps=True",
        DEV_0_16,
        "tensorrt_llm/runtime/generation.py",
    ),
    "tensorrt_llm.runtime.ModelRunner.from_engine": Row(
        "engine, *, max_output_len, lora_dir, rank, debug_mode, lora_ckpt_source, medusa_choices, stream, "
        "gpu_weights_percent, enable_context_fmha_fp32_acc, multi_block_mode",
        DEV_0_16,
        "tensorrt_llm/runtime/model_runner.py",
    ),
    "tensorrt_llm.runtime.ModelRunner.generate": Row(
        "batch_input_ids, position_ids=None, sampling_config=None, prompt_table=None, prompt_tasks=None, "
        "lora_uids=None, streaming=False, stopping_criteria=None, logits_processor=None, medusa_choices=None, **kwargs",
        DEV_0_16,
        "tensorrt_llm/runtime/model_runner.py",
    ),
    "tensorrt.Logger": Row("min_severity=None", "TensorRT 10", "tensorrt"),
    "tensorrt.Weights": Row("type=None, ptr=None, count=None", "TensorRT 10", "tensorrt"),
    "tensorrt.Refitter": Row("engine, logger", "TensorRT 10", "tensorrt"),
    "tensorrt.Refitter.get_all_weights": Row("", "TensorRT 10", "tensorrt"),
    "tensorrt.Refitter.get_weights_prototype": Row("weights_name", "TensorRT 10", "tensorrt"),
    "tensorrt.Refitter.set_named_weights": Row("name, weights, location=None", "TensorRT 10", "tensorrt"),
    "tensorrt.Refitter.refit_cuda_engine": Row("", "TensorRT 10", "tensorrt"),
}

ELSEWHERE: frozenset[str] = frozenset(
    {
        "tensorrt_llm.runtime.ModelRunner.from_dir",
        "tensorrt_llm.runtime.ModelRunnerCpp.from_dir",
        "tensorrt_llm.lora_manager.LoraConfig",
        "tensorrt_llm.lora_manager.LoraManager",
        "tensorrt_llm.logger.set_level",
        "tensorrt_llm.quantization.QuantMode",
        "tensorrt_llm.quantization.QuantMode.from_description",
        "tensorrt_llm.quantization.QuantMode.from_quant_algo",
        "tensorrt_llm.runtime.ModelConfig",
        "mpi4py.futures.MPIPoolExecutor",
        "tensorrt_llm.Mapping.from_dict",
    }
)
"""Called in the same upstream files, but never on the path from build to generate."""


def strict(name: str, function: Callable[..., Any], bound: bool = False) -> Callable[..., Any]:
    """``function`` behind a check of its arguments against the table. ``bound``: the first argument is self or cls."""
    signature = SIGNATURES[name].signature

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args[int(bound) :], **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        return function(*args, **kwargs)

    return checked
