"""Memory of one GPU by arithmetic, without executing anything. No torch.

What is counted here tensor by tensor, a rehearsal finds by carrying the stage out; ``tests`` hold one against
the other, to a few percent. Legend: N parameters of a rank, t tensor-, p pipeline-, d data-parallel size, h hidden size,
f MLP width, a query heads and g key/value heads of c channels, V rows of the vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from nemo_ampo.algo.algorithm import AlgorithmConfig
from nemo_ampo.config.reading import read_section
from nemo_ampo.errors import ConfigError
from nemo_ampo.megatron import STRETCH_ELEMENTS
from nemo_ampo.model_folder.facts import ModelFacts, facts_of

GB = 1e9
FP32, BF16 = 4, 2
ADAM_BYTES = 8
"""Two fp32 moments per parameter."""
MARGIN = 0.1
"""Part of a GPU's memory that is left free: CUDA's own, NCCL's buffers, fragmentation."""


@dataclass(frozen=True)
class Hardware:
    """One device: memory in bytes, dense bf16 FLOP/s, memory bytes/s (vendor's data sheets)."""

    memory: float
    flops: float
    bandwidth: float

    @property
    def room(self) -> float:
        """Bytes that a stage may fill."""
        return (1 - MARGIN) * self.memory


HARDWARE: dict[str, Hardware] = {
    "h100": Hardware(80e9, 989e12, 3.35e12),
    "h200": Hardware(141e9, 989e12, 4.8e12),
    "a100": Hardware(80e9, 312e12, 2.0e12),
}


def hardware_of(gpu: str) -> Hardware:
    """The device of a name of :data:`HARDWARE`.

    Raises:
        ConfigError: there is none.
    """
    if gpu not in HARDWARE:
        raise ConfigError(f"--gpu: expected one of {', '.join(HARDWARE)}, got {gpu!r}")
    return HARDWARE[gpu]


_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings"),
)


def _facts(family: str, sizes: tuple[int, ...], **more: Any) -> ModelFacts:
    return facts_of({"model_type": family, **dict(zip(_SIZES, sizes, strict=True)), **more})


_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MODELS: dict[str, ModelFacts] = {
    "tiny": _facts("qwen2", (2, 96, 288, 4, 2, 768, 1024), tie_word_embeddings=True),
    "smollm2_135m": _facts("llama", (30, 576, 1536, 9, 3, 49152, 8192), tie_word_embeddings=True, rope_theta=1e5),
    "qwen2.5_7b": _facts("qwen2", (28, 3584, 18944, 28, 4, 152064, 32768), rope_theta=1e6),
    "llama3.1_8b": _facts(
        "llama", (32, 4096, 14336, 32, 8, 128256, 131072), rope_theta=5e5, rope_scaling={"factor": 8.0} | _LLAMA3
    ),
    "qwen2.5_72b": _facts("qwen2", (80, 8192, 29568, 64, 8, 152064, 32768), rope_theta=1e6),
    "llama3.1_70b": _facts(
        "llama", (80, 8192, 28672, 64, 8, 128256, 131072), rope_theta=5e5, rope_scaling={"factor": 8.0} | _LLAMA3
    ),
}
"""Models by name: those of the shipped configs, and their 70B kin."""


def parameters_on(facts: ModelFacts, stage: int, tensor: int, pipeline: int) -> int:
    """Parameters held by one rank.

    Per layer: c(a + 2g)h [+ c(a + 2g) bias] + cah + 3hf, divided by t, plus two norms of h. The first stage adds the
    embedding Vh/t, the last the output layer Vh/t (of a tied one, a copy if p > 1) and the final norm.

    Args:
        facts: of the model.
        stage: pipeline stage, 0-based.
        tensor, pipeline: parallel sizes.
    """
    rows = facts.q_width + 2 * facts.kv_width
    split = rows * facts.hidden + facts.q_width * facts.hidden + 3 * facts.hidden * facts.ffn
    split += rows if facts.qkv_bias else 0
    count = facts.num_layers // pipeline * (split // tensor + 2 * facts.hidden)
    table = facts.padded_vocab * facts.hidden // tensor
    first, last = stage == 0, stage == pipeline - 1
    count += table if first else 0
    count += facts.hidden if last else 0
    needs_output = last and not (facts.tied and first)
    return count + (table if needs_output else 0)


