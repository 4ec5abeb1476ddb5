"""The passes of a training stage, one after the other, on rows of one length: what a rank keeps, and asks of others. [nemo]

Nothing here knows whether its tensors have values: a test carries out the same passes on real ranks and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_ampo.data.bc import BcExample
from nemo_ampo.ranks import MegatronRanks
from nemo_ampo.rehearse.collectives import Call
from nemo_ampo.rehearse.ledger import MemoryLedger
from nemo_ampo.rehearse.report import ENGINE_PASS, UPDATE, Passes
from nemo_ampo.rollout.config import RolloutConfig
from nemo_ampo.rollout.engine import Request
from nemo_ampo.rollout.megatron import MegatronEngine, decoding_mode
from nemo_ampo.training.bc_trainer import BcParts, BcTrainer
from nemo_ampo.training.optimise import optimise
from nemo_ampo.training.trainer import AmpoTrainer
from nemo_ampo.types import TrainBatch

FIRST_TOKEN = 3


@dataclass(frozen=True)
class Watch:
    """How passes are watched.

    Attributes:
        take_peak: bytes by part since it was last asked.
        take_calls: collectives since it was last asked.
        part: for what memory is used while it lasts; None where that is not told apart.
    """

    take_peak: Callable[[], dict[str, int]]
    take_calls: Callable[[], list[Call]]
    ledger: MemoryLedger | None = None

    @contextmanager
    def watched(self, passes: Passes, name: str, part: str = "activations") -> Iterator[None]:
        """One pass."""
        self.take_peak(), self.take_calls()
        if self.ledger is None:
            yield
        else:
            with self.ledger.part(part):
                yield
        passes.peaks[name], passes.calls[name] = self.take_peak(), self.take_calls()


def ampo_trainer(session: Any, cfg: Any, config: Any) -> AmpoTrainer:
    """The stage's trainer without data, judge and engine."""
    parts: Any = _Parts(config.algorithm, config.rollout)
    session.model.algorithm = config.algorithm
    return AmpoTrainer(
        prompts=[None] * config.rollout.prompts_per_step,  # type: ignore[list-item]
        parts=parts,
        run_log=None,  # type: ignore[arg-type]
        log_rollouts=0,
        cfg=cfg.trainer.reinforce,
        **session.trainer_arguments,
    )


@dataclass(frozen=True)
class _Parts:
    algorithm: Any
    rollout: RolloutConfig


def ampo_passes(trainer: AmpoTrainer, rows: int, tokens: int, watch: Watch) -> Passes:
    """Log-probabilities, those of the reference, one update.

    Args:
        trainer: of :func:`ampo_trainer`.
        rows: of this replica.
        tokens: of each row, all of them in the loss.
        watch: counts.
    """
    passes = Passes({}, {})
    tokens_BT, mask_BT = torch.full((rows, tokens), FIRST_TOKEN), torch.ones(rows, tokens - 1, dtype=torch.bool)
    with watch.watched(passes, "log-probabilities"):
        old_BT = trainer.logprobs(tokens_BT, mask_BT)
    with watch.watched(passes, "reference"):
        reference_BT = trainer.reference_logprobs(tokens_BT, mask_BT)
    batch = TrainBatch(tokens_BT, mask_BT, torch.ones(rows, tokens - 1), old_BT, reference_BT, old_BT)
    with watch.watched(passes, UPDATE):
        trainer.update(batch)
    return passes


def bc_trainer(session: Any, cfg: Any, config: Any, tokens: int) -> BcTrainer:
    """The stage's trainer with rows of this many tokens."""
    examples = [BcExample(f"row {i}", (FIRST_TOKEN,) * tokens, 1, 1) for i in range(int(cfg.model.global_batch_size))]
    ranks = MegatronRanks()
    return BcTrainer(
        parts=BcParts(examples, examples, None, None, ranks, None, config.data, (), 0, 0),  # type: ignore[arg-type]
        cfg=cfg.trainer.sft,
        **session.trainer_arguments,
    )


def bc_passes(trainer: BcTrainer, watch: Watch) -> Passes:
    """The loss on held-out rows, one update."""
    passes = Passes({}, {})
    with watch.watched(passes, "validation"):
        trainer._heldout_loss()
    with watch.watched(passes, UPDATE):
        optimise(trainer, trainer._batch(trainer._rows_of_step()), trainer.cfg.gradient_clip_val)
    return passes


@torch.no_grad()
def decoding(model: Any, rows: int, prompt_tokens: int, new_tokens: int, watch: Watch) -> Passes:
    """Megatron's engine: prefill of so many prompts, one of them shorter, with room for responses, and one token more."""
    passes = Passes({}, {})
    prompts = [(row, *(FIRST_TOKEN,) * (prompt_tokens - 1 - (row == rows - 1))) for row in range(rows)]
    engine = MegatronEngine(model, rows)
    with watch.watched(passes, ENGINE_PASS, "engine"), decoding_mode(model):
        requests = [Request(row, prompt, row) for row, prompt in enumerate(prompts)]
        cache, _, padding_B = engine.prefill(requests, new_tokens)
        tokens_BT = torch.full((rows, 1), FIRST_TOKEN, device=padding_B.device)
        engine.forward(tokens_BT, prompt_tokens, cache, padding_B)
    return passes


def tell_parts_apart(model: Any, optimizer: Any, ledger: MemoryLedger) -> None:
    """From now on memory belongs to weights, gradients, optimizer, activations or loss; the states of Adam are there."""
    modules = model.get_model_module_list()
    inner = getattr(optimizer, "mcore_optimizer", optimizer)
    for one in getattr(inner, "chained_optimizers", [inner]):
        adam = one.optimizer
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.allocate(parameter)
                ledger.assign("optimizer", [parameter, *adam.state[parameter].values()])
    for module in modules:
        ledger.assign("gradients", (p.main_grad for p in module.parameters()))
        ledger.assign("weights", module.parameters())
        if hasattr(module, "output_layer") and parallel_state.is_pipeline_last_stage():
            _follow_logits(module, ledger)


def _follow_logits(module: Any, ledger: MemoryLedger) -> None:
    """What is made from the output layer on is the loss's, until its gradient has come back there."""

    def enter(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if ledger.current == "activations":
            ledger.current = "loss"
            if inputs[0].requires_grad:
                inputs[0].register_hook(leave)

    def leave(_: Any) -> None:
        ledger.current = "activations"

    def start(*_: Any) -> None:
        if ledger.current == "loss":
            ledger.current = "activations"

    module.output_layer.register_forward_pre_hook(enter)
    module.register_forward_pre_hook(start)
