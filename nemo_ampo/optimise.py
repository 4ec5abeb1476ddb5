"""One optimizer step, the same for cloning and RL. [nemo]"""

from __future__ import annotations

from typing import Any

from nemo_aligner.utils.train_utils import clip_gradients


def optimise(trainer: Any, batch: dict[str, Any], clip: float) -> dict[str, float]:
    """Accumulate gradients over the batch, clip, step, and say what happened.

    Args:
        trainer: with ``model``, ``optimizer`` and ``scheduler``.
        batch: this replica's rows.
        clip: largest gradient norm.

    Returns:
        the model's metrics plus ``grad_norm`` (before clipping) and ``lr`` (of this step).
    """
    trainer.optimizer.zero_grad()
    trainer.model.prepare_for_training_step()
    _, metrics = trainer.model.get_loss_and_metrics(batch=batch, forward_only=False)
    trainer.model.finish_training_step()
    grad_norm = clip_gradients(trainer.model, clip)
    lr = trainer.optimizer.param_groups[0]["lr"]
    outcome = trainer.optimizer.step()
    if grad_norm is None:
        # Megatron's distributed optimizer clips inside step() and answers (loss, norm, zeros); Aligner drops the norm.
        grad_norm = outcome[1]
    trainer.scheduler.step()
    return metrics | {"grad_norm": float(grad_norm), "lr": float(lr)}
