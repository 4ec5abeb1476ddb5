"""Intervals cover what they promise, p-values are scipy's, pairs are pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nemo_ampo.errors import DataError
from nemo_ampo.sotopia.statistics import (
    COLUMNS,
    ScoredEpisode,
    compare,
    estimate,
    permutation_p,
    scenario_codes,
    summarise,
    with_overall,
)


def clustered(
    rng: np.random.Generator, scenarios: int, per_scenario: int, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores with a shared part per scenario: values [N, 1], scenarios [N]; the true mean is 0."""
    shared = rng.normal(size=(scenarios, 1)) * spread
    return (shared + rng.normal(size=(scenarios, per_scenario))).reshape(-1, 1), np.repeat(
        np.arange(scenarios), per_scenario
    )


@pytest.mark.parametrize(("scenarios", "runs"), [(14, 800), (90, 300)])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(scenarios: int, runs: int) -> None:
    """Simulated runs; the bounds are three standard errors around 95 %."""
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(runs):
        values, codes = clustered(rng, scenarios, 5)
        (found,) = estimate(values, codes, seed, resamples=500)
        covered += found.low <= 0 <= found.high
    assert abs(covered / runs - 0.95) <= 3 * (0.95 * 0.05 / runs) ** 0.5


def test_episodes_taken_as_independent_would_cover_far_less() -> None:
    """The reason for resampling scenarios: the same data, every episode a scenario of its own."""
    rng = np.random.default_rng(6)
    covered = 0
    for seed in range(200):
        values, _ = clustered(rng, 14, 5)
        (found,) = estimate(values, np.arange(len(values)), seed, resamples=500)
        covered += found.low <= 0 <= found.high
    assert covered / 200 < 0.85


def test_the_interval_of_many_equal_scenarios_is_the_textbook_one() -> None:
    """One episode per scenario: the bootstrap agrees with Student's interval up to resampling noise."""
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 1))
    (found,) = estimate(values, np.arange(200), resamples=20_000)
    low, high = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values[:, 0]))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert found.std == pytest.approx(values.std())


def test_equal_seeds_give_equal_intervals_and_other_seeds_others() -> None:
    values, codes = clustered(np.random.default_rng(1), 20, 3)
    assert estimate(values, codes, seed=3) == estimate(values, codes, seed=3)
    assert estimate(values, codes, seed=3) != estimate(values, codes, seed=4)


def test_one_scenario_says_nothing_about_others() -> None:
    (found,) = estimate(np.array([[1.0], [3.0]]), np.array([7, 7]))
    assert found.mean == 2
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("scenarios", [8, 40])
def test_p_values_are_scipys(scenarios: int) -> None:
    """8 scenarios are enumerated and agree exactly, 40 are drawn and agree within the noise of drawing."""
    rng = np.random.default_rng(2)
    delta = rng.normal(0.25, 1.0, size=(scenarios * 3, 2))
    codes = np.repeat(np.arange(scenarios), 3)
    found = permutation_p(delta, codes, seed=1, resamples=20_000)
    for column in (0, 1):
        sums = delta[:, column].reshape(scenarios, 3).sum(axis=1)
        expected = stats.permutation_test(
            (sums,), np.mean, permutation_type="samples", n_resamples=20_000, vectorized=True, random_state=3
        ).pvalue
        assert found[column] == pytest.approx(expected, abs=1e-12 if scenarios == 8 else 0.015)


def test_a_test_of_equal_runs_rejects_no_more_often_than_its_level() -> None:
    rng = np.random.default_rng(4)
    rejected = 0
    for _ in range(300):
        values, codes = clustered(rng, 12, 5)
        rejected += permutation_p(values, codes)[0] <= 0.05
    assert rejected / 300 <= 0.08


def episode(env_id: int, value: float, seat: str = "agent1", seed: int = 0, scenario: str | None = None) -> ScoredEpisode:
    scores = with_overall([value] * 7)
    return ScoredEpisode(
        env_id=env_id,
        seat=seat,
        seed=seed,
        scenario=scenario or f"s{env_id % 6}",
        hard=env_id % 2 == 0,
        actor=scores,
        partner=with_overall([value - 1] * 7),
    )


def test_a_summary_averages_actor_and_partner_and_keeps_seeds_apart() -> None:
    found = summarise([episode(i, float(i), seed=s) for i in range(6) for s in (1, 2)])
    assert (found.episodes, found.scenarios) == (12, 6)
    assert set(found.actor) == set(COLUMNS)
    assert found.actor["goal"].mean == pytest.approx(2.5)
    assert found.partner["goal"].mean == pytest.approx(1.5)
    assert found.average["overall"].mean == pytest.approx(2.0)
    assert {s: v["average"]["goal"] for s, v in found.by_seed.items()} == {1: pytest.approx(2.0), 2: pytest.approx(2.0)}


def test_nothing_has_no_mean() -> None:
    found = summarise([])
    assert found.episodes == 0
    assert np.isnan(found.actor["goal"].mean)


def test_a_constant_gain_is_found_with_certainty() -> None:
    first = [episode(i, i / 3) for i in range(12)]
    found = compare(first, [episode(i, i / 3 + 0.5) for i in range(12)])
    goal = found.average["goal"]
    assert (found.pairs, found.scenarios, found.unpaired) == (12, 6, 0)
    assert (goal.mean, goal.low, goal.high) == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))
    assert goal.second - goal.first == pytest.approx(0.5)
    assert goal.p == pytest.approx(2 / 2**6)  # only all signs alike are as extreme


def test_pairs_are_matched_by_id_and_seat_not_by_position() -> None:
    first = [episode(i, float(i)) for i in range(6)]
    found = compare(first, list(reversed(first)))
    assert found.actor["goal"].mean == 0
    assert found.actor["goal"].low == found.actor["goal"].high == 0
    with pytest.raises(DataError, match="no pairing and seat in common"):
        compare(first, [episode(i, 1.0, seat="agent2") for i in range(6)])


def test_episodes_of_one_run_alone_are_counted() -> None:
    found = compare([episode(i, 1.0) for i in range(6)], [episode(i, 1.0) for i in range(2, 9)])
    assert (found.pairs, found.unpaired) == (4, 5)


def test_seeds_are_averaged_before_pairing() -> None:
    first = [episode(i, 1.0, seed=1) for i in range(4)]
    second = [episode(i, v, seed=s) for i in range(4) for s, v in ((7, 2.0), (8, 4.0))]
    assert compare(first, second).actor["goal"].mean == pytest.approx(2.0)


def test_runs_from_different_files_are_refused() -> None:
    with pytest.raises(DataError, match="env_id 0 is a different scenario"):
        compare([episode(0, 1.0, scenario="x")], [episode(0, 1.0, scenario="y")])


def test_codes_follow_names() -> None:
    assert scenario_codes(["b", "a", "b"]).tolist() == [0, 1, 0]
