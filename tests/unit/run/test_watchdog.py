"""Ranks that are stopped, hang, or leave, among others that wait for them; real processes over gloo."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_ampo.run.watchdog import FIRST_SIGN_S, HANG_S, STATUS, Sign, verdict
from nemo_ampo.serve.local import free_port

JOB = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from nemo_ampo.run.watchdog import leave_ranks, watch_ranks

folder, silence = Path(sys.argv[1]), float(sys.argv[2])
watch_ranks(silence, float(sys.argv[3]))
dist.init_process_group("gloo")
rank = dist.get_rank()
for step in range(100_000):
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, step)
    (folder / f"step{rank}").write_text(str(step))
    if (folder / "end").exists() and step >= 20 and min(told) >= int((folder / "end").read_text()):
        break
    if (folder / f"hang{rank}").exists():
        (folder / f"hanging{rank}").touch()
        def read_from_a_dead_disk():
            time.sleep(600)
        read_from_a_dead_disk()
    time.sleep(0.01)
leave_ranks(0)
if rank == 0:
    time.sleep(2 * silence)  # says goodbye late
"""


class Job:
    """Three ranks of :data:`JOB`, the first of which holds the meeting point."""

    def __init__(self, folder: Path, silence_s: float, hang_s: float) -> None:
        self.folder = folder
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port("127.0.0.1")),
            "WORLD_SIZE": "3",
        }
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", JOB, str(folder), str(silence_s), str(hang_s)],
                env=environment | {"RANK": str(rank)},
                stderr=(folder / f"stderr{rank}").open("w"),
            )
            for rank in range(3)
        ]
        self.after(3)

    def step(self) -> int:
        """The last one that all ranks did."""
        files = [self.folder / f"step{rank}" for rank in range(3)]
        return min(int(file.read_text() or -1) if file.exists() else -1 for file in files)

    def after(self, steps: int) -> None:
        """Wait until that many steps are done."""
        wait_until(lambda: self.step() >= steps)

    def lines(self) -> list[str]:
        """What the watchdogs of all ranks said."""
        texts = [(self.folder / f"stderr{rank}").read_text() for rank in range(3)]
        return [line for text in texts for line in text.splitlines() if line.startswith("error: ")]


@contextmanager
def job(folder: Path, silence_s: float, hang_s: float = HANG_S) -> Iterator[Job]:
    started = Job(folder, silence_s, hang_s)
    try:
        yield started
    finally:
        for process in started.ranks:
            process.kill()
            process.wait()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def end_at(folder: Path, step: int) -> None:
    """The job ends after that step; its ranks read the number at any moment, so that it is there at once or not at all."""
    (folder / "end.new").write_text(str(step))
    (folder / "end.new").rename(folder / "end")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_in_one_line_and_the_others_end(tmp_path: Path, stopped: int) -> None:
    """Rank 0 holds the meeting point, so that nobody hears of anybody when it stops."""
    with job(tmp_path, silence_s=2.0) as running:
        running.after(running.step() + 100)  # all have heard of each other
        victim = running.ranks[stopped]
        victim.send_signal(signal.SIGSTOP)
        others = [process for process in running.ranks if process is not victim]
        assert [process.wait(timeout=60) for process in others] == [STATUS, STATUS]
        named = {line for line in running.lines() if f"rank {stopped} (" in line and f"pid {victim.pid})" in line}
        assert named and named == set(running.lines())
        assert victim.poll() is None


