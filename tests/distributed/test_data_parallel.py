"""Two real ranks over gloo: upstream's REINFORCE trains both on everything; ours gives each its own share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import run_nemo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    finished = run_nemo([Path(__file__).parent / "chunk_jobs.py", out], ranks=2)
    assert finished.status == 0, finished.err[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_upstream_trains_every_rank_on_everything(ranks: list[dict[str, Any]]) -> None:
    """The defect our trainer works around (nemo-aligner 0.7.0, ReinforceRolloutBatch.chunk ignores rank and split)."""
    assert [r["upstream"] for r in ranks] == [list(range(8))] * 2


def test_ours_trains_each_rank_on_its_own(ranks: list[dict[str, Any]]) -> None:
    assert [r["ours"] for r in ranks] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_collectives(ranks: list[dict[str, Any]]) -> None:
    assert [r["gathered"] for r in ranks] == [list(range(8))] * 2
    assert [r["shared"] for r in ranks] == ["from 0", "from 1"]
    assert [r["any"] for r in ranks] == [[True, False]] * 2
    assert [r["main"] for r in ranks] == [True, False]


def test_a_rank_joins_the_threads_of_its_groups_before_it_ends(ranks: list[dict[str, Any]]) -> None:
    """One of them that asks for the interpreter while it goes down ends the process in SIGABRT."""
    assert [name for r in ranks for name in r["threads"] if "gloo" in name] == []
