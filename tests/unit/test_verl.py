"""Our GRPO family against verl 0.9.1's numbers; ``tests/golden/make_verl_numbers.py`` wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_ampo.algo.advantage import group_levels, grpo_advantage
from nemo_ampo.algo.algorithm import PRESETS, AlgorithmConfig, Baseline, Correction, ModeLevel, Ratio, Scale
from nemo_ampo.algo.loss import Surrogate, kl_estimate, policy_loss, surrogate, token_weights, weighted_sum
from nemo_ampo.algo.mismatch import importance_weights, mismatch, mismatch_metrics

VERL = json.loads((Path(__file__).resolve().parents[1] / "golden" / "verl.json").read_text(encoding="utf-8"))
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def given(name: str) -> Tensor:
    return torch.tensor(VERL["inputs"][name], dtype=torch.long if name == "groups_B" else torch.float64)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sample_level(rules: AlgorithmConfig, rows: slice = slice(None)) -> Tensor:
    rewards_B, groups_B = given("rewards_B")[rows], given("groups_B")[rows]
    return group_levels(rewards_B, torch.ones_like(groups_B), torch.ones_like(rewards_B), groups_B, rules=rules).sample_B


def test_advantages() -> None:
    expected = {name: tensor(values) for name, values in VERL["advantages"].items()}
    torch.testing.assert_close(grpo_advantage(given("rewards_B"), given("groups_B")), expected["grpo"], **CLOSE)
    for preset, name in (("grpo", "grpo"), ("dapo", "grpo"), ("gspo", "grpo"), ("dr-grpo", "dr_grpo"), ("rloo", "rloo")):
        torch.testing.assert_close(sample_level(PRESETS[preset]), expected[name], **CLOSE)


def test_batch_standard_deviation() -> None:
    rules = AlgorithmConfig(advantage=ModeLevel.grpo, scale=Scale.batch_std, baseline=Baseline.group_mean)
    # verl adds 1e-8 to the variance, we 1e-6 to the standard deviation.
    expected = tensor(VERL["advantages"]["batch_std"])
    torch.testing.assert_close(sample_level(rules, slice(0, 12)), expected, rtol=5e-6, atol=1e-12)


def our_tokens(case: str, logprobs_BT: Tensor) -> Surrogate:
    kind = case.split()[0]
    low, high, cap = (*VERL["meta"]["gspo_clip"], 1e9) if kind == "gspo" else VERL["meta"]["clips"][kind]
    return surrogate(
        logprobs_BT,
        given("old_BT"),
        given("advantages_BT"),
        given("mask_BT"),
        low,
        high,
        dual_clip=cap if cap < 1e9 else None,
        ratio="sequence" if kind == "gspo" else "token",
    )


@pytest.mark.parametrize("case", VERL["losses"])
def test_losses_and_gradients(case: str) -> None:
    expected = VERL["losses"][case]
    logprobs_BT, mask_BT = given("logprobs_BT").requires_grad_(), given("mask_BT")
    tokens = our_tokens(case, logprobs_BT)
    loss_BT = tokens.loss_BT
    if case.endswith("truncated"):
        loss_BT = loss_BT * tensor(VERL["weights"]["truncate token"])
    loss = weighted_sum(loss_BT, token_weights(mask_BT, case.split()[1]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), **CLOSE)
    assert logprobs_BT.grad is not None
    torch.testing.assert_close(logprobs_BT.grad, tensor(expected["gradient"]), **CLOSE)
    count = mask_BT.sum()
    assert float(tokens.clipped_BT.sum() / count) == pytest.approx(expected["metrics"]["actor/pg_clipfrac"], abs=1e-6)
    assert float(tokens.capped_BT.sum() / count) == pytest.approx(expected["metrics"]["actor/pg_clipfrac_lower"], abs=1e-6)


def test_every_kind_of_clip_acts() -> None:
    metrics = {case: row["metrics"] for case, row in VERL["losses"].items()}
    assert all(metrics[f"{kind} token_mean"]["actor/pg_clipfrac"] > 0 for kind in ("ppo", "higher", "gspo"))
    assert metrics["dual token_mean"]["actor/pg_clipfrac_lower"] > 0
    assert len({round(row["loss"], 9) for row in VERL["losses"].values()}) == len(VERL["losses"])


@pytest.mark.parametrize("case", [case for case in VERL["losses"] if case.startswith(("ppo", "higher"))])
def test_policy_loss_is_the_same_number(case: str) -> None:
    kind, aggregate = case.split()
    low, high, _ = VERL["meta"]["clips"][kind]
    inputs = (given("logprobs_BT"), given("old_BT"), given("advantages_BT")[:, 0], given("mask_BT"))
    loss, metrics = policy_loss(*inputs, low, high, aggregate)
    assert float(loss) == pytest.approx(VERL["losses"][case]["loss"], abs=1e-6)
    assert float(metrics["approx_kl"]) == pytest.approx(VERL["losses"][case]["metrics"]["actor/ppo_kl"], abs=1e-6)


@pytest.mark.parametrize("kind", VERL["kl"])
def test_kl_estimates(kind: str) -> None:
    torch.testing.assert_close(kl_estimate(given("logprobs_BT"), given("ref_BT"), kind), tensor(VERL["kl"][kind]), **CLOSE)


@pytest.mark.parametrize("case", VERL["weights"])
def test_importance_weights(case: str) -> None:
    correction, level = case.split()
    rules = AlgorithmConfig(
        mismatch=Correction(correction),
        mismatch_level=Ratio(level),
        mismatch_low=0.7,
        mismatch_high=1.3 if correction == "mask" else 1.2,
    )
    mask_BT = given("mask_BT")
    weights_BT = importance_weights(given("old_BT"), given("sampling_BT"), mask_BT, rules)
    torch.testing.assert_close(weights_BT.double() * mask_BT, tensor(VERL["weights"][case]), **CLOSE)


def test_mismatch_kl() -> None:
    found = mismatch(given("old_BT"), given("sampling_BT"), given("mask_BT"), AlgorithmConfig())
    assert mismatch_metrics([found])["mismatch/kl"] == pytest.approx(VERL["mismatch"]["k3_kl"], abs=1e-6)
