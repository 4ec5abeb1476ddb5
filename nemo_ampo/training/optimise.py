"""One optimizer step, the same for cloning and RL. [nemo]"""

from __future__ import annotations

from typing import Any

import torch
from nemo_aligner.utils.train_utils import clip_gradients


def optimise(trainer: Any, batch: dict[str, Any], clip: float) -> dict[str, float]:
    """Accumulate gradients over the batch, clip, step, and say what happened.

    A gradient that is not finite on one rank leaves weights and optimizer states of every rank as they were; the
    learning-rate schedule goes on, so that it stays a function of the step number.

    Args:
        trainer: with ``model``, ``optimizer`` and ``scheduler``.
        batch: this replica's rows.
        clip: largest gradient norm.

    Returns:
        the model's metrics plus ``grad_norm`` (before clipping; NaN when skipped), ``lr`` (of this step) and
        ``skipped_updates`` (0 or 1).
    """
    trainer.optimizer.zero_grad()
    trainer.model.prepare_for_training_step()
    _, metrics = trainer.model.get_loss_and_metrics(batch=batch, forward_only=False)
    trainer.model.finish_training_step()
    lr = trainer.optimizer.param_groups[0]["lr"]
    finite = gradients_are_finite(trainer.model)
    grad_norm = _clip_and_step(trainer, clip) if finite else float("nan")
    trainer.scheduler.step()
    return metrics | {"grad_norm": grad_norm, "lr": float(lr), "skipped_updates": float(not finite)}


def _clip_and_step(trainer: Any, clip: float) -> float:
    grad_norm = clip_gradients(trainer.model, clip)
    outcome = trainer.optimizer.step()
    if grad_norm is None:
        # Megatron's distributed optimizer clips inside step() and answers (loss, norm, zeros); Aligner drops the norm.
        grad_norm = outcome[1]
    return float(grad_norm)


def gradients_are_finite(model: Any) -> bool:
    """Are the gradients of all ranks free of NaN and infinity? The same answer on every rank.

    Asked before the optimizer looks at them: without a loss scaler Megatron steps on NaN. Each rank checks its whole
    buffer, of which only a part may be reduced yet; a bad value on any replica is found in any case.
    """
    finite = torch.ones((), dtype=torch.int32, device=torch.cuda.current_device())
    for parameter in (p for module in model.get_model_module_list() for p in module.parameters()):
        gradient = getattr(parameter, "main_grad", None)  # where Megatron's own data parallelism accumulates
        gradient = parameter.grad if gradient is None else gradient
        if gradient is not None:
            finite &= gradient.isfinite().all()
    torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)
