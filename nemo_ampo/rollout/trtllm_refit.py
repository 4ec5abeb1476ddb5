"""Rollouts on a TensorRT-LLM 0.17 engine inside the training processes, refitted in place each step. [nemo]

Sampling goes through NeMo-Aligner's :class:`GPTGenerateTRTLLM`; conversion, build and refit through NeMo's exporter with
its gaps closed (:mod:`nemo_ampo.rollout.trtllm_export`). What Aligner's class does and we do not rely on: its seeds come
from one generator that is equal on every data-parallel rank (ours come with each request), it stops at one EOS id only
(every id is named here), its stop strings match token ids (text is cut by us), and it drops the sampler's
log-probabilities (asked for here). No engine has been built on a GPU by this project; see docs/engines.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp

from nemo_ampo.compat.common import load_trt_llm
from nemo_ampo.megatron.padding import vocab_size
from nemo_ampo.rollout.collective import check_equal_on_replica
from nemo_ampo.rollout.engine import (
    Caps,
    Decode,
    OnFinish,
    ReplyError,
    Request,
    Response,
    SamplingSpec,
    StaleWeightsError,
    SyncReport,
    batches_by_length,
    check_complete,
    check_requests,
    finish_response,
)
from nemo_ampo.rollout.trtllm_export import RepairedExporter
from nemo_ampo.rollout.trtllm_version import require_tensorrt_llm


def stop_words(stop_token_ids: Sequence[int], rows: int) -> Any:
    """Single-token stop words as TensorRT-LLM wants them: int32 numpy [rows, 2, ids]; ids, then where each ends."""
    ids = list(stop_token_ids)
    table = torch.tensor([ids, range(1, len(ids) + 1)], dtype=torch.int32)
    return table.repeat(rows, 1, 1).numpy()


class _Sampler(load_trt_llm().GPTGenerateTRTLLM):  # type: ignore[misc]
    """Aligner's generator with our exporter, seeds, stops and log-probabilities."""

    def __init__(self, exporter: RepairedExporter, **arguments: Any) -> None:
        super().__init__(end_strings=[], **arguments)
        self.trt_llm_exporter = exporter

    def sample(self, requests: Sequence[Request], sampling: SamplingSpec) -> tuple[torch.Tensor, ...]:
        """One static batch.

        Returns:
            output ids int64 [B, T] with the prompt in front, total lengths int64 [B], log-probabilities float32 [B, T]
            aligned to the token they score (zeros when not wanted); equal on every model-parallel rank.
        """
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "stop_words_list": stop_words(sampling.stop_token_ids, len(requests)),
            "temperature": 1.0 if sampling.greedy else float(sampling.temperature),
            "top_k": 1 if sampling.greedy else sampling.top_k,
            "top_p": 1.0 if sampling.greedy else float(sampling.top_p),
            "random_seed": torch.tensor([r.seed for r in requests], dtype=torch.int64),
            "output_log_probs": sampling.want_logprobs,
        }
        unknown = self.sampling_config.update(**settings)
        if unknown:
            raise ReplyError(f"TensorRT-LLM's SamplingConfig does not know {', '.join(sorted(unknown))}")
        output = self.trt_llm_exporter.decoder.generate(
            batch_input_ids=[torch.tensor(r.prompt_ids, dtype=torch.int32) for r in requests],
            sampling_config=self.sampling_config,
            streaming=False,
        )
        if output is None or "output_ids" not in output or "sequence_lengths" not in output:
            raise ReplyError("TensorRT-LLM returned nothing")
        ids = output["output_ids"][:, 0].long()
        lengths = output["sequence_lengths"][:, :1].long()
        if sampling.want_logprobs and output.get("log_probs") is None:
            raise ReplyError("TensorRT-LLM returned no log-probabilities")
        logprobs = output["log_probs"][:, 0].float() if sampling.want_logprobs else torch.zeros_like(ids).float()
        device = torch.cuda.current_device()
        shared = (
            broadcast_2d_tensor_within_mp(tensor.to(device).contiguous(), dtype=tensor.dtype)
            for tensor in (ids, lengths, logprobs)
        )
        ids, lengths, logprobs = (tensor.cpu() for tensor in shared)
        return ids, lengths[:, 0], logprobs


