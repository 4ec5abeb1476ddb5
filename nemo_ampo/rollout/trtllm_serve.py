"""Serve rollouts from TensorRT-LLM 1.2 or later: ``python -m nemo_ampo.rollout.trtllm_serve --model DIR ...``.

Runs in TensorRT-LLM's own container, with this project's folder on ``PYTHONPATH``; needs nothing of NeMo. Plain
``trtllm-serve`` cannot change weights, so this starts ``AsyncLLM`` with an extension in each worker that can
(:mod:`nemo_ampo.rollout.trtllm_worker`), behind the application the trainer's engine expects
(:mod:`nemo_ampo.rollout.server_api`). The application is tested over a stand-in; this file's calls into TensorRT-LLM are
written from its sources and were never run by this project.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from nemo_ampo.model_folder.facts import read_facts
from nemo_ampo.overrides import typed_path
from nemo_ampo.rollout.server_api import Drawn, PromptTokens, Sampling, State, make_app

EXTENSION = "nemo_ampo.rollout.trtllm_worker.FolderExtension"


class TensorRtLlm:
    """A :class:`~nemo_ampo.rollout.server_api.Backend` over ``AsyncLLM``.

    Args:
        model: Hugging Face folder the engine starts with; its weights are never used for rollouts.
        tensor_parallel: GPUs of this server.
        max_batch, max_prompt, max_total: limits of the engine.
    """

    def __init__(self, model: Path, tensor_parallel: int, max_batch: int, max_prompt: int, max_total: int) -> None:
        import tensorrt_llm
        from tensorrt_llm import AsyncLLM

        self._release = tensorrt_llm.__version__
        self._limits = {"max_prompt": max_prompt, "max_total": max_total}
        self._vocab_size = read_facts(model).vocab
        self._version: int | None = None
        self._llm: Any = AsyncLLM(
            model=str(model),
            backend="pytorch",
            orchestrator_type="ray",
            ray_worker_extension_cls=EXTENSION,
            tensor_parallel_size=tensor_parallel,
            max_batch_size=max_batch,
            max_seq_len=max_total,
            # The sampler whose log-probability is that of the sampled token, and which takes a seed per request.
            sampler_type="TRTLLMSampler",
        )

    def state(self) -> State:
        """See :class:`~nemo_ampo.rollout.server_api.Backend`."""
        return State(tensorrt_llm=self._release, weight_version=self._version, vocab_size=self._vocab_size, **self._limits)

    async def load(self, folder: str, weight_version: int) -> tuple[int, int]:
        """See :class:`~nemo_ampo.rollout.server_api.Backend`."""
        self._version = None  # a load that fails leaves nothing to draw from
        moved = await self._llm.collective_rpc("load_folder", args=(folder,))
        if len(set(map(tuple, moved))) != 1:
            raise RuntimeError(f"the workers loaded different weights: {moved}")
        self._version = weight_version
        return int(moved[0][0]), int(moved[0][1])

    async def release(self) -> None:
        """Nothing to give back: this server's GPUs are its own."""

    async def generate(self, requests: list[PromptTokens], sampling: Sampling) -> AsyncIterator[Drawn]:
        """See :class:`~nemo_ampo.rollout.server_api.Backend`."""
        if sampling.want_logprobs and sampling.temperature != 1 and not sampling.greedy:
            raise ValueError("log-probabilities are only known to be the policy's at temperature 1")
        calls = [asyncio.create_task(self._one(request, sampling)) for request in requests]
        try:
            for call in asyncio.as_completed(calls):
                yield await call
        finally:
            for task in calls:
                task.cancel()

    async def _one(self, request: PromptTokens, sampling: Sampling) -> Drawn:
        from tensorrt_llm import SamplingParams

        assert self._version is not None
        settings = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            end_id=-1,
            stop_token_ids=sampling.stop_token_ids,
            include_stop_str_in_output=True,
            detokenize=False,
            seed=request.seed,
            temperature=1.0 if sampling.greedy else sampling.temperature,
            # Both left out would mean greedy search.
            top_k=1 if sampling.greedy else sampling.top_k,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            logprobs=1 if sampling.want_logprobs else None,
        )
        result = await self._llm.generate_async(inputs=request.prompt_ids, sampling_params=settings)
        output = result.outputs[0]
        ids = list(output.token_ids)
        values = sampled_logprobs(ids, output.logprobs) if sampling.want_logprobs else None
        return Drawn(request_id=request.request_id, token_ids=ids, logprobs=values, weight_version=self._version)


def sampled_logprobs(token_ids: Sequence[int], logprobs: Any) -> list[float]:
    """The sampled token's own log-probability at each position.

    Args:
        token_ids: drawn tokens.
        logprobs: one mapping of token id to an object with ``logprob`` per position, as TensorRT-LLM returns them.

    Raises:
        ValueError: a position has none for its sampled token; some samplers return the most likely token's instead.
    """
    if logprobs is None or len(logprobs) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens, {0 if logprobs is None else len(logprobs)} log-probabilities")
    values = []
    for position, (token, known) in enumerate(zip(token_ids, logprobs, strict=True)):
        if token not in known:
            raise ValueError(f"position {position}: a log-probability of another token than the sampled one")
        values.append(float(known[token].logprob))
    return values


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m nemo_ampo.rollout.trtllm_serve", description="Serve rollouts.")
    p.add_argument("--model", type=typed_path, required=True, metavar="DIR", help="Hugging Face folder of the policy")
    p.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs (default %(default)s)")
    p.add_argument("--max-batch", type=int, default=256, metavar="N", help="responses at once (default %(default)s)")
    p.add_argument("--max-prompt", type=int, default=6144, metavar="N", help="tokens (default %(default)s)")
    p.add_argument("--max-total", type=int, default=8192, metavar="N", help="prompt plus response (default %(default)s)")
    p.add_argument("--host", default="0.0.0.0", help="address to listen on (default %(default)s)")
    p.add_argument("--port", type=int, default=8200, help="port (default %(default)s)")
    p.add_argument("--url-file", type=typed_path, metavar="FILE", help="gets this server's URL once the engine is up")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Start the engine, say where it is, serve until killed."""
    import uvicorn

    args = parser().parse_args(argv)
    app = make_app(TensorRtLlm(args.model, args.tensor_parallel, args.max_batch, args.max_prompt, args.max_total))
    if args.url_file is not None:
        partial = args.url_file.with_name(f".{args.url_file.name}.partial")
        partial.write_text(f"http://{socket.gethostname()}:{args.port}\n")
        partial.rename(args.url_file)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
