"""One optimizer step of the actor against autograd on the transformers model it was converted from."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", ["paper", "left out", "heavy", "dual", "dr-grpo", "dapo", "gspo"])
def test_loss_and_gradient_are_those_of_the_formula(measured: dict[str, Any], case: str) -> None:
    """Also: the gradient is divided by the two micro-batches there are, or by the tokens of both together."""
    row = measured["update"][case]
    assert row["nemo"]["loss"] == pytest.approx(row["loss"], abs=2e-6)
    assert row["nemo"]["grad_norm"] == pytest.approx(row["grad_norm"], rel=2e-5)


def test_metrics_are_measured(measured: dict[str, Any]) -> None:
    metrics = measured["update"]["paper"]["nemo"]
    assert 0.1 < metrics["clip_fraction"] < 0.6
    assert metrics["ratio_max"] > 1.2
    assert metrics["kl"] > 0.05


def test_metrics_follow_the_algorithm(measured: dict[str, Any]) -> None:
    update = {name: row["nemo"] for name, row in measured["update"].items()}
    assert update["dual"]["capped_fraction"] > 0 == update["paper"]["capped_fraction"]
    assert "kl" not in update["dapo"]
    assert [row["skipped_updates"] for row in update.values()] == [0] * len(update)


def test_reference_policy_stays_put(measured: dict[str, Any]) -> None:
    row = measured["reference"]
    assert row["moved"] > 0.1
    assert row["reference_error"] < 2e-5
    assert row["policy_untouched"]


def test_eps_reaches_the_optimizer(measured: dict[str, Any]) -> None:
    assert set(measured["eps"]) == {2e-8}
