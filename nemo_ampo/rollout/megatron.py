"""Generation with the trainer's own Megatron model: KV-cached, batched, seeded per request. [nemo]

Prompts of unequal length stand right-aligned in one batch, so that one forward pass fills the cache for all of them and
every row draws its first token in the same step. What stands left of a short prompt is masked; rotary angles follow the
column and not the position in the prompt, which is the same attention, because it only sees differences. Equal prompts
(the G responses of a group) are computed once and their cache is copied. A finished row leaves the batch, so a step costs
what the living rows cost. Memory is bounded by ``batch_size`` rows of (longest prompt + max_new_tokens) columns.

Every model-parallel rank runs the same loop; the last pipeline stage draws and broadcasts.
Legend: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference_params import InferenceParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from nemo_ampo.compat.layer_spec import RotatedCacheSelfAttention, SdpaAttention
from nemo_ampo.megatron.forward import inference_mode
from nemo_ampo.megatron.padding import vocab_size
from nemo_ampo.rollout.collective import check_equal_on_replica
from nemo_ampo.rollout.engine import (
    Caps,
    Decode,
    OnFinish,
    Request,
    Response,
    SamplingSpec,
    SyncReport,
    batches_by_length,
    check_complete,
    check_requests,
    finish_response,
)
from nemo_ampo.rollout.sampling import draw, uniform_draws

_COMPACT_BELOW = 0.85
"""The cache is rewritten without its finished rows once fewer than this share of its rows is alive."""
_PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Prompt tokens, padding included, of one prefill pass: bounds its activations and its mask.

A GPU wants them many. On a CPU a pass's activations should stay in the cache, and below the size from which every
allocation is fresh memory of the system.
"""


