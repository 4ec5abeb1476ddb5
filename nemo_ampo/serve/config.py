"""How a checkpoint is served."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from nemo_ampo.errors import ConfigError
from nemo_ampo.model_folder.portable import note_for_transformers_5
from nemo_ampo.ranges import check_numbers, number, seconds


class ServeEngine(StrEnum):
    """Which server."""

    auto = "auto"
    """vllm, else trtllm, else embedded: the first one that is installed and can do what is asked."""
    vllm = "vllm"
    trtllm = "trtllm"
    embedded = "embedded"


PROGRAMS: Mapping[ServeEngine, str] = {ServeEngine.vllm: "vllm", ServeEngine.trtllm: "trtllm-serve"}
"""The command each foreign server is started with."""


@dataclass
class ServeConfig:
    """How local checkpoints are served.

    Attributes:
        engine: auto, vllm, trtllm or embedded.
        host: address to listen on.
        device: auto, cpu or gpu; of the embedded server.
        dtype: auto (as stored), float32, bfloat16 or float16; of the embedded server.
        max_batch: requests decoded together; of the embedded server.
        start_timeout_s: seconds until a server must answer; loading a large model takes minutes.
        extra_args: further words for the command line of vllm or trtllm-serve.
    """

    engine: ServeEngine = ServeEngine.auto
    host: str = "127.0.0.1"
    device: str = "auto"
    dtype: str = "auto"
    max_batch: int = number(32, least=1, most=65536)
    start_timeout_s: float = seconds(1200)
    extra_args: list[str] = field(default_factory=list)


def check_serve(config: ServeConfig) -> None:
    """Rules between keys.

    Raises:
        ConfigError: naming the key.
    """
    for key, allowed in (("device", ("auto", "cpu", "gpu")), ("dtype", ("auto", "float32", "bfloat16", "float16"))):
        if getattr(config, key) not in allowed:
            raise ConfigError(f"serve.{key}: expected one of {', '.join(allowed)}, got {getattr(config, key)!r}")
    check_numbers("serve", config)
    if not config.host.strip():
        raise ConfigError("serve.host: must not be empty; 0.0.0.0 listens on every address")


def choose_engine(config: ServeConfig, mode_dial: bool = False, checkpoints: Sequence[str | Path] = ()) -> ServeEngine:
    """The server to start.

    Args:
        config: what was asked for.
        mode_dial: the run biases the choice of the mode, which only the embedded server can do.
        checkpoints: to be served. vllm reads them with transformers 5.

    Raises:
        ConfigError: the one asked for is not installed or cannot do it.
    """
    misread = next(filter(None, (note_for_transformers_5(Path(folder)) for folder in checkpoints)), None)
    engine = config.engine
    if engine is ServeEngine.auto:
        installed = [] if mode_dial or misread else [engine for engine, program in PROGRAMS.items() if shutil.which(program)]
        engine = next(iter(installed), ServeEngine.embedded)
    if engine is ServeEngine.embedded and config.extra_args:
        raise ConfigError("serve.extra_args: the embedded server takes none")
    for key in ("device", "dtype", "max_batch"):
        if engine is not ServeEngine.embedded and getattr(config, key) != getattr(ServeConfig(), key):
            raise ConfigError(
                f"serve.{key}: is for the embedded server; give {PROGRAMS[engine]} its own option in serve.extra_args"
            )
    if mode_dial and engine is not ServeEngine.embedded:
        raise ConfigError(f"policy.mode_bias: serve.engine={engine.value} cannot bias the mode; take embedded")
    if misread and engine is ServeEngine.vllm:
        raise ConfigError(f"serve.engine: vllm reads text with transformers 5, take embedded; {misread}")
    program = PROGRAMS.get(engine)
    if program is not None and shutil.which(program) is None:
        raise ConfigError(f"serve.engine: {engine.value} needs the command {program}, which is not on the PATH")
    return engine
