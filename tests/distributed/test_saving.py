"""Checkpoints of a real model: other layouts, a full disk on two ranks, kill -9 in a save loop."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nemo_process import run_nemo

from nemo_ampo.model_folder.facts import facts_of
from nemo_ampo.rehearse.sizes import parameters_on, state_bytes

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
SMALL_DISK_BYTES = 3_200_000
"""Room for one checkpoint of the tiny model and a part of the next."""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    folder = tmp_path_factory.mktemp("small_disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saving")
    finished = run_nemo([HERE / "saving_jobs.py", folder, small_disk or "-"])
    assert finished.status == 0, finished.out[-2000:] + finished.err[-6000:]
    return json.loads((folder / "results.json").read_text())


LAYOUTS = {
    "data 2": (2, 1, 1, False),
    "tensor 2": (2, 2, 1, False),
    "pipeline 2": (2, 1, 2, False),
    "bf16, data 2": (2, 1, 1, True),
    "bf16, tensor 2": (2, 2, 1, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_through_another_layout_changes_no_bit(results: dict[str, Any], layout: str) -> None:
    assert results[layout]["equal"]
    assert results[layout]["tensors"] > 30, "weights, fp32 copies and two moments of each"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_knows_the_states_of_the_fullest_rank(results: dict[str, Any], layout: str) -> None:
    ranks, tensor, pipeline, half = LAYOUTS[layout]
    facts = facts_of(
        {
            "model_type": "qwen2",
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 640,
            "max_position_embeddings": 1024,
        }
    )
    largest = max(parameters_on(facts, stage, tensor, pipeline) for stage in range(pipeline))
    planned = state_bytes(largest, half, ranks // tensor // pipeline)
    measured = results[layout]["memory"]
    for name, value in zip(("weights", "gradients", "optimizer"), planned, strict=True):
        assert value == pytest.approx(measured[name], rel=0.02), name


def test_a_damaged_checkpoint_is_passed_over_and_a_run_without_a_good_one_is_not_begun_anew(results: dict[str, Any]) -> None:
    damaged = results["damaged"]
    assert damaged["step"] == 3
    told = "\n".join(damaged["said"])
    assert "step-000004 is damaged and ignored (rank 0: content of optimizer/__0_0.distcp differs from its hash)" in told
    assert "step-000003 is incomplete and ignored" in told and "continuing from" in told
    assert damaged["refused"].endswith("none of its checkpoints can be continued from; move it away to start anew")


def test_a_checkpoint_packed_as_nemo_file_is_the_same_model(results: dict[str, Any]) -> None:
    assert results["packed equals restored"] is True


def test_a_full_disk_is_an_alarm_on_every_rank_and_the_old_checkpoint_stays(
    results: dict[str, Any], small_disk: Path | None
) -> None:
    if small_disk is None:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    full = results["full disk"]
    first, second, third = full["metrics"]
    assert first["checkpoint/failed_saves"] == 0 and first["checkpoint/bytes"] > 1_000_000
    assert second == {"checkpoint/failed_saves": 1.0} and third == {"checkpoint/failed_saves": 2.0}
    alarms = [line for line in full["said"].splitlines() if line.startswith("ALARM")]
    assert [line.split(" not written")[0] for line in alarms] == [f"ALARM: checkpoint of step {s}" for s in (2, 3, 4)]
    assert "a checkpoint needs" in alarms[0] and "a checkpoint needs" not in alarms[1]
    assert all("the one of step 1 stays" in line for line in alarms)
    assert full["stopped"].startswith("checkpoint.max_failed_saves: 3 saves in a row failed")
    assert full["files"] == ["step-000001"], "nothing half written is left"
    assert results["after full disk"]["step"] == 1


def test_killed_in_a_save_loop_the_latest_always_loads(results: dict[str, Any]) -> None:
    rows = results["killed"]
    restored = [r for r in rows if "restored" in r]
    assert len(restored) == 11 and all(r["whole"] for r in restored)
    assert restored[0]["restored"] == 0
    for i, row in enumerate(rows):
        if "restored" in row and i:
            assert row["restored"] >= rows[i - 1]["saved"], "a published checkpoint was lost"
