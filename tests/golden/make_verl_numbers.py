"""Write ``verl.json``: numbers of an independent library for our advantages, losses, KL estimates and weights.

verl wants newer packages than NeMo allows, so it lives in an environment of its own::

    python3.11 -m venv /tmp/verl && /tmp/verl/bin/pip install verl==0.9.1 orjson
    /tmp/verl/bin/python tests/golden/make_verl_numbers.py

Inputs are drawn here from a fixed seed and stored beside the results; ``tests/unit/test_verl.py`` feeds them to our
functions. Everything is float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import verl
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics, compute_rollout_correction_weights
from verl.workers.config import ActorConfig

AGGREGATES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",  # without a factor of its own it divides by T
}
CLIPS = {
    "ppo": (0.2, 0.2, 1e9),  # verl always caps; so high that it never does
    "higher": (0.2, 0.28, 1e9),
    "dual": (0.2, 0.2, 1.5),
}


def actor(low: float, high: float, cap: float) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=cap,
    )  # fmt: skip


def advantages(rewards_B: Tensor, groups_B: Tensor) -> dict[str, list[float]]:
    """One token per response, so that a mean over tokens is one over responses."""
    one_B1 = torch.ones(len(rewards_B), 1, dtype=torch.float64)
    index = groups_B.numpy().astype(object)

    def of(function: Any, rows: slice = slice(None), **settings: Any) -> list[float]:
        return function(rewards_B[rows, None].clone(), one_B1[rows], index[rows], **settings)[0][:, 0].tolist()

    return {
        "grpo": of(core_algos.compute_grpo_outcome_advantage),
        "dr_grpo": of(core_algos.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
        "rloo": of(core_algos.compute_rloo_outcome_advantage),
        # verl whitens: without the last two rows (one is a group of its own) the mean that it takes off is 0.
        "batch_std": of(core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage, slice(0, 12)),
    }


def with_gradient(loss: Any, logprobs_BT: Tensor) -> dict[str, Any]:
    logprobs_BT.grad = None
    loss[0].backward()
    return {"loss": loss[0].item(), "gradient": logprobs_BT.grad.tolist(), "metrics": loss[1]}


def main() -> None:
    g = torch.Generator().manual_seed(20251122)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rewards_B = torch.rand(14, generator=g, dtype=torch.float64)
    rewards_B[9:12] = 0.75  # a constant group
    groups_B = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2, 2, 3, 3, 3, 4, 0])
    rewards_B[5] = -2.0

    old_BT = -torch.rand(6, 9, generator=g, dtype=torch.float64) * 3
    logprobs_BT = (old_BT + 0.35 * normal(6, 9)).requires_grad_()
    ref_BT = old_BT + 0.5 * normal(6, 9)
    ref_BT[0, :3] = logprobs_BT[0, :3].detach() + torch.tensor([25.0, -25.0, 3.0])
    sampling_BT = old_BT + 0.4 * normal(6, 9)
    advantages_BT = normal(6, 1).expand(6, 9).contiguous()
    mask_BT = (torch.arange(9) < torch.tensor([9, 4, 7, 1, 6, 2])[:, None]).double()

    losses = {}
    for clip, limits in CLIPS.items():
        for ours, theirs in AGGREGATES.items():
            args = (old_BT, logprobs_BT, advantages_BT, mask_BT, theirs, actor(*limits))
            losses[f"{clip} {ours}"] = with_gradient(core_algos.compute_policy_loss_vanilla(*args), logprobs_BT)
    for ours, theirs in AGGREGATES.items():
        args = (old_BT, logprobs_BT, advantages_BT, mask_BT, theirs, actor(0.1, 0.15, 1e9))
        losses[f"gspo {ours}"] = with_gradient(core_algos.compute_policy_loss_gspo(*args), logprobs_BT)

    weights = {}
    for name, (level, threshold) in {
        "truncate token": ("token", 1.2),
        "truncate sequence": ("sequence", 1.2),
        "mask token": ("token", "0.7_1.3"),
        "mask sequence": ("sequence", "0.7_1.3"),
    }.items():
        found, _ = compute_rollout_correction_weights(old_BT - sampling_BT, mask_BT, level, threshold)
        weights[name] = found.tolist()
    corrected = core_algos.compute_policy_loss_vanilla(
        old_BT, logprobs_BT, advantages_BT, mask_BT, "token-mean", actor(*CLIPS["dual"]),
        rollout_is_weights=torch.tensor(weights["truncate token"], dtype=torch.float64),
    )  # fmt: skip
    losses["dual token_mean truncated"] = with_gradient(corrected, logprobs_BT)

    kl = {}
    for kind in ("k1", "k2", "k3"):
        kl[kind] = core_algos.kl_penalty(logprobs_BT.detach(), ref_BT, kind).tolist()

    inputs = {
        "rewards_B": rewards_B, "groups_B": groups_B, "logprobs_BT": logprobs_BT.detach(), "old_BT": old_BT,
        "ref_BT": ref_BT, "sampling_BT": sampling_BT, "advantages_BT": advantages_BT, "mask_BT": mask_BT,
    }  # fmt: skip
    result = {
        "meta": {"verl": verl.__version__, "torch": torch.__version__, "clips": CLIPS, "gspo_clip": [0.1, 0.15]},
        "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
        "advantages": advantages(rewards_B, groups_B),
        "losses": losses,
        "kl": kl,
        "weights": weights,
        "mismatch": {k: v for k, v in compute_offpolicy_metrics(old_BT, sampling_BT, mask_BT).items() if "kl" in k},
    }
    Path(__file__).with_name("verl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
