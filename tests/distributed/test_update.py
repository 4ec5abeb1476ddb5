"""Two real ranks: the loss of a batch is one number however it is split, and no rank steps on a bad gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/unit/converters"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from tiny_hf import write_model

    folder = tmp_path_factory.mktemp("update")
    hf = write_model(folder / "hf", "qwen2", True)
    convert = ["converters.hf_to_nemo", "--input", str(hf), "--output", str(folder / "model.nemo"), "--no-verify"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(Path(__file__).parent / "update_jobs.py")]
    for command in (convert, [*launch, str(folder)]):
        process = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant"])
def test_a_mean_over_the_batch_does_not_see_replicas_or_micro_batches(ranks: list[dict[str, Any]], aggregate: str) -> None:
    for rank in ranks:
        found = rank[aggregate]
        assert found["loss"] == pytest.approx(found["oracle"]["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(found["oracle"]["grad_norm"], rel=2e-5)
    assert ranks[0][aggregate] == ranks[1][aggregate]


def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_on_any(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        on_one, on_the_other, clean = rank["skip"]
        assert (on_one["skipped"], on_one["moved"]) == (1, 0)
        assert (on_the_other["skipped"], on_the_other["moved"]) == (1, 0)
        assert clean["skipped"] == 0 and clean["moved"] > 1e-4


def test_the_ranks_stay_equal(ranks: list[dict[str, Any]]) -> None:
    first, second = ([step["weights"] for step in rank["skip"]] for rank in ranks)
    assert first == second and all(abs(weights) < 1e9 for weights in first)
