"""What every rollout engine promises: prompts in; sampled tokens, their log-probabilities and the reason to stop out.

An engine never pads, never decides rewards and never sees a group: it gets independent :class:`Request` records, each
with a seed of its own, and gives back one :class:`Response` per request. Whatever can be shared between engines stands
here and in :mod:`nemo_ampo.rollout.sampling`: checks, batches, the cut at a stop string, packing. Every doubt is an
:class:`~nemo_ampo.errors.EngineError` raised instead of data. Legend: B samples, T tokens of the longest prompt plus
response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from nemo_ampo.errors import EngineError
from nemo_ampo.files import derived_seed

Finish = Literal["eos", "stop_string", "length"]
LogprobKind = Literal["raw", "sampling"]


class RequestError(EngineError):
    """The call cannot be answered faithfully; nothing was drawn.

    Args:
        message: naming the request and the limit.
        is_bug: False where a setting of the run is at fault.
    """

    def __init__(self, message: str, is_bug: bool = True) -> None:
        super().__init__(message)
        self.is_bug = is_bug


class StaleWeightsError(EngineError):
    """The engine's weights are not the version that was asked for."""


class WeightMismatchError(EngineError):
    """Names, shapes or types of weights differ between trainer and engine; nothing was loaded."""


class ReplyError(EngineError):
    """The engine returned something that is no answer to the requests; nothing of it is used."""


class UnavailableError(EngineError):
    """The engine cannot be reached or refused to work."""


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: a response is cut here; it then has ``finish="length"``.
        stop_token_ids: a response ends with the first of these, which stays in it.
        temperature: logits are divided by it; above 0.
        top_p: smallest set of most likely tokens with this probability mass, in (0, 1]; 1 keeps all.
        top_k: that many most likely tokens; 0 keeps all.
        greedy: take the most likely token; temperature, top_p and top_k are then not used.
        stop_strings: a response ends with the token that completes the first of these in its text.
        want_logprobs: responses carry log-probabilities.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    stop_strings: tuple[str, ...] = ()
    want_logprobs: bool = True


