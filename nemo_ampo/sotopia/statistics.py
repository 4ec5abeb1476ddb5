"""How sure the numbers are: means with bootstrap intervals by scenario, and paired comparison of two runs.

The five pairings of one scenario share its situation and goals, so their scores hang together; so do the two
seats and the seeds of one pairing. Treating them as independent draws would promise too much. Everything here
therefore resamples, or flips, whole scenarios.

Legend: N episodes, P pairs, C scenarios, K columns (:data:`COLUMNS`), B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ampo.errors import DataError
from nemo_ampo.sotopia.dimensions import DIMENSIONS, OVERALL
from nemo_ampo.types import Seat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

COLUMNS = (OVERALL, *DIMENSIONS)
"""Columns of every table: the mean of the seven dimensions, then each of them."""

LEVEL = 0.95
RESAMPLES = 10_000
MAX_EXACT_SCENARIOS = 14
"""Up to so many scenarios (the hard set has 14) all sign patterns are tried and the p-value is exact."""


@dataclass(frozen=True)
class ScoredEpisode:
    """What the statistics need of one scored episode.

    Attributes:
        env_id: of the pairing, 0..449.
        seat: of the actor.
        seed: of the run.
        scenario: the situation; pairings of equal ``scenario`` are resampled together.
        hard: whether the pairing belongs to SOTOPIA-hard.
        actor, partner: scores under :data:`COLUMNS`.
    """

    env_id: int
    seat: Seat
    seed: int
    scenario: str
    hard: bool
    actor: tuple[float, ...]
    partner: tuple[float, ...]

    @property
    def average(self) -> tuple[float, ...]:
        """Mean of actor and partner, column by column."""
        return tuple((a + p) / 2 for a, p in zip(self.actor, self.partner, strict=True))


@dataclass(frozen=True)
class Estimate:
    """One mean and how sure it is.

    Attributes:
        mean: over episodes.
        low, high: ends of the :data:`LEVEL` interval.
        std: population standard deviation over episodes, as the authors print it.
    """

    mean: float
    low: float
    high: float
    std: float


Estimates = dict[str, Estimate]
"""One estimate per column."""


def with_overall(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores in the order of :data:`DIMENSIONS` behind their mean."""
    if len(scores) != len(DIMENSIONS):
        raise ValueError(f"{len(DIMENSIONS)} scores expected, got {len(scores)}")
    return (sum(scores) / len(scores), *map(float, scores))


# --- one run --------------------------------------------------------------------------------------


def estimate(values_NK: Floats, scenarios_N: Ints, seed: int = 0, resamples: int = RESAMPLES) -> list[Estimate]:
    """Mean of each column with a cluster-bootstrap interval.

    A resample draws C scenarios with replacement and takes the mean over all episodes of those drawn:
    ``sum_c w_c s_c / sum_c w_c n_c`` with sums s_c, counts n_c and multinomial weights w_c. The interval is
    the expanded percentile interval (Hesterberg 2015, "What teachers should know about the bootstrap"): the
    nominal level is widened to ``Phi(-sqrt(C / (C - 1)) t_{C-1})`` so that few scenarios (14 in the
    hard set) do not promise too much.

    Args:
        values_NK: scores.
        scenarios_N: scenario of each row, any integers.
        seed: of the resampling; equal arguments give equal intervals.
        resamples: B.

    Returns:
        One estimate per column; with a single scenario the interval is NaN.
    """
    import numpy as np

    if len(values_NK) == 0:
        return [Estimate(*[float("nan")] * 4) for _ in range(values_NK.shape[1])]
    means_K, stds_K = values_NK.mean(axis=0), values_NK.std(axis=0)
    sums_CK, counts_C = _by_scenario(values_NK, scenarios_N)
    if len(counts_C) < 2:
        low_K = high_K = np.full(values_NK.shape[1], np.nan)
    else:
        weights_BC = np.random.default_rng(seed).multinomial(
            len(counts_C), np.full(len(counts_C), 1 / len(counts_C)), size=resamples
        )
        means_BK = (weights_BC @ sums_CK) / (weights_BC @ counts_C)[:, None]
        tail = _expanded_tail(len(counts_C))
        low_K, high_K = np.quantile(means_BK, [tail, 1 - tail], axis=0)
    return [Estimate(*map(float, row)) for row in zip(means_K, low_K, high_K, stds_K, strict=True)]


def _expanded_tail(num_scenarios: int) -> float:
    from scipy import stats

    n = num_scenarios
    quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    return float(stats.norm.cdf(-((n / (n - 1)) ** 0.5) * quantile))


def _by_scenario(values_NK: Floats, scenarios_N: Ints) -> tuple[Floats, Ints]:
    """Sums [C, K] and counts [C]."""
    import numpy as np

    codes, index_N = np.unique(scenarios_N, return_inverse=True)
    sums_CK = np.zeros((len(codes), values_NK.shape[1]))
    np.add.at(sums_CK, index_N, values_NK)
    return sums_CK, np.bincount(index_N, minlength=len(codes))


@dataclass(frozen=True)
class SubsetSummary:
    """Scores of one set of episodes.

    Attributes:
        episodes, scenarios: how many entered.
        actor, partner, average: estimates per column.
        by_seed: seed to role (``actor``, ``partner``, ``average``) to the plain means per column.
    """

    episodes: int
    scenarios: int
    actor: Estimates
    partner: Estimates
    average: Estimates
    by_seed: dict[int, dict[str, dict[str, float]]]