def parameters_of(facts: ModelFacts) -> int:
    """N of the whole model."""
    return parameters_on(facts, stage=0, tensor=1, pipeline=1)


def check_layout(facts: ModelFacts, tensor: int, pipeline: int, ranks: int) -> None:
    """Can this model be split like that over so many ranks?

    Raises:
        ConfigError: naming the key, the size and what it does not divide.
    """
    from nemo_ampo.config.stages import check_parallel_layout

    sizes = {
        "num_attention_heads": facts.num_heads,
        "num_query_groups": facts.num_groups,
        "ffn_hidden_size": facts.ffn,
        "num_layers": facts.num_layers,
    }
    check_parallel_layout(sizes, tensor, pipeline)
    if facts.padded_vocab % tensor:
        raise ConfigError(
            f"model.tensor_model_parallel_size: {tensor} does not divide the vocabulary's {facts.padded_vocab} rows"
        )
    if ranks % (tensor * pipeline):
        raise ConfigError(
            f"model.tensor_model_parallel_size x model.pipeline_model_parallel_size = {tensor * pipeline} does not divide "
            f"the {ranks} ranks"
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by part.

    Attributes:
        weights, gradients, optimizer: held all the time.
        activations: kept for the backward pass, at the fullest moment of an update.
        loss: logits, their gradient, what is computed of them, at that moment.
        scoring: passes without gradients (log-probabilities, validation).
        engine: rollouts.
        engine_stays: the engine keeps its memory while the trainer works.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    scoring: float
    engine: float
    engine_stays: bool = False

    @property
    def total(self) -> float:
        """Largest at one time."""
        passing = max(self.activations + self.loss, self.scoring)
        both = passing + self.engine if self.engine_stays else max(passing, self.engine)
        return self.weights + self.gradients + self.optimizer + both

    def rows(self) -> list[tuple[str, float]]:
        """Name and bytes of each part."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "engine_stays"]


@dataclass(frozen=True)
class Layout:
    """How a model is spread and what goes through it at once.

    Attributes:
        tensor, pipeline, data: parallel sizes.
        rows: of the longest, in a micro-batch.
        tokens: of a micro-batch.
        scored_tokens: of a pass without gradients.
        sequence_parallel, half, recompute: of NeMo's keys.
    """

    tensor: int
    pipeline: int
    data: int
    rows: int
    tokens: int
    scored_tokens: int
    sequence_parallel: bool
    half: bool
    recompute: bool

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return BF16 if self.half else FP32


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


def layer_elements(facts: ModelFacts, layout: Layout) -> float:
    """What the backward pass keeps of one layer and token, in elements of the weights' type.

    4h: inputs and results of both norms (divided by t with sequence parallelism). Divided by t: queries, keys and values as
    they leave their product, c(a + 2g), and rotated, c(a + g); the attention's result, ca; of the gated MLP 4f (both halves,
    silu of one, their product). Scores are never stored.
    """
    shared = 4 * facts.hidden / (layout.tensor if layout.sequence_parallel else 1)
    q, kv = facts.q_width, facts.kv_width
    return shared + (3 * q + 3 * kv + 4 * facts.ffn) / layout.tensor


def activation_bytes(facts: ModelFacts, layout: Layout, stage: int) -> float:
    """What a pipeline stage, counted from 0, keeps when it is fullest: p - stage micro-batches of L/p layers.

    Full recomputation keeps the input of a layer instead, and one layer's worth while that is computed again.
    """
    layer = layer_elements(facts, layout)
    held = (layout.pipeline - stage) * facts.num_layers / layout.pipeline
    if layout.recompute:
        kept = held * facts.hidden / (layout.tensor if layout.sequence_parallel else 1) + layer
    else:
        kept = held * layer
    return layout.element * layout.tokens * kept


def loss_bytes(facts: ModelFacts, layout: Layout, tokens: int) -> float:
    """Two tensors of logits, V/t each (their two orders, later with the gradient), the output layer's whole input, and the
    stretch that is worked on in fp32, a few times."""
    logits = tokens * facts.padded_vocab / layout.tensor
    gathered = tokens * facts.hidden if layout.sequence_parallel else 0
    return layout.element * (2 * logits + gathered) + 4 * FP32 * min(logits, STRETCH_ELEMENTS)


def scoring_bytes(facts: ModelFacts, layout: Layout, last: bool) -> float:
    """The widest moment of a layer, its MLP with 2h and 4f/t, or on the last stage the loss's part without a gradient."""
    tokens = layout.scored_tokens
    layer = layout.element * tokens * (2 * facts.hidden + 4 * facts.ffn / layout.tensor)
    return max(layer, loss_bytes(facts, layout, tokens) if last else 0.0)


