from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_ampo.errors import UserError
from nemo_ampo.files import read_jsonl, sha256_of
from nemo_ampo.runlog import RunLog, log_positions, write_provenance


def test_one_line_per_step_after_a_resume(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(5):
        if step == 3:
            positions = log_positions(tmp_path)
        log.metrics(step, {"reward/mean": float(step)})
        log.rollouts(step, [{"text": "a"}, {"text": "b"}])
    again = RunLog(tmp_path, positions=positions)
    again.metrics(3, {"reward/mean": 30.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["reward/mean"]) for r in rows] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert [r["step"] for r in read_jsonl(tmp_path / "rollouts.jsonl")] == [0, 0, 1, 1, 2, 2]


def test_nothing_to_average_is_left_out(tmp_path: Path) -> None:
    RunLog(tmp_path).metrics(0, {"a": float("nan"), "b": 1.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "kind": "train", "b": 1.0}]


def test_a_log_that_ends_before_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    RunLog(tmp_path).metrics(0, {"a": 1.0})
    size = log_positions(tmp_path)["metrics.jsonl"]
    with pytest.raises(UserError, match=rf"metrics\.jsonl: has {size} bytes, the checkpoint was written after {size + 1}"):
        RunLog(tmp_path, positions={"metrics.jsonl": size + 1})


def test_a_new_run_in_an_old_folder_starts_its_logs_anew(tmp_path: Path) -> None:
    RunLog(tmp_path).metrics(0, {"a": 1.0})
    RunLog(tmp_path).metrics(0, {"a": 2.0})
    assert [r["a"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [2.0]


def test_silent_ranks_write_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", active=False).metrics(0, {"a": 1.0})
    assert not (tmp_path / "run").exists()


def test_provenance_names_versions_and_hashes(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text("[]")
    write_provenance(tmp_path, {"run": {"seed": 1}}, {str(data): sha256_of(data)})
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["packages"]["nemo-aligner"] == "0.7.0"
    assert record["data"] == {str(data): "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"}
