"""What a stage will need before it is started: memory per GPU, disk, tokens, judge calls, time. Loads no model.

Sizes of weights, gradients, optimizer states and checkpoints are counted, tensor by tensor, and hold within a few percent
(``tests`` compare them with real runs). Activations, the engine and every second are estimates from the assumptions that
:class:`Assumptions` and :class:`Hardware` state; docs/checkpoints.md has the formulas. Legend: N parameters, t tensor-,
p pipeline-, d data-parallel size, h hidden size, f MLP width, a query heads and g key/value heads of c channels, V rows of
the vocabulary, L layers, b sequences of a micro-batch, s tokens of the longest sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.megatron import STRETCH_ELEMENTS
from nemo_ampo.model_folder.facts import facts_of, read_object

GB = 1e9
FP32, BF16 = 4, 2
ADAM_BYTES = 8
"""Two fp32 moments per parameter."""
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide everything here.

    Attributes:
        layers, hidden, ffn: depth, width, MLP width.
        heads, groups, channels: query heads, key/value heads, size of a head.
        vocab: rows of the embedding, padding included.
        tied: the output layer is the embedding.
        qkv_bias: the attention's first matrix has a bias.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    channels: int
    vocab: int
    tied: bool
    qkv_bias: bool

    @property
    def parameters(self) -> int:
        """N, whole model."""
        return self.parameters_on(stage=0, tensor=1, pipeline=1)

    def parameters_on(self, stage: int, tensor: int, pipeline: int) -> int:
        """Parameters held by one rank.

        Per layer: c(a + 2g)h [+ c(a + 2g) bias] + cah + 3hf, divided by t, plus two norms of h. The first stage adds the
        embedding Vh/t, the last the output layer Vh/t (of a tied one, a copy if p > 1) and the final norm.

        Args:
            stage: pipeline stage, 0-based.
            tensor, pipeline: parallel sizes.
        """
        rows = self.channels * (self.heads + 2 * self.groups)
        split = rows * self.hidden + self.channels * self.heads * self.hidden + 3 * self.hidden * self.ffn
        split += rows if self.qkv_bias else 0
        count = self.layers // pipeline * (split // tensor + 2 * self.hidden)
        table = self.vocab * self.hidden // tensor
        first, last = stage == 0, stage == pipeline - 1
        count += table if first else 0
        count += self.hidden if last else 0
        needs_output = last and not (self.tied and first)
        return count + (table if needs_output else 0)


SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(2, 96, 288, 4, 2, 24, 768, True, True),
    "smollm2_135m": ModelShape(30, 576, 1536, 9, 3, 64, 49152, True, False),
    "qwen2.5_7b": ModelShape(28, 3584, 18944, 28, 4, 128, 152064, False, True),
    "llama3.1_8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False, False),
}
"""Models of the shipped configs, by config name."""


@dataclass(frozen=True)
class Hardware:
    """One device: memory in bytes, dense bf16 FLOP/s, memory bytes/s (vendor's data sheets)."""

    memory: float
    flops: float
    bandwidth: float


HARDWARE: dict[str, Hardware] = {
    "h100": Hardware(80e9, 989e12, 3.35e12),
    "h200": Hardware(141e9, 989e12, 4.8e12),
    "a100": Hardware(80e9, 312e12, 2.0e12),
}


@dataclass(frozen=True)
class Assumptions:
    """What the time of a step is guessed from; each pair is (slow, fast).

    Attributes:
        mean_new_share: mean response as a share of ``max_new_tokens``.
        matmul_efficiency: share of the peak FLOP/s in training and log-probability passes.
        decode_efficiency: share of the peak memory bandwidth while decoding.
        judge_latency_s: one judge call, seconds.
        disk_bytes_per_s: writing a checkpoint, whole job.
    """

    mean_new_share: float = 0.25
    matmul_efficiency: tuple[float, float] = (0.25, 0.45)
    decode_efficiency: tuple[float, float] = (0.3, 0.6)
    judge_latency_s: tuple[float, float] = (5.0, 1.0)
    disk_bytes_per_s: tuple[float, float] = (0.5e9, 3e9)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU; ``engine_stays`` says that the engine keeps its memory while the trainer works."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    engine: float
    engine_stays: bool = False

    @property
    def total(self) -> float:
        """Largest at one time; fragmentation comes on top."""
        both = self.activations + self.engine if self.engine_stays else max(self.activations, self.engine)
        return self.weights + self.gradients + self.optimizer + both


@dataclass(frozen=True)
class Work:
    """One training step of the whole job. Calls are upper bounds: a malformed reply is not judged."""

    samples: int
    prompt_tokens: int
    new_tokens: int
    judge_calls: int


@dataclass(frozen=True)
class Plan:
    """Everything :func:`make_plan` works out; seconds are (slow, fast)."""

    stage: str
    shape: ModelShape
    gpu: str
    ranks: int
    tensor: int
    pipeline: int
    data: int
    memory: Memory
    checkpoint_bytes: float
    weights_only_bytes: float
    disk_bytes: float
    work: Work
    seconds: dict[str, tuple[float, float]]
    steps: int

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Slow and fast end; judging overlaps with the rollout, so the longer of the two counts."""
        slow, fast = (max(self.seconds["rollout"][i], self.seconds["judge"][i]) for i in (0, 1))
        rest = [name for name in self.seconds if name not in ("rollout", "judge", "checkpoint")]
        return slow + sum(self.seconds[n][0] for n in rest), fast + sum(self.seconds[n][1] for n in rest)


def shape_of(source: Path | None, config_name: str) -> ModelShape:
    """Shape of a model from its files, or of the model a shipped config is for.

    Args:
        source: a Hugging Face folder, its ``config.json``, or a ``.nemo`` file, unpacked or not.
        config_name: used without a source.

    Raises:
        UserError: nothing there to read, or no shipped shape of that name.
    """
    if source is None:
        if config_name not in SHAPES:
            raise UserError(f"--model: needed for --config-name {config_name}; known without it: {', '.join(SHAPES)}")
        return SHAPES[config_name]
    if source.suffix == ".nemo" or (source / "model_config.yaml").is_file():
        from nemo_ampo.checkpoint.nemo_file import read_model_config

        return _of_nemo(read_model_config(source))
    path = source / "config.json" if source.is_dir() else source
    try:
        facts = facts_of(read_object(path), str(path))
    except UserError as error:
        raise UserError(f"--model {error}") from None
    return ModelShape(
        layers=facts.num_layers,
        hidden=facts.hidden,
        ffn=facts.ffn,
        heads=facts.num_heads,
        groups=facts.num_groups,
        channels=facts.head_dim,
        vocab=-(-facts.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        tied=facts.tied,
        qkv_bias=facts.qkv_bias,
    )


def _of_nemo(config: Mapping[str, Any]) -> ModelShape:
    return ModelShape(
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        ffn=config["ffn_hidden_size"],
        heads=config["num_attention_heads"],
        groups=config["num_query_groups"],
        channels=config["kv_channels"],
        vocab=config["override_vocab_size"],
        tied=config["share_embeddings_and_output_weights"],
        qkv_bias=config["qkv_bias"],
    )


def make_plan(
    stage: str,
    cfg: DictConfig,
    shape: ModelShape,
    ranks: int,
    gpu: str = "h100",
    assume: Assumptions = Assumptions(),
) -> Plan:
    """Work out what a stage needs.

    Args:
        stage: ``bc`` or ``ampo``.
        cfg: composed config; keys about places may be missing.
        shape: of the model.
        ranks: GPUs of the job.
        gpu: a name of :data:`HARDWARE`.
        assume: for the estimates.

    Raises:
        ConfigError: the layout does not fit the ranks or the model.
    """
    if gpu not in HARDWARE:
        raise ConfigError(f"--gpu: expected one of {', '.join(HARDWARE)}, got {gpu!r}")
    from nemo_ampo.config.stages import check_parallel_layout

    model = cfg.model
    tensor, pipeline = int(model.tensor_model_parallel_size), int(model.pipeline_model_parallel_size)
    check_parallel_layout(
        {
            "num_attention_heads": shape.heads,
            "num_query_groups": shape.groups,
            "ffn_hidden_size": shape.ffn,
            "num_layers": shape.layers,
        },
        tensor,
        pipeline,
    )
    if ranks % (tensor * pipeline):
        raise ConfigError(
            f"model.tensor_model_parallel_size x model.pipeline_model_parallel_size = {tensor * pipeline} does not divide "
            f"the {ranks} ranks"
        )
    data = ranks // (tensor * pipeline)
    work = work_of_step(stage, cfg, assume)
    parameters = max(shape.parameters_on(stage_, tensor, pipeline) for stage_ in range(pipeline))
    weights, gradients, optimizer = state_bytes(parameters, bool(model.megatron_amp_O2), data)
    full, weights_only = checkpoint_bytes(shape, bool(model.megatron_amp_O2))
    memory = Memory(
        *(weights, gradients, optimizer, activation_bytes(cfg, shape, stage, tensor), engine_bytes(stage, cfg, shape)),
        engine_stays=stage == "ampo" and cfg.rollout.engine == "trtllm" and not cfg.rollout.trtllm.unload_during_training,
    )
    seconds = _seconds(stage, cfg, shape, work, HARDWARE[gpu], ranks, tensor, data, assume)
    slow, fast = assume.disk_bytes_per_s
    return Plan(
        stage=stage,
        shape=shape,
        gpu=gpu,
        ranks=ranks,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        memory=memory,
        checkpoint_bytes=full,
        weights_only_bytes=weights_only,
        disk_bytes=kept_bytes(cfg, shape),
        work=work,
        seconds=seconds | {"checkpoint": (full / slow, full / fast)},
        steps=_steps(stage, cfg),
    )


# --- counted --------------------------------------------------------------------------------------------------------


def state_bytes(parameters: int, half: bool, data: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states of one rank, bytes.

    bf16 (``megatron_amp_O2``): 2N, 4N (gradients are summed in fp32), (4 + 8)N/d: a master copy and two moments, shared
    out over the replicas. fp32: 4N, 4N, 8N/d; the weights are their own master copy.

    Args:
        parameters: N of the rank.
        half: bf16 weights.
        data: d.
    """
    element = BF16 if half else FP32
    master = FP32 if half else 0
    return float(element * parameters), float(FP32 * parameters), (master + ADAM_BYTES) * parameters / data


def checkpoint_bytes(shape: ModelShape, half: bool) -> tuple[float, float]:
    """A whole checkpoint, and one without its optimizer: (element + 12)N and (element)N.

    The optimizer part holds fp32 weights and both moments whatever the training precision. The layout of the job does not
    matter: each parameter is written once.
    """
    element = BF16 if half else FP32
    weights = float(element * shape.parameters)
    return weights + (FP32 + ADAM_BYTES) * shape.parameters, weights


def kept_bytes(cfg: DictConfig, shape: ModelShape) -> float:
    """Largest amount at one time: what is kept, one more while it is written, and the final ``.nemo`` twice (packing)."""
    full, weights_only = checkpoint_bytes(shape, bool(cfg.model.megatron_amp_O2))
    last, best = int(cfg.checkpoint.keep_last), int(cfg.checkpoint.keep_best)
    whole = min(last, 2)
    return full * (whole + 1) + weights_only * (last - whole + best + 2)


# --- estimated ------------------------------------------------------------------------------------------------------


def sequence_tokens(stage: str, cfg: DictConfig) -> int:
    """Longest sequence, tokens."""
    if stage == "bc":
        return int(cfg.data.max_tokens)
    return int(cfg.rollout.max_prompt_tokens) + int(cfg.rollout.max_new_tokens)


def activation_bytes(cfg: DictConfig, shape: ModelShape, stage: str, tensor: int) -> float:
    """What the backward pass needs of one micro-batch of the longest sequences, or of a full token budget, bytes.

    Per token and layer, in elements: 4h of inputs and norms (divided by t with sequence parallelism), and
    [c(a + 2g) + ca + 3f]/t of attention and MLP; attention scores are never stored. With full recomputation 2h per
    layer instead, plus one layer's worth. Logits and their gradient: 2V/t per token, and four fp32 copies of the stretch
    that the loss works on. Pipeline stages hold p micro-batches of L/p layers.
    """
    model = cfg.model
    element = BF16 if model.megatron_amp_O2 else FP32
    tokens = int(model.tokens_per_micro_batch or model.micro_batch_size * sequence_tokens(stage, cfg))
    shared = 4 * shape.hidden / (tensor if model.sequence_parallel else 1)
    split = (shape.channels * (2 * shape.heads + 2 * shape.groups) + 3 * shape.ffn) / tensor
    layer = (shared + split) * element
    layers = shape.layers * layer
    if model.activations_checkpoint_granularity == "full":
        layers = shape.layers * 2 * shape.hidden * element + layer
    logits = tokens * shape.vocab / tensor
    return tokens * layers + 2 * element * logits + 4 * FP32 * min(logits, STRETCH_ELEMENTS)


def engine_bytes(stage: str, cfg: DictConfig, shape: ModelShape) -> float:
    """Key/value cache of one decoding batch: 2Lgc elements per token, divided by t and p.

    TensorRT-LLM in the training processes adds its own weights; a server in a container of its own needs GPUs of its own
    and counts 0 here.
    """
    if stage == "bc":
        batch, tokens = int(cfg.model.data.validation_ds.global_batch_size), sequence_tokens(stage, cfg)
        engine = "megatron"
    else:
        batch, tokens, engine = int(cfg.rollout.batch_size), sequence_tokens(stage, cfg), str(cfg.rollout.engine)
    if engine == "trtllm_server":
        return 0.0
    element = BF16 if cfg.model.megatron_amp_O2 else FP32
    parts = int(cfg.model.tensor_model_parallel_size) * int(cfg.model.pipeline_model_parallel_size)
    cache = 2 * shape.layers * shape.groups * shape.channels * element * tokens * batch / parts
    return cache + (BF16 * shape.parameters / parts if engine == "trtllm" else 0)


def work_of_step(stage: str, cfg: DictConfig, assume: Assumptions) -> Work:
    """Samples, tokens and judge calls of one step; prompts are counted at half their limit."""
    if stage == "bc":
        samples = int(cfg.model.global_batch_size)
        return Work(samples, samples * int(cfg.data.max_tokens) // 2, 0, 0)
    rollout = cfg.rollout
    samples = int(rollout.prompts_per_step) * int(rollout.group_size)
    new = int(samples * rollout.max_new_tokens * assume.mean_new_share)
    return Work(samples, samples * int(rollout.max_prompt_tokens) // 2, new, samples)


def _seconds(
    stage: str,
    cfg: DictConfig,
    shape: ModelShape,
    work: Work,
    hardware: Hardware,
    ranks: int,
    tensor: int,
    data: int,
    assume: Assumptions,
) -> dict[str, tuple[float, float]]:
    """Seconds of each phase, (slow, fast).

    Training 6N FLOP per token (8N with full recomputation), a log-probability pass 2N, a prefill 2N. Decoding reads
    the weights and the cache once per token of the longest response of each batch; log-probabilities are taken under the
    policy and, with a KL term, under the reference.
    """
    tokens = work.prompt_tokens + work.new_tokens
    recompute = cfg.model.activations_checkpoint_granularity == "full"
    flops = hardware.flops * ranks

    def compute(per_token: int, count: float) -> tuple[float, float]:
        slow, fast = assume.matmul_efficiency
        total = per_token * shape.parameters * count
        return total / (flops * slow), total / (flops * fast)

    phases = {"update": compute(8 if recompute else 6, tokens)}
    if stage == "bc":
        return {"rollout": (0.0, 0.0), "judge": (0.0, 0.0)} | phases
    batches = math.ceil(work.samples / data / int(cfg.rollout.batch_size))
    element = BF16 if cfg.model.megatron_amp_O2 else FP32
    cache = 2 * shape.layers * shape.groups * shape.channels * element * sequence_tokens(stage, cfg)
    read = (element * shape.parameters + cache * int(cfg.rollout.batch_size) / 2) / tensor
    decode = batches * int(cfg.rollout.max_new_tokens) * read / hardware.bandwidth
    prefill = compute(2, work.prompt_tokens)
    passes = 2 if cfg.algorithm.kl_coef and str(cfg.algorithm.kl) != "off" else 1
    waves = math.ceil(work.judge_calls / data / int(cfg.judge.max_concurrency))
    phases["rollout"] = (
        decode / assume.decode_efficiency[0] + prefill[0],
        decode / assume.decode_efficiency[1] + prefill[1],
    )
    phases["judge"] = (waves * assume.judge_latency_s[0], waves * assume.judge_latency_s[1])
    phases["logprobs"] = compute(2 * passes, tokens)
    return phases


def _steps(stage: str, cfg: DictConfig) -> int:
    return int(cfg.trainer.sft.max_steps if stage == "bc" else cfg.trainer.reinforce.max_steps)


# --- shown ----------------------------------------------------------------------------------------------------------


def compose_for_plan(stage: str, config_name: str, overrides: list[str]) -> DictConfig:
    """The stage's config; places that a plan does not need get stand-ins.

    Raises:
        ConfigError: unknown stage, file or key.
    """
    from nemo_ampo.config.compose import compose

    if stage not in ("bc", "ampo"):
        raise ConfigError(f"STAGE: a plan is for bc or ampo, got {stage!r}")
    cfg = compose(stage, config_name, overrides)
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "-")
    return cfg


def lines(plan: Plan) -> list[str]:
    """The plan as text."""
    m, w = plan.memory, plan.work
    slow, fast = plan.step_seconds
    limit = HARDWARE[plan.gpu].memory
    verdict = "fits" if m.total < 0.9 * limit else "is tight" if m.total < limit else "DOES NOT FIT"
    out = [
        f"{plan.stage}: {plan.shape.parameters / 1e9:.3g} G parameters on {plan.ranks} x {plan.gpu} "
        f"(tensor {plan.tensor}, pipeline {plan.pipeline}, data {plan.data})",
        "memory per GPU",
        *(f"  {name:<12} {value / GB:9.3g} GB  {kind}" for name, value, kind in _rows(m)),
        f"  {'at most':<12} {m.total / GB:9.3g} GB  {verdict} in {limit / GB:.0f} GB",
        "one step of the job",
        f"  samples      {w.samples}",
        f"  tokens       {w.prompt_tokens} prompt, {w.new_tokens} generated (estimates)",
        f"  judge calls  at most {w.judge_calls}",
        f"  time         {fast:.3g} to {slow:.3g} s (estimate): "
        + ", ".join(f"{name} {b:.3g}..{a:.3g}" for name, (a, b) in plan.seconds.items() if name != "checkpoint"),
        "disk",
        f"  checkpoint   {plan.checkpoint_bytes / GB:.3g} GB, weights only {plan.weights_only_bytes / GB:.3g} GB, "
        f"{plan.seconds['checkpoint'][1]:.3g} to {plan.seconds['checkpoint'][0]:.3g} s to write (estimate)",
        f"  at most      {plan.disk_bytes / GB:.3g} GB under the retention rules, the final .nemo included",
    ]
    if plan.steps > 0:
        out.append(f"whole stage    {plan.steps} steps, {plan.steps * fast / 3600:.3g} to {plan.steps * slow / 3600:.3g} h")
    return out


def _rows(m: Memory) -> list[tuple[str, float, str]]:
    return [
        ("weights", m.weights, "counted"),
        ("gradients", m.gradients, "counted"),
        ("optimizer", m.optimizer, "counted"),
        ("activations", m.activations, "estimate"),
        ("engine", m.engine, "estimate"),
    ]
