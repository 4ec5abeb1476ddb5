from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_ampo.errors import ConfigError, DiskError
from nemo_ampo.rollout import require_engine, require_engine_room, trtllm_version
from nemo_ampo.rollout.config import RolloutConfig, TrtLlmConfig, check_rollout
from nemo_ampo.rollout.engine import (
    Caps,
    ReplyError,
    Request,
    RequestError,
    Response,
    SamplingSpec,
    StaleWeightsError,
    batches_by_length,
    check_complete,
    check_requests,
    finish_response,
    request_seed,
    requests_digest,
)
from nemo_ampo.rollout.probe import duplicate_fraction
from nemo_ampo.rollout.trtllm_version import require_mpi_ranks

CAPS = Caps("raw", 4, 8, 12, 100, True)
SPEC = SamplingSpec(4, (0,))
REQUESTS = [Request(0, (5, 6), 1), Request(1, (7,), 2)]


def response(i: int, ids: tuple[int, ...], logprobs: list[float] | None = None) -> Response:
    return Response(i, ids, torch.tensor(logprobs if logprobs is not None else [-1.0] * len(ids)), "eos")


# --- requests


def test_seeds_are_63_bits_and_distinct() -> None:
    seeds = {request_seed(1, s, p, k) for s in range(3) for p in ("a", "b") for k in range(16)}
    assert len(seeds) == 96
    assert all(0 <= s < 2**63 for s in seeds)
    assert request_seed(1, 2, "a", 3) == request_seed(1, 2, "a", 3) != request_seed(2, 2, "a", 3)


def test_limits_are_the_engines_own() -> None:
    check_requests([Request(0, (1,) * 8, 1)], SPEC, CAPS)
    with pytest.raises(RequestError, match="prompt of 9 tokens exceeds the engine's 8"):
        check_requests([Request(0, (1,) * 9, 1)], SPEC, CAPS)
    with pytest.raises(RequestError, match="plus 5 new ones exceeds the engine's 12"):
        check_requests([Request(0, (1,) * 8, 1)], replace(SPEC, max_new_tokens=5), CAPS)
    with pytest.raises(RequestError, match="stop token outside the vocabulary of 100"):
        check_requests(REQUESTS, replace(SPEC, stop_token_ids=(100,)), CAPS)


def test_an_engine_that_cannot_give_the_policys_log_probs_refuses_to() -> None:
    caps, warm = replace(CAPS, logprob_kind="sampling"), replace(SPEC, temperature=0.7)
    with pytest.raises(RequestError, match=r"only at temperature 1, got 0\.7"):
        check_requests(REQUESTS, warm, caps)
    check_requests(REQUESTS, replace(warm, want_logprobs=False), caps)
    check_requests(REQUESTS, replace(warm, greedy=True), caps)
    check_requests(REQUESTS, warm, CAPS)


def test_batches_keep_lengths_and_equal_prompts_together() -> None:
    prompts = [(1,), (2, 2, 2), (1,), (3, 3), (2, 2, 2), (4, 4)]
    batches = list(batches_by_length([Request(i, p, i) for i, p in enumerate(prompts)], 4))
    assert [[r.request_id for r in batch] for batch in batches] == [[1, 4, 3, 5], [0, 2]]


def test_batches_keep_to_a_budget_of_prompt_tokens() -> None:
    requests = [Request(i, (1,) * n, i) for i, n in enumerate((3, 5, 1, 9, 2))]
    batches = list(batches_by_length(requests, 3, max_tokens=8))
    assert [[len(r.prompt_ids) for r in batch] for batch in batches] == [[9], [5, 3], [2, 1]]
    assert [len(batch) for batch in batches_by_length(requests, 3)] == [3, 2]


def test_equal_calls_have_equal_digests() -> None:
    assert requests_digest(REQUESTS, SPEC) == requests_digest(list(REQUESTS), replace(SPEC))
    assert requests_digest(REQUESTS, SPEC) != requests_digest(REQUESTS[::-1], SPEC)
    assert requests_digest(REQUESTS, SPEC) != requests_digest(REQUESTS, replace(SPEC, top_k=1))


# --- responses


def finish(ids: list[int], spec: SamplingSpec = SPEC, logprobs: list[float] | None = None) -> Response:
    values = torch.tensor([-1.0] * len(ids) if logprobs is None else logprobs)
    return finish_response(REQUESTS[0], ids, values, spec, CAPS, lambda t: "".join(chr(96 + i) for i in t if i), 7)


def test_what_lies_behind_the_stop_is_dropped() -> None:
    got = finish([5, 0, 6])
    assert (got.token_ids, got.finish, got.weight_version) == ((5, 0), "eos", 7)
    assert got.logprobs is not None and got.logprobs.tolist() == [-1.0, -1.0]
    assert finish([5, 6, 7, 8]).finish == "length"


def test_the_first_of_stop_token_and_stop_string_ends_it() -> None:
    spec = replace(SPEC, stop_strings=("cd", "b"))
    assert finish([1, 3, 4, 2], spec).token_ids == (1, 3, 4)
    assert finish([1, 2, 3, 4], spec).token_ids == (1, 2)
    assert finish([1, 0, 3, 4], spec).finish == "eos"
    assert finish([3, 4], spec).finish == "stop_string", "an engine may have stopped there itself"


