"""Each thing that can be wrong with a node is said under the node's name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_backend import HfBackend
from serving import served
from small_disk import small_disk

from nemo_ampo.job.preflight import NOT_FIT, different, problems
from nemo_ampo.world.judge_server import demo_judge_process

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "token").write_text("7-0\n")


def arguments(shared: Path, **changes: object) -> Namespace:
    fit = {"shared": shared, "token": "7-0", "gpus": 0, "run_gb": 0.0, "judge_url": "", "rollout_url": "", "needs": ""}
    return Namespace(**(fit | changes))


def found(shared: Path, **changes: object) -> list[str]:
    return list(problems(arguments(shared, **changes), "n1"))


def test_a_fit_node(tmp_path: Path) -> None:
    assert found(tmp_path) == []


def test_an_engine_that_is_not_installed(tmp_path: Path) -> None:
    assert found(tmp_path, needs="json") == []
    (problem,) = found(tmp_path, needs="no_such_engine")
    assert problem.startswith("no_such_engine, the AMPO stage's engine, is not installed")
    assert sorted(p.name for p in (tmp_path / "slurm").iterdir()) == ["token"]


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    assert found(tmp_path, token="8-0")[0].endswith("run_dir must be shared by all nodes")
    (tmp_path / "slurm" / "token").unlink()
    assert "is it on a file system that all nodes share?" in found(tmp_path)[0]


def test_a_full_disk(tmp_path: Path) -> None:
    [said] = found(tmp_path, run_gb=1e12)
    assert said.endswith(f"GB free in {tmp_path}, 1e+12 are what the run may still write there (AMPO_MIN_FREE_GB)")


def test_a_small_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "small", 256) as disk:
        monkeypatch.setenv("TMPDIR", str(disk.path))
        [said] = found(tmp_path)
    assert said.endswith(f"GB free in {disk.path}, 1 are needed; set TMPDIR to a folder with room")


def test_missing_accelerators(tmp_path: Path) -> None:
    assert found(tmp_path, gpus=99)[0].endswith("GPUs visible, 99 expected (AMPO_GPUS_PER_NODE)")


def test_a_taken_port_counts_on_the_first_node_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "cannot be used" in found(tmp_path)[0]
        monkeypatch.setenv("RANK", "1")
        assert found(tmp_path) == []


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    with demo_judge_process() as url:
        yield url


def test_the_judge(tmp_path: Path, judge: str) -> None:
    assert found(tmp_path, judge_url=judge) == [] == found(tmp_path, judge_url=f"{judge}?api-version=1")
    assert "cannot be reached" in found(tmp_path, judge_url="http://127.0.0.1:9/v1")[0]


def test_the_rollout_server(tmp_path: Path) -> None:
    with served(HfBackend(8, 16, 32)) as url:
        assert found(tmp_path, rollout_url=url) == []
    assert "rollout server http://127.0.0.1:9 cannot be reached" in found(tmp_path, rollout_url="http://127.0.0.1:9")[0]


def test_the_odd_node_is_named() -> None:
    usual, odd = {"torch": "2", "python": "3.11"}, {"torch": "1", "python": "3.11"}
    reports = [{"node": n, "versions": usual} for n in ("a", "a", "c")] + [{"node": "b", "versions": odd}]
    assert different(reports) == ["b: torch is 1, elsewhere 2"]
    assert different(reports[:3]) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_meet_or_say_who_is_absent(tmp_path: Path, ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nemo_ampo.job.preflight", "--shared", str(tmp_path), "--token", "7-0", "--gpus", "0"]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [*command, "--timeout-s", "5" if ranks == 1 else "60"],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    if ranks == 2:
        assert [process.returncode for process in processes] == [0, 0], errors
        assert "preflight: ok: 2 ranks, CPU" in errors[0]
    else:
        assert processes[0].returncode == NOT_FIT
        assert "no word from ranks 1 within 5 s" in errors[0]
