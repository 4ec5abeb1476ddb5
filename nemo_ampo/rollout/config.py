"""The ``rollout`` section: which engine draws responses, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from nemo_ampo.chat.config import is_http
from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import number, seconds


class EngineName(StrEnum):
    """Values of ``rollout.engine``; docs/engines.md compares them."""

    megatron = "megatron"
    trtllm = "trtllm"
    trtllm_server = "trtllm_server"


@dataclass
class ProbeConfig:
    """Greedy comparison of an engine's own copy of the weights with the trainer, after every sync.

    Attributes:
        prompts: of the data, the same ones every time.
        new_tokens: drawn for each.
        max_gap: largest mean |log-probability of engine - of trainer| on them; above it the run stops.
    """

    prompts: int = number(2, least=1)
    new_tokens: int = number(16, least=1)
    max_gap: float = number(0.1, least=0, above=True)


@dataclass
class TrtLlmConfig:
    """``rollout.engine=trtllm``: TensorRT-LLM 0.17 inside the training processes.

    Attributes:
        engine_dir: where the built engine is written; null takes a folder of its own in ``TMPDIR``, gone with the process.
        unload_during_training: free the engine's memory while the trainer works, at the price of loading it every step.
        max_num_tokens: prompt tokens of one batch together: what the engine reserves memory for. A batch of more is split.
    """

    engine_dir: str | None = None
    unload_during_training: bool = True
    max_num_tokens: int = number(16384, least=1)


@dataclass
class TrtLlmServerConfig:
    """``rollout.engine=trtllm_server``: TensorRT-LLM 1.2 or later in a container of its own.

    Attributes:
        url: of the server, or of several separated by commas, one or more per data-parallel rank.
        weights_dir: folder both containers see, where each weight version is published; null takes ``rollout_weights`` in
            the run folder.
        keep_versions: published versions kept on disk.
        timeout_s: for one call that draws responses.
        load_timeout_s: for one call that loads weights.
    """

    url: str = ""
    weights_dir: str | None = None
    keep_versions: int = number(2, least=1)
    timeout_s: float = seconds(1800)
    load_timeout_s: float = seconds(600)


@dataclass
class RolloutConfig:
    """How responses are drawn.

    Attributes:
        engine: ``megatron``, ``trtllm`` or ``trtllm_server``; docs/engines.md compares them.
        prompts_per_step: distinct prompts of one step, whole job.
        group_size: responses per prompt (G).
        max_prompt_tokens: a longer prompt stops the run at start-up, tokens.
        max_new_tokens: a response is cut here, tokens.
        temperature: of the sampling distribution; log-probabilities are taken under the same temperature only at 1.0.
        top_p: draw from the smallest set of most likely tokens with this probability; 1 keeps all.
        top_k: draw from that many most likely tokens; 0 keeps all.
        allow_unreproducible_sampling: let the two above cut tokens off, which the trainer's probabilities know nothing of.
        batch_size: responses decoded at once on one replica.
        probe: of engines that hold their own copy of the weights.
        trtllm, trtllm_server: keys of these engines alone.
    """

    engine: str = "megatron"
    prompts_per_step: int = number(16, least=1)
    group_size: int = number(16, least=1)
    max_prompt_tokens: int = number(6144, least=1)
    max_new_tokens: int = number(2048, least=1)
    temperature: float = number(1.0, least=0, most=100, above=True)
    top_p: float = number(1.0, least=0, most=1, above=True)
    top_k: int = number(0, least=0)
    allow_unreproducible_sampling: bool = False
    batch_size: int = number(128, least=1)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    trtllm: TrtLlmConfig = field(default_factory=TrtLlmConfig)
    trtllm_server: TrtLlmServerConfig = field(default_factory=TrtLlmServerConfig)


def check_rollout(rollout: RolloutConfig) -> None:
    """Rules between the keys of the ``rollout`` section that need no engine.

    Raises:
        ConfigError: naming the key.
    """
    if rollout.engine not in tuple(EngineName):
        raise ConfigError(f"rollout.engine: expected one of {', '.join(EngineName)}, got {rollout.engine!r}")
    if rollout.engine != "megatron" and rollout.temperature != 1:
        raise ConfigError(
            f"rollout.temperature: {rollout.engine} knows the policy's log-probabilities only at temperature 1, got "
            f"{rollout.temperature}"
        )
    budget = rollout.trtllm.max_num_tokens
    if rollout.engine == "trtllm" and budget < rollout.max_prompt_tokens:
        raise ConfigError(
            f"rollout.trtllm.max_num_tokens: {budget} is less than one prompt of rollout.max_prompt_tokens="
            f"{rollout.max_prompt_tokens}"
        )
    server = rollout.trtllm_server
    if rollout.engine == "trtllm_server" and not server.url:
        raise ConfigError("rollout.trtllm_server.url: a value is required with rollout.engine=trtllm_server")
    urls = [url.strip() for url in server.url.split(",") if url.strip()]
    if server.url and not (urls and all(map(is_http, urls))):
        raise ConfigError("rollout.trtllm_server.url: must be URLs like http://host:8000, separated by commas")
    _check_filters(rollout)


def _check_filters(rollout: RolloutConfig) -> None:
    """Filters draw from another distribution than the one that is trained; the loss cannot tell."""
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        value = getattr(rollout, key)
        if value != off and not rollout.allow_unreproducible_sampling:
            raise ConfigError(
                f"rollout.{key}: {value} draws from a cut-off distribution that the trainer's log-probabilities do not "
                "reproduce, so the policy gradient would be biased; leave it at "
                f"{off:g}, or set rollout.allow_unreproducible_sampling=true"
            )
