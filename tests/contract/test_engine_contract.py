"""What every rollout engine must do, with the Megatron engine as oracle and stand-ins that execute the weights."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("contract")]

ENGINES = ("megatron", "trtllm", "trtllm_server")
FAMILIES = ("qwen2", "llama")
COPIES = ("trtllm", "trtllm_server")
"""Engines that hold their own copy of the weights."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, family: str, results: dict[str, Any]) -> dict[str, Any]:
    return results[family][request.param] | {"name": request.param}


def test_every_engine_draws_what_the_oracle_draws(engine: dict[str, Any], family: str, results: dict[str, Any]) -> None:
    oracle = results[family]["megatron"]
    for case in ("ids", "greedy", "reseeded", "group", "batch_128", "cool"):
        assert engine[case] == oracle[case], case


def test_log_probs_are_the_trainers_on_the_same_tokens(engine: dict[str, Any]) -> None:
    assert engine["logprob_error"] < 5e-5
    assert engine["greedy_logprob_error"] < 5e-5
    assert engine["batch_128_logprob_error"] < 5e-5
    assert [len(row) for row in engine["logprobs"]] == [len(row) for row in engine["ids"]]
    assert engine["no_logprobs"] == [True] * 6


def test_prompts_of_unequal_length_do_not_disturb_each_other(engine: dict[str, Any]) -> None:
    assert engine["alone"] == engine["ids"]
    assert engine["reversed"] == engine["ids"]


def test_responses_end_at_the_first_stop_token_or_the_limit(engine: dict[str, Any]) -> None:
    stops = set(range(3, 516, 24))
    assert set(engine["finish"]) == {"eos", "length"}, "the case must show both ends"
    for ids, finish in zip(engine["ids"], engine["finish"], strict=True):
        assert not set(ids[:-1]) & stops
        assert (ids[-1] in stops) == (finish == "eos")
        assert finish == "eos" or len(ids) == 24
    assert [len(ids) for ids in engine["at_once"]] == [1] * 6
    assert [length for length, finish, seen in engine["endless"] if not seen] == [6] * 6
    assert {finish for _, finish, _ in engine["endless"]} == {"length"}
    assert engine["full"] == 24, "the longest prompt and the longest response fit together"


def test_equal_seeds_are_equal_and_others_are_not(engine: dict[str, Any]) -> None:
    first = engine["twins"][0]
    assert engine["twins"] == [first] * 3
    assert engine["reseeded"] != engine["ids"]
    assert len({tuple(ids) for ids in engine["group"]}) == 8


def test_calls_larger_than_the_engine_are_split(engine: dict[str, Any]) -> None:
    assert len(engine["batch_128"]) == 128
    assert engine["split"] == engine["batch_128"][:10]


def test_each_response_is_announced_once_and_names_its_weights(engine: dict[str, Any]) -> None:
    assert engine["told"] == list(range(6))
    assert set(engine["versions"]) == {1}
    assert engine["version_after"] == 2
    assert engine["after_release"] == engine["ids"]


CUT = {
    "plain": (9, "stop_string"),
    "dot": (8, "stop_string"),
    "bang": (8, "stop_string"),
    "quote": (8, "stop_string"),
    "bracket": (8, "stop_string"),
    "blank": (7, "stop_string"),
    "newline behind": (9, "stop_string"),
    "at once": (7, "stop_string"),
    "never": (24, "length"),
}


@pytest.mark.parametrize("case", CUT)
def test_stop_text_is_found_however_its_ends_are_merged(engine: dict[str, Any], case: str) -> None:
    length, finish = CUT[case]
    assert engine["stop_strings"][case] == [length, finish, length]


def test_a_stop_text_ends_the_responses_that_hold_it_and_no_other(engine: dict[str, Any]) -> None:
    case = engine["stop_in_batch"]
    expected = []
    for ids, finish in zip(engine["ids"], engine["finish"], strict=True):
        ends = [n for n in range(2, len(ids) + 1) if ids[n - 2 : n] in case["pairs"]]
        cut = ends and (ends[0] < len(ids) or finish == "length")
        expected.append((ids[: ends[0]], "stop_string") if cut else (ids, finish))
    assert list(zip(case["ids"], case["finish"], strict=True)) == expected
    assert case["finish"].count("stop_string") == 1, "a text that began in the prompt is no stop text of the response"
    assert case["logprobs"] == [len(ids) for ids in case["ids"]]


@pytest.mark.parametrize("name", COPIES)
def test_nothing_is_drawn_before_the_first_sync(results: dict[str, Any], family: str, name: str) -> None:
    assert results[family][name]["unsynced"].startswith("StaleWeightsError")
    version, tensors, size = results[family][name]["sync"]
    assert version == 1 and tensors > 15 and size > 4 * 516 * 64


def test_changed_weights_arrive_with_the_sync(engine: dict[str, Any]) -> None:
    changed = engine["changed"]
    assert changed["after"] != changed["before"] == changed["back"]
    assert changed["error"] < 1e-4
    assert changed["versions"] == [3, 4]
    if engine["name"] in COPIES:
        assert changed["stale_gap"] > 0.1, "the probe must see weights that were not synced"
    else:
        assert changed["stale_gap"] < 1e-4


