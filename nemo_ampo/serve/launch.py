"""A checkpoint behind a server process of its own, for as long as it is needed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_ampo.errors import UserError
from nemo_ampo.files import no_model_folder
from nemo_ampo.serve.config import PROGRAMS, ServeConfig, ServeEngine, choose_engine
from nemo_ampo.serve.local import base_url_of, free_port, server_process

MODEL_NAME = "policy"
"""Name under which vllm and the embedded server offer a checkpoint."""


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        base_url: of its API.
        model: name to ask for.
        engine: which server it is.
    """

    base_url: str
    model: str
    engine: ServeEngine


@contextlib.contextmanager
def served(checkpoint: str | Path, config: ServeConfig, *, mode_dial: bool = False) -> Iterator[Served]:
    """Serve a Hugging Face folder until the block is left.

    Args:
        checkpoint: the folder.
        config: which server, and how.
        mode_dial: requests will bias the choice of the mode.

    Raises:
        ConfigError: the server asked for is not installed or cannot do it.
        UserError: it does not come up.
    """
    if not (Path(checkpoint) / "config.json").is_file():
        raise UserError(f"checkpoint: {no_model_folder(checkpoint)}")
    engine = choose_engine(config, mode_dial, [checkpoint])
    if engine is ServeEngine.embedded:
        command = embedded_command(checkpoint, config)
        with server_process(command, what="the embedded server", start_timeout_s=config.start_timeout_s) as url:
            yield Served(url, MODEL_NAME, engine)
        return
    port = free_port(config.host)
    url = base_url_of(config.host, port)
    command, model = foreign_command(engine, checkpoint, config, port)
    process = server_process(
        command,
        what=PROGRAMS[engine],
        start_timeout_s=config.start_timeout_s,
        base_url=url,
        environment=os.environ,
    )
    with process:
        yield Served(url, model, engine)


def embedded_command(checkpoint: str | Path, config: ServeConfig) -> list[str]:
    """Command line of the embedded server on a free port."""
    options = {"model-name": MODEL_NAME, "host": config.host, "device": config.device, "dtype": config.dtype}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "nemo_ampo.serve", str(checkpoint), *words, "--max-batch", str(config.max_batch)]


def foreign_command(engine: ServeEngine, checkpoint: str | Path, config: ServeConfig, port: int) -> tuple[list[str], str]:
    """Command line of another server, and the model name to ask it for."""
    address = ["--host", config.host, "--port", str(port)]
    if engine is ServeEngine.vllm:
        named = ["--served-model-name", MODEL_NAME]
        # Otherwise vllm fills in what a request leaves out from the checkpoint's generation_config.json, such as top_k and
        # repetition_penalty. Stop tokens are read from there in either case.
        neutral = ["--generation-config", "vllm"]
        return [PROGRAMS[engine], "serve", str(checkpoint), *address, *named, *neutral, *config.extra_args], MODEL_NAME
    # trtllm-serve names the model after its folder, and reads no sampling defaults from it.
    return [PROGRAMS[engine], str(checkpoint), *address, *config.extra_args], Path(checkpoint).resolve().name
