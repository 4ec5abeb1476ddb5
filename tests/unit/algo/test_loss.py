"""Policy loss, KL estimators and entropy: worked numbers, gradients, and what a mask must keep out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_ampo.algo.algorithm import AlgorithmConfig
from nemo_ampo.algo.loss import (
    AGGREGATES,
    KL_KINDS,
    Totals,
    entropy_from_logits,
    kl_estimate,
    policy_loss,
    surrogate,
    token_loss,
    token_weights,
    update_weights,
    weighted_sum,
)
from nemo_ampo.errors import ConfigError

LOG2 = math.log(2)


def rows(*values: list[float], grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def loss_of(
    log_ratio: list[list[float]],
    advantages: list[float],
    mask: list[list[int]] | None = None,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    aggregate: str = "token_mean",
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics and gradient with respect to the log-probabilities; the old ones are all -1."""
    logprobs = (torch.tensor(log_ratio, dtype=torch.float64) - 1).requires_grad_()
    mask_BT = torch.ones_like(logprobs) if mask is None else torch.tensor(mask)
    old = torch.full_like(logprobs, -1.0)
    loss, metrics = policy_loss(logprobs, old, torch.tensor(advantages), mask_BT, *clip, aggregate)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), metrics, logprobs.grad


# KL estimates


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # policy 1/2 and 1/8 against a reference of 1/4 everywhere: x = -ln 2, +ln 2
        ("k1", [LOG2, -LOG2]),
        ("k2", [LOG2**2 / 2, LOG2**2 / 2]),
        ("k3", [0.5 + LOG2 - 1, 2 - LOG2 - 1]),
    ],
)
def test_kl_by_hand(kind: str, expected: list[float]) -> None:
    logprobs, reference = rows([-LOG2, -3 * LOG2]), rows([-2 * LOG2, -2 * LOG2])
    assert kl_estimate(logprobs, reference, kind)[0].tolist() == pytest.approx(expected)


def test_k3_is_the_default() -> None:
    logprobs, reference = rows([-1.0, -2.0]), rows([-1.5, -0.5])
    assert torch.equal(kl_estimate(logprobs, reference), kl_estimate(logprobs, reference, "k3"))


@pytest.mark.parametrize("kind", sorted(KL_KINDS))
def test_no_kl_between_equal_policies(kind: str) -> None:
    logprobs = rows([-0.1, -3.0, -40.0])
    assert kl_estimate(logprobs, logprobs, kind).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", sorted(KL_KINDS))
def test_kl_gradients(kind: str) -> None:
    reference = rows([-1.0, -2.0, -0.5])
    assert torch.autograd.gradcheck(
        lambda logprobs: kl_estimate(logprobs, reference, kind), rows([-2.0, -1.0, -0.7], grad=True)
    )


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_are_unbiased(kind: str) -> None:
    # Averaged over the policy's own distribution they give sum p log(p / q) exactly; k2 is only close to it.
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    exact = (policy * (policy / reference).log()).sum()
    per_token = kl_estimate(policy.log()[None], reference.log()[None], kind)[0]
    assert float((policy * per_token).sum()) == pytest.approx(float(exact))


