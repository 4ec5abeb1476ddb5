from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ampo.checkpoint.config import BestMode, CheckpointConfig
from nemo_ampo.checkpoint.store import (
    MANIFEST,
    JobLayout,
    Manifest,
    Store,
    damaged,
    list_files,
    measure,
    steps_to_keep,
)
from nemo_ampo.errors import UserError

ONE = JobLayout(world=1, tensor=1, pipeline=1, data=1)


def write(store: Store, step: int, score: float | None = None, content: bytes = b"w" * 100) -> Path:
    folder = store.begin(step)
    for name in ("model_weights/.metadata", "model_weights/__0_0.distcp", "optimizer/__0_0.distcp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return store.publish(folder, manifest_of(folder, step, score)).path


def manifest_of(folder: Path, step: int, score: float | None) -> Manifest:
    return Manifest("ampo", step, {"step": step}, ONE, {"run.seed": 1}, score, {}, measure(folder, list_files(folder)))


def steps(store: Store) -> list[int]:
    return [c.step for c in store.scan()[0]]


def test_what_is_published_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "checkpoints")
    path = write(store, 25, score=0.5)
    (checkpoint,), incomplete = store.scan()
    assert checkpoint.path == path and path.name == "step-000025" and incomplete == []
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.score, manifest.layout, manifest.bytes) == (25, 0.5, ONE, 300)
    assert set(manifest.files) == {"model_weights/.metadata", "model_weights/__0_0.distcp", "optimizer/__0_0.distcp"}
    assert manifest.has_optimizer
    assert damaged(path, manifest, list(manifest.files)) == []


def test_a_folder_that_was_never_published_is_invisible_and_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store, 1)
    half = store.begin(2)
    (half / "model_weights").mkdir()
    assert steps(store) == [1] and store.scan()[1] == []
    store.sweep()
    assert not half.exists() and steps(store) == [1]


@pytest.mark.parametrize("harm", ["missing", "short", "no manifest", "torn manifest", "other config"])
def test_an_incomplete_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    write(store, 1)
    path = write(store, 2)
    weights, manifest = path / "model_weights" / "__0_0.distcp", path / MANIFEST
    if harm == "missing":
        weights.unlink()
    elif harm == "short":
        os.truncate(weights, 99)
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "torn manifest":
        os.truncate(manifest, manifest.stat().st_size // 2)
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config": {"run.seed": 2}}))
    assert steps(store) == [1]
    assert [c.step for c in store.resumable()] == [1]
    (bad,) = store.scan()[1]
    assert bad.path == path
    expected = {
        "missing": "missing",
        "short": "99 bytes instead of 100",
        "no manifest": "no checkpoint here, manifest.json is missing",
        "torn manifest": "not a checkpoint manifest",
        "other config": "config was changed",
    }
    assert expected[harm] in bad.reason


def test_changed_bytes_of_the_same_size_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = write(store, 1)
    (path / "optimizer" / "__0_0.distcp").write_bytes(b"v" * 100)
    (checkpoint,) = store.scan()[0]
    assert damaged(path, checkpoint.manifest, list(checkpoint.manifest.files)) == ["optimizer/__0_0.distcp"]


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store, 1, content=b"old")
    path = write(store, 1, content=b"newer")
    assert (path / "model_weights" / "__0_0.distcp").read_bytes() == b"newer"
    assert steps(store) == [1] and [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_retention_keeps_last_best_and_every_and_drops_old_optimizer_states(tmp_path: Path) -> None:
    store = Store(tmp_path)
    config = CheckpointConfig(keep_last=3, keep_every=10, keep_best=1)
    for step, score in ((2, 0.1), (4, 0.9), (6, None), (8, 0.2), (10, 0.3), (12, 0.4), (14, 0.5), (16, 0.6)):
        write(store, step, score)
        store.prune(config)
    assert steps(store) == [4, 10, 12, 14, 16]
    assert [c.step for c in store.resumable()] == [16, 14]
    for checkpoint in store.scan()[0]:
        assert (checkpoint.path / "optimizer").exists() == (checkpoint.step >= 14)
        assert (checkpoint.path / "model_weights" / "__0_0.distcp").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:06d}" for s in (4, 10, 12, 14, 16)]


def test_the_best_of_a_loss_is_the_smallest_and_ties_go_to_the_newer() -> None:
    scores = {1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: None}
    base = CheckpointConfig(keep_last=1, keep_best=1)
    assert steps_to_keep(scores, replace(base, best_mode=BestMode.min)) == {3, 5}
    assert steps_to_keep(scores, base) == {1, 5}
    assert steps_to_keep(scores, replace(base, keep_best=0)) == {5}
    assert steps_to_keep(scores, replace(base, keep_best=0, keep_every=2)) == {2, 4, 5}


@given(
    st.dictionaries(st.integers(1, 200), st.none() | st.floats(-1, 1), min_size=1),
    st.integers(1, 4),
    st.integers(0, 50),
    st.integers(0, 3),
)
def test_the_newest_always_stays_and_no_more_than_the_rules_ask_for(
    scores: dict[int, float | None], last: int, every: int, best: int
) -> None:
    kept = steps_to_keep(scores, CheckpointConfig(keep_last=last, keep_every=every, keep_best=best))
    assert max(scores) in kept and kept <= set(scores)
    multiples = sum(1 for s in scores if every and s % every == 0)
    assert len(kept) <= last + best + multiples


def test_a_manifest_of_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="not a checkpoint manifest"):
        Manifest.load(tmp_path / MANIFEST)


SAVE_LOOP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import CheckpointConfig, Store, write
store = Store(Path(sys.argv[1]))
step = max((c.step for c in store.scan()[0]), default=0)
while True:
    step += 1
    write(store, step, content=step.to_bytes(4, "big") * 20_000)
    store.prune(CheckpointConfig(keep_last=1, keep_best=0))
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_newest_published_one_is_whole(tmp_path: Path) -> None:
    store, draw, newest = Store(tmp_path), random.Random(5), 0
    for _ in range(10):
        command = [sys.executable, "-c", SAVE_LOOP, str(tmp_path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            seen = int(process.stdout.readline())
            time.sleep(draw.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            seen = max([seen, *map(int, process.stdout.read().split())])
        (*_, checkpoint) = store.scan()[0]
        assert checkpoint.step >= seen > newest
        newest = checkpoint.step
        assert damaged(checkpoint.path, checkpoint.manifest, list(checkpoint.manifest.files)) == []
        weights = (checkpoint.path / "model_weights" / "__0_0.distcp").read_bytes()
        assert weights == newest.to_bytes(4, "big") * 20_000