def summarise(episodes: Sequence[ScoredEpisode], seed: int = 0, resamples: int = RESAMPLES) -> SubsetSummary:
    """All estimates of a set of episodes."""
    import numpy as np

    tables = {
        role: np.array([getattr(e, role) for e in episodes], dtype=float).reshape(len(episodes), len(COLUMNS))
        for role in ("actor", "partner", "average")
    }
    scenarios_N = scenario_codes([e.scenario for e in episodes])
    estimates = {
        role: dict(zip(COLUMNS, estimate(values_NK, scenarios_N, seed, resamples), strict=True))
        for role, values_NK in tables.items()
    }
    seeds_N = np.array([e.seed for e in episodes], dtype=np.int64)
    by_seed = {
        int(s): {
            role: dict(zip(COLUMNS, map(float, values_NK[seeds_N == s].mean(axis=0)), strict=True))
            for role, values_NK in tables.items()
        }
        for s in np.unique(seeds_N)
    }
    return SubsetSummary(len(episodes), len(set(scenarios_N.tolist())), **estimates, by_seed=by_seed)


def scenario_codes(names: Sequence[str]) -> Ints:
    """Scenario names as integers [N], in order of first appearance."""
    import numpy as np

    codes = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([codes[name] for name in names], dtype=np.int64)


# --- two runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Second run minus first, over paired episodes.

    Attributes:
        first, second: means over the pairs.
        mean: their difference.
        low, high: ends of its :data:`LEVEL` interval.
        p: two-sided p-value of the permutation test.
    """

    first: float
    second: float
    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two runs over the episodes both have.

    Attributes:
        pairs, scenarios: how many entered.
        unpaired: keys that only one run has.
        actor, partner, average: differences per column.
    """

    pairs: int
    scenarios: int
    unpaired: int
    actor: dict[str, Difference]
    partner: dict[str, Difference]
    average: dict[str, Difference]


def compare(
    first: Sequence[ScoredEpisode], second: Sequence[ScoredEpisode], seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """Paired comparison.

    Episodes of one pairing and seat are averaged over a run's seeds, then paired by (env_id, seat): equal seed
    numbers of two models share no randomness, so there is nothing to gain from pairing by them, and runs with
    different seeds stay comparable.

    Raises:
        DataError: the runs have no pairing and seat in common, or call the same pairing different scenarios.
    """
    import numpy as np

    by_key = _seed_means(first), _seed_means(second)
    shared = [key for key in by_key[0] if key in by_key[1]]
    if not shared:
        raise DataError("the two runs have no pairing and seat in common; nothing can be compared")
    for key in shared:
        if by_key[0][key][0] != by_key[1][key][0]:
            raise DataError(
                f"env_id {key[0]} is a different scenario in the two runs; were they made from the same files? "
                "Others' result files need --sotopia-dir"
            )
    scenarios_P = scenario_codes([by_key[0][key][0] for key in shared])
    tables = [np.stack([means[key][1] for key in shared]) for means in by_key]  # [P, roles, K]
    differences: dict[str, dict[str, Difference]] = {}
    for role, name in enumerate(("actor", "partner", "average")):
        first_PK, second_PK = tables[0][:, role], tables[1][:, role]
        delta_PK = second_PK - first_PK
        intervals = estimate(delta_PK, scenarios_P, seed, resamples)
        p_K = permutation_p(delta_PK, scenarios_P, seed, resamples)
        differences[name] = {
            column: Difference(float(a), float(b), e.mean, e.low, e.high, float(p))
            for column, a, b, e, p in zip(
                COLUMNS, first_PK.mean(axis=0), second_PK.mean(axis=0), intervals, p_K, strict=True
            )
        }
    unpaired = len(set(by_key[0]) ^ set(by_key[1]))
    return Comparison(len(shared), len(set(scenarios_P.tolist())), unpaired, **differences)


def _seed_means(episodes: Sequence[ScoredEpisode]) -> dict[tuple[int, Seat], tuple[str, Floats]]:
    """(env_id, seat) to scenario and scores [roles, K], mean over seeds."""
    import numpy as np

    grouped: dict[tuple[int, Seat], list[ScoredEpisode]] = {}
    for episode in episodes:
        grouped.setdefault((episode.env_id, episode.seat), []).append(episode)
    return {
        key: (group[0].scenario, np.mean([(e.actor, e.partner, e.average) for e in group], axis=0))
        for key, group in grouped.items()
    }


def permutation_p(delta_PK: Floats, scenarios_P: Ints, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Two-sided p-value of "the two runs are alike", by flipping the sign of whole scenarios.

    If the runs are alike, which of them is called first is arbitrary for each scenario. The statistic is the
    mean difference; p is the share of sign patterns that make it at least as large. Up to
    :data:`MAX_EXACT_SCENARIOS` scenarios all ``2^C`` patterns are tried; beyond, ``resamples`` drawn ones, and
    the one observed, are counted: ``(1 + hits) / (1 + B)``.

    Args:
        delta_PK: differences of pairs.
        scenarios_P: scenario of each pair.
        seed, resamples: of the drawn patterns.

    Returns:
        p [K].
    """
    import numpy as np

    sums_CK, counts_C = _by_scenario(delta_PK, scenarios_P)
    num_scenarios = len(counts_C)
    exact = num_scenarios <= MAX_EXACT_SCENARIOS
    if exact:
        patterns = np.arange(2**num_scenarios)[:, None] >> np.arange(num_scenarios) & 1
    else:
        patterns = np.random.default_rng(seed).integers(0, 2, size=(resamples, num_scenarios))
    # Adding up in another order must not turn a tie into a miss.
    observed_K = np.abs(sums_CK.sum(axis=0)) * (1 - 1e-9) - 1e-12
    hits_K = (np.abs((2.0 * patterns - 1.0) @ sums_CK) >= observed_K).sum(axis=0)
    return hits_K / len(patterns) if exact else (1 + hits_K) / (1 + resamples)