def verl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The formula as the reference writes it, clamped only at the end."""
    x = reference - logprobs
    return (x.exp() - x - 1).clamp(-10, 10)


def test_k3_agrees_with_the_convention_of_verl() -> None:
    x = torch.linspace(-60, 60, 241, dtype=torch.float64)[None]
    logprobs = torch.full_like(x, -30.0)
    assert torch.allclose(kl_estimate(logprobs, logprobs + x), verl_k3(logprobs, logprobs + x))


@pytest.mark.parametrize("far", [1000.0, 89.0, 21.0, -21.0, -1000.0])
def test_k3_far_from_the_reference_has_a_finite_gradient(far: float) -> None:
    logprobs = torch.tensor([[-5.0, -5.0]], requires_grad=True)
    kl = kl_estimate(logprobs, torch.tensor([[-5.0 + far, -5.5]]))
    assert kl[0, 0] == 10
    kl.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 0] == 0
    # d/dlogp (exp(x) - x - 1) = 1 - exp(x)
    assert logprobs.grad[0, 1] == pytest.approx(1 - math.exp(-0.5))


@pytest.mark.parametrize("kind", sorted(KL_KINDS))
def test_masked_kl_keeps_infinities_out(kind: str) -> None:
    logprobs = rows([-1.0, -math.inf, math.nan, -1e30], grad=True)
    kl = kl_estimate(logprobs, rows([-2.0, -math.inf, -1.0, 1e30]), kind, rows([1, 0, 0, 0]))
    assert kl[0, 1:].tolist() == [0, 0, 0]
    kl.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[0, 0] != 0
    assert logprobs.grad[0, 1:].tolist() == [0, 0, 0]


def test_kl_refuses_unknown_kinds_and_other_shapes() -> None:
    with pytest.raises(ConfigError, match=r"kl_kind.*k1, k2, k3.*'k4'"):
        kl_estimate(rows([0.0]), rows([0.0]), "k4")
    with pytest.raises(ValueError, match=r"ref_logprobs_BT \(1, 2\)"):
        kl_estimate(rows([0.0]), rows([0.0, 0.0]))


# aggregates

VALUES = rows([1.0, 2.0, 3.0], [10.0, math.nan, math.inf], [math.nan, math.nan, math.nan])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("name", "expected"), [("token_mean", 16 / 4), ("sequence_mean", (2 + 10) / 2), ("constant", (6 + 10) / 3 / 2)]
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_aggregates_by_hand(name: str, expected: float, mask_dtype: torch.dtype) -> None:
    assert AGGREGATES[name](VALUES, MASK.to(mask_dtype)) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "weights"), [("token_mean", [1 / 4, 1 / 4]), ("sequence_mean", [1 / 6, 1 / 2])])
def test_aggregates_weigh_tokens(name: str, weights: list[float]) -> None:
    values = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    AGGREGATES[name](values, MASK).backward()
    assert values.grad is not None
    assert [values.grad[0, 0].item(), values.grad[1, 0].item()] == pytest.approx(weights)
    assert values.grad[MASK == 0].tolist() == [0] * 5


@pytest.mark.parametrize("name", sorted(AGGREGATES))
def test_nothing_in_the_mask_is_zero_without_gradient(name: str) -> None:
    values = rows([math.nan, 2.0], grad=True)
    total = AGGREGATES[name](values, torch.zeros(1, 2))
    total.backward()
    assert total == 0
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 0]]


# policy loss


def test_loss_of_the_sampling_policy_is_the_negative_advantage() -> None:
    loss, metrics, gradient = loss_of([[0.0, 0.0], [0.0, 0.0]], [2.0, -1.0])
    assert loss == pytest.approx(-(2 + 2 - 1 - 1) / 4)
    # A plain policy gradient: -A / number of tokens.
    assert gradient.tolist() == [[-0.5, -0.5], [0.25, 0.25]]
    assert {name: float(value) for name, value in metrics.items()} == {
        "clip_fraction": 0.0,
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
        "approx_kl": 0.0,
    }


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        pytest.param(1.1, 1.0, -1.1, -1.1, id="inside, good"),
        pytest.param(1.1, -1.0, 1.1, 1.1, id="inside, bad"),
        pytest.param(1.5, 1.0, -1.3, 0.0, id="above, good: clipped at 1 + 0.3"),
        pytest.param(1.5, -1.0, 1.5, 1.5, id="above, bad: free"),
        pytest.param(0.5, 1.0, -0.5, -0.5, id="below, good: free"),
        pytest.param(0.5, -1.0, 0.8, 0.0, id="below, bad: clipped at 1 - 0.2"),
        pytest.param(1.5, 0.0, 0.0, 0.0, id="no advantage"),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    value, metrics, gradient = loss_of([[math.log(ratio)]], [advantage], clip=(0.2, 0.3))
    assert value == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)
    assert metrics["clip_fraction"] == (slope == 0 and advantage != 0)


def test_metrics_by_hand() -> None:
    log_ratio = [[math.log(1.5), math.log(0.5), 0.0, 9.0]]
    _, metrics, _ = loss_of(log_ratio, [1.0], [[1, 1, 1, 0]])
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["approx_kl"] == pytest.approx(-math.log(0.75) / 3)


def test_the_largest_ratio_is_taken_inside_the_mask() -> None:
    _, metrics, _ = loss_of([[math.log(0.5), 5.0]], [1.0], [[1, 0]])
    assert metrics["ratio_max"] == pytest.approx(0.5)


@pytest.mark.parametrize(("aggregate", "expected"), [("token_mean", -0.5), ("sequence_mean", 0.0)])
def test_long_sequences_weigh_more_under_the_token_mean(aggregate: str, expected: float) -> None:
    loss, _, _ = loss_of([[0.0] * 3, [0.0] * 3], [1.0, -1.0], [[1, 1, 1], [1, 0, 0]], aggregate=aggregate)
    assert loss == pytest.approx(expected)


def verl_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> dict[str, Tensor]:
    """The reference's loss, clip fraction and KL, as its formulas stand."""
    ratio = (logprobs - old).exp()
    free = -advantages[:, None] * ratio
    clipped = -advantages[:, None] * ratio.clamp(1 - clip, 1 + clip)

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    return {
        "loss": mean(torch.max(free, clipped)),
        "clip_fraction": mean((clipped > free).double()),
        "approx_kl": mean(old - logprobs),
    }


