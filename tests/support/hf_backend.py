"""What stands in for TensorRT-LLM's server: loads the published folder with transformers and executes it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch

from nemo_ampo.rollout.engine import SamplingSpec
from nemo_ampo.rollout.sampling import draw, uniform_draws
from nemo_ampo.rollout.server_api import Drawn, PromptTokens, Sampling, State


class HfBackend:
    """Draws with the project's own sampler: equal (seed, logits) give equal tokens in every engine of the suite."""

    def __init__(self, max_prompt: int, max_total: int, vocab_size: int) -> None:
        self._limits = {"max_prompt": max_prompt, "max_total": max_total, "vocab_size": vocab_size}
        self._version: int | None = None
        self._model: Any = None

    def state(self) -> State:
        return State(tensorrt_llm="1.2.0", weight_version=self._version, **self._limits)

    async def load(self, folder: str, weight_version: int) -> tuple[int, int]:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self._version = weight_version
        weights = list(self._model.parameters())
        return len(weights), sum(w.numel() * w.element_size() for w in weights)

    async def release(self) -> None: ...

    async def generate(self, requests: list[PromptTokens], sampling: Sampling) -> AsyncIterator[Drawn]:
        plain = sampling.model_dump() | {"stop_token_ids": tuple(sampling.stop_token_ids)}
        for row in self._rows(requests, SamplingSpec(**plain)):
            yield row

    @torch.no_grad()
    def _rows(self, requests: list[PromptTokens], sampling: SamplingSpec) -> list[Drawn]:
        assert self._version is not None
        lengths = torch.tensor([len(r.prompt_ids) for r in requests])
        ids = torch.zeros((len(requests), int(lengths.max()) + sampling.max_new_tokens), dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
        draws = uniform_draws([r.seed for r in requests], sampling.max_new_tokens)
        logprobs: list[list[float]] = [[] for _ in requests]
        running = torch.ones(len(requests), dtype=torch.bool)
        for step in range(sampling.max_new_tokens):
            logits = self._model(ids[:, : int(lengths.max())]).logits[torch.arange(len(ids)), lengths - 1]
            tokens, values = draw(logits.float(), draws[:, step], sampling)
            for row in running.nonzero()[:, 0].tolist():
                ids[row, lengths[row]] = tokens[row]
                lengths[row] += 1
                logprobs[row].append(float(values[row]))
                running[row] = int(tokens[row]) not in sampling.stop_token_ids
            if not running.any():
                break
        return [
            Drawn(
                request_id=request.request_id,
                token_ids=ids[row, len(request.prompt_ids) : lengths[row]].tolist(),
                logprobs=logprobs[row] if sampling.want_logprobs else None,
                weight_version=self._version,
            )
            for row, request in enumerate(requests)
        ]
