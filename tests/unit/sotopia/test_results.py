"""The authors' result files aggregate to the authors' numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_ampo.errors import DataError
from nemo_ampo.sotopia.results import EpisodeMeans, Table, aggregate, hard_only

CASES = json.loads((Path(__file__).parents[2] / "golden" / "eval_result.json").read_text())["cases"]


def assert_table(table: Table, expected: dict[str, Any]) -> None:
    assert set(expected) <= set(table)  # of no episodes the reference prints the overall row alone
    for name in expected:
        row = table[name]
        for value, want in ((row.mean, expected[name]["mean"]), (row.std, expected[name]["std"])):
            assert math.isnan(value) if want is None else value == pytest.approx(want, abs=1e-9), name


def assert_means(means: EpisodeMeans, expected: dict[str, Any], prefix: str) -> None:
    assert means.episodes == expected[f"{prefix}episodes"]
    assert_table(means.actor, expected[f"{prefix}actor"])
    assert_table(means.partner, expected[f"{prefix}partner"])
    assert_table(means.average, expected[f"{prefix}avg"])


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_reference_numbers(case: dict[str, Any]) -> None:
    assert_means(aggregate(case["episodes"]), case["expected"], "")
    assert_means(aggregate(hard_only(case["episodes"], case["hard_ids"])), case["expected"], "hard_")


def test_failed_evaluations_are_counted() -> None:
    """The reference leaves them out in silence (D12); ours says how many."""
    case = next(c for c in CASES if c["name"] == "one_failed_evaluation")
    means = aggregate(case["episodes"])
    assert (means.episodes, means.failed) == (2, 1)


def test_a_missing_dimension_is_named() -> None:
    episode = json.loads(json.dumps(CASES[0]["episodes"][0]))
    del episode["agent2_scores"]["goal"]
    with pytest.raises(DataError, match=r"env_id 0: agent2_scores lacks goal"):
        aggregate([episode])
