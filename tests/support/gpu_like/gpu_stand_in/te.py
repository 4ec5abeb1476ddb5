"""Transformer Engine's modules in torch arithmetic: what they compute, keep, save and refuse."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from gpu_stand_in.machine import is_used


class TransformerEngineBaseModule(torch.nn.Module):
    """Keeps an extra state, which a checkpoint then holds; without fp8 it is a serialised None."""

    def get_extra_state(self) -> io.BytesIO:
        state = io.BytesIO()
        torch.save(None, state)
        return state

    def set_extra_state(self, state: Any) -> None:
        if state is None:
            return
        if not isinstance(state, io.BytesIO | torch.Tensor):
            raise RuntimeError("Unsupported checkpoint format.")

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def _needs_cuda(self) -> None:
        assert is_used(), "TransformerEngine needs CUDA."


def _parameter(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype or torch.get_default_dtype(), device=device))


def _marked(parameter: torch.nn.Parameter, dim: int) -> torch.nn.Parameter:
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    return parameter


class _Norm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.sequence_parallel = bool(sequence_parallel)
        shape = (int(hidden_size or normalized_shape),)
        self.weight = _parameter(shape, params_dtype, kwargs.get("device", "cuda"))
        torch.nn.init.ones_(self.weight)
        self.weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(_Norm):
    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        TransformerEngineBaseModule._needs_cuda(self)  # type: ignore[arg-type]
        return _rms(inp, self.weight, self.eps)


class LayerNorm(_Norm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        TransformerEngineBaseModule._needs_cuda(self)  # type: ignore[arg-type]
        return torch.nn.functional.layer_norm(inp, self.weight.shape, self.weight, self.bias, self.eps)


def _rms(inp: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = inp.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(inp.dtype)


class _Parallel(TransformerEngineBaseModule):
    """Weights of a linear layer split over the tensor-parallel group."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        tp_size: int,
        get_rng_state_tracker: Callable[[], Any] | None,
        init_method: Callable[[torch.Tensor], Any] | None,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype | None,
        parallel_mode: str | None,
        device: Any,
    ) -> None:
        super().__init__()
        split = {"column": (out_features // tp_size, in_features), "row": (out_features, in_features // tp_size)}
        shape = split.get(parallel_mode or "", (out_features, in_features))
        self.tp_size, self.parallel_mode, self.return_bias = tp_size, parallel_mode, return_bias
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.weight = _parameter(shape, params_dtype, device)
        if parallel_mode is not None:
            _marked(self.weight, 1 if parallel_mode == "row" else 0)
        if init_method is not None:
            if get_rng_state_tracker is not None:
                with get_rng_state_tracker().fork():
                    init_method(self.weight)
            else:
                init_method(self.weight)
        self.use_bias = bias
        if bias:
            self.bias = _parameter(shape[:1], params_dtype, device)
            torch.nn.init.zeros_(self.bias)
            if parallel_mode == "column":
                _marked(self.bias, 0)
            elif parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def _multiply(self, inp: torch.Tensor) -> Any:
        from megatron.core.tensor_parallel import mappings

        self._needs_cuda()
        if self.parallel_mode == "column":
            whole = mappings.gather_from_sequence_parallel_region if self.sequence_parallel else None
            inp = whole(inp) if whole else mappings.copy_to_tensor_model_parallel_region(inp)
        out = torch.nn.functional.linear(inp, self.weight)
        if self.parallel_mode == "row":
            shared = mappings.reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
            out = shared(out) if shared else mappings.reduce_from_tensor_model_parallel_region(out)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class Linear(_Parallel):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        **overlap: Any,
    ) -> None:
        super().__init__(
            *(in_features, out_features, sequence_parallel, tp_size, get_rng_state_tracker, init_method, bias, return_bias),
            *(params_dtype, parallel_mode, device),
        )

    def forward(self, inp: torch.Tensor, is_first_microbatch: Any = None, fp8_output: Any = False) -> Any:
        return self._multiply(inp)


class LayerNormLinear(_Parallel):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        **overlap: Any,
    ) -> None:
        super().__init__(
            *(in_features, out_features, sequence_parallel, tp_size, get_rng_state_tracker, init_method, bias, return_bias),
            *(params_dtype, parallel_mode, device),
        )
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = _parameter((in_features,), params_dtype, device)
        torch.nn.init.ones_(self.layer_norm_weight)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros_like(self.layer_norm_weight))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor, is_first_microbatch: Any = None, fp8_output: Any = False) -> Any:
        weight = self.layer_norm_weight
        if self.normalization == "RMSNorm":
            normed = _rms(inp, weight, self.eps)
        else:
            normed = torch.nn.functional.layer_norm(inp, weight.shape, weight, self.layer_norm_bias, self.eps)
        return self._multiply(normed)


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention, which never looks at the mask it is given; ``sbhd`` in, [S, B, heads * head dim] out."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        **others: Any,
    ) -> None:
        super().__init__()
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        attn_mask_type: str | None = None,
        **others: Any,
    ) -> torch.Tensor:
        self._needs_cuda()
        causal = (attn_mask_type or self.attn_mask_type) in ("causal", "padding_causal")
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query_layer, key_layer, value_layer))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(*query_layer.shape[:2], -1)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with ``exp_avg`` and ``exp_avg_sq`` per parameter and ``step`` per group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                    state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step)
                )
        return None


class FusedSGD(torch.optim.SGD):
    """Imported, never built."""


def multi_tensor_applier(op: Any, noop_flag_buffer: torch.Tensor, tensor_lists: list[Any], *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk: int, noop: torch.Tensor, lists: list[Any], per_tensor: bool = False, *rest: Any) -> Any:
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(1)


def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: list[Any], scale: Any) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
        if not bool(target.isfinite().all()):
            noop.fill_(1)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    return torch_checkpoint(function, *args, use_reentrant=False)


class CudaRNGStatesTracker:
    """Megatron has its own; only a subclass is defined."""

    def reset(self) -> None:
        self.states_: dict[str, Any] = {}


class SplitAlongDim(torch.autograd.Function):
    """torch.split whose gradient is one concatenation."""

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, split_dim: int, sizes: Any, squeeze: bool = False) -> Any:
        ctx.split_dim = split_dim
        return torch.split(mixed, sizes, dim=split_dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.cat(grads, ctx.split_dim), None, None, None


class FusedRoPEFunc(torch.autograd.Function):
    """``apply_rope_fusion`` is off in every recipe."""


class DelayedScaling:
    """fp8 is not used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class Float8Tensor(torch.Tensor):
    """No tensor is one."""