@pytest.mark.parametrize(
    "words",
    [
        "empty prompt",
        "exceeds the engine's",
        "tokens plus",
        "distinct",
        "outside the vocabulary",
        "no stop token",
        "temperature must",
        "top_p must",
        "max_new_tokens",
        "seed -1",
        "empty stop string",
    ],
)
def test_calls_that_cannot_be_answered_faithfully_are_refused(engine: dict[str, Any], words: str) -> None:
    assert engine["refused"][words].startswith("RequestError") and words in engine["refused"][words]


# --- taking a safeguard away


def test_the_repaired_engine_passes_its_probe(results: dict[str, Any], family: str) -> None:
    assert results[family]["mutations"]["nothing broken"] == ""


def test_without_the_config_repair_nothing_is_drawn(results: dict[str, Any], family: str) -> None:
    words = {"qwen2": "WeightMismatchError", "llama": "ProbeError"}[family]
    assert results[family]["mutations"]["config repair"].startswith(words)


def test_without_the_bias_repair_the_engine_cannot_be_built(results: dict[str, Any]) -> None:
    assert "attention.dense.bias" in results["qwen2"]["mutations"]["weight repair"]


def test_a_lost_bias_is_seen_even_where_names_are_not_compared(results: dict[str, Any]) -> None:
    assert results["qwen2"]["mutations"]["config repair, names unchecked"].startswith("ProbeError")


def test_a_layer_left_out_of_the_refit_stops_it(results: dict[str, Any], family: str) -> None:
    message = results[family]["mutations"]["layer left out of refit"]
    assert message.startswith("WeightMismatchError") and "layers.1." in message


def test_a_layer_that_keeps_old_weights_is_seen_by_the_probe(results: dict[str, Any], family: str) -> None:
    assert results[family]["mutations"]["layer left stale"].startswith("ProbeError")
    assert results[family]["mutations"]["refit skipped"].startswith("ProbeError")


def test_without_seeds_a_group_repeats_itself(results: dict[str, Any], family: str) -> None:
    assert float(results[family]["mutations"]["seed dropped"]) == 7 / 8
    assert float(results[family]["mutations"]["seed kept"]) == 0


@pytest.mark.parametrize("name", ENGINES)
def test_without_the_sample_in_its_seed_a_steps_group_repeats_itself(
    results: dict[str, Any], family: str, name: str
) -> None:
    assert results[family]["seed without sample"][name] == 3 / 4, "groups of four"


# --- the doctor


@pytest.mark.parametrize("name", ENGINES)
def test_the_doctor_finds_nothing_wrong_with_a_right_engine(results: dict[str, Any], family: str, name: str) -> None:
    *findings, verdict = results[family]["doctor"][name]
    assert len(findings) == 12
    assert [finding for finding in findings if finding[1] is False] == []
    assert verdict[2] == f"rollout.engine={name} answers as the trainer does"


def test_the_doctor_finds_a_lost_repair(results: dict[str, Any], family: str) -> None:
    *findings, verdict = results[family]["doctor"]["broken"]
    failed = [name for name, ok, _ in findings if ok is False]
    # Qwen's lost bias leaves names over and stops the build; Llama's lost scaling shows in the figures.
    assert failed == (["first sync"] if family == "qwen2" else failed)
    assert "greedy log-probs" in failed or failed == ["first sync"]
    assert verdict[2].startswith("rollout.engine=trtllm must not be used here: ")


# --- training with each engine


@pytest.mark.parametrize("name", COPIES)
def test_two_training_steps_are_the_same_under_each_engine(results: dict[str, Any], family: str, name: str) -> None:
    oracle, other = results[family]["steps"]["megatron"], results[family]["steps"][name]
    assert len(set(oracle[0]["rewards"])) > 1 and oracle[0]["policy/grad_norm"] > 0, "the case must train"
    assert oracle[0]["rewards"] != oracle[1]["rewards"]
    for want, got in zip(oracle, other, strict=True):
        assert got["rewards"] == pytest.approx(want["rewards"], abs=1e-4)
        for key in ("policy/loss", "policy/pg_loss", "policy/kl", "policy/grad_norm", "reward/mean"):
            assert got[key] == pytest.approx(want[key], abs=1e-4), key
        assert got["engine/logprob_gap"] < 1e-4
        assert got["engine/duplicate_fraction"] == 0


# --- two ranks


@pytest.mark.parametrize("name", ENGINES)
def test_two_tensor_parallel_ranks_draw_what_one_process_draws(
    two_ranks: dict[str, Any], results: dict[str, Any], name: str
) -> None:
    split, whole = two_ranks[name], results["qwen2"]["megatron"]
    for case in ("ids", "finish", "greedy", "reseeded", "group", "twins", "at_once", "endless", "cool", "batch_128"):
        assert split[case] == whole[case], case
    for case in ("alone", "reversed", "after_release"):
        assert split[case] == whole["ids"], case
    for case in ("stop_in_batch", "stop_strings", "told", "full"):
        assert split[case] == whole[case], case
    assert all(message.startswith("RequestError") for message in split["refused"].values())
    assert max(split[f"{case}logprob_error"] for case in ("", "greedy_", "batch_128_")) < 5e-5
    assert split["changed"]["error"] < 1e-4
    # Each rank moves its own shard, so the moved model is another one than on one process.
    assert split["changed"]["after"] == two_ranks["megatron"]["changed"]["after"] != split["changed"]["before"]


@pytest.mark.parametrize("name", ENGINES)
def test_ranks_that_ask_for_different_things_all_refuse(two_ranks: dict[str, Any], name: str) -> None:
    assert ["2 different calls" in message for message in two_ranks["unequal"][name]] == [True, True]
