"""What Transformer Engine and Apex accept where Megatron-core and NeMo call them, and where that was read.

One table, used twice, as for TensorRT-LLM's stand-in: a call that does not bind to its row is refused, and a test binds
every call found in the upstream sources to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TE = "1.13"
"""The newest release before 2.0; Megatron-core 0.11.0 knows both."""
APEX = "25.01"


@dataclass(frozen=True)
class Row:
    """One callable.

    Attributes:
        parameters: as they stand between the parentheses of its ``def``, without ``self``.
        version: tag of the upstream repository.
        file: in that repository.
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


_PYTORCH = "transformer_engine/pytorch"
_NORM = (
    "normalized_shape=None, eps=1e-05, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False, "
    "hidden_size=None, **kwargs"
)

SIGNATURES: dict[str, Row] = {
    "transformer_engine.pytorch.Linear": Row(
        "in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1, "
        "get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False, "
        "params_dtype=None, parallel_mode=None, parameters_split=None, device='cuda', ub_overlap_rs=False, "
        "ub_overlap_ag=False, ub_name=None",
        TE,
        f"{_PYTORCH}/module/linear.py",
    ),
    "transformer_engine.pytorch.Linear.forward": Row(
        "inp, is_first_microbatch=None, fp8_output=False", TE, f"{_PYTORCH}/module/linear.py"
    ),
    "transformer_engine.pytorch.LayerNormLinear": Row(
        "in_features, out_features, eps=1e-05, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, "
        "tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, normalization='LayerNorm', "
        "return_bias=False, params_dtype=None, parallel_mode=None, return_layernorm_output=False, "
        "return_layernorm_output_gathered=False, parameters_split=None, zero_centered_gamma=False, device='cuda', "
        "ub_bulk_wgrad=False, ub_bulk_dgrad=False, ub_overlap_ag=False, ub_overlap_rs_dgrad=False, ub_name=None",
        TE,
        f"{_PYTORCH}/module/layernorm_linear.py",
    ),
    "transformer_engine.pytorch.LayerNormLinear.forward": Row(
        "inp, is_first_microbatch=None, fp8_output=False", TE, f"{_PYTORCH}/module/layernorm_linear.py"
    ),
    "transformer_engine.pytorch.LayerNorm": Row(_NORM, TE, f"{_PYTORCH}/module/layernorm.py"),
    "transformer_engine.pytorch.RMSNorm": Row(_NORM, TE, f"{_PYTORCH}/module/rmsnorm.py"),
    "transformer_engine.pytorch.DotProductAttention": Row(
        "num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format='sbhd', "
        "attn_mask_type='causal', window_size=None, sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, "
        "tp_group=None, layer_number=None, attention_type='self', cp_group=None, cp_global_ranks=None, cp_stream=None, "
        "cp_comm_type='p2p', softmax_scale=None",
        TE,
        f"{_PYTORCH}/attention.py",
    ),
    "transformer_engine.pytorch.DotProductAttention.forward": Row(
        "query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None, "
        "cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None, "
        "window_size=None, checkpoint_core_attention=False, core_attention_bias_type='no_bias', core_attention_bias=None, "
        "alibi_slopes=None, fast_zero_fill=True, inference_params=None, is_first_microbatch=None",
        TE,
        f"{_PYTORCH}/attention.py",
    ),
    "transformer_engine.pytorch.optimizers.FusedAdam": Row(
        "params, lr=0.001, bias_correction=True, betas=(0.9, 0.999), eps=1e-08, adam_w_mode=True, weight_decay=0.0, "
        "amsgrad=False, set_grad_none=True, capturable=False, master_weights=False, master_weight_dtype=None, "
        "exp_avg_dtype=None, exp_avg_sq_dtype=None, use_decoupled_grad=False",
        TE,
        f"{_PYTORCH}/optimizers/fused_adam.py",
    ),
    "transformer_engine.pytorch.optimizers.multi_tensor_applier": Row(
        "op, noop_flag_buffer, tensor_lists, *args", TE, f"{_PYTORCH}/optimizers/multi_tensor_apply.py"
    ),
    "transformer_engine.pytorch.distributed.checkpoint": Row("function, *args, **kwargs", TE, f"{_PYTORCH}/distributed.py"),
    "apex.transformer.log_util.set_logging_level": Row("verbosity", APEX, "apex/transformer/log_util.py"),
    "apex.transformer.pipeline_parallel.schedules.common.listify_model": Row(
        "model", APEX, "apex/transformer/pipeline_parallel/utils.py"
    ),
    "apex.normalization.fused_layer_norm.FusedLayerNorm": Row(
        "normalized_shape, eps=1e-05, elementwise_affine=True, memory_efficient=False",
        APEX,
        "apex/normalization/fused_layer_norm.py",
    ),
    "apex.normalization.MixedFusedRMSNorm": Row(
        "normalized_shape, eps=1e-05, *, memory_efficient=False, **kwargs", APEX, "apex/normalization/fused_layer_norm.py"
    ),
}


def strict(name: str, function: Callable[..., Any], bound: bool = False) -> Callable[..., Any]:
    """``function`` behind a check of its arguments against the table. ``bound``: the first argument is self."""
    signature = SIGNATURES[name].signature

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args[int(bound) :], **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        return function(*args, **kwargs)

    return checked
