"""What a GPU has and a CPU has not, as far as shapes and memory go: Transformer Engine's kernels and a fused Adam. [nemo]

Nothing here computes. Each class has the results of the kernel it stands for, keeps what that keeps for its backward pass,
and takes the workspace that it takes. Everything around them is Megatron's own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_ampo.compat.adam import FusedAdamLayout


class _NormKernel(torch.autograd.Function):
    """Keeps its input and one fp32 number per position."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class GpuNorm(torch.nn.Module):
    """RMSNorm whose weight knows that its gradient is a part of the sum over the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        result: torch.Tensor = _NormKernel.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


class _FlashKernel(torch.autograd.Function):
    """Flash attention: keeps queries, keys, values, its result and one fp32 number per head and position."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens, rows, heads, _ = q.shape
        out = q.new_empty(tokens, rows, heads, v.size(-1))
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        q, k, v, _, _ = ctx.saved_tensors
        summed = torch.empty_like(q, dtype=torch.float32)  # of the queries' gradient
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del summed
        return grads


class GpuAttention(DotProductAttention):
    """Scores are never stored."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *unused: Any, **also: Any
    ) -> torch.Tensor:
        """[T, B, heads, channels] each, fewer heads of keys and values, to [T, B, heads x channels]."""
        for name, other in (("keys", key), ("values", value)):
            if query.size(2) % other.size(2) or query.size(-1) != key.size(-1) or other.shape[1] != query.shape[1]:
                raise ValueError(f"attention: queries {tuple(query.shape)} do not fit {name} {tuple(other.shape)}")
            if other.dtype != query.dtype:
                raise ValueError(f"attention: queries of {query.dtype}, {name} of {other.dtype}")
        out: torch.Tensor = _FlashKernel.apply(query, key, value)  # type: ignore[no-untyped-call]
        return out.reshape(*out.shape[:2], -1)


class GpuAdam(FusedAdamLayout):
    """Its states and nothing beside them."""

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            if p.grad is None or p.grad.shape != p.shape or p.grad.device != p.device:
                raise ValueError(f"optimizer: a parameter {tuple(p.shape)} and a gradient that does not fit it")
            self.allocate(p)
            p.add_(p.grad)


def _norm_of_all(flag: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
    return flag.new_empty(1, dtype=torch.float32), None


def _scale_all(flag: torch.Tensor, lists: list[list[torch.Tensor]], scale: float) -> None:
    sources, targets = lists
    if [s.shape for s in sources] != [t.shape for t in targets]:
        raise ValueError("optimizer: tensors to be scaled and their targets differ in shape")


def install() -> None:
    """Put all of it where NeMo and Megatron look, both imported."""
    import megatron.core.optimizer as optimizer
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as gpt
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision
    from megatron.core.transformer import transformer_block

    gpt.get_specs = lambda *args, **kwargs: gpu_layer_spec()
    transformer_block.LayerNormImpl = GpuNorm
    optimizer.Adam = distrib_optimizer.Adam = GpuAdam
    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = lambda kernel, flag, lists, *args: kernel(flag, lists, *args)
        module.multi_tensor_scale_impl = _scale_all
    clip_grads.l2_norm_impl = _norm_of_all


def gpu_layer_spec() -> ModuleSpec:
    """Megatron's layer with the classes above where it would have Transformer Engine's."""
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = GpuNorm
    spec.submodules.self_attention.submodules.core_attention = GpuAttention
    return spec