EARLY = """
import sys, time
from pathlib import Path
from nemo_ampo.run import watchdog

watchdog.watch_ranks(float(sys.argv[2]))
while len(watchdog._watchdog._signs) < 3:
    time.sleep(0.01)
Path(sys.argv[1], f"heard{watchdog._watchdog._rank}").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_rank_that_stops_before_the_job_has_met_is_named_too(tmp_path: Path, stopped: int) -> None:
    """In what comes before torch's meeting, such as the main rank's first call of a judge; without torchrun."""
    (tmp_path / "early.py").write_text(EARLY)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": "3"}
    command = [sys.executable, str(tmp_path / "early.py"), str(tmp_path), "5.0"]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        wait_until(lambda: all((tmp_path / f"heard{rank}").exists() for rank in range(3)))
        ranks[stopped].send_signal(signal.SIGSTOP)
        said = [ranks[rank].communicate(timeout=60)[1] for rank in range(3) if rank != stopped]
        assert any(f"error: rank {stopped} (" in text and f"pid {ranks[stopped].pid})" in text for text in said), said
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_rank_that_pauses_for_less_than_the_limit_and_one_that_goes_early_are_left_alone(tmp_path: Path) -> None:
    with job(tmp_path, silence_s=6.0) as running:
        for process in running.ranks:
            process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            process.send_signal(signal.SIGCONT)
        reached = running.step()
        running.after(reached + 20)
        end_at(tmp_path, reached + 40)
        assert [process.wait(timeout=60) for process in running.ranks] == [0, 0, 0] and running.lines() == []


@pytest.mark.slow
def test_a_rank_that_hangs_alive_is_named_with_its_place(tmp_path: Path) -> None:
    """Its signs of life go on: long computations look the same, until all others wait far too long."""
    with job(tmp_path, silence_s=20.0, hang_s=8.0) as running:
        (tmp_path / "hang2").touch()
        wait_until((tmp_path / "hanging2").exists)
        assert STATUS in [process.wait(timeout=60) for process in running.ranks]
        pattern = r"rank 2 \(.*\) stands still at .*read_from_a_dead_disk for \d+ s, and all others wait"
        assert any(re.search(pattern, line) for line in running.lines())


@pytest.mark.slow
def test_ranks_that_compute_on_do_not_mind_a_stopped_torchrun(tmp_path: Path) -> None:
    """Ctrl-Z reaches torchrun alone."""
    (tmp_path / "job.py").write_text(JOB)
    silence_s = 5.0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(free_port("127.0.0.1")), str(tmp_path / "job.py"), str(tmp_path), str(silence_s), "1500"]
    with (tmp_path / "stderr").open("w") as stderr:
        torchrun = subprocess.Popen(launch, stderr=stderr)
    try:
        wait_until((tmp_path / "step1").exists)
        torchrun.send_signal(signal.SIGSTOP)
        time.sleep(2 * silence_s)
        reached = int((tmp_path / "step1").read_text() or 0)
        end_at(tmp_path, reached + 20)
        torchrun.send_signal(signal.SIGCONT)
        status = torchrun.wait(timeout=120)
    finally:
        torchrun.kill()
    said = (tmp_path / "stderr").read_text()
    assert status == 0 and "error: " not in said, said


def heard(**change: object) -> Sign:
    return Sign(**{"count": 1, "who": "node, pid 1", "where": "a.py:1 f"} | change)  # type: ignore[arg-type]


def test_what_is_given_up_and_what_is_not() -> None:
    """By the rules of the module, over random jobs: nobody alive and moving is ever given up, nobody dead is overlooked."""
    draw = random.Random(3)
    given_up = 0
    for _ in range(2000):
        size, silence = draw.randrange(2, 9), draw.choice([5.0, 60.0, 300.0, 3600.0])
        own = draw.randrange(size)
        silent = {rank: draw.choice([0.0, 0.5, 0.99]) * silence for rank in range(size)}
        signs = {
            rank: heard(
                waits=draw.random() < 0.7,
                still_s=draw.choice([0, 1, HANG_S - 1, HANG_S, 3 * HANG_S]),
                left=draw.choice([None] * 6 + [0]),
            )
            for rank in range(size)
        }
        dead = {rank for rank in range(size) if rank != own and signs[rank].left != 0 and draw.random() < 0.1}
        for rank in dead:
            limit = silence
            if draw.random() < 0.3:
                del signs[rank]
                limit = max(silence, FIRST_SIGN_S)
            silent[rank] = limit * draw.choice([1, 1.5, 100])
        for rank in {rank for rank in signs if rank != own and rank not in dead and draw.random() < 0.1}:
            del signs[rank]
            silent[rank] = max(silence, FIRST_SIGN_S) * draw.choice([0.0, 0.99])
        found = verdict(signs, silent, own, silence)
        if dead:
            assert set(found) == dead
        else:
            still = len(signs) == size and all(sign.still_s >= HANG_S for sign in signs.values())
            hanging = {rank for rank, sign in signs.items() if not sign.waits and sign.left is None}
            expected = hanging if still and 0 < len(hanging) < size else set()
            assert set(found) == expected
        given_up += bool(found)
    assert 300 < given_up < 1900


def test_a_rank_that_ended_with_an_error_is_named_once_the_others_had_time_to_end_too() -> None:
    signs = {0: heard(), 1: heard(left=2)}
    assert verdict(signs, {0: 0.0, 1: 59.0}, 0, 300.0) == {}
    found = verdict(signs, {0: 0.0, 1: 60.0}, 0, 300.0)
    assert found == {1: "ended with status 2, and the others still wait for it"}
    assert verdict({0: heard(), 1: heard(left=0)}, {0: 0.0, 1: 1e9}, 0, 300.0) == {}