class TrtLlmRefitEngine:
    """The primary engine for GPUs; see the module's docstring.

    Args:
        model: the NeMo model being trained.
        engine_dir: where the built engine is written.
        max_batch, max_prompt, max_new_tokens: what the engine is built for.
        max_num_tokens: prompt tokens of one batch together, which the engine is built for and every batch keeps to.
        unload_during_training: free the engine's memory in :meth:`release`.
        decode: tokens to text, only needed for stop strings.

    Raises:
        ConfigError: another TensorRT-LLM than the one this is written for, or none.
    """

    def __init__(
        self,
        model: Any,
        engine_dir: Path,
        max_batch: int,
        max_prompt: int,
        max_new_tokens: int,
        unload_during_training: bool,
        max_num_tokens: int,
        decode: Decode | None = None,
    ) -> None:
        require_tensorrt_llm()
        self._model = model
        self._decode = decode
        self._unload = unload_during_training
        self._max_num_tokens = max_num_tokens
        self._weight_version: int | None = None
        self._exporter = RepairedExporter(engine_dir, model.cfg, max_prompt, max_new_tokens, max_batch, max_num_tokens)
        self._sampler = _Sampler(
            self._exporter,
            model_cfg=model.cfg,
            tokenizer=model.tokenizer,
            max_input_len=max_prompt,
            max_generation_length=max_new_tokens,
            generation_batch_size=max_batch,
            trt_model_dir=str(engine_dir),
        )
        self.caps = Caps(
            logprob_kind="sampling",
            max_batch=max_batch,
            max_prompt=max_prompt,
            max_total=max_prompt + max_new_tokens,
            vocab_size=vocab_size(model),
            own_weights=True,
        )

    def sync(self, weight_version: int) -> SyncReport:
        """Build the engine from the trainer's weights at the first call, refit all of them at later ones."""
        begin = time.monotonic()
        self._weight_version = None  # whatever fails below leaves no engine to draw from
        (module,) = self._model.get_model_module_list()
        export = self._exporter.refit_engine if self._exporter.is_built else self._exporter.build_engine
        weights = export(module)
        self._weight_version = weight_version
        size = sum(t.numel() * t.element_size() for t in weights.values())
        return SyncReport(weight_version, len(weights), size, time.monotonic() - begin)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        """See :meth:`nemo_ampo.rollout.engine.Engine.generate`. Responses of a batch come together, at its end."""
        if self._weight_version is None or self._exporter.decoder is None:
            raise StaleWeightsError("the engine holds no weights of the trainer: sync() comes before generate()")
        check_equal_on_replica(requests, sampling)
        check_requests(requests, sampling, self.caps)
        finished: dict[int, Response] = {}
        for batch in batches_by_length(requests, self.caps.max_batch, self._max_num_tokens):
            ids_BT, lengths_B, logprobs_BT = self._sampler.sample(batch, sampling)
            if len(ids_BT) != len(batch):
                raise ReplyError(f"{len(batch)} requests, {len(ids_BT)} rows from TensorRT-LLM")
            for row, request in enumerate(batch):
                response = self._response(request, ids_BT[row], int(lengths_B[row]), logprobs_BT[row], sampling)
                finished[request.request_id] = response
                if on_finish is not None:
                    on_finish(response)
        return check_complete(requests, finished, self._weight_version)

    def _response(
        self, request: Request, ids_T: torch.Tensor, length: int, logprobs_T: torch.Tensor, sampling: SamplingSpec
    ) -> Response:
        assert self._weight_version is not None
        begin = len(request.prompt_ids)
        if tuple(ids_T[:begin].tolist()) != request.prompt_ids:
            raise ReplyError(f"response {request.request_id}: its prompt came back changed")
        if not begin <= length <= len(ids_T):
            raise ReplyError(f"response {request.request_id}: length {length} of a prompt of {begin} in {len(ids_T)}")
        logprobs = logprobs_T[begin:length] if sampling.want_logprobs else None
        ids = ids_T[begin:length].tolist()
        return finish_response(request, ids, logprobs, sampling, self.caps, self._decode, self._weight_version)

    def release(self) -> None:
        """Unload the engine, if configured; the next :meth:`sync` loads it and refits every weight."""
        if self._unload:
            self._weight_version = None
            self._exporter.unload()

    def close(self) -> None:
        """Unload the engine for good."""
        self._weight_version = None
        self._exporter.unload()