class MegatronEngine:
    """An :class:`~nemo_ampo.rollout.engine.Engine` over a NeMo ``MegatronGPTModel``.

    Args:
        model: the NeMo model; its current weights are the ones that answer.
        batch_size: rows decoded at once; bounds the memory of the cache.
        decode: tokens to text, only needed for stop strings.
    """

    def __init__(self, model: Any, batch_size: int, decode: Decode | None = None) -> None:
        self._model = model
        self._decode = decode
        self._weight_version = 0
        max_total = int(model.cfg.max_position_embeddings)
        self.caps = Caps(
            logprob_kind="raw",
            max_batch=batch_size,
            max_prompt=max_total,
            max_total=max_total,
            vocab_size=vocab_size(model),
            own_weights=False,
        )

    def sync(self, weight_version: int) -> SyncReport:
        """Nothing moves: the trainer's weights are the engine's."""
        self._weight_version = weight_version
        return SyncReport(weight_version, 0, 0, 0.0)

    def release(self) -> None:
        """Nothing to give back: the cache lives only within a call."""

    def close(self) -> None:
        """Nothing to end."""

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        """See :meth:`nemo_ampo.rollout.engine.Engine.generate`."""
        check_equal_on_replica(requests, sampling)
        check_requests(requests, sampling, self.caps)
        finished: dict[int, Response] = {}
        with decoding_mode(self._model):
            for batch in batches_by_length(requests, self.caps.max_batch):
                for response in self._answer(batch, sampling):
                    finished[response.request_id] = response
                    if on_finish is not None:
                        on_finish(response)
        return check_complete(requests, finished, self._weight_version)

    def _answer(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[Response]:
        """Yield each response of one batch as soon as it is complete."""
        device = torch.cuda.current_device()
        limit = sampling.max_new_tokens
        cache, logits_BV, padding_B = self.prefill(requests, limit)
        draws_BT = uniform_draws([r.seed for r in requests], limit).to(device)
        tokens_BT = torch.zeros((len(requests), limit), dtype=torch.long, device=device)
        logprobs_BT = torch.zeros((len(requests), limit), dtype=torch.float32, device=device)
        stops = torch.tensor(sampling.stop_token_ids, device=device)
        alive = torch.arange(len(requests), device=device)  # rows of the cache, as indices into the batch
        running = torch.ones(len(requests), dtype=torch.bool, device=device)
        columns = max(len(r.prompt_ids) for r in requests)
        for count in range(limit):
            drawn, logprobs = self._draw(logits_BV, draws_BT[alive, count], sampling)
            tokens_BT[alive, count] = drawn
            logprobs_BT[alive, count] = logprobs
            done = torch.isin(drawn, stops) if count + 1 < limit else torch.ones_like(drawn, dtype=torch.bool)
            if sampling.stop_strings:
                done |= self._text_stops(tokens_BT[alive, : count + 1], sampling)
            done &= running[alive]
            for row in alive[done].tolist():
                ids, values = tokens_BT[row, : count + 1].tolist(), logprobs_BT[row, : count + 1].cpu()
                yield finish_response(requests[row], ids, values, sampling, self.caps, self._decode, self._weight_version)
            running[alive[done]] = False
            survivors = running[alive]
            if not survivors.any():
                return
            if survivors.float().mean() < _COMPACT_BELOW:
                _select_rows(cache, survivors.nonzero().squeeze(1))
                alive, drawn, padding_B = alive[survivors], drawn[survivors], padding_B[survivors]
            logits_BV = self.forward(drawn.unsqueeze(1), columns + count, cache, padding_B)

    def _text_stops(self, tokens_BT: torch.Tensor, sampling: SamplingSpec) -> torch.Tensor:
        """Which rows' last tokens complete a stop string, bool [B]."""
        assert self._decode is not None  # finish_response refuses stop strings without it, at the first response
        # A token holds at least one byte, so this many hold the longest string and what merged into its ends.
        window = max(len(s.encode()) for s in sampling.stop_strings) + 2
        texts = [self._decode(ids) for ids in tokens_BT[:, -window:].tolist()]
        return torch.tensor([any(s in text for s in sampling.stop_strings) for text in texts], device=tokens_BT.device)

    def prefill(
        self, requests: Sequence[Request], max_new_tokens: int
    ) -> tuple[InferenceParams, torch.Tensor | None, torch.Tensor]:
        """Fill the cache with all prompts, each distinct one computed once.

        Args:
            requests: longest prompts first, so that a pass is as wide as its own prompts and not as the batch's longest.
            max_new_tokens: columns to keep for responses.

        Returns:
            The cache of B rows; the logits of every row's first token [B, V] (None but on the last pipeline stage); how
            many columns are padding, int64 [B].
        """
        device = torch.cuda.current_device()
        distinct = list(dict.fromkeys(r.prompt_ids for r in requests))
        place = {prompt: index for index, prompt in enumerate(distinct)}
        row_of = torch.tensor([place[r.prompt_ids] for r in requests], device=device)
        width = len(distinct[0])
        padding_U = torch.tensor([width - len(p) for p in distinct], device=device)
        cache = InferenceParams(len(requests), width + max_new_tokens)
        parts = []
        begin = 0
        while begin < len(distinct):
            longest = len(distinct[begin])
            prompts = distinct[
                begin : begin + max(1, _PREFILL_TOKENS["cpu" if row_of.device.type == "cpu" else "cuda"] // longest)
            ]
            end = begin + len(prompts)
            tokens_BT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
            chunk = InferenceParams(len(prompts), width)
            parts.append(self.forward(tokens_BT, width - longest, chunk, padding_U[begin:end]))
            wanted = ((row_of >= begin) & (row_of < end)).nonzero().squeeze(1)
            _copy_rows(chunk, row_of[wanted] - begin, cache, wanted)
            begin = end
        logits_BV = None if parts[0] is None else torch.cat(parts)[row_of]
        return cache, logits_BV, padding_U[row_of]

    def forward(
        self, tokens_BT: torch.Tensor, offset: int, cache: InferenceParams, padding_B: torch.Tensor
    ) -> torch.Tensor | None:
        """Feed columns ``offset ..`` and return the last one's full-vocabulary logits [B, V].

        None on all but the last pipeline stage.
        """
        rows, width = tokens_BT.shape
        columns = torch.arange(offset, offset + width, device=tokens_BT.device)
        positions = (columns - padding_B.unsqueeze(1)).clamp(min=0)
        mask = attention_mask(offset, width, padding_B) if bool(padding_B.any()) else None
        cache.sequence_len_offset = offset

        def forward_step(iterator: Any, model: Any) -> Any:
            output = model(tokens_BT, positions, mask, inference_params=cache)
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
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0].contiguous())
        return logits[:, 0, : self.caps.vocab_size].float()

    def _draw(
        self, logits_BV: torch.Tensor | None, draws_B: torch.Tensor, sampling: SamplingSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next token and its log-probability, [B] each, equal on every model-parallel rank."""
        if logits_BV is not None:
            tokens, logprobs = draw(logits_BV, draws_B, sampling)
        else:
            tokens = torch.empty(len(draws_B), dtype=torch.long, device=draws_B.device)
            logprobs = torch.empty(len(draws_B), dtype=torch.float32, device=draws_B.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(tokens, source, group)
            torch.distributed.broadcast(logprobs, source, group)
        return tokens, logprobs


def attention_mask(offset: int, width: int, padding_B: torch.Tensor) -> torch.Tensor:
    """True where a column, one of T from ``offset`` on, may not look, bool [B, 1, T, offset + T].

    A column sees itself and what stands left of it down to its row's padding. A padding column sees only itself: its
    result is never read, but a softmax over nothing would be NaN and spread.
    """
    seen = torch.arange(offset + width, device=padding_B.device)
    columns = seen[offset:]
    hidden = (seen > columns.unsqueeze(1)) | (seen < padding_B[:, None, None])
    return (hidden & (seen != columns.unsqueeze(1))).unsqueeze(1)


@contextmanager
def decoding_mode(model: Any) -> Iterator[None]:
    """What a model needs around :meth:`MegatronEngine.prefill` and :meth:`MegatronEngine.forward`."""
    with inference_mode(model), _last_column_only(model), _attention_with_mask(model):
        yield


@contextmanager
def _last_column_only(model: Any) -> Iterator[None]:
    """The output layer sees one column: logits of a whole prompt would be [B, T, V], gigabytes nobody reads."""
    hooks = [
        module.output_layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0][-1:], *inputs[1:]))
        for module in model.get_model_module_list()
        if hasattr(module, "output_layer")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attention_with_mask(model: Any) -> Iterator[None]:
    """What generation needs of Megatron's attention while it lasts: a heeded mask, and a cache that begins with zeros.

    Transformer Engine's causal attention ignores a mask; torch's takes its place. And Megatron leaves a new cache as the
    memory was: a masked column still takes part, with weight 0, and 0 times NaN is NaN.
    """
    replaced = []
    zeroed = []
    for module in model.get_model_module_list():
        for layer in module.decoder.layers:
            attention = layer.self_attention
            if not isinstance(attention, RotatedCacheSelfAttention):
                zeroed.append(attention)
                attention._allocate_memory = partial(_zeros_for_cache, attention._allocate_memory)
            if not isinstance(attention.core_attention, SdpaAttention):
                replaced.append((attention, attention.core_attention))
                attention.core_attention = SdpaAttention(
                    config=attention.config,
                    layer_number=attention.layer_number,
                    attn_mask_type=attention.attn_mask_type,
                    attention_type=attention.attention_type,
                ).eval()
    try:
        yield
    finally:
        for attention, core in replaced:
            attention.core_attention = core
        for attention in zeroed:
            del attention._allocate_memory


def _zeros_for_cache(allocate: Any, *shape: Any) -> torch.Tensor:
    memory: torch.Tensor = allocate(*shape)
    return memory.zero_()


def _copy_rows(source: InferenceParams, rows: torch.Tensor, target: InferenceParams, places: torch.Tensor) -> None:
    """Copy a prefilled cache's rows into the first columns of a larger one, allocating it at the first call."""
    for layer, pair in source.key_value_memory_dict.items():
        if layer not in target.key_value_memory_dict:
            length, batch = target.max_sequence_length, target.max_batch_size
            target.key_value_memory_dict[layer] = tuple(
                t.new_zeros(batch, t.size(2), length, t.size(3)).permute(2, 0, 1, 3) for t in pair
            )
        for old, new in zip(pair, target.key_value_memory_dict[layer], strict=True):
            new.permute(1, 2, 0, 3)[places, :, : old.size(0)] = old.permute(1, 2, 0, 3)[rows]


def _select_rows(cache: InferenceParams, rows: torch.Tensor) -> None:
    """Keep only these rows of every layer's keys and values."""
    for layer, pair in cache.key_value_memory_dict.items():
        # The caches are [B, heads, S, head dim] in memory (see compat.layer_spec) and must stay so.
        cache.key_value_memory_dict[layer] = tuple(t.permute(1, 2, 0, 3)[rows].permute(2, 0, 1, 3) for t in pair)
    cache.max_batch_size = cache.current_batch_size = len(rows)
