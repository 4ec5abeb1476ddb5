"""Engine against trainer: what is measured, and the weights that correct for it, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ampo.algo.algorithm import AlgorithmConfig
from nemo_ampo.algo.mismatch import Mismatch, importance_weights, mismatch, mismatch_metrics

# Trainer over engine: ratios 2, 1/2, 1 | 4 (then padding, where both hold rubbish).
RATIOS = torch.tensor([[2.0, 0.5, 1.0], [4.0, 1.0, 1.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
SAMPLING = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, math.nan, 7.0]])
TRAINER = torch.where(MASK, SAMPLING + RATIOS.log(), torch.tensor([[0.0, 0.0, 0.0], [0.0, math.inf, -math.inf]]))


def measure(**knobs: object) -> tuple[list[list[float]], dict[str, float]]:
    given = (TRAINER, SAMPLING, MASK, AlgorithmConfig(**knobs))  # type: ignore[arg-type]
    return importance_weights(*given).tolist(), mismatch_metrics([mismatch(*given)])


def test_what_is_measured_by_hand() -> None:
    weights, metrics = measure()
    assert weights == [[1.0] * 3] * 2
    # |d| of 2 and 1/2 is the same factor 2; k3 of a ratio r is r - 1 - ln r
    k3 = [2 - 1 - math.log(2), 0.5 - 1 + math.log(2), 0.0, 4 - 1 - math.log(4)]
    assert metrics == pytest.approx(
        {
            "engine/logprob_gap": math.log(2 * 2 * 1 * 4) / 4,
            "mismatch/error": (2 + 2 + 1 + 4) / 4,
            "mismatch/kl": sum(k3) / 4,
            "mismatch/sequence_max": max(5 / 3, 4.0),
            "mismatch/weight": 1.0,
            "mismatch/changed_fraction": 0.0,
        }
    )


@pytest.mark.parametrize(
    ("knobs", "weights", "changed"),
    [
        ({"mismatch": "truncate", "mismatch_high": 1.5}, [[1.5, 0.5, 1.0], [1.5, 1, 1]], 2),
        ({"mismatch": "mask", "mismatch_low": 0.6, "mismatch_high": 3.0}, [[2.0, 0.0, 1.0], [0.0, 1, 1]], 2),
        # products over the response: 2 * 1/2 * 1 = 1, and 4
        ({"mismatch": "truncate", "mismatch_level": "sequence", "mismatch_high": 3.0}, [[1.0] * 3, [3.0, 1, 1]], 1),
        ({"mismatch": "mask", "mismatch_level": "sequence", "mismatch_high": 3.0}, [[1.0] * 3, [0.0, 1, 1]], 1),
        ({"mismatch": "truncate", "mismatch_high": 5.0}, [[2.0, 0.5, 1.0], [4.0, 1, 1]], 0),
    ],
)
def test_weights_by_hand(knobs: dict[str, object], weights: list[list[float]], changed: int) -> None:
    found, metrics = measure(**knobs)
    assert found[0] == pytest.approx(weights[0]) and found[1] == pytest.approx(weights[1])
    assert metrics["mismatch/changed_fraction"] == changed / 4
    assert metrics["mismatch/weight"] == pytest.approx((sum(weights[0]) + weights[1][0]) / 4)


@pytest.mark.parametrize("gap", [300.0, -300.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_absurd_gaps_stay_finite(gap: float, level: str) -> None:
    sampling = torch.full((1, 4), -310.0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    rules = AlgorithmConfig(mismatch="truncate", mismatch_level=level, mismatch_high=1e12)  # type: ignore[arg-type]
    weights = importance_weights(sampling + gap, sampling, mask, rules)
    assert weights.isfinite().all() and weights.max() <= math.exp(20) * 1.0001
    assert all(
        math.isfinite(value) for value in mismatch_metrics([mismatch(sampling + gap, sampling, mask, rules)]).values()
    )


def test_a_small_gap_is_not_rounding_noise() -> None:
    """k3 of a gap of 1e-4 is 1e-8 / 2; float32 would give anything from -6e-8 to 6e-8."""
    sampling = torch.full((1, 64), -2.0)
    mask = torch.ones(1, 64, dtype=torch.bool)
    found = mismatch(sampling + 1e-4, sampling, mask, AlgorithmConfig())
    assert mismatch_metrics([found])["mismatch/kl"] == pytest.approx(5e-9, rel=0.01)


def test_weights_are_float32_without_gradient() -> None:
    trainer = TRAINER.bfloat16().requires_grad_()
    weights = importance_weights(trainer, SAMPLING, MASK, AlgorithmConfig(mismatch="truncate"))  # type: ignore[arg-type]
    assert weights.dtype == torch.float32 and not weights.requires_grad


def test_replicas_are_joined_by_their_tokens() -> None:
    parts = [
        Mismatch(3, 1.5, 6.0, 0.3, 2.5, 3.0, 0),
        Mismatch(1, 0.5, 4.0, 0.1, 4.0, 0.5, 1),
        Mismatch(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0),
    ]
    assert mismatch_metrics(parts) == pytest.approx(
        {
            "engine/logprob_gap": 0.5,
            "mismatch/error": 2.5,
            "mismatch/kl": 0.1,
            "mismatch/sequence_max": 4.0,
            "mismatch/weight": 3.5 / 4,
            "mismatch/changed_fraction": 0.25,
        }
    )
    assert mismatch_metrics([parts[2]]) == {}
