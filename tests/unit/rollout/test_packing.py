from __future__ import annotations

import pytest
import torch

from nemo_ampo.rollout.engine import ReplyError, Request, Response
from nemo_ampo.rollout.packing import pack

REQUESTS = [Request(0, (5, 6), 1), Request(1, (7,), 2)]


def response(i: int, ids: tuple[int, ...], logprobs: list[float] | None = None) -> Response:
    return Response(i, ids, torch.tensor(logprobs if logprobs is not None else [-1.0] * len(ids)), "eos")


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
        ([response(0, (4,)), Response(1, (4,), None, "eos")], "1 tokens, 0 log-probs"),
        ([response(0, (4,)), response(1, (4,), [0.5])], "positive or not finite"),
        ([response(0, (4,)), response(1, (4,), [float("nan")])], "positive or not finite"),
    ],
)
def test_untrainable_responses_are_refused(responses: list[Response], words: str) -> None:
    with pytest.raises(ReplyError, match=words):
        pack(REQUESTS, responses, pad_id=0)
