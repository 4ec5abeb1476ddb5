"""Which name lives in which module, and putting them all into ``sys.modules``."""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
import types
from typing import Any

from gpu_stand_in import apex, te
from gpu_stand_in.signatures import SIGNATURES, strict


def _named(*names: str) -> dict[str, Any]:
    return {name: getattr(te, name) for name in names}


TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "": {"__version__": "1.13.0"},
    "common": {},
    "common.recipe": _named("DelayedScaling"),
    "pytorch": _named("Linear", "LayerNormLinear", "LayerNorm", "RMSNorm", "DotProductAttention")
    | {"GroupedLinear": te.Linear, "TransformerLayer": te.torch.nn.Module, "fp8_autocast": apex.unused},
    "pytorch.module": {},
    "pytorch.module.base": _named("TransformerEngineBaseModule"),
    "pytorch.distributed": _named("CudaRNGStatesTracker", "checkpoint"),
    "pytorch.attention": _named("FusedRoPEFunc") | {"_SplitAlongDim": te.SplitAlongDim},
    "pytorch.optimizers": _named(
        "FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"
    ),
    "pytorch.float8_tensor": _named("Float8Tensor"),
    "pytorch.cpp_extensions": {"cast_to_fp8": apex.unused},
}
APEX: dict[str, dict[str, Any]] = {
    "": {},
    "_autocast_utils": {"_cast_if_autocast_enabled": lambda *args: args},
    "contrib": {},
    "contrib.layer_norm": {},
    "contrib.layer_norm.layer_norm": {
        "FastLayerNormFN": apex.FastLayerNormFN,
        "FastLayerNorm": apex.FastLayerNorm,
        "_fast_layer_norm": apex.unused,
    },
    "contrib.optimizers": {},
    "contrib.optimizers.distributed_fused_adam": {
        "DistributedFusedAdam": apex.DistributedFusedAdam,
        "_disable_pre_forward_hook": apex.unused,
        "_multi_tensor_copy": apex.unused,
    },
    "multi_tensor_apply": {"multi_tensor_applier": te.multi_tensor_applier},
    "normalization": {"MixedFusedRMSNorm": apex.MixedFusedRMSNorm, "FusedLayerNorm": apex.FusedLayerNorm},
    "normalization.fused_layer_norm": {
        "FusedLayerNorm": apex.FusedLayerNorm,
        "FusedLayerNormAffineFunction": apex.FusedLayerNormAffineFunction,
        "MixedFusedLayerNorm": apex.MixedFusedLayerNorm,
    },
    "optimizers": {"FusedAdam": te.FusedAdam, "FusedSGD": te.FusedSGD, "FusedLAMB": te.FusedSGD},
    "transformer": {},
    "transformer.enums": {name: getattr(apex, name) for name in ("AttnMaskType", "AttnType", "ModelType")},
    "transformer.functional": {"fused_apply_rotary_pos_emb": apex.unused, "fused_apply_rotary_pos_emb_thd": apex.unused},
    "transformer.functional.fused_softmax": {"FusedScaleMaskSoftmax": te.torch.nn.Module},
    "transformer.layers": {},
    "transformer.layers.layer_norm": {
        "FastLayerNorm": apex.FastLayerNorm,
        "MixedFusedLayerNorm": apex.MixedFusedLayerNorm,
    },
    "transformer.log_util": {"set_logging_level": apex.set_logging_level},
    "transformer.parallel_state": {},
    "transformer.pipeline_parallel": {},
    "transformer.pipeline_parallel.schedules": {},
    "transformer.pipeline_parallel.schedules.common": {"listify_model": apex.listify_model},
    "transformer.tensor_parallel": {},
    "transformer.tensor_parallel.layers": {
        "set_defaults_if_not_set_tensor_model_parallel_attributes": apex.set_defaults_if_not_set,
        "set_tensor_model_parallel_attributes": apex.unused,
    },
    "transformer.utils": {"divide": apex.divide},
}
AMP_C: dict[str, dict[str, Any]] = {"": _named("multi_tensor_l2norm", "multi_tensor_scale")}


def install(package: str, table: dict[str, dict[str, Any]]) -> None:
    """Fill the package, already in ``sys.modules``, and register its submodules."""
    for name, members in table.items():
        dotted = f"{package}.{name}" if name else package
        module = sys.modules.get(dotted) or types.ModuleType(dotted)
        module.__path__ = getattr(module, "__path__", [])
        module.__spec__ = module.__spec__ or importlib.machinery.ModuleSpec(dotted, None, is_package=True)
        sys.modules[dotted] = module
        for member, value in members.items():
            setattr(module, member, _guarded(f"{dotted}.{member}", value))
        if name:
            parent, _, leaf = dotted.rpartition(".")
            setattr(sys.modules[parent], leaf, module)


def _guarded(dotted: str, value: Any) -> Any:
    """What the signature table names checks its arguments."""
    if not inspect.isclass(value):
        return strict(dotted, value) if dotted in SIGNATURES else value
    for key, method in ((dotted, "__init__"), (f"{dotted}.forward", "forward")):
        if key in SIGNATURES and not hasattr(vars(value).get(method), "__wrapped__"):
            setattr(value, method, strict(key, getattr(value, method), bound=True))
    return value
