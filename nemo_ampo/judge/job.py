"""The judge of one process as part of its job: limits, spending and cache are shared with all other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_ampo.chat.job import shared
from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.client import Judge, recording_of
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.prompts import load_prompt


@contextmanager
def open_judge(config: JudgeConfig, run_dir: str | Path) -> Iterator[JudgeThread]:
    """A running judge that stays within the limits of the whole job; spending is remembered in the run folder.

    Raises:
        ConfigError: key, prompt, cache or replay cannot be used.
        UserError: the main rank does not appear.
    """
    with shared(config, run_dir, recording_of(config, load_prompt(config.prompt))) as job:
        second = None
        if config.second is not None:
            second = Judge(config.second_judge(), limiter=job.limiter, cache=job.cache)
        with JudgeThread(Judge(config, limiter=job.limiter, cache=job.cache), second, job) as judge:
            yield judge
