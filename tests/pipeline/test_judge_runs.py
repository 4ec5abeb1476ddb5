"""The judge of real AMPO stages: a replay is the same run, and a spent budget ends one at a checkpoint."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from stage_runs import ENDS, Quickstart, ends_named, naming_one_end

from nemo_ampo.checkpoint.nemo_file import unpack_assets
from nemo_ampo.checkpoint.store import Store
from nemo_ampo.files import read_jsonl
from nemo_ampo.world.judge_server import DemoJudgeOptions, demo_judge_process

pytestmark = pytest.mark.slow
SMALL = [
    *("rollout.prompts_per_step=2", "rollout.group_size=8", "rollout.max_new_tokens=96", "model.global_batch_size=16"),
    *("model.micro_batch_size=4", "model.reinforce.forward_micro_batch_size=8", "trainer.reinforce.max_steps=2"),
    *("judge.backoff_initial_s=0.01", "judge.backoff_max_s=0.05"),
]
OF_THE_CALLS = ("judge/", "time/", "throughput/", "checkpoint/")


def unpack(nemo_file: Path, folder: Path) -> Path:
    with tarfile.open(nemo_file) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_replay_is_the_same_run_without_a_call(quickstart: Quickstart, tmp_path: Path) -> None:
    recorded, replayed, cache = tmp_path / "recorded", tmp_path / "replayed", tmp_path / "cache.sqlite"
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes((quickstart.folder / "hf" / "bc" / "system_prompt.txt").read_bytes() + b"\r\n")
    policy = naming_one_end(quickstart.folder / "bc" / "policy.nemo", tmp_path)
    small = [*SMALL, f"data.system_prompt={prompt}", f"run.init_from={policy}"]
    with demo_judge_process(DemoJudgeOptions(fail_rate=0.5)) as url:
        finished = quickstart.ampo(recorded, url, *small, f"judge.cache={cache}")
    assert finished.status == 0, finished.err
    # The replay starts from the same policy, unpacked; where it lies nothing is written, and nothing of it is removed.
    unpacked = unpack(policy, tmp_path / "policy")
    before = {path: path.read_bytes() for path in unpacked.rglob("*") if path.is_file()}
    given = (f"judge.replay={cache}", f"run.init_from={unpacked}")
    finished = quickstart.ampo(replayed, "http://127.0.0.1:9/v1", *small, *given)
    assert finished.status == 0, finished.err
    assert {path: path.read_bytes() for path in unpacked.rglob("*") if path.is_file()} == before
    assert not [path.name for path in replayed.iterdir() if path.name.startswith(".init-")]
    packed = unpack_assets(recorded / "policy.nemo", tmp_path / "assets")
    assert (packed / "system_prompt.txt").read_bytes() == prompt.read_bytes(), "what it was trained on travels along"
    assert ends_named(recorded / "policy.nemo", tmp_path) == ENDS, "and where its replies end"
    retries = [name for name in read_jsonl(recorded / "metrics.jsonl")[-1] if name.startswith("judge/retries/")]
    assert retries, "the judge did fail now and then"
    assert read_jsonl(replayed / "metrics.jsonl")[-1]["judge/calls"] == 0

    def rollouts(folder: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_jsonl(folder / "rollouts.jsonl")]

    def metrics(folder: Path) -> list[dict[str, float]]:
        rows = read_jsonl(folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith(OF_THE_CALLS)} for row in rows]

    assert rollouts(recorded) == rollouts(replayed) and len(rollouts(recorded)) == 32
    assert json.dumps(metrics(recorded)) == json.dumps(metrics(replayed))


def test_a_spent_budget_ends_the_run_at_a_checkpoint_with_one_line(quickstart: Quickstart, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with demo_judge_process() as url:
        finished = quickstart.ampo(folder, url, *SMALL, "judge.max_calls=20")
    assert finished.status == 2
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: judge.max_calls: the 20 calls of this job are spent")
    assert json.loads((folder / "judge_spent.json").read_text())["calls"] == 20
    assert len(read_jsonl(folder / "metrics.jsonl")) == 1
    assert [checkpoint.step for checkpoint in Store(folder / "checkpoints").resumable()] == [1]
