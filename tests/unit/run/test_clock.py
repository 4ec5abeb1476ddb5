"""Seconds, memory and use of the cards by phase, over a counter that counts what is asked of it."""

from __future__ import annotations

import pytest
import torch

from nemo_ampo.job.plan import gpus_of_job
from nemo_ampo.ranks import OneProcess
from nemo_ampo.rehearse.sizes import MODELS, parameters_of
from nemo_ampo.run.clock import Clock, Gpus


class Memory:
    """What torch.cuda keeps count of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = 0
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)

    def take(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def reset(self) -> None:
        self.peak = self.held


class Fullest(OneProcess):
    """Another rank holds a gigabyte more."""

    def highest(self, values: list[int]) -> list[int]:
        return [value + 10**9 for value in values]

    def gather(self, rows: list[int]) -> list[int]:  # type: ignore[override]
        return rows * 2


def test_each_phase_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, clock = Memory(monkeypatch), Clock(Gpus(2, 100, 1e6))
    memory.take(5 * 10**9)  # the weights
    with clock("rollout"):
        memory.take(10**9)
        memory.take(-(10**9))
    with pytest.raises(KeyError), clock("update"):
        memory.take(3 * 10**9)
        memory.take(-(2 * 10**9))
        raise KeyError
    with clock("judge_wait"):
        pass
    expected = {"memory/rollout_gb": 6.0, "memory/update_gb": 8.0, "memory/judge_wait_gb": 6.0}
    found = clock.gpu_metrics([], OneProcess())
    assert found == expected, "without a row that was trained on there is no speed"
    assert clock.gpu_metrics([], Fullest())["memory/update_gb"] == 9.0


def test_speed_is_counted_over_all_replicas_and_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(Gpus(count=4, parameters=1000, flops=1e6))
    with clock("rollout"):
        now[0] += 6
    with clock("update"):
        now[0] += 2
    found = clock.gpu_metrics([30, 50], Fullest())
    assert found["throughput/tokens_per_s_per_gpu"] == 160 / 8 / 4
    assert found["throughput/update_mfu"] == pytest.approx(6 * 1000 * 160 / 2 / 4 / 1e6)
    assert clock.time_metrics(12) == {
        **{"time/rollout_s": 6, "time/update_s": 2, "time/step_s": 8, "throughput/rollout_tokens_per_s": 2}
    }


def test_on_a_cpu_there_is_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("asked"))
    clock = Clock()
    with clock("update"):
        pass
    assert clock.gpu_metrics([8], OneProcess()) == {} and set(clock.seconds) == {"update"}


@pytest.mark.parametrize(
    ("card", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_card_is_known_by_its_name(card: str, flops: float | None) -> None:
    facts = MODELS["qwen2.5_7b"]
    assert gpus_of_job(card, 8, facts) == Gpus(8, parameters_of(facts), flops)
