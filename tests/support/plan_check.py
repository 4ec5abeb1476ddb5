"""A finished stage's real sizes against what ``nemo-ampo plan`` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.job.plan import compose_for_plan, make_plan, model_of


def plan_error(run_dir: Path, stage: str, name: str, overrides: Sequence[str], ranks: int, nemo: Path) -> dict[str, float]:
    """Planned over measured, minus one, for each state on the fullest rank and for the checkpoint on the disk."""
    plan = make_plan(stage, compose_for_plan(stage, name, list(overrides), ranks), model_of(nemo, name), ranks)
    newest = Store(run_dir / "checkpoints").resumable()[0]
    on_disk = sum(p.stat().st_size for p in newest.path.rglob("*") if p.is_file())
    weights = sum(p.stat().st_size for p in (newest.path / "model_weights").rglob("*") if p.is_file())
    measured = newest.manifest.memory | {"checkpoint": on_disk, "weights only": weights}
    planned = {
        "weights": plan.memory.weights,
        "gradients": plan.memory.gradients,
        "optimizer": plan.memory.optimizer,
        "checkpoint": plan.checkpoint_bytes,
        "weights only": plan.weights_only_bytes,
    }
    return {key: value / measured[key] - 1 for key, value in planned.items()}
