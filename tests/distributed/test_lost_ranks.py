"""One of two ranks refuses, is killed or stops, in every phase of a run: the other ends within a minute."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from lost_ranks import FAULTS, NOBODY_LOST, PHASES, REASON
from nemo_process import HERE, run_nemo

pytestmark = pytest.mark.slow
CASES = [f"{phase}-{fault}" for phase, fault in product(PHASES, FAULTS)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lost")
    finished = run_nemo([HERE / "lost_ranks.py", folder])
    assert finished.status == 0, finished.err[-4000:]
    return json.loads((folder / "ended.json").read_text())


def test_a_job_that_loses_nobody_ends_well(jobs: dict[str, Any]) -> None:
    name = "-".join(NOBODY_LOST)
    assert jobs["statuses"].get(name) == 0, jobs["said"][name]


@pytest.mark.parametrize("case", CASES)
def test_the_other_rank_does_not_wait_for_the_lost_one(jobs: dict[str, Any], case: str) -> None:
    assert jobs["statuses"].get(case, 0) != 0, jobs["said"][case]


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_refuses_says_its_own_reason_once(jobs: dict[str, Any], phase: str) -> None:
    lines = [line for line in jobs["said"][f"{phase}-raise"].splitlines() if REASON in line]
    assert lines == [f"error: rank 1: {REASON}"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_stopped_is_named(jobs: dict[str, Any], phase: str) -> None:
    assert "error: rank 1 (" in jobs["said"][f"{phase}-stop"]
