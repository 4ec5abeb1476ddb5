"""A second opinion: does another judge rank the same replies alike?

A policy that learns to please its judge drifts away from what a different model would say. Every so many steps the second
judge scores some of the step's replies; the figures go into the log, nothing into the reward.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.config import SecondJudgeConfig
from nemo_ampo.types import DialogueTurn, JudgeRequest, Seat, Verdict


@dataclass(frozen=True)
class FirstOpinion:
    """A reply the first judge has scored.

    Attributes:
        request: what it was asked.
        seat: whose score became the reward.
        score: that score, 0..10.
    """

    request: JudgeRequest
    seat: Seat
    score: float

    @classmethod
    def of(cls, turn: DialogueTurn, answer: str | None, verdict: Verdict) -> FirstOpinion:
        """The verdict on an answer to a turn; only replies with an answer are judged."""
        assert answer is not None
        return cls(JudgeRequest.about(turn, answer), turn.seat, verdict.of(turn.seat))


class SecondJudge:
    """Compares; knows the schedule.

    Args:
        judge: thread of both judges.
        config: how often and how many.
        seed: of the choice of replies.
    """

    def __init__(self, judge: JudgeThread, config: SecondJudgeConfig, seed: int) -> None:
        self._judge, self._config, self._seed = judge, config, seed

    def is_due(self, step: int) -> bool:
        """Whether this step (0-based) is one to compare."""
        return step % self._config.every == 0

    def compare(self, step: int, opinions: Sequence[FirstOpinion], max_wait_s: float = math.inf) -> dict[str, float]:
        """The ``judge/second_*`` metrics of some of a step's replies; waits for the second judge, at most so long.

        ``rank_correlation`` is Spearman's, left out where either judge gives all replies the same score; ``mean_gap`` is
        the second judge's score minus the first's.
        """
        draw = random.Random(f"{self._seed} {step}")
        chosen = draw.sample(list(opinions), min(self._config.samples, len(opinions)))
        outcomes = self._judge.score_all_by_second((opinion.request for opinion in chosen), max_wait_s)
        pairs = [
            (opinion.score, outcome.of(opinion.seat))
            for opinion, outcome in zip(chosen, outcomes, strict=True)
            if isinstance(outcome, Verdict)
        ]
        found = {"samples": float(len(pairs)), "failed": float(len(chosen) - len(pairs))}
        stats = self._judge.second_stats
        found |= {"cost_usd": stats.cost_usd if stats is not None else 0.0}
        return {f"judge/second_{name}": value for name, value in (found | agreement(pairs)).items()}


def agreement(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Rank correlation and gap of (first, second) scores, as far as they are defined."""
    found: dict[str, float] = {}
    if pairs:
        found["mean_gap"] = fmean(second - first for first, second in pairs)
        found["mean_absolute_gap"] = fmean(abs(second - first) for first, second in pairs)
    firsts, seconds = {first for first, _ in pairs}, {second for _, second in pairs}
    if len(firsts) > 1 and len(seconds) > 1:
        from scipy.stats import spearmanr

        correlation = float(spearmanr([first for first, _ in pairs], [second for _, second in pairs]).statistic)
        if math.isfinite(correlation):
            found["rank_correlation"] = correlation
    return found
