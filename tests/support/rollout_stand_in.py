"""The project's rollout server on a machine without TensorRT-LLM: its launcher's own ``main`` over a stand-in.

Takes the words a Python would: ``rollout_stand_in.py -m nemo_ampo.rollout.trtllm_serve --model DIR ...``. What stands in for
``AsyncLLM`` loads the published folder with transformers and executes it with the project's own sampler.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from hf_backend import HfBackend

from nemo_ampo.rollout import trtllm_serve
from nemo_ampo.rollout.server_api import PromptTokens, Sampling


@dataclass
class SamplingParams:
    """The arguments the launcher gives."""

    max_tokens: int
    end_id: int
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    detokenize: bool
    seed: int
    temperature: float
    top_k: int
    top_p: float
    logprobs: int | None


class AsyncLLM:
    """Answers the two calls the launcher makes."""

    def __init__(self, model: str, max_seq_len: int, **engine: Any) -> None:
        assert Path(model, "config.json").is_file()
        self._backend = HfBackend(max_seq_len, max_seq_len, 0)

    async def collective_rpc(self, method: str, args: tuple[str]) -> list[tuple[int, int]]:
        assert method == "load_folder"
        return [await self._backend.load(args[0], 0)]

    async def generate_async(self, inputs: list[int], sampling_params: SamplingParams) -> SimpleNamespace:
        given = sampling_params
        sampling = Sampling(
            max_new_tokens=given.max_tokens,
            stop_token_ids=given.stop_token_ids,
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=0 if given.top_k == 1 else given.top_k,
            greedy=given.top_k == 1,
            want_logprobs=given.logprobs is not None,
        )
        request = PromptTokens(request_id=0, prompt_ids=inputs, seed=given.seed)
        (drawn,) = [row async for row in self._backend.generate([request], sampling)]
        values = zip(drawn.token_ids, drawn.logprobs or [], strict=True)
        known = [{token: SimpleNamespace(logprob=value)} for token, value in values]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=drawn.token_ids, logprobs=known)])


if __name__ == "__main__":
    stand_in: Any = ModuleType("tensorrt_llm")
    stand_in.__version__, stand_in.AsyncLLM, stand_in.SamplingParams = "1.2.0", AsyncLLM, SamplingParams
    sys.modules["tensorrt_llm"] = stand_in
    trtllm_serve.main(sys.argv[3:])
