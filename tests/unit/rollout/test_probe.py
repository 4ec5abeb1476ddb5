"""The probe and the release, over an engine of a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from nemo_ampo.rollout.engine import Caps, OnFinish, Request, Response, SamplingSpec, StaleWeightsError, SyncReport
from nemo_ampo.rollout.probe import Probe, ProbeError, probe_gap, released_after, sync_and_probe

PROBE = Probe(((5, 6), (7,)), 3, 0.1, (0,), 0)


@dataclass
class Engine:
    """Answers -1 for each of its tokens; ``late`` sits on the old version."""

    caps: Caps = field(default_factory=lambda: Caps("raw", 8, 99, 99, 300, True))
    late: int = 0
    calls: list[str] = field(default_factory=list)

    def sync(self, weight_version: int) -> SyncReport:
        return SyncReport(weight_version - self.late, 1, 1, 0.0)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        assert sampling.greedy
        self.calls.append("generate")
        return [Response(r.request_id, (4, 4, 0), torch.full((3,), -1.0), "eos") for r in requests]

    def release(self) -> None:
        self.calls.append("release")

    def close(self) -> None: ...


def trainer(value: float) -> object:
    return lambda tokens_BT, _lengths: torch.full((len(tokens_BT), tokens_BT.size(1) - 1), value)


def test_the_gap_counts_drawn_tokens_only() -> None:
    assert probe_gap(Engine(), trainer(-1.25), PROBE) == pytest.approx(0.25)


def test_a_wrong_engine_stops_the_run() -> None:
    sync_and_probe(Engine(), 1, trainer(-1.05), PROBE)
    with pytest.raises(ProbeError, match=r"weights 1 .* differ from the trainer's by 0\.2000 .* allowed 0\.1"):
        sync_and_probe(Engine(), 1, trainer(-1.2), PROBE)
    with pytest.raises(ProbeError, match="nan"):
        sync_and_probe(Engine(), 1, trainer(float("nan")), PROBE)


def test_another_version_stops_the_run() -> None:
    with pytest.raises(StaleWeightsError, match="holds weights 4, expected 5"):
        sync_and_probe(Engine(late=1), 5, trainer(-1.0), PROBE)


def test_an_engine_without_weights_of_its_own_is_not_probed() -> None:
    engine = Engine()
    engine.caps = replace(engine.caps, own_weights=False)
    sync_and_probe(engine, 1, trainer(-9.0), PROBE)
    assert engine.calls == []


def test_memory_comes_back_also_when_drawing_failed() -> None:
    engine = Engine()
    with pytest.raises(RuntimeError, match="boom"), released_after(engine):
        raise RuntimeError("boom")
    assert engine.calls == ["release"]
