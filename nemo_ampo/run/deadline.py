"""Will the next step still fit into the job's time?

The batch scripts put the end of the allocation into ``SLURM_JOB_END_TIME``. What a step takes is measured as the run goes;
what a save takes is not known before the first one, so a reserve stands in for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from nemo_ampo.errors import ConfigError

END_TIME = "SLURM_JOB_END_TIME"
SAVE_RESERVE = "AMPO_SAVE_RESERVE_S"
DEFAULT_SAVE_RESERVE_S = 120.0


class Deadline:
    """Asked once at every step boundary.

    Args:
        end_time: Unix time at which the allocation ends, None without a limit.
        reserve_s: seconds kept for saving and leaving.
        clock: Unix time now.
    """

    def __init__(
        self, end_time: float | None, reserve_s: float = DEFAULT_SAVE_RESERVE_S, clock: Callable[[], float] = time.time
    ) -> None:
        self._end_time = end_time
        self._reserve_s = reserve_s
        self._clock = clock
        self._last = clock()
        self._longest_s = 0.0

    @classmethod
    def of_job(cls, environment: Mapping[str, str] = os.environ) -> Deadline:
        """The deadline of the Slurm job this process belongs to; none outside of one.

        Raises:
            ConfigError: a variable does not hold a number.
        """
        end_time = _number(environment, END_TIME)
        reserve_s = _number(environment, SAVE_RESERVE)
        return cls(end_time, DEFAULT_SAVE_RESERVE_S if reserve_s is None else reserve_s)

    def is_near(self) -> bool:
        """True when a step as long as the longest so far, and the reserve, end after the allocation does.

        The time since the previous call (at first: since construction) counts as one step.
        """
        now = self._clock()
        self._longest_s = max(self._longest_s, now - self._last)
        self._last = now
        return self._end_time is not None and now + self._longest_s + self._reserve_s >= self._end_time


def _number(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name, "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a number of seconds, got {text!r}") from None
