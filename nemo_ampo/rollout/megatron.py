"""Generation with the trainer's own Megatron model: KV-cached, batched, seeded per request. [nemo]

Rows of unequal prompts share a batch without padding on the left: the cache is filled up to the shortest prompt, and
longer prompts are fed token by token while shorter ones already answer. A finished row leaves the batch, so a step costs
what the living rows cost. Every model-parallel rank runs the same loop; the last pipeline stage draws and broadcasts.
Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference_params import InferenceParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from nemo_ampo.forward import inference_mode
from nemo_ampo.padding import vocab_size
from nemo_ampo.rollout.engine import (
    OnFinish,
    Request,
    Response,
    SamplingSpec,
    check_requests,
)

_COMPACT_BELOW = 0.85
"""The cache is rewritten without its finished rows once fewer than this share of its rows is alive."""


class MegatronEngine:
    """An :class:`~nemo_ampo.rollout.engine.Engine` over a NeMo ``MegatronGPTModel``.

    Args:
        model: the NeMo model; its current weights are the ones that answer.
        batch_size: rows decoded at once; bounds the memory of the cache.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._max_total = int(model.cfg.max_position_embeddings)
        self._vocab_size = vocab_size(model)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        """See :meth:`nemo_ampo.rollout.engine.Engine.generate`."""
        check_requests(requests, sampling, self._max_total, self._vocab_size)
        finished: dict[int, Response] = {}
        with inference_mode(self._model):
            for begin in range(0, len(requests), self._batch_size):
                for response in self._decode(requests[begin : begin + self._batch_size], sampling):
                    finished[response.request_id] = response
                    if on_finish is not None:
                        on_finish(response)
        return [finished[r.request_id] for r in requests]

    def _decode(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[Response]:
        """Yield each response of one batch as soon as it is complete."""
        device = torch.cuda.current_device()
        prompt_lengths = [len(r.prompt_ids) for r in requests]
        width = max(prompt_lengths) + sampling.max_new_tokens
        tokens_BT = torch.zeros((len(requests), width), dtype=torch.long, device=device)
        for row, request in enumerate(requests):
            tokens_BT[row, : prompt_lengths[row]] = torch.tensor(request.prompt_ids, device=device)
        draws_BT = _uniform_draws(requests, sampling.max_new_tokens).to(device)
        logprobs_BT = torch.zeros((len(requests), width), dtype=torch.float32, device=device)
        lengths_B = torch.tensor(prompt_lengths, device=device)
        stops = torch.tensor(sampling.stop_token_ids, device=device)

        cache = InferenceParams(len(requests), width)
        alive = torch.arange(len(requests), device=device)  # rows of the cache, as indices into the batch
        running = torch.ones(len(requests), dtype=torch.bool, device=device)
        begin, end = 0, min(prompt_lengths)
        while end < width:
            logits_BV = self._forward(tokens_BT[alive, begin:end], begin, cache)
            answering = lengths_B[alive] <= end
            drawn, logprobs = self._draw(
                logits_BV,
                draws_BT[alive, (end - lengths_B[alive]).clamp(min=0)],
                sampling.temperature,
                len(alive),
            )
            tokens_BT[alive, end] = torch.where(answering, drawn, tokens_BT[alive, end])
            logprobs_BT[alive, end] = torch.where(answering, logprobs, logprobs_BT[alive, end])
            stopped = answering & torch.isin(drawn, stops)
            spent = end + 1 - lengths_B[alive] >= sampling.max_new_tokens
            done = (stopped | (answering & spent)) & running[alive]
            for row in alive[done].tolist():
                begin_response = prompt_lengths[row]
                answer = tokens_BT[row, begin_response : end + 1].tolist()
                yield Response(
                    request_id=requests[row].request_id,
                    token_ids=tuple(answer),
                    logprobs=logprobs_BT[row, begin_response : end + 1].cpu(),
                    finish="eos" if answer[-1] in sampling.stop_token_ids else "length",
                )
            running[alive[done]] = False
            survivors = running[alive]
            if not survivors.any():
                return
            if survivors.float().mean() < _COMPACT_BELOW:
                _keep_rows(cache, survivors)
                alive = alive[survivors]
            begin, end = end, end + 1

    def _forward(self, tokens_BT: torch.Tensor, offset: int, cache: InferenceParams) -> torch.Tensor | None:
        """Feed positions ``offset ..`` and return the last position's full-vocabulary logits [B, V].

        None on all but the last pipeline stage.
        """
        rows, width = tokens_BT.shape
        positions = torch.arange(offset, offset + width, device=tokens_BT.device).expand(rows, -1)
        cache.sequence_len_offset = offset

        def forward_step(iterator: Any, model: Any) -> Any:
            output = model(tokens_BT, positions, None, inference_params=cache)
            return output, lambda tensor, **kwargs: tensor

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self._model.model,
            num_microbatches=1,
            forward_only=True,
            seq_length=width,
            micro_batch_size=rows,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return None
        logits = outputs[0][:, -1:].contiguous()
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        return logits[:, 0, : self._vocab_size].float()

    def _draw(
        self, logits_BV: torch.Tensor | None, draws_B: torch.Tensor, temperature: float, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next token and its log-probability, [B] each, equal on every model-parallel rank."""
        if logits_BV is not None:
            tokens, logprobs = draw(logits_BV, draws_B, temperature)
        else:
            tokens = torch.empty(rows, dtype=torch.long, device=draws_B.device)
            logprobs = torch.empty(rows, dtype=torch.float32, device=draws_B.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(tokens, source, group)
            torch.distributed.broadcast(logprobs, source, group)
        return tokens, logprobs


def draw(logits_BV: torch.Tensor, draws_B: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: the token whose cumulative probability interval holds the uniform draw.

    The outcome depends on the row's own logits and draw alone, never on what else is in the batch.

    Args:
        logits_BV: float32.
        draws_B: uniform in [0, 1), float64.
        temperature: above 0.

    Returns:
        token ids int64 [B] and their log-probabilities under softmax(logits / temperature), float32 [B].
    """
    logprobs_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
    cdf_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    tokens_B = torch.searchsorted(cdf_BV, (draws_B * cdf_BV[:, -1]).unsqueeze(1), right=True).squeeze(1)
    tokens_B = tokens_B.clamp(max=logits_BV.size(-1) - 1)
    return tokens_B, logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)


def _uniform_draws(requests: Sequence[Request], count: int) -> torch.Tensor:
    """``count`` uniform numbers per request from its own seed, float64 [B, count]."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(r.seed)) for r in requests]
    return torch.stack(rows)


def _keep_rows(cache: InferenceParams, keep: torch.Tensor) -> None:
    """Drop finished rows from every layer's keys and values."""
    for layer, (keys, values) in cache.key_value_memory_dict.items():
        cache.key_value_memory_dict[layer] = (keys[:, keep].contiguous(), values[:, keep].contiguous())
    cache.max_batch_size = cache.current_batch_size = int(keep.sum())
