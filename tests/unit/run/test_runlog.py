from __future__ import annotations

import ast
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ampo.chat import wire
from nemo_ampo.errors import UserError
from nemo_ampo.files import read_jsonl, sha256_of
from nemo_ampo.run.runlog import RunLog, log_hashes, log_positions, write_provenance


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


def test_a_log_that_was_edited_before_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    """The next checkpoint would vouch for the edited line."""
    log = RunLog(tmp_path)
    log.metrics(0, {"a": 1.0})
    positions = log_positions(tmp_path)
    hashes = log_hashes(tmp_path, positions)
    log.metrics(1, {"a": 3.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"a": 3.0', '"a": 4.0'))
    RunLog(tmp_path, positions=positions, hashes=hashes)
    path.write_text(path.read_text().replace('"a": 1.0', '"a": 2.0'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: its first \d+ bytes are not those .* damaged or edited"):
        RunLog(tmp_path, positions=positions, hashes=hashes)


def test_a_new_run_in_an_old_folder_starts_its_logs_anew(tmp_path: Path) -> None:
    RunLog(tmp_path).metrics(0, {"a": 1.0})
    RunLog(tmp_path).metrics(0, {"a": 2.0})
    assert [r["a"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [2.0]


def test_silent_ranks_write_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", active=False).metrics(0, {"a": 1.0})
    assert not (tmp_path / "run").exists()


def test_provenance_names_versions_and_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("NOT_NCCL_X", "1")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 23, 4))
    data = tmp_path / "rows.json"
    data.write_text("[]")
    write_provenance(tmp_path, {"run": {"seed": 1}}, {str(data): sha256_of(data)})
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["nccl"]["version"] == "2.23.4" and record["nccl"]["NCCL_IB_HCA"] == "mlx5"
    assert not any("NOT" in name for name in record["nccl"])
    assert record["packages"]["nemo-aligner"] == "0.7.0"
    talks = ast.parse(inspect.getsource(wire))
    imported = {alias.name for node in talks.body if isinstance(node, ast.Import) for alias in node.names}
    others = imported - set(sys.stdlib_module_names)
    assert "openai" in others and all(record["packages"][name] for name in others), "those that talk"
    assert record["data"] == {str(data): "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"}


def test_a_disk_that_takes_no_more_is_said_once_and_its_lines_wait(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from nemo_ampo.run.runlog import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
with RunLog(Path({str(tmp_path)!r})) as log:
    for step in range(30):
        if step == 5: limit(300)
        if step == 20: limit(resource.RLIM_INFINITY)
        log.metrics(step, {{"reward/mean": float(step)}})
        log.rollouts(step, [{{"text": "x" * 20}}])
        assert len(log.history()) == step + 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"ALARM: cannot write {tmp_path}/"), done.stderr
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert [row["step"] for row in read_jsonl(tmp_path / name)] == list(range(30))


def test_lines_that_never_found_room_are_counted_at_the_end(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from nemo_ampo.run.runlog import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunLog(Path({str(tmp_path)!r})) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
    for step in range(9):
        log.metrics(step, {{"reward/mean": float(step)}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"ALARM: 8 lines of the run log in {tmp_path} were never written"
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0]


def test_what_is_not_finite_is_no_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics(0, {"a": math.inf, "b": 1.0})
    log.rollouts(0, [{"logprob": -math.inf, "parts": [{"x": math.nan}]}])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "kind": "train", "b": 1.0}]
    assert read_jsonl(tmp_path / "rollouts.jsonl") == [{"step": 0, "logprob": None, "parts": [{"x": None}]}]


def test_hashes_are_of_the_bytes_up_to_a_position(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics(0, {"a": 1.0})
    positions = log_positions(tmp_path)
    before = log_hashes(tmp_path, positions)
    assert before == {"metrics.jsonl": sha256_of(tmp_path / "metrics.jsonl")}
    log.metrics(1, {"a": 1.0})
    assert log_hashes(tmp_path, positions) == before
    assert log_hashes(tmp_path, {"metrics.jsonl": 10**6}) == {"metrics.jsonl": ""}
