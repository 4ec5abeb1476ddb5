"""Run with two ranks: one mean over both replicas, and a gradient that is not finite on one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(folder: Path) -> None:
    from nemo_ampo import compat

    compat.setup("cpu")
    from nemo_ampo.algo.algorithm import AlgorithmConfig
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.config.compose import compose
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import open_session, prepare_config

    nemo = str(folder / "model.nemo")
    overrides = ["model.optim.lr=0.01", "model.global_batch_size=8", "model.micro_batch_size=2"]
    cfg = compose("ampo", "tiny", overrides)
    prepare_config(cfg, folder / "run", nemo, unpack_assets(nemo, folder / "assets"), "cpu")
    session = open_session(cfg, "reinforce", AmpoActor, nemo, 8, keep_reference=False)
    rank = torch.distributed.get_rank()
    batch = whole_batch()
    mine = {name: rows[4 * rank : 4 * rank + 4] for name, rows in batch.items()}
    result: dict[str, Any] = {}
    for aggregate in ("token_mean", "sequence_mean", "constant"):
        # No weight decay and no rate: the weights stay for the next case.
        rules = AlgorithmConfig(aggregate=aggregate, aggregate_over="batch", kl_coef=0.05)  # type: ignore[arg-type]
        result[aggregate] = update(session, mine, rules, lr=0.0) | {"oracle": oracle(folder / "hf", batch, rules)}

    rules = AlgorithmConfig()
    result["skip"] = []
    for poisoned_rank, value in ((1, torch.inf), (0, torch.nan), (None, 0.0)):
        rows = {name: tensor.clone() for name, tensor in mine.items()}
        if rank == poisoned_rank:
            rows["advantages_BT"][1, rows["mask_BT"][1].int().argmax()] = value
        before = [p.detach().clone() for p in session.model.parameters()]
        metrics = update(session, rows, rules, lr=0.01)
        moved = max(float((p.detach() - q).abs().max()) for p, q in zip(session.model.parameters(), before, strict=True))
        total = sum(float(p.detach().double().sum()) for p in session.model.parameters())
        result["skip"].append({"skipped": metrics["skipped_updates"], "moved": moved, "weights": total})
    (folder / f"{rank}.json").write_text(json.dumps(result))


def whole_batch() -> dict[str, torch.Tensor]:
    """Eight rows whose masks grow, so that replicas and micro-batches hold unequal numbers of tokens."""
    g = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(3, 500, (8, 40), generator=g)
    shape = (8, 39)
    return {
        "tokens_BT": tokens_BT,
        "mask_BT": torch.rand(shape, generator=g) < torch.linspace(0.1, 0.9, 8)[:, None],
        "advantages_BT": torch.randn(8, generator=g)[:, None].expand(shape).contiguous(),
        "old_logprobs_BT": -6 + torch.rand(shape, generator=g),
        "ref_logprobs_BT": -6 + torch.rand(shape, generator=g),
    }


def update(session: Any, rows: dict[str, torch.Tensor], rules: Any, lr: float) -> dict[str, float]:
    from nemo_ampo.training.optimise import optimise

    session.model.algorithm = rules
    session.model.prepare_for_training()
    for group in session.optimizer.param_groups:
        group["lr"] = lr
    metrics = optimise(session, rows, clip=1.0)
    session.model.finish_training()
    return metrics


def oracle(hf: Path, batch: dict[str, torch.Tensor], rules: Any) -> dict[str, float]:
    """Loss and gradient norm of the whole batch in one piece, by autograd on the transformers model."""
    from transformers import AutoModelForCausalLM

    from nemo_ampo.algo.loss import entropy_from_logits, token_loss, token_weights, weighted_sum

    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    logits = model(batch["tokens_BT"]).logits[:, :-1].float()
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch["tokens_BT"][:, 1:, None])[..., 0]
    weights = token_weights(batch["mask_BT"], rules.aggregate, None, rules.constant_tokens)
    loss = weighted_sum(token_loss(logprobs, entropy_from_logits(logits), batch, rules).loss_BT, weights)
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    return {"loss": float(loss.detach()), "grad_norm": float(norm)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