def test_agrees_with_the_convention_of_verl() -> None:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(6, 9, generator=generator, dtype=torch.float64) * 3
    logprobs = old + torch.randn(6, 9, generator=generator, dtype=torch.float64) * 0.3
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = (torch.rand(6, 9, generator=generator) < 0.7).double()
    loss, metrics = policy_loss(logprobs, old, advantages, mask, 0.2, 0.2, "token_mean")
    expected = verl_loss(logprobs, old, advantages, mask, 0.2)
    assert 0 < expected["clip_fraction"] < 1
    assert {"loss": loss.item()} | {k: float(metrics[k]) for k in ("clip_fraction", "approx_kl")} == pytest.approx(
        {k: float(v) for k, v in expected.items()}
    )


@pytest.mark.parametrize("aggregate", sorted(AGGREGATES))
def test_loss_gradients(aggregate: str) -> None:
    old = rows([-1.0, -2.0, -0.5], [-0.3, -0.4, -2.0])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages = torch.tensor([0.7, -1.3], dtype=torch.float64)
    logprobs = (old + rows([0.1, 0.5, 0.0], [-0.1, 0.6, -0.7])).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: policy_loss(values, old, advantages, mask, 0.2, 0.3, aggregate)[0], logprobs
    )


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_nothing_outside_the_mask_leaks(aggregate: str) -> None:
    logprobs = rows([-1.0, math.nan, -math.inf, 500.0], grad=True)
    old = rows([-1.1, -1.0, -math.inf, -500.0])
    loss, metrics = policy_loss(logprobs, old, torch.ones(1), rows([1, 0, 0, 0]), 0.2, 0.2, aggregate)
    loss.backward()
    assert logprobs.grad is not None
    ratio = math.exp(0.1)
    assert loss.item() == pytest.approx(-ratio)
    assert logprobs.grad[0].tolist() == pytest.approx([-ratio, 0, 0, 0])
    assert float(metrics["ratio_max"]) == pytest.approx(ratio)
    assert float(metrics["approx_kl"]) == pytest.approx(-0.1)


