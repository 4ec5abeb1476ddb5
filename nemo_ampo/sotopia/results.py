"""Means over finished SOTOPIA episodes, in the layout the authors' evaluation writes, so that published files aggregate.

Each episode counts three times: for the actor, for its partner, and for the average of both. Standard deviations are those
of the population. An episode without scores is left out of every mean and counted as failed: a result that does not say
how many those are must not be published.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ampo.errors import DataError
from nemo_ampo.sotopia.dimensions import DIMENSIONS, OVERALL

FAILED_REWARD = -100
"""What the authors' evaluation writes as last reward of an episode it could not score."""


@dataclass(frozen=True)
class MeanStd:
    """Mean and population standard deviation; NaN of nothing."""

    mean: float
    std: float


Table = dict[str, MeanStd]
"""``overall`` and each dimension."""


@dataclass(frozen=True)
class EpisodeMeans:
    """Aggregated episodes.

    Attributes:
        episodes: that entered the means.
        failed: left out, because they were not scored.
        actor, partner, average: one table each.
    """

    episodes: int
    failed: int
    actor: Table
    partner: Table
    average: Table


def aggregate(episodes: Sequence[Mapping[str, Any]]) -> EpisodeMeans:
    """Means over the scored ones of ``episodes``.

    Args:
        episodes: records with ``actor_role``, ``rewards``, ``agent1_scores`` and ``agent2_scores``; a score is a pair of
            reasoning and number.

    Raises:
        DataError: a scored record lacks a dimension.
    """
    scored = [e for e in episodes if is_scored(e)]
    pairs = [_actor_and_partner(e) for e in scored]
    actors, partners = [a for a, _ in pairs], [p for _, p in pairs]
    averages = [{k: (a[k] + p[k]) / 2 for k in a} for a, p in pairs]
    return EpisodeMeans(len(scored), len(episodes) - len(scored), *(_table(rows) for rows in (actors, partners, averages)))


def hard_only(episodes: Sequence[Mapping[str, Any]], hard_ids: Collection[int]) -> list[Mapping[str, Any]]:
    """Episodes of the hard set: listed by id, or flagged in their own record."""
    return [e for e in episodes if e["env_id"] in hard_ids or e.get("hard")]


def is_scored(episode: Mapping[str, Any]) -> bool:
    """False for an episode whose evaluation failed."""
    return bool(episode["agent1_scores"]) and episode["rewards"][-1] != FAILED_REWARD


def _actor_and_partner(episode: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    seats = ("agent1", "agent2") if episode["actor_role"] == "agent1" else ("agent2", "agent1")
    actor, partner = (_scores(episode, seat) for seat in seats)
    return actor, partner


def _scores(episode: Mapping[str, Any], seat: str) -> dict[str, float]:
    given = episode[f"{seat}_scores"]
    missing = [name for name in DIMENSIONS if name not in given]
    if missing:
        raise DataError(f"episode with env_id {episode['env_id']}: {seat}_scores lacks {', '.join(missing)}")
    scores = {name: float(given[name][1]) for name in DIMENSIONS}
    return {OVERALL: statistics.fmean(scores.values())} | scores


def _table(rows: Sequence[Mapping[str, float]]) -> Table:
    return {name: _mean_std([row[name] for row in rows]) for name in (OVERALL, *DIMENSIONS)}


def _mean_std(values: Sequence[float]) -> MeanStd:
    if not values:
        return MeanStd(float("nan"), float("nan"))
    return MeanStd(statistics.fmean(values), statistics.pstdev(values))
