"""The Megatron engine against transformers on the same weights."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(measured: dict[str, Any]) -> dict[str, Any]:
    return measured["engine"]


def test_log_probs_are_those_of_the_model(engine: dict[str, Any]) -> None:
    assert engine["logprob_error"] < 2e-5
    assert engine["trainer_error"] < 2e-5


def test_a_response_depends_on_its_own_prompt_and_seed_only(engine: dict[str, Any]) -> None:
    assert engine["alone_equal"]
    assert engine["small_batches_equal"]
    assert engine["order_does_not_matter"]
    assert engine["equal_seeds_equal"]
    assert engine["other_seed_differs"]
    assert engine["first_tokens"] > 8, "16 seeds must not repeat the same token"


def test_a_prefill_in_several_passes_is_the_same(engine: dict[str, Any]) -> None:
    assert engine["passes_equal"]
    assert engine["passes_error"] < 2e-5


def test_replies_end_at_the_first_stop_token_or_the_limit(engine: dict[str, Any]) -> None:
    assert set(engine["finish"]) == {"eos", "length"}, "the case must show both ends"
    assert engine["stop_only_at_end"]
    for finish, length in zip(engine["finish"], engine["lengths"], strict=True):
        assert length == 24 if finish == "length" else length <= 24


def test_finished_replies_are_handed_out_while_others_are_drawn(engine: dict[str, Any]) -> None:
    assert sorted(engine["finished_order"]) == list(range(6))
    assert engine["finished_order"] != list(range(6))


def test_padded_vocabulary_is_never_drawn(engine: dict[str, Any]) -> None:
    assert engine["largest_id"] < engine["vocab"] == 515


def test_low_temperature_is_greedy_search(engine: dict[str, Any]) -> None:
    assert engine["cold_is_greedy"]


def test_model_is_back_in_training_mode(engine: dict[str, Any]) -> None:
    assert engine["training_mode_restored"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("too_long", "prompt of 5000 tokens"),
        ("empty", "empty prompt"),
        ("twice", "distinct"),
        ("outside", "outside the vocabulary of 515"),
        ("no_stop", "no stop token"),
    ],
)
def test_bad_requests_are_refused(engine: dict[str, Any], case: str, words: str) -> None:
    assert words in engine[case]


def test_each_distinct_prompt_is_computed_once_and_in_one_pass(measured: dict[str, Any]) -> None:
    work = measured["work"]
    assert work["one prompt"] == {"embedded": 9, "calls": 1, "drawn": 16, "columns": 1}
    assert work["two prompts"] == {"embedded": 2 * 30, "calls": 1, "drawn": 32, "columns": 1}


def test_finished_rows_leave_the_batch(measured: dict[str, Any]) -> None:
    work = measured["work"]["most finish"]
    steps = work["calls"] - 1
    fed = work["embedded"] - 9
    assert steps > 8, "some rows must go on for long"
    # Each drawn token but a row's last is fed once; a few finished rows may wait for the next compaction.
    assert work["drawn"] - 64 <= fed < 1.25 * (work["drawn"] - 64) + 64
    assert fed < 0.5 * 64 * steps


def test_rows_that_finish_are_not_fed_again(measured: dict[str, Any]) -> None:
    leaving = measured["leaving"]
    assert leaving["rows"] == 64
    prefill, *steps = leaving["at_once"]
    assert (prefill["rows"], prefill["columns"]) == (3, 20), "three distinct prompts"
    assert [(step["rows"], step["columns"]) for step in steps] == [(16, 1)] * 5


def test_the_cache_holds_living_rows_of_the_longest_prompt_plus_the_limit(measured: dict[str, Any]) -> None:
    leaving = measured["leaving"]
    prefill, *steps = leaving["at_once"]
    assert prefill["bytes"] == 3 * 20 * leaving["column_bytes"]
    assert [step["bytes"] for step in steps] == [16 * (20 + 6) * leaving["column_bytes"]] * 5
    # 200 requests, 64 rows at most: a call has no say in how much memory it takes.
    sizes = [step["bytes"] for step in leaving["in_batches"]]
    assert len(sizes) == 4 * 6
    assert max(sizes) == 64 * (20 + 6) * leaving["column_bytes"]


def test_draws_follow_the_distribution(measured: dict[str, Any]) -> None:
    # 99.9 % point of chi-square with 20 degrees of freedom; seeds are fixed, so this does not flicker.
    assert measured["frequencies"]["chi2"] < 45.3