@pytest.mark.parametrize(
    ("ids", "logprobs", "words"),
    [
        ([], None, "0 tokens, expected 1 to 4"),
        ([1, 2, 3, 4, 5], None, "5 tokens, expected 1 to 4"),
        ([1, 100, 0], None, "outside the vocabulary of 100"),
        ([1, -42, 0], None, "outside the vocabulary of 100"),
        ([1, 2], None, "ended after 2 of 4 tokens without a stop"),
        ([1, 0], [-1.0], "2 tokens, 1 log-probs"),
        ([1, 0], [-1.0, 0.1], "positive or not finite"),
        ([1, 0], [-1.0, float("-inf")], "positive or not finite"),
    ],
)
def test_what_is_no_answer_is_refused(ids: list[int], logprobs: list[float] | None, words: str) -> None:
    with pytest.raises(ReplyError, match=words):
        finish(ids, logprobs=logprobs)


def test_all_and_only_the_requests_are_answered_by_one_version() -> None:
    both = {i: replace(response(i, (4,)), weight_version=3) for i in (1, 0)}
    assert [r.request_id for r in check_complete(REQUESTS, both, 3)] == [0, 1]
    with pytest.raises(ReplyError, match=r"missing \[1\]"):
        check_complete(REQUESTS, {0: both[0]}, 3)
    with pytest.raises(ReplyError, match=r"not asked for \[2\]"):
        check_complete(REQUESTS, both | {2: both[0]}, 3)
    with pytest.raises(StaleWeightsError, match=r"response 0 was drawn by weights 2, expected 3"):
        check_complete(REQUESTS, both | {0: replace(both[0], weight_version=2)}, 3)


def test_duplicates_count_within_a_prompt_only() -> None:
    requests = [Request(i, (1,) if i < 3 else (2,), i) for i in range(4)]
    assert duplicate_fraction(requests, [response(i, (4,)) for i in range(4)]) == 0.5
    assert duplicate_fraction(requests, [response(i, (4, i)) for i in range(4)]) == 0


# --- names and versions


def test_engine_names_and_their_keys() -> None:
    check_rollout(RolloutConfig())
    check_rollout(RolloutConfig(engine="trtllm"))
    with pytest.raises(ConfigError, match=r"rollout.trtllm.max_num_tokens: 100 is less than one prompt"):
        check_rollout(RolloutConfig(engine="trtllm", trtllm=TrtLlmConfig(max_num_tokens=100)))
    with pytest.raises(ConfigError, match=r"rollout.engine: expected one of megatron, trtllm, trtllm_server, got 'vllm'"):
        check_rollout(RolloutConfig(engine="vllm"))
    with pytest.raises(ConfigError, match=r"rollout.trtllm_server.url: a value is required"):
        check_rollout(RolloutConfig(engine="trtllm_server"))
    with pytest.raises(ConfigError, match=r"rollout.temperature: trtllm knows .* got 0\.7"):
        check_rollout(RolloutConfig(engine="trtllm", temperature=0.7))


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "not installed"), ("0.13.0", "found 0.13.0"), ("0.170.1", "found 0.170.1"), ("1.2.0", "found 1.2.0")],
)
def test_another_tensorrt_llm_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, found: str | None, words: str) -> None:
    monkeypatch.setattr(trtllm_version, "installed_version", lambda: found)
    with pytest.raises(ConfigError, match=words) as caught:
        require_engine("trtllm")
    assert "\n" not in str(caught.value) and "0.17" in str(caught.value)


def test_the_right_tensorrt_llm_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtllm_version, "installed_version", lambda: "0.17.0.post1")
    require_engine("trtllm")
    require_engine("megatron")


def test_room_for_the_engines_of_a_node_is_asked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=30e9))
    require_engine_room(TrtLlmConfig(), 7_400_000_000, 4)
    with pytest.raises(DiskError, match=rf"null: TMPDIR.* needs 32 GB of disk, but {tmp_path} has 30 GB free"):
        require_engine_room(TrtLlmConfig(), 8_000_000_000, 4)
    with pytest.raises(DiskError, match=r"needs 118 GB of disk, but /else/where"):
        require_engine_room(TrtLlmConfig(engine_dir="/else/where"), 7_400_000_000, 1)


def test_an_engine_is_written_to_the_nodes_own_disk_and_gone_with_its_process(tmp_path: Path) -> None:
    code = "from nemo_ampo.rollout import _local_folder as f; print(a := f(), b := f()); (a / 'rank0.engine').touch()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = map(Path, done.stdout.split())
    assert first != second and first.parent == second.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_old_servers_are_refused() -> None:
    for good in ("1.2.0rc6", "1.3.0", "2.0"):
        trtllm_version.require_server_version(good)
    for bad in ("1.1.0", "0.21.0", "main"):
        with pytest.raises(ConfigError, match="rollout server"):
            trtllm_version.require_server_version(bad)


@pytest.mark.parametrize("started_by", [{"OMPI_COMM_WORLD_RANK": "1"}, {"PMIX_RANK": "1"}])
def test_several_ranks_of_tensorrt_llm_must_be_started_through_mpi(started_by: dict[str, str]) -> None:
    torchrun = {"WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}
    with pytest.raises(ConfigError, match=r"rollout\.engine: trtllm asks MPI .* `srun --mpi=pmix`"):
        require_mpi_ranks(torchrun)
    require_mpi_ranks(torchrun | started_by)
    require_mpi_ranks({"WORLD_SIZE": "1"})
    require_mpi_ranks({})
