from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_ampo.rollout.engine import SamplingSpec
from nemo_ampo.rollout.sampling import draw, uniform_draws

SPEC = SamplingSpec(1, (0,))
PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.1])


def tokens(spec: SamplingSpec, draws: list[float], probabilities: torch.Tensor = PROBABILITIES) -> list[int]:
    logits = probabilities.log().expand(len(draws), -1)
    return draw(logits, torch.tensor(draws, dtype=torch.float64), spec)[0].tolist()


def test_each_token_owns_its_share_of_the_unit_interval() -> None:
    assert tokens(SPEC, [0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 0.9999]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_truncation_keeps_the_most_likely_and_shares_the_rest() -> None:
    assert tokens(replace(SPEC, top_k=2), [0.6, 0.7, 0.99]) == [0, 1, 1]  # 2/3 and 1/3
    assert tokens(replace(SPEC, top_p=0.6), [0.6, 0.7, 0.99]) == [0, 1, 1]
    assert tokens(replace(SPEC, top_p=0.01), [0.99]) == [0], "one token always stays"
    assert tokens(replace(SPEC, top_k=3, top_p=0.7), [0.99]) == [1], "top_p counts within top_k"
    assert tokens(replace(SPEC, top_k=2), [0.99], PROBABILITIES.flip(0)) == [3]


def test_temperature_sharpens() -> None:
    cold = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    edges = cold.cumsum(0).tolist()
    half = replace(SPEC, temperature=0.5)
    assert tokens(half, [edges[0] - 0.01, edges[0] + 0.01, edges[2] + 0.005]) == [0, 1, 3]
    assert tokens(replace(SPEC, greedy=True), [0.99]) == [0]


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, temperature=0.5), replace(SPEC, top_k=1), replace(SPEC, greedy=True)])
def test_log_probs_are_the_policys_own_whatever_the_sampling(spec: SamplingSpec) -> None:
    drawn, logprobs = draw(PROBABILITIES.log().unsqueeze(0), torch.tensor([0.3], dtype=torch.float64), spec)
    torch.testing.assert_close(logprobs, PROBABILITIES.log()[drawn])


def test_draws_depend_on_the_rows_own_seed_alone() -> None:
    both, one = uniform_draws([5, 6], 8), uniform_draws([6], 8)
    assert torch.equal(both[1], one[0]) and not torch.equal(both[0], both[1])
    assert torch.equal(uniform_draws([6], 4)[0], one[0, :4])
