from __future__ import annotations

import pytest
import torch

from nemo_ampo.errors import ConfigError, EngineError
from nemo_ampo.rollout import check_engine_name
from nemo_ampo.rollout.engine import Request, Response, pack, request_seed


def response(i: int, ids: tuple[int, ...], logprobs: list[float] | None = None) -> Response:
    return Response(i, ids, torch.tensor(logprobs if logprobs is not None else [-1.0] * len(ids)), "eos")


REQUESTS = [Request(0, (5, 6), 1), Request(1, (7,), 2)]


def test_pack_by_hand() -> None:
    packed = pack(REQUESTS, [response(0, (8, 9)), response(1, (4,), [-0.25])], pad_id=0, multiple_of=1)
    assert packed.tokens_BT.tolist() == [[5, 6, 8, 9], [7, 4, 0, 0]]
    assert packed.mask_BT.tolist() == [[False, True, True], [True, False, False]]
    assert packed.sampling_logprobs_BT.tolist() == [[0, -1, -1], [-0.25, 0, 0]]
    assert packed.prompt_lengths_B.tolist() == [2, 1]
    assert packed.response_lengths_B.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("responses", "words"),
    [
        ([response(1, (4,)), response(0, (4,))], "line up"),
        ([response(0, (4,)), response(1, (), [])], "0 tokens"),
        ([response(0, (4,)), response(1, (4, 5), [-1.0])], "2 tokens, 1 log-probs"),
        ([response(0, (4,)), response(1, (4,), [0.5])], "positive or not finite"),
        ([response(0, (4,)), response(1, (4,), [float("nan")])], "positive or not finite"),
    ],
)
def test_untrainable_responses_are_refused(responses: list[Response], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        pack(REQUESTS, responses, pad_id=0)


def test_seeds_are_63_bits_and_distinct() -> None:
    seeds = {request_seed(1, s, p, k) for s in range(3) for p in ("a", "b") for k in range(16)}
    assert len(seeds) == 96
    assert all(0 <= s < 2**63 for s in seeds)
    assert request_seed(1, 2, "a", 3) == request_seed(1, 2, "a", 3) != request_seed(2, 2, "a", 3)


def test_engine_names() -> None:
    check_engine_name("megatron")
    with pytest.raises(ConfigError, match=r"rollout.engine: trtllm is not available"):
        check_engine_name("trtllm")
    with pytest.raises(ConfigError, match=r"rollout.engine: expected one of \['megatron', 'trtllm'\]"):
        check_engine_name("vllm")
