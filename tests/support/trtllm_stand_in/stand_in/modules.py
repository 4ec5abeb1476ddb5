"""Which name lives in which module, and putting them all into ``sys.modules``."""

from __future__ import annotations

import importlib.machinery
import inspect
import os
import sys
import types
from typing import Any

from stand_in import parts
from stand_in.signatures import SIGNATURES, strict

_NONE = type("Unused", (), {})
"""For names that upstream imports and our path never calls."""

TENSORRT_LLM: dict[str, dict[str, Any]] = {
    "": {"__version__": "0.17.0", "mpi_rank": 0, "mpi_world_size": 0, "mpi_barrier": 0, "Mapping": 0},
    "_utils": dict.fromkeys(
        ("mpi_comm", "str_dtype_to_torch", "torch_dtype_to_trt", "pad_vocab_size", "numpy_to_torch", "torch_to_numpy"), 0
    ),
    "_common": {"check_max_num_tokens": 0},
    "functional": {"non_gated_version": 0},
    "layers": {"MoeConfig": 0},
    "models": {"LLaMAForCausalLM": 0, "PretrainedConfig": 0, "GemmaConfig": _NONE},
    "models.modeling_utils": {"PretrainedConfig": 0, "optimize_model": 0, "preprocess_weights": 0},
    "models.llama": {},
    "models.llama.config": {"LLaMAConfig": 0},
    "models.gpt": {},
    "models.gpt.config": {"GPTConfig": _NONE},
    "models.falcon": {},
    "models.falcon.config": {"FalconConfig": _NONE},
    "builder": {"BuildConfig": 0, "Engine": 0},
    "commands": {},
    "commands.build": {"build": 0},
    "logger": {"logger": types.SimpleNamespace(set_level=strict("tensorrt_llm.logger.logger.set_level", str))},
    "lora_manager": {"LoraConfig": _NONE, "LoraManager": _NONE},
    "plugin": {"PluginConfig": 0},
    "quantization": {"QuantMode": _NONE},
    "bindings": {"GptJsonConfig": 0, "MpiComm": 0},
    "runtime": {"SamplingConfig": 0, "ModelRunner": 0, "ModelRunnerCpp": _NONE, "ModelConfig": _NONE},
    "runtime.generation": {"DISABLE_TORCH_DEVICE_SET": bool(os.environ.get("DISABLE_TORCH_DEVICE_SET"))},
}
"""0 stands for the name of the same spelling in :mod:`stand_in.parts`."""


def install(package: str, table: dict[str, dict[str, Any]]) -> None:
    """Fill the package, already in ``sys.modules``, and register its submodules."""
    for name, members in table.items():
        dotted = f"{package}.{name}" if name else package
        module = sys.modules.get(dotted) or types.ModuleType(dotted)
        module.__path__ = getattr(module, "__path__", [])
        # torch's compiler asks every loaded module for its spec.
        module.__spec__ = module.__spec__ or importlib.machinery.ModuleSpec(dotted, None, is_package=True)
        sys.modules[dotted] = module
        for member, value in members.items():
            setattr(module, member, _guarded(f"{dotted}.{member}", getattr(parts, member)) if value == 0 else value)
        if name:
            parent, _, leaf = dotted.rpartition(".")
            setattr(sys.modules[parent], leaf, module)


def _guarded(dotted: str, value: Any) -> Any:
    """Functions and methods named in the signature table check their arguments."""
    if inspect.isclass(value):
        for key in [k for k in SIGNATURES if k.startswith(f"{dotted}.") and k.count(".") == dotted.count(".") + 1]:
            _guard_method(value, key)
        if dotted in SIGNATURES and not hasattr(value, "_guarded_init"):
            value.__init__ = strict(dotted, value.__init__, bound=True)
            value._guarded_init = True
        return value
    return strict(dotted, value) if dotted in SIGNATURES else value


def _guard_method(owner: type, key: str) -> None:
    name = key.rsplit(".", 1)[1]
    raw = inspect.getattr_static(owner, name)
    if isinstance(raw, staticmethod):
        setattr(owner, name, staticmethod(strict(key, raw.__func__)))
    elif isinstance(raw, classmethod):
        setattr(owner, name, classmethod(strict(key, raw.__func__, bound=True)))
    else:
        setattr(owner, name, strict(key, raw, bound=True))
