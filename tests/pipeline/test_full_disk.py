"""A whole AMPO stage whose checkpoints go to a disk that fills up, and is enlarged later."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from stage_runs import ROOT, SMALL_STEPS, Quickstart

from nemo_ampo.files import read_jsonl
from nemo_ampo.overrides import override
from nemo_ampo.world.judge_server import demo_judge_process

pytestmark = pytest.mark.slow
STEPS, FAILURES = 6, 3
ROOM_FOR_ONE = 7_000_000
"""Bytes; a checkpoint of the tiny model has 5 million."""
ROOM_FOR_ALL = 64_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(mount_command(folder, f"size={ROOM_FOR_ONE}"), capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def mount_command(folder: Path, options: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]


def resize(folder: Path, files: int) -> None:
    """Bytes for everything, and so many files."""
    options = f"remount,size={ROOM_FOR_ALL},nr_inodes={files}"
    subprocess.run(mount_command(folder, options), check=True, capture_output=True)


def contents(folder: Path) -> dict[str, str]:
    """Name below ``folder`` -> sha256, of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stage:
    """A stage under way, and the lines it says."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.alarmed, self.began = threading.Event(), threading.Event()
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.said.append(line.rstrip("\n"))
            if line.startswith("BC 1/"):
                self.began.set()
            if line.startswith("ALARM"):
                self.alarmed.set()

    def end(self) -> int:
        try:
            status = self.process.wait(timeout=300)
        finally:
            self.process.kill()
        self._reader.join(30)
        return status


def test_a_full_disk_is_an_alarm_then_a_clean_stop_and_the_same_command_continues(
    quickstart: Quickstart, disk: Path, tmp_path: Path
) -> None:
    run_dir, checkpoints = tmp_path / "ampo", disk / "checkpoints"
    log = run_dir / "metrics.jsonl"
    with demo_judge_process() as url:
        command = [
            *(sys.executable, "-m", "recipes.ampo", "--config-name", "tiny", f"run.dir={run_dir}", f"judge.base_url={url}"),
            override("run.init_from", quickstart.folder / "bc" / "policy.nemo"),
            override("data.train", quickstart.folder / "world" / "rl_train.jsonl"),
            *(f"checkpoint.dir={checkpoints}", f"checkpoint.max_failed_saves={FAILURES}"),
            *(f"trainer.reinforce.max_steps={STEPS}", "trainer.reinforce.save_interval=1"),
            *SMALL_STEPS,
        ]
        full = Stage(command)
        assert full.alarmed.wait(300), full.said
        before = contents(checkpoints)
        # Bytes enough from now on, but not for the files of one more checkpoint: it runs out in the middle of writing.
        used = os.statvfs(disk)
        resize(disk, used.f_files - used.f_ffree + 8)
        status = full.end()
        said = "\n".join(full.said)
        assert status == 2, said

        alarms = [line for line in full.said if line.startswith("ALARM")]
        assert [line.split(" not written")[0] for line in alarms] == [f"ALARM: checkpoint of step {s}" for s in (2, 3, 4)]
        assert all("the one of step 1 stays" in line for line in alarms)
        assert "a checkpoint needs" in alarms[0] and "No space left on device" in alarms[-1]
        assert f"error: checkpoint.max_failed_saves: {FAILURES} saves in a row failed" in said
        assert "Make room, then the same command continues" in said
        assert [row["step"] for row in read_jsonl(log)] == [0, 1, 2, 3], "training went on meanwhile"
        assert [row.get("checkpoint/failed_saves") for row in read_jsonl(log)] == [None, 0, 1, 2]
        assert contents(checkpoints) == before and {Path(name).parts[0] for name in before} == {"step-000001"}

        resize(disk, 10_000)
        again = Stage(command)
        status = again.end()
    assert status == 0, again.said
    assert any("resume: continuing from" in line and line.endswith("step-000001") for line in again.said)
    assert [row["step"] for row in read_jsonl(log)] == list(range(STEPS))
    assert (checkpoints / f"step-{STEPS:06d}" / "manifest.json").exists() and (run_dir / "policy.nemo").exists()


def test_a_run_folder_that_fills_up_costs_no_training(quickstart: Quickstart, disk: Path, tmp_path: Path) -> None:
    world, run_dir, steps = quickstart.folder / "world", disk / "bc", 12
    command = [
        *(sys.executable, "-m", "recipes.bc", "--config-name", "tiny", f"run.dir={run_dir}"),
        *(override("run.init_from", quickstart.folder / "nemo" / "base.nemo"), f"checkpoint.dir={tmp_path / 'checkpoints'}"),
        *(override("data.train", world / "bc_train.jsonl"), override("data.heldout", world / "bc_heldout.jsonl")),
        *(f"trainer.sft.{name}={steps}" for name in ("max_steps", "val_check_interval", "save_interval")),
    ]
    full = Stage(command)
    assert full.began.wait(300), full.said
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert full.end() == 2, full.said
    assert full.said[-1].startswith(f"error: cannot write {run_dir / 'policy.nemo'}: "), full.said
    assert not any("Traceback" in line for line in full.said), full.said
    filler.unlink()
    again = Stage(command)
    assert again.end() == 0, again.said
    assert (run_dir / "policy.nemo").exists()
