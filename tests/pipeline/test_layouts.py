"""The same AMPO steps on two ranks, split three ways, against one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_runs import Quickstart

from nemo_ampo.demo_judge import demo_judge_process
from nemo_ampo.runlog import read_jsonl

pytestmark = pytest.mark.slow
STEPS = "trainer.reinforce.max_steps=2"
LAYOUTS = {
    "data": [],
    "tensor": ["model.tensor_model_parallel_size=2"],
    "pipeline": ["model.pipeline_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def judge_url() -> Iterator[str]:
    with demo_judge_process() as url:
        yield url


@pytest.fixture(scope="module")
def alone(quickstart: Quickstart, judge_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "ampo"
    finished = quickstart.ampo(folder, judge_url, STEPS)
    assert finished.status == 0, finished.err
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(quickstart: Quickstart, judge_url: str, alone: Path, tmp_path: Path, layout: str) -> None:
    finished = quickstart.ampo(tmp_path / "ampo", judge_url, STEPS, *LAYOUTS[layout], ranks=2)
    assert finished.status == 0, finished.err
    ours, theirs = (read_jsonl(f / "rollouts.jsonl") for f in (tmp_path / "ampo", alone))
    assert len(ours) == len(theirs) == 256
    assert [r["text"] for r in ours] == [r["text"] for r in theirs]
    assert [r["reward"] for r in ours] == [r["reward"] for r in theirs]
    assert [r["advantage"] for r in ours] == pytest.approx([r["advantage"] for r in theirs], abs=1e-6)
    for mine, other in zip(*(read_jsonl(f / "metrics.jsonl") for f in (tmp_path / "ampo", alone)), strict=True):
        assert mine["engine/logprob_gap"] < 1e-5
        for name in ("policy/loss", "policy/kl", "policy/entropy", "policy/grad_norm"):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), name
