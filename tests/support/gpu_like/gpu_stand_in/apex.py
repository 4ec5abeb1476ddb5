"""Apex's names in torch arithmetic."""

from __future__ import annotations

import enum
from typing import Any

import torch


class FusedLayerNorm(torch.nn.LayerNorm):
    """There is no RMS norm behind this name, as in Apex."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)


class FastLayerNorm(FusedLayerNorm):
    """The persistent kernel's module."""


class MixedFusedLayerNorm(FusedLayerNorm):
    """Of mixed types."""


class MixedFusedRMSNorm(torch.nn.RMSNorm):
    """Apex's own RMS norm, which Megatron-core does not use."""

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps)


class FusedLayerNormAffineFunction(torch.autograd.Function):
    """A CUDA kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: Any,
        bias: Any,
        normalized_shape: Any,
        eps: float,
        memory_efficient: bool = False,
    ) -> Any:
        raise RuntimeError("fused_layer_norm_cuda: expected all tensors to be on CUDA")


class FastLayerNormFN(FusedLayerNormAffineFunction):
    """The persistent kernel."""


class ModelType(enum.Enum):
    encoder_or_decoder = 1
    encoder_and_decoder = 2


class AttnMaskType(enum.Enum):
    padding = 1
    causal = 2


class AttnType(enum.Enum):
    self_attn = 1
    cross_attn = 2


class DistributedFusedAdam(torch.optim.Optimizer):
    """Built by nobody: every recipe uses Megatron's distributed optimizer."""

    class ParameterFragment: ...

    class StateBucket: ...

    class GradientBucket: ...

    class ParameterBucket: ...


def set_logging_level(verbosity: Any) -> None: ...


def listify_model(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def set_defaults_if_not_set(tensor: torch.Tensor) -> None:
    for name, value in (("tensor_model_parallel", False), ("partition_dim", -1), ("partition_stride", 1)):
        if not hasattr(tensor, name):
            setattr(tensor, name, value)


def divide(numerator: int, denominator: int) -> int:
    assert numerator % denominator == 0
    return numerator // denominator


def unused(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("this stand-in for Apex does not have it: no recipe is known to call it")
