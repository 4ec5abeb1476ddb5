"""Run with the ranks of one layout: the same update and the same log-probabilities under several splits of the batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SPLITS: dict[str, dict[str, Any]] = {
    "1 row": {"micro_batch_size": 1},
    "2 rows": {"micro_batch_size": 2},
    "all rows": {"micro_batch_size": 4},
    "48 tokens": {"tokens_per_micro_batch": 48},
    "80 tokens": {"tokens_per_micro_batch": 80},
    "one micro-batch": {"tokens_per_micro_batch": 4096},
}
"""Of the four rows of a replica, at most 48 tokens each."""
LENGTHS = (44, 9, 30, 12, 16, 16, 15, 9)
"""Of the job's rows: one replica's are longer, so that a budget gives the two unequal numbers of micro-batches."""


def main(folder: Path, tensor: int, pipeline: int) -> None:
    from nemo_ampo import compat

    compat.setup("cpu")
    from megatron.core import parallel_state

    from nemo_ampo.algo.algorithm import AlgorithmConfig
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.bc_model import BcModel

    layout = [f"model.tensor_model_parallel_size={tensor}", f"model.pipeline_model_parallel_size={pipeline}"]
    result: dict[str, Any] = {}
    session = open_model(folder, "ampo", "reinforce", AmpoActor, layout)
    actor = session.model
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = slice(replica * 8 // replicas, (replica + 1) * 8 // replicas)
    batch = {name: rows[share] for name, rows in policy_batch().items()}
    actor.prepare_for_training()
    for aggregate in ("token_mean", "sequence_mean", "constant"):
        actor.algorithm = AlgorithmConfig(aggregate=aggregate, aggregate_over="batch", kl_coef=0.05)  # type: ignore[arg-type]
        result[aggregate] = compare(session, batch)
    actor.algorithm = AlgorithmConfig()
    result["means over micro-batches"] = compare(session, batch)
    result["logprobs"] = logprob_gaps(actor, batch["tokens_BT"], batch["mask_BT"])
    result["micro_batches"] = micro_batches(actor, batch["mask_BT"])
    bc = open_model(folder, "bc", "sft", BcModel, layout)
    whole = {name: rows[share] for name, rows in cloning_batch().items()}
    result["bc"] = compare(bc, whole, {n: s for n, s in SPLITS.items() if n == "1 row" or "tokens_per_micro_batch" in s})
    result["bc and upstream"] = against_upstream(bc, whole)
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


def open_model(folder: Path, stage: str, algorithm: str, model_class: Any, layout: list[str]) -> Any:
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.config.compose import compose
    from nemo_ampo.training.session import open_session, prepare_config

    nemo = str(folder / "model.nemo")
    sizes = ["model.global_batch_size=8", "model.micro_batch_size=1"]
    cfg = compose(stage, "tiny", [*sizes, *layout])
    prepare_config(cfg, folder / stage, nemo, unpack_assets(nemo, folder / "assets"), "cpu")
    return open_session(cfg, algorithm, model_class, nemo, 8, keep_reference=stage == "ampo")


def policy_batch() -> dict[str, torch.Tensor]:
    """Eight rows of unequal lengths, one of which is left out."""
    g = torch.Generator().manual_seed(3)
    shape = (8, 47)
    columns_T, lengths_B = torch.arange(47), torch.tensor(LENGTHS)
    mask_BT = (columns_T >= 4) & (columns_T < lengths_B[:, None] - 1)
    mask_BT[6] = False
    return {
        "tokens_BT": torch.randint(3, 500, (8, 48), generator=g),
        "mask_BT": mask_BT,
        "advantages_BT": torch.randn(8, generator=g)[:, None].expand(shape).contiguous(),
        "old_logprobs_BT": -6 + torch.rand(shape, generator=g),
        "ref_logprobs_BT": -6 + torch.rand(shape, generator=g),
    }


def cloning_batch() -> dict[str, torch.Tensor]:
    from nemo_ampo.data.collate import collate_bc

    g = torch.Generator().manual_seed(5)
    rows = [
        {"tokens": torch.randint(3, 500, (n,), generator=g), "prompt_len": torch.tensor(4), "mode": torch.tensor(1)}
        for n in LENGTHS
    ]
    batch = collate_bc(rows, 0)
    return {name: batch[name] for name in ("tokens", "labels", "loss_mask", "position_ids")}


def split_by(model: Any, split: dict[str, Any]) -> None:
    from megatron.core import parallel_state
    from nemo_aligner.utils.utils import configure_batch_sizes

    split = {"micro_batch_size": 1, "tokens_per_micro_batch": None} | split
    for name, value in split.items():
        model.cfg[name] = value
    model.forward_micro_batch_size = split["micro_batch_size"]
    configure_batch_sizes(split["micro_batch_size"], 8, parallel_state.get_data_parallel_world_size())


def compare(session: Any, batch: dict[str, torch.Tensor], splits: dict[str, Any] = SPLITS) -> dict[str, Any]:
    """Loss by split, and the largest difference of a gradient from that of the first, over its largest element."""
    losses, gaps, first = {}, {}, torch.empty(0)
    for name, split in splits.items():
        split_by(session.model, split)
        losses[name], gradient = update(session, batch)
        first = first if len(first) else gradient
        gaps[name] = float((gradient - first).abs().max() / first.abs().max())
    return {"loss": losses, "gap": gaps, "largest": float(first.abs().max())}


def against_upstream(session: Any, batch: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Loss and gradients of cloning beside those of the class it extends, by micro-batch size."""
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel

    found = {}
    for name in ("1 row", "2 rows", "all rows"):
        split_by(session.model, SPLITS[name])
        ours = update(session, batch)
        with mock.patch.object(type(session.model), "get_loss_and_metrics", GPTSFTModel.get_loss_and_metrics):
            theirs = update(session, batch)
        found[name] = [ours[0], theirs[0], float((ours[1] - theirs[1]).abs().max() / theirs[1].abs().max())]
    return found


def update(session: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model = session.model
    session.optimizer.zero_grad()
    model.prepare_for_training_step()
    loss, _ = model.get_loss_and_metrics(batch=dict(batch), forward_only=False)
    model.finish_training_step()
    gradients = [p.main_grad if getattr(p, "main_grad", None) is not None else p.grad for p in model.parameters()]
    return loss, torch.cat([g.detach().double().flatten().clone() for g in gradients if g is not None])


def logprob_gaps(model: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> dict[str, float]:
    """Largest difference of a log-probability from those asked for at all positions, policy and reference."""
    split_by(model, SPLITS["2 rows"])
    everywhere = (model.get_inference_log_probs(tokens_BT), model.get_init_policy_logprobs(tokens_BT))
    gaps = {}
    for name, split in SPLITS.items():
        split_by(model, split)
        both = (model.get_inference_log_probs(tokens_BT, mask_BT), model.get_init_policy_logprobs(tokens_BT, mask_BT))
        gaps[name] = max(float((a - b * mask_BT).abs().max()) for a, b in zip(both, everywhere, strict=True))
    return gaps


def micro_batches(model: Any, mask_BT: torch.Tensor) -> dict[str, list[int]]:
    """How many there are by split: of this replica alone, and as run."""
    from nemo_ampo.megatron.forward import split_of_update
    from nemo_ampo.megatron.micro_batches import by_tokens, needed_tokens

    counts = {}
    for name, split in SPLITS.items():
        if "tokens_per_micro_batch" in split:
            split_by(model, split)
            alone = by_tokens(needed_tokens(mask_BT), split["tokens_per_micro_batch"])
            counts[name] = [len(alone), len(split_of_update(model, mask_BT))]
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
