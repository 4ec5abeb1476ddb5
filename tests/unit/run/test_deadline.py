from __future__ import annotations

import pytest

from nemo_ampo.errors import ConfigError
from nemo_ampo.run.deadline import DEFAULT_SAVE_RESERVE_S, Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_longest_step_and_the_reserve_must_still_fit() -> None:
    clock = Clock()
    deadline = Deadline(1100.0, reserve_s=20.0, clock=clock)
    clock.now = 1030.0  # a step of 30 s: 1030 + 30 + 20 < 1100
    assert not deadline.is_near()
    clock.now = 1040.0  # one of 10 s, but another of 30 s may come: 1040 + 30 + 20 < 1100
    assert not deadline.is_near()
    clock.now = 1050.0  # 1050 + 30 + 20 = 1100: it would end with the job
    assert deadline.is_near()


def test_without_a_limit_there_is_always_time() -> None:
    clock = Clock()
    deadline = Deadline(None, clock=clock)
    clock.now = 1e12
    assert not deadline.is_near()


def test_the_job_says_when_it_ends() -> None:
    assert Deadline.of_job({"SLURM_JOB_END_TIME": "1000"}).is_near()
    assert not Deadline.of_job({"SLURM_JOB_END_TIME": "99999999999"}).is_near()
    assert not Deadline.of_job({}).is_near()
    import time

    soon = str(time.time() + DEFAULT_SAVE_RESERVE_S / 2)
    assert Deadline.of_job({"SLURM_JOB_END_TIME": soon}).is_near()
    assert not Deadline.of_job({"SLURM_JOB_END_TIME": soon, "AMPO_SAVE_RESERVE_S": "1"}).is_near()
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME: expected a number"):
        Deadline.of_job({"SLURM_JOB_END_TIME": "tomorrow"})