@dataclass(frozen=True)
class Request:
    """One response to draw.

    Attributes:
        request_id: unique within a call.
        prompt_ids: unpadded prompt.
        seed: decides every draw of this response; see :func:`request_seed`.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Response:
    """One drawn response.

    Attributes:
        request_id: of the request it answers.
        token_ids: drawn tokens, the stop token included.
        logprobs: log-probability of each token under the policy itself, temperature 1 and nothing truncated, whatever
            the sampling was; float32 [len]. None when they were not wanted.
        finish: ``eos`` when a stop token was drawn, ``stop_string`` when the text ended it, ``length`` when the limit
            cut it.
        weight_version: of the weights that drew it.
    """

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: torch.Tensor | None
    finish: Finish
    weight_version: int = 0


@dataclass(frozen=True)
class Caps:
    """What an engine can do.

    Attributes:
        logprob_kind: ``raw`` engines know the policy's own log-probability at any temperature; ``sampling`` ones only
            that after temperature, which is the same at temperature 1 and refused elsewhere.
        max_batch: requests answered at once; longer calls are split.
        max_prompt, max_total: longest prompt, longest prompt plus response, tokens.
        vocab_size: ids at or above it do not exist.
        own_weights: the engine holds a copy of the weights that can be wrong, so it is probed after each sync.
    """

    logprob_kind: LogprobKind
    max_batch: int
    max_prompt: int
    max_total: int
    vocab_size: int
    own_weights: bool


@dataclass(frozen=True)
class SyncReport:
    """What moving the trainer's weights into the engine took.

    Attributes:
        weight_version: now in the engine.
        num_tensors, num_bytes: moved by this rank; 0 for an engine that shares the trainer's weights.
        seconds: wall clock.
    """

    weight_version: int
    num_tensors: int
    num_bytes: int
    seconds: float


OnFinish = Callable[[Response], None]
Decode = Callable[[Sequence[int]], str]


class Engine(Protocol):
    """A rollout engine. On several model-parallel ranks every rank calls with equal requests and gets equal responses.

    A step is ``sync``, any number of ``generate``, ``release``; the next ``sync`` brings the engine back.
    """

    @property
    def caps(self) -> Caps:
        """Limits and properties."""
        ...

    def sync(self, weight_version: int) -> SyncReport:
        """Make the trainer's current weights the ones that answer, under this version number.

        Raises:
            WeightMismatchError: a weight is missing, left over or misshapen.
            UnavailableError: the engine did not take them.
        """
        ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        """Draw one response per request, in request order.

        Args:
            requests: with distinct ``request_id``.
            sampling: shared by all requests of the call.
            on_finish: called as soon as a response is complete, while others are still being drawn.

        Raises:
            RequestError: empty or too long prompt, duplicate id, token outside the vocabulary, unequal requests across
                model-parallel ranks.
            StaleWeightsError: not synced, or answered by another version.
            ReplyError: the engine's answer does not fit the requests.
        """
        ...

    def release(self) -> None:
        """Give back what memory the engine can spare while the trainer works."""
        ...

    def close(self) -> None:
        """End the engine."""
        ...


def request_seed(run_seed: int, step: int, prompt: str, sample: int) -> int:
    """A 63-bit seed from what the response *is*, never from the rank that happens to draw it.

    So a run draws the same responses on one process, two data-parallel ranks, or after a resume.
    """
    return derived_seed(f"{run_seed}/{step}/{prompt}/{sample}", bits=63)


def check_requests(requests: Sequence[Request], sampling: SamplingSpec, caps: Caps) -> None:
    """Refuse a call that could not be answered faithfully.

    Args:
        requests: of one ``generate`` call.
        sampling: of the same call.
        caps: of the engine that was asked.

    Raises:
        RequestError: naming the request and the limit.
    """
    _check_sampling(sampling, caps)
    if len({r.request_id for r in requests}) != len(requests):
        raise RequestError("request ids of one call must be distinct")
    for r in requests:
        length = len(r.prompt_ids)
        if not r.prompt_ids:
            raise RequestError(f"request {r.request_id}: empty prompt")
        if length > caps.max_prompt:
            raise RequestError(
                f"request {r.request_id}: prompt of {length} tokens exceeds the engine's {caps.max_prompt} "
                "(rollout.max_prompt_tokens)",
                is_bug=False,
            )
        if length + sampling.max_new_tokens > caps.max_total:
            raise RequestError(
                f"request {r.request_id}: prompt of {length} tokens plus {sampling.max_new_tokens} new ones "
                f"exceeds the engine's {caps.max_total} (rollout.max_prompt_tokens, rollout.max_new_tokens)",
                is_bug=False,
            )
        if max(r.prompt_ids) >= caps.vocab_size or min(r.prompt_ids) < 0:
            raise RequestError(f"request {r.request_id}: token id outside the vocabulary of {caps.vocab_size}")
        if not 0 <= r.seed < 2**63:
            raise RequestError(f"request {r.request_id}: seed {r.seed} is not in [0, 2**63)")


def _check_sampling(sampling: SamplingSpec, caps: Caps) -> None:
    if sampling.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if sampling.temperature <= 0:
        raise RequestError(f"temperature must be above 0, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise RequestError(f"top_p must be in (0, 1] and top_k at least 0, got {sampling.top_p} and {sampling.top_k}")
    if not sampling.stop_token_ids:
        raise RequestError("no stop token: every response would run to max_new_tokens")
    if not all(0 <= i < caps.vocab_size for i in sampling.stop_token_ids):
        raise RequestError(f"stop token outside the vocabulary of {caps.vocab_size}: {sampling.stop_token_ids}")
    if any(not s for s in sampling.stop_strings):
        raise RequestError("an empty stop string would end every response")
    if sampling.want_logprobs and caps.logprob_kind == "sampling" and sampling.temperature != 1 and not sampling.greedy:
        raise RequestError(
            f"this engine's log-probabilities are the policy's only at temperature 1, got {sampling.temperature}; "
            "set want_logprobs=False"
        )


def batches_by_length(requests: Sequence[Request], size: int, max_tokens: int | None = None) -> Iterator[list[Request]]:
    """Batches of at most ``size`` requests, longest prompts first, equal prompts side by side.

    ``max_tokens`` bounds the prompt tokens of a batch together; a prompt longer than that is a batch of its own.

    A static batch pads to its longest prompt, so neighbours in length waste least; and the largest batch coming first
    shows at once whether memory suffices.
    """
    ordered = sorted(requests, key=lambda r: (-len(r.prompt_ids), r.prompt_ids, r.request_id))
    batch: list[Request] = []
    tokens = 0
    for request in ordered:
        tokens += len(request.prompt_ids)
        if batch and (len(batch) == size or (max_tokens is not None and tokens > max_tokens)):
            yield batch
            batch, tokens = [], len(request.prompt_ids)
        batch.append(request)
    if batch:
        yield batch


def finish_response(
    request: Request,
    token_ids: Sequence[int],
    logprobs: torch.Tensor | None,
    sampling: SamplingSpec,
    caps: Caps,
    decode: Decode | None,
    weight_version: int,
) -> Response:
    """One engine's raw tokens as a checked response, cut at the first stop token or stop string.

    Args:
        request: what was asked.
        token_ids: drawn tokens, without the prompt; what lies behind the stop is dropped.
        logprobs: float [len] or None.
        sampling: of the call.
        caps: of the engine.
        decode: tokens to text; only needed with stop strings.
        weight_version: that drew them.

    Raises:
        ReplyError: no token, more than asked for, fewer without a stop, an id that does not exist, log-probabilities
            that are absent, not one per token, positive or not finite.
    """
    name = f"response {request.request_id}"
    ids = tuple(token_ids)
    if not ids or len(ids) > sampling.max_new_tokens:
        raise ReplyError(f"{name}: {len(ids)} tokens, expected 1 to {sampling.max_new_tokens}")
    if not all(0 <= i < caps.vocab_size for i in ids):
        raise ReplyError(f"{name}: a token id outside the vocabulary of {caps.vocab_size}")
    finish: Finish = "length"
    stop = next((n for n, i in enumerate(ids) if i in sampling.stop_token_ids), None)
    keep = len(ids)
    if stop is not None:
        finish, keep = "eos", stop + 1
    text_end = stop_string_end(ids[:keep], sampling.stop_strings, decode)
    if text_end is not None and (text_end < keep or stop is None):
        finish, keep = "stop_string", text_end
    if finish == "length" and keep < sampling.max_new_tokens:
        raise ReplyError(f"{name}: ended after {keep} of {sampling.max_new_tokens} tokens without a stop token")
    if not sampling.want_logprobs:
        return Response(request.request_id, ids[:keep], None, finish, weight_version)
    if logprobs is None or len(logprobs) != len(ids):
        raise ReplyError(f"{name}: {len(ids)} tokens, {0 if logprobs is None else len(logprobs)} log-probs")
    kept = logprobs[:keep].float()
    check_logprobs(name, kept)
    return Response(request.request_id, ids[:keep], kept, finish, weight_version)


def stop_string_end(token_ids: Sequence[int], stop_strings: Sequence[str], decode: Decode | None) -> int | None:
    """How many tokens to keep so that the text just contains one of the strings; None when it never does.

    Looked for in the decoded text and not in token ids: what stands before and behind a stop string merges into its
    first and last token, so that no fixed list of ids matches (``.<``, ``>`` with a line break). The token that
    completes the string stays whole.
    """
    if not stop_strings:
        return None
    if decode is None:
        raise RequestError("stop strings need an engine that was given a tokenizer")

    def has(count: int) -> bool:
        text = decode(token_ids[:count])
        return any(s in text for s in stop_strings)

    if not has(len(token_ids)):
        return None
    low, high = 0, len(token_ids)  # has(low) is False, has(high) is True
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if has(middle) else (middle, high)
    return high


def check_logprobs(name: str, logprobs: torch.Tensor) -> None:
    """Log-probabilities are finite and not positive.

    Raises:
        ReplyError: otherwise.
    """
    if not torch.isfinite(logprobs).all() or (logprobs > 1e-4).any():
        raise ReplyError(f"{name}: a log-probability is positive or not finite")


def check_complete(requests: Sequence[Request], responses: dict[int, Response], weight_version: int) -> list[Response]:
    """Responses in request order, all of one version.

    Raises:
        ReplyError: one is missing or too many.
        StaleWeightsError: one was drawn by other weights.
    """
    wanted = {r.request_id for r in requests}
    if wanted != set(responses):
        raise ReplyError(
            f"{len(requests)} requests, {len(responses)} responses; missing {sorted(wanted - set(responses))[:8]}, "
            f"not asked for {sorted(set(responses) - wanted)[:8]}"
        )
    for response in responses.values():
        if response.weight_version != weight_version:
            raise StaleWeightsError(
                f"response {response.request_id} was drawn by weights {response.weight_version}, expected {weight_version}"
            )
    return [responses[r.request_id] for r in requests]


def requests_digest(requests: Sequence[Request], sampling: SamplingSpec) -> str:
    """Equal for equal calls; what ranks of one replica compare."""
    return hashlib.sha256(repr((sampling, list(requests))).encode()).hexdigest()


def check_equal_calls(requests: Sequence[Request], sampling: SamplingSpec, variants: Callable[[str], int]) -> None:
    """Every rank of the replica raises if one asks for something else; nobody hangs in a half-entered collective.

    Args:
        requests, sampling: of this rank's call.
        variants: how many different values the ranks of the replica hold, of this one and theirs.

    Raises:
        RequestError: naming how many different calls were made.
    """
    count = variants(requests_digest(requests, sampling))
    if count > 1:
        raise RequestError(f"the model-parallel ranks of a replica made {count} different calls")
