"""What a stage will need before it is started: memory per GPU, disk, tokens, judge calls, time. Loads no model.

Sizes of weights, gradients, optimizer states and checkpoints are counted, tensor by tensor, and hold within a few percent
(``tests`` compare them with real runs). Memory is that of :mod:`nemo_ampo.rehearse.sizes`; every second is an estimate from
the assumptions that :class:`Assumptions` and :class:`Hardware` state. Legend: N parameters, t tensor-, p pipeline-,
d data-parallel size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig, OmegaConf

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.model_folder.facts import ModelFacts, facts_of, read_facts, read_object
from nemo_ampo.rehearse.sizes import (
    ADAM_BYTES,
    BF16,
    FP32,
    GB,
    HARDWARE,
    MODELS,
    Hardware,
    Memory,
    check_layout,
    hardware_of,
    layout_of,
    longest_row,
    memory_of,
    parameters_of,
    scoring_passes,
)
from nemo_ampo.run.clock import Gpus


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
class Work:
    """One training step of the whole job. Calls are upper bounds: a malformed reply is not judged."""

    samples: int
    prompt_tokens: int
    new_tokens: int
    judge_calls: int


@dataclass(frozen=True)
class StagePlan:
    """Everything :func:`make_plan` works out; seconds are (slow, fast)."""

    stage: str
    facts: ModelFacts
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
    def fits(self) -> bool:
        """Whether it leaves the margin of every GPU's memory free, as a rehearsal asks too."""
        return self.memory.total <= hardware_of(self.gpu).room

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Slow and fast end; judging overlaps with the rollout, so the longer of the two counts."""
        slow, fast = (max(self.seconds["rollout"][i], self.seconds["judge"][i]) for i in (0, 1))
        rest = [name for name in self.seconds if name not in ("rollout", "judge", "checkpoint")]
        return slow + sum(self.seconds[n][0] for n in rest), fast + sum(self.seconds[n][1] for n in rest)


def model_of(source: Path | None, config_name: str) -> ModelFacts:
    """Facts of a model from its files, or of the model a shipped config is for.

    Args:
        source: a Hugging Face folder, its ``config.json``, or a ``.nemo`` file, unpacked or not.
        config_name: used without a source.

    Raises:
        UserError: nothing there to read, or no known model of that name.
    """
    if source is None:
        if config_name not in MODELS:
            raise UserError(f"--model: needed for --config-name {config_name}; known without it: {', '.join(MODELS)}")
        return MODELS[config_name]
    if source.suffix == ".nemo" or (source / "model_config.yaml").is_file():
        from nemo_ampo.checkpoint.nemo_file import unpack_assets

        with TemporaryDirectory() as folder:
            return read_facts(unpack_assets(source, folder))
    path = source / "config.json" if source.is_dir() else source
    try:
        return facts_of(read_object(path), str(path))
    except UserError as error:
        raise UserError(f"--model {error}") from None


def gpus_of_job(name: str, count: int, facts: ModelFacts) -> Gpus:
    """What a job's use of its cards is measured against.

    Args:
        name: of the card, as torch tells it.
        count: of cards, one per rank.
        facts: of the model.
    """
    slower = re.search("pcie|nvl", name.lower())  # HARDWARE has the boards with the highest clock
    known = None if slower else next((h.flops for kind, h in HARDWARE.items() if kind in name.lower()), None)
    return Gpus(count, parameters_of(facts), known)


def make_plan(
    stage: str,
    cfg: DictConfig,
    facts: ModelFacts,
    ranks: int,
    gpu: str = "h100",
    assume: Assumptions = Assumptions(),
) -> StagePlan:
    """Work out what a stage needs.

    Args:
        stage: ``bc`` or ``ampo``.
        cfg: composed config; keys about places may be missing.
        facts: of the model.
        ranks: GPUs of the job.
        gpu: a name of :data:`HARDWARE`.
        assume: for the estimates.

    Raises:
        ConfigError: the layout does not fit the ranks or the model.
    """
    hardware = hardware_of(gpu)
    model = cfg.model
    tensor, pipeline = int(model.tensor_model_parallel_size), int(model.pipeline_model_parallel_size)
    check_layout(facts, tensor, pipeline, ranks)
    data = ranks // (tensor * pipeline)
    work = work_of_step(stage, cfg, assume)
    layout = layout_of(stage, cfg, ranks)
    full, weights_only = checkpoint_bytes(facts, layout.half)
    memory = memory_of(stage, cfg, facts, layout)
    seconds = _seconds(stage, cfg, facts, work, hardware, ranks, tensor, data, assume)
    slow, fast = assume.disk_bytes_per_s
    return StagePlan(
        stage=stage,
        facts=facts,
        gpu=gpu,
        ranks=ranks,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        memory=memory,
        checkpoint_bytes=full,
        weights_only_bytes=weights_only,
        disk_bytes=kept_bytes(cfg, facts),
        work=work,
        seconds=seconds | {"checkpoint": (full / slow, full / fast)},
        steps=_steps(stage, cfg),
    )


# --- counted --------------------------------------------------------------------------------------------------------


def checkpoint_bytes(facts: ModelFacts, half: bool) -> tuple[float, float]:
    """A whole checkpoint, and one without its optimizer: (element + 12)N and (element)N.

    The optimizer part holds fp32 weights and both moments whatever the training precision. The layout of the job does not
    matter: each parameter is written once.
    """
    element = BF16 if half else FP32
    weights = float(element * parameters_of(facts))
    return weights + (FP32 + ADAM_BYTES) * parameters_of(facts), weights


def kept_bytes(cfg: DictConfig, facts: ModelFacts) -> float:
    """Largest amount at one time: what is kept, one more while it is written, and the final ``.nemo`` twice (packing)."""
    full, weights_only = checkpoint_bytes(facts, bool(cfg.model.megatron_amp_O2))
    last, best = int(cfg.checkpoint.keep_last), int(cfg.checkpoint.keep_best)
    whole = min(last, 2)
    return full * (whole + 1) + weights_only * (last - whole + best + 2)


# --- estimated ------------------------------------------------------------------------------------------------------


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
    facts: ModelFacts,
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
        total = per_token * parameters_of(facts) * count
        return total / (flops * slow), total / (flops * fast)

    phases = {"update": compute(8 if recompute else 6, tokens)}
    if stage == "bc":
        return {"rollout": (0.0, 0.0), "judge": (0.0, 0.0)} | phases
    batches = math.ceil(work.samples / data / int(cfg.rollout.batch_size))
    element = BF16 if cfg.model.megatron_amp_O2 else FP32
    cache = 2 * facts.num_layers * facts.kv_width * element * longest_row(stage, cfg)
    read = (element * parameters_of(facts) + cache * int(cfg.rollout.batch_size) / 2) / tensor
    decode = batches * int(cfg.rollout.max_new_tokens) * read / hardware.bandwidth
    prefill = compute(2, work.prompt_tokens)
    waves = math.ceil(work.judge_calls / int(cfg.judge.max_concurrency))
    phases["rollout"] = (
        decode / assume.decode_efficiency[0] + prefill[0],
        decode / assume.decode_efficiency[1] + prefill[1],
    )
    phases["judge"] = (waves * assume.judge_latency_s[0], waves * assume.judge_latency_s[1])
    phases["logprobs"] = compute(2 * scoring_passes(stage, cfg), tokens)
    return phases


def _steps(stage: str, cfg: DictConfig) -> int:
    return int(cfg.trainer.sft.max_steps if stage == "bc" else cfg.trainer.reinforce.max_steps)


# --- shown ----------------------------------------------------------------------------------------------------------


def compose_for_plan(stage: str, config_name: str, overrides: list[str], ranks: int) -> DictConfig:
    """The stage's config, held to all rules that need no file; places that a plan does not need get stand-ins.

    Raises:
        ConfigError: unknown stage, file or key, or what the stage itself would refuse on so many ranks.
    """
    from nemo_ampo.config.check import check_stage
    from nemo_ampo.config.compose import compose

    if stage not in ("bc", "ampo"):
        raise ConfigError(f"STAGE: a plan is for bc or ampo, got {stage!r}")
    cfg = compose(stage, config_name, overrides)
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "http://judge.invalid/v1" if key == "judge.base_url" else "-")
    if stage == "ampo" and cfg.data.train is None and cfg.data.sotopia_dir is None:
        cfg.data.train = "-"
    if stage == "ampo" and not cfg.rollout.trtllm_server.url:
        cfg.rollout.trtllm_server.url = "http://rollout.invalid:1"
    check_stage(stage, cfg, ranks, files=False)
    return cfg


def lines(plan: StagePlan) -> list[str]:
    """The plan as text."""
    m, w = plan.memory, plan.work
    slow, fast = plan.step_seconds
    limit = hardware_of(plan.gpu).memory
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    out = [
        f"{plan.stage}: {parameters_of(plan.facts) / 1e9:.3g} G parameters on {plan.ranks} x {plan.gpu} "
        f"(tensor {plan.tensor}, pipeline {plan.pipeline}, data {plan.data})",
        "memory per GPU",
        *(f"  {name:<12} {value / GB:9.3g} GB" for name, value in m.rows()),
        f"  {'at most':<12} {m.total / GB:9.3g} GB  {verdict} in {limit / GB:.0f} GB, a tenth of which is left free",
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