@pytest.mark.parametrize("aggregate", sorted(AGGREGATES))
def test_an_all_masked_batch_is_zero_with_zero_gradient(aggregate: str) -> None:
    loss, metrics, gradient = loss_of([[0.3, 900.0]], [1.0], [[0, 0]], aggregate=aggregate)
    assert loss == 0
    assert gradient.tolist() == [[0, 0]]
    assert [float(value) for value in metrics.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize(("log_ratio", "advantage"), [(500.0, -1.0), (500.0, 1.0), (-500.0, 1.0), (-500.0, -1.0)])
def test_absurd_ratios_stay_finite(log_ratio: float, advantage: float) -> None:
    loss, metrics, gradient = loss_of([[log_ratio]], [advantage])
    assert loss.isfinite()
    assert gradient.item() == 0
    assert metrics["ratio_max"] <= math.exp(20) * 1.000001


# token weights


def test_weights_of_tokens_by_hand() -> None:
    """Three tokens and one, in the mask; four rows and ten tokens in the job; Dr. GRPO's constant 8."""
    totals = Totals(tokens=10, sequences=4)
    found = {name: token_weights(MASK, name, totals, 8)[:, 0].tolist() for name in AGGREGATES}
    assert found["token_mean"] == pytest.approx([1 / 10, 1 / 10, 0])
    assert found["sequence_mean"] == pytest.approx([1 / 12, 1 / 4, 0])
    assert found["constant"] == pytest.approx([1 / 32, 1 / 32, 0])


@pytest.mark.parametrize("name", sorted(AGGREGATES))
@pytest.mark.parametrize(("replicas", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
def test_one_mean_however_the_batch_is_split(name: str, replicas: int, micro_batches: int) -> None:
    """What Megatron does: mean over the micro-batches of a replica, then over the replicas."""
    g = torch.Generator().manual_seed(2)
    values = torch.randn(12, 7, generator=g, dtype=torch.float64)
    mask = torch.rand(12, 7, generator=g) < torch.linspace(0, 1, 12)[:, None]
    rules = AlgorithmConfig(aggregate=name, aggregate_over="batch", constant_tokens=7)  # type: ignore[arg-type]
    losses = []
    for rows, own in zip(values.chunk(replicas), mask.chunk(replicas), strict=True):
        weights = update_weights(own, micro_batches, rules, Totals.of(mask), replicas)
        parts = zip(rows.chunk(micro_batches), weights.chunk(micro_batches), strict=True)
        losses.append(sum(float(weighted_sum(v, w)) for v, w in parts) / micro_batches)
    assert sum(losses) / replicas == pytest.approx(float(AGGREGATES[name](values, mask)))


def test_a_mean_over_micro_batches_depends_on_the_split() -> None:
    values, mask = rows([1.0, 1.0, 1.0], [4.0, 0.0, 0.0]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    weights = update_weights(mask, 2, AlgorithmConfig(), None, 1)
    assert float(weighted_sum(values, weights)) / 2 == pytest.approx((1 + 4) / 2)
    assert float(AGGREGATES["token_mean"](values, mask)) == pytest.approx(7 / 4)


# the other surrogates


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "capped"),
    [
        pytest.param(5.0, -1.0, 3.0, True, id="bad, far above: capped at 3"),
        pytest.param(2.0, -1.0, 2.0, False, id="bad, above: free"),
        pytest.param(5.0, 1.0, -1.2, False, id="good: the cap is for bad tokens"),
        pytest.param(5.0, -2.0, 6.0, True, id="the cap scales with the advantage"),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, capped: bool) -> None:
    logprobs = rows([math.log(ratio)], grad=True)
    found = surrogate(logprobs, rows([0.0]), rows([advantage]), torch.ones(1, 1), 0.2, 0.2, dual_clip=3.0)
    found.loss_BT.sum().backward()
    assert logprobs.grad is not None
    assert found.loss_BT.item() == pytest.approx(loss)
    assert bool(found.capped_BT) == capped
    assert (logprobs.grad.item() == 0) == (capped or advantage > 0)


def test_sequence_ratio_by_hand() -> None:
    """Log-ratios 0.2 and 0.4 (and rubbish in the padding): ratio exp(0.3) for both tokens, each with its own gradient."""
    logprobs = rows([0.2, 0.4, 50.0], [0.0, math.nan, math.nan], grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = surrogate(logprobs, torch.zeros(2, 3).double(), rows([-1.0], [1.0]), mask, 0.9, 9.0, ratio="sequence")
    assert found.ratio_BT[0, :2].tolist() == pytest.approx([math.exp(0.3)] * 2)
    assert found.loss_BT[0].tolist() == pytest.approx([math.exp(0.3)] * 2 + [0.0])
    found.loss_BT.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([math.exp(0.3)] * 2 + [0.0])
    assert logprobs.grad[1].tolist() == pytest.approx([-1.0, 0.0, 0.0])


def test_each_token_of_a_sequence_answers_for_its_own_advantage() -> None:
    logprobs = rows([0.2, 0.4], grad=True)
    inputs = (logprobs, rows([0.0, 0.0]), rows([-1.0, 0.0]), torch.ones(1, 2), 0.9, 9.0)
    surrogate(*inputs, ratio="sequence").loss_BT.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([math.exp(0.3), 0.0])


def test_a_sequence_is_clipped_as_a_whole() -> None:
    """Token ratios 2 and 1/2 cancel: none is clipped, where both would be on their own."""
    inputs = (rows([math.log(2), -math.log(2)]), rows([0.0, 0.0]), rows([1.0, -1.0]), torch.ones(1, 2), 0.2, 0.2)
    assert surrogate(*inputs).clipped_BT.tolist() == [[True, True]]
    assert surrogate(*inputs, ratio="sequence").clipped_BT.tolist() == [[False, False]]


def test_the_objective_by_hand() -> None:
    """Ratio 1, A = 2: surrogate -2. x = ref - logprob = 1: k2 = 0.5. Entropy 3. Coefficients 0.1 and 0.01."""
    batch = {
        "old_logprobs_BT": rows([-1.0]),
        "ref_logprobs_BT": rows([0.0]),
        "advantages_BT": rows([2.0]),
        "mask_BT": torch.ones(1, 1, dtype=torch.bool),
    }
    rules = {"kl_coef": 0.1, "kl_kind": "k2", "entropy_coef": 0.01}
    by_place = {
        kl: token_loss(rows([-1.0]), rows([3.0]), batch, AlgorithmConfig(kl=kl, **rules)).loss_BT.item()  # type: ignore[arg-type]
        for kl in ("in_loss", "in_reward", "off")
    }
    assert by_place == pytest.approx({"in_loss": -2 + 0.05 - 0.03, "in_reward": -2.03, "off": -2.03})


def test_impossible_surrogates_are_refused() -> None:
    inputs = (rows([0.0]), rows([0.0]), rows([1.0]), torch.ones(1, 1), 0.2, 0.2)
    with pytest.raises(ConfigError, match=r"algorithm\.dual_clip"):
        surrogate(*inputs, dual_clip=1.0)
    with pytest.raises(ConfigError, match=r"algorithm\.ratio.*token, sequence"):
        surrogate(*inputs, ratio="word")


def test_metrics_are_detached() -> None:
    logprobs = rows([-1.0], grad=True)
    loss, metrics = policy_loss(logprobs, rows([-1.0]), torch.ones(1), rows([1]), 0.2, 0.2, "token_mean")
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"aggregate": "mean"}, ConfigError, "algorithm.aggregate: .*token_mean, sequence_mean"),
        ({"clip_low": 1.0}, ConfigError, "algorithm.clip_low"),
        ({"clip_high": -0.1}, ConfigError, "algorithm.clip_high"),
        ({"mask_BT": torch.ones(2, 2)}, ValueError, r"mask_BT \(2, 2\)"),
        ({"old_logprobs_BT": torch.zeros(2, 4)}, ValueError, r"old_logprobs_BT \(2, 4\)"),
        ({"advantages_B": torch.ones(3)}, ValueError, r"advantages_B \[B\].*\(3,\)"),
        ({"advantages_B": torch.ones(2, 3)}, ValueError, r"advantages_B \[B\].*\(2, 3\)"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {
        "logprobs_BT": torch.zeros(2, 3),
        "old_logprobs_BT": torch.zeros(2, 3),
        "advantages_B": torch.ones(2),
        "mask_BT": torch.ones(2, 3),
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregate": "token_mean",
    }
    policy_loss(**arguments)
    with pytest.raises(error, match=words):
        policy_loss(**(arguments | changed))


# entropy


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [
        pytest.param([0.0, 0.0, 0.0, 0.0], math.log(4), id="uniform"),
        pytest.param([math.log(3), 0.0], 2 * LOG2 - 0.75 * math.log(3), id="three to one"),
        pytest.param([7.0, -math.inf, 7.0], LOG2, id="one token ruled out"),
        pytest.param([0.0, -1e9], 0.0, id="certain"),
    ],
)
def test_entropy_by_hand(logits: list[float], entropy: float) -> None:
    assert float(entropy_from_logits(rows(logits)[None])) == pytest.approx(entropy)


def test_entropy_gradients() -> None:
    logits = torch.tensor([[[0.3, -1.2, 2.0], [0.0, 0.5, 0.1]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy_from_logits, logits)


def test_entropy_gradient_stays_finite_where_a_token_is_ruled_out() -> None:
    logits = torch.tensor([[[1.0, -math.inf, 0.0]]], requires_grad=True)
    entropy_from_logits(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0] < 0 < logits.grad[0, 0, 2]


def test_entropy_of_half_precision_logits_is_float32() -> None:
    assert entropy_from_logits(torch.zeros(1, 2, 5, dtype=torch.bfloat16)).dtype == torch.float32


def test_half_precision_is_widened_before_the_exponential() -> None:
    logprobs, old = torch.full((1, 2), -1.0), torch.full((1, 2), -13.0)
    mask, bad = torch.ones(1, 2), torch.tensor([-1.0])
    wide, _ = policy_loss(logprobs, old, bad, mask, 0.2, 0.2, "token_mean")
    half, _ = policy_loss(logprobs.half(), old.half(), bad, mask, 0.2, 0.2, "token_mean")
    assert wide.isfinite() and half == wide
    assert kl_estimate(logprobs.half(), old.half()).dtype == torch.float32


def test_an_empty_batch_has_no_loss() -> None:
    empty = torch.zeros(0, 3)
    loss, metrics = policy_loss(empty, empty, torch.zeros(0), empty, 0.2, 0.2, "sequence_mean")
    assert loss == 0 and metrics["ratio_max"] == 0


def test_the_papers_spelling_of_an_aggregate_is_understood() -> None:
    values, mask = torch.randn(2, 3), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    advantages = torch.tensor([1.0, -2.0])
    for name in ("token_mean", "sequence_mean"):
        ours, papers = (
            policy_loss(values, values - 0.1, advantages, mask, 0.2, 0.2, spelling)[0]
            for spelling in (name, name.replace("_", "-"))
        )
        assert ours == papers