def engine_bytes(cfg: Any, stage: str, facts: ModelFacts, layout: Layout) -> float:
    """Key/value cache of one decoding batch: 2Lgc elements per token, divided by t and p.

    TensorRT-LLM in the training processes adds its own weights; a server in a container of its own needs GPUs of its own
    and counts 0 here.
    """
    if stage == "bc":
        batch, engine = int(cfg.model.data.validation_ds.global_batch_size), "megatron"
    else:
        batch, engine = int(cfg.rollout.batch_size), str(cfg.rollout.engine)
    if engine == "trtllm_server":
        return 0.0
    parts = layout.tensor * layout.pipeline
    cache = 2 * facts.num_layers * facts.kv_width * layout.element * longest_row(stage, cfg) * batch / parts
    return cache + (BF16 * parameters_of(facts) / parts if engine == "trtllm" else 0)


def longest_row(stage: str, cfg: Any) -> int:
    """Tokens of the longest sequence a stage lets through."""
    if stage == "bc":
        return int(cfg.data.max_tokens)
    return int(cfg.rollout.max_prompt_tokens) + int(cfg.rollout.max_new_tokens)


def scoring_passes(stage: str, cfg: Any) -> int:
    """Passes without gradients over the rows of a step: of the policy, and of the reference where one is read."""
    if stage == "bc":
        return 0
    return 2 if read_section("algorithm", AlgorithmConfig, cfg.algorithm).uses_reference else 1


def layout_of(stage: str, cfg: Any, ranks: int) -> Layout:
    """The layout that a composed config asks for, on so many ranks."""
    model = cfg.model
    tensor, pipeline = int(model.tensor_model_parallel_size), int(model.pipeline_model_parallel_size)
    scored = model.data.validation_ds.micro_batch_size if stage == "bc" else model.reinforce.forward_micro_batch_size
    longest, budget = longest_row(stage, cfg), model.tokens_per_micro_batch
    rows = max(1, int(budget) // longest) if budget else int(model.micro_batch_size)
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=ranks // (tensor * pipeline),
        rows=rows,
        tokens=rows * longest,
        scored_tokens=(rows if budget else int(scored)) * longest,
        sequence_parallel=bool(model.sequence_parallel),
        half=bool(model.megatron_amp_O2),
        recompute=model.activations_checkpoint_granularity == "full",
    )


def memory_of(stage: str, cfg: Any, facts: ModelFacts, layout: Layout) -> Memory:
    """The fullest rank's.

    Args:
        stage: ``bc`` or ``ampo``.
        cfg: composed config.
        facts: of the model.
        layout: of :func:`layout_of`, or another to be tried.
    """
    stays = stage == "ampo" and cfg.rollout.engine == "trtllm" and not cfg.rollout.trtllm.unload_during_training
    engine = engine_bytes(cfg, stage, facts, layout)

    def on(part: int) -> Memory:
        last = part == layout.pipeline - 1
        return Memory(
            *state_bytes(parameters_on(facts, part, layout.tensor, layout.pipeline), layout.half, layout.data),
            activations=activation_bytes(facts, layout, part),
            loss=loss_bytes(facts, layout, layout.tokens) if last else 0.0,
            scoring=scoring_bytes(facts, layout, last),
            engine=engine,
            engine_stays=stays,
        )

    return max((on(part) for part in range(layout.pipeline)), key=lambda memory: memory.total)
