"""Rollout engines: one Protocol (:mod:`nemo_ampo.rollout.engine`), one file per engine, one table of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_ampo.errors import ConfigError
from nemo_ampo.rollout.engine import Engine


def _megatron(model: Any, batch_size: int) -> Engine:
    from nemo_ampo.rollout.megatron import MegatronEngine

    return MegatronEngine(model, batch_size)


def _trtllm(model: Any, batch_size: int) -> Engine:
    raise ConfigError(
        "rollout.engine: trtllm is not available in this version; set rollout.engine=megatron (TensorRT-LLM engines "
        "are the next milestone)"
    )


ENGINES: dict[str, Callable[[Any, int], Engine]] = {"megatron": _megatron, "trtllm": _trtllm}


def check_engine_name(name: str) -> None:
    """Refuse an unknown or unavailable engine before any model loads.

    Raises:
        ConfigError: naming the key.
    """
    if name not in ENGINES:
        raise ConfigError(f"rollout.engine: expected one of {sorted(ENGINES)}, got {name!r}")
    if name == "trtllm":
        _trtllm(None, 0)
