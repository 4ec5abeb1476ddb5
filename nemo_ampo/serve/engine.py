"""Continuous batching over a transformers model: requests join between two decoding steps and leave when they are done.

Each request's prompt is read alone, exactly as ``generate`` would, and its keys and values then join the batch, whose
rows are padded on the left. A row attends to its own positions only, so what is drawn depends on the request and its
seed, not on who shares the batch (up to the last bits of floating-point sums). One thread owns the model.

Legend: B rows of the batch, T positions, H key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from nemo_ampo.checkpoint.policy_files import stop_token_ids
from nemo_ampo.data.chat import check_tokenizer, encode_prompt
from nemo_ampo.errors import EngineError, UserError
from nemo_ampo.serve.dial import ModeDial

_STOP_LOOKBACK = 8
"""Tokens decoded beyond a stop text's length in characters, when looking for it."""


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate.

    Attributes:
        prompt: token ids.
        max_tokens: reply tokens at most, at least 1.
        temperature: 0 takes the most likely token.
        top_p: nucleus; 1 samples from everything.
        seed: of this request's own generator; None draws one.
        stop: texts that end the reply and do not belong to it.
        mode_bias: mode to a number, see :mod:`nemo_ampo.serve.dial`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    mode_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """A finished reply.

    Attributes:
        ids: tokens drawn, the one that ended the reply included.
        text: decoded without special tokens, cut at a stop text.
        finish_reason: ``stop`` or ``length``.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass
class _Row:
    """A request in the batch."""

    request: GenerateRequest
    future: Future[Generated]
    generator: torch.Generator
    biases: dict[int, float]
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions whose keys and values are known: all but the last token's."""
        return len(self.request.prompt) + len(self.ids) - 1


class Engine:
    """A model that many callers ask at once.

    Args:
        folder: Hugging Face checkpoint.
        device: torch device.
        dtype: torch dtype name, or ``auto`` for the stored one.
        max_batch: rows decoded together.

    Raises:
        UserError: the folder cannot be loaded or has no usable chat template.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: str = "auto", max_batch: int = 32) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            check_tokenizer(self.tokenizer)
            kind = dtype if dtype == "auto" else getattr(torch, dtype)
            self._model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=kind).to(device).eval()
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder}: no checkpoint that can be served: {str(error).splitlines()[0]}") from None
        self.context = int(self._model.config.max_position_embeddings)
        self._stops = frozenset(stop_token_ids(folder, self.tokenizer))
        self._max_batch = max_batch
        self._dial: ModeDial | None = None
        self._rows: list[_Row] = []
        self._cache_KV: list[tuple[torch.Tensor, torch.Tensor]] = []  # per layer [B, H, T, D], padded on the left
        self._waiting: deque[_Row] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="decoder", daemon=True)
        self._thread.start()

    def encode(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Prompt tokens of a conversation, by the checkpoint's own chat template."""
        return tuple(encode_prompt(messages, self.tokenizer))

    def submit(self, request: GenerateRequest) -> Future[Generated]:
        """Queue a request; cancel the future to give it up.

        Raises:
            UserError: it cannot be served: too long, or a mode bias the tokenizer has no tokens for.
        """
        if not request.prompt or len(request.prompt) >= self.context:
            raise UserError(f"context_length_exceeded: {len(request.prompt)} prompt tokens, the context is {self.context}")
        biases = self._mode_dial().biases(request.mode_bias) if request.mode_bias else {}
        seed = request.seed if request.seed is not None else random.SystemRandom().getrandbits(63)
        row = _Row(request, Future(), torch.Generator().manual_seed(seed), biases)
        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed")
            self._waiting.append(row)
            self._wake.notify()
        return row.future

    def close(self) -> None:
        """Stop decoding; open requests fail with EngineError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        for row in [*self._rows, *self._waiting]:
            with contextlib.suppress(InvalidStateError):
                row.future.set_exception(EngineError("the engine was closed"))

    def _mode_dial(self) -> ModeDial:
        if self._dial is None:
            self._dial = ModeDial(self.tokenizer)
        return self._dial

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._waiting or self._rows):
                    self._wake.wait()
                if self._closed:
                    return
                joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._free_rows()))]
            try:
                with torch.inference_mode():
                    for row in joining:
                        self._join(row)
                    self._keep([row for row in self._rows if not row.future.done()])
                    if self._rows:
                        self._step()
            except Exception as error:  # whatever the model raises belongs to the callers, who are waiting
                self._fail(joining, error)

    def _free_rows(self) -> int:
        return self._max_batch - len(self._rows)

    def _fail(self, joining: list[_Row], error: Exception) -> None:
        rows = {id(row): row for row in (*self._rows, *joining)}
        self._rows, self._cache_KV = [], []
        for row in rows.values():
            with contextlib.suppress(InvalidStateError):
                row.future.set_exception(EngineError(f"generation failed: {error}"))

    def _join(self, row: _Row) -> None:
        """Read a prompt, draw its first token, and make it a row of the batch unless that was all."""
        if row.future.done():  # cancelled while it waited
            return
        cache = DynamicCache()
        ids_1T = torch.tensor([row.request.prompt], device=self._model.device)
        logits_V = self._model(ids_1T, past_key_values=cache, use_cache=True, num_logits_to_keep=1).logits[0, -1]
        if self._draw(row, logits_V):
            return
        own = list(zip(cache.key_cache, cache.value_cache, strict=True))
        width = max(self._width(), len(row.request.prompt))
        if self._rows:
            old = [(_padded(k, width), _padded(v, width)) for k, v in self._cache_KV]
            new = [(_padded(k, width), _padded(v, width)) for k, v in own]
            own = [(torch.cat((ok, nk)), torch.cat((ov, nv))) for (ok, ov), (nk, nv) in zip(old, new, strict=True)]
        self._cache_KV = own
        self._rows.append(row)

    def _keep(self, rows: list[_Row]) -> None:
        """Drop all other rows, and the padding that none of the remaining ones needs."""
        if len(rows) == len(self._rows):
            return
        kept = {id(row) for row in rows}
        index = torch.tensor([i for i, row in enumerate(self._rows) if id(row) in kept], device=self._model.device)
        width = max((row.length for row in rows), default=0)
        self._cache_KV = [(k[index][:, :, -width:], v[index][:, :, -width:]) for k, v in self._cache_KV] if rows else []
        self._rows = rows

    def _step(self) -> None:
        """One token for every row."""
        width = self._width()
        device = self._model.device
        lengths = [row.length for row in self._rows]
        cache = DynamicCache()
        cache.key_cache, cache.value_cache = [k for k, _ in self._cache_KV], [v for _, v in self._cache_KV]
        cache._seen_tokens = width
        logits_BTV = self._model(
            torch.tensor([[row.ids[-1]] for row in self._rows], device=device),
            attention_mask=torch.tensor([[0] * (width - n) + [1] * (n + 1) for n in lengths], device=device),
            position_ids=torch.tensor([[n] for n in lengths], device=device),
            cache_position=torch.tensor([width], device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        self._cache_KV = list(zip(cache.key_cache, cache.value_cache, strict=True))
        ended = [self._draw(row, logits_V) for row, logits_V in zip(self._rows, logits_BTV[:, -1], strict=True)]
        self._keep([row for row, over in zip(self._rows, ended, strict=True) if not over])

    def _width(self) -> int:
        return self._cache_KV[0][0].shape[2] if self._cache_KV else 0

    def _draw(self, row: _Row, logits_V: torch.Tensor) -> bool:
        """Draw the row's next token; True when its reply is complete."""
        logits_V = logits_V.float()
        if row.biases and self._mode_dial().chooses_next(row.ids):
            for token, bias in row.biases.items():
                logits_V[token] += bias
        row.ids.append(sample(logits_V, row.request.temperature, row.request.top_p, row.generator))
        reason = self._finish_reason(row)
        if reason is None:
            return False
        text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        cut = min((at for at in (text.find(stop) for stop in row.request.stop) if at >= 0), default=len(text))
        with contextlib.suppress(InvalidStateError):  # the caller may give up at any moment
            row.future.set_result(Generated(tuple(row.ids), text[:cut], reason))
        return True

    def _finish_reason(self, row: _Row) -> str | None:
        if row.ids[-1] in self._stops:
            return "stop"
        if row.request.stop:
            span = max(map(len, row.request.stop)) + _STOP_LOOKBACK
            tail = self.tokenizer.decode(row.ids[-span:], skip_special_tokens=True)
            if any(stop in tail for stop in row.request.stop):
                return "stop"
        full = len(row.request.prompt) + len(row.ids) >= self.context
        return "length" if full or len(row.ids) >= row.request.max_tokens else None


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token: the most likely one at temperature 0, else drawn from the nucleus ``top_p``.

    Args:
        logits_V: [V] float32.
        temperature: divides the logits.
        top_p: the smallest set of most likely tokens with at least this probability is drawn from.
        generator: on the CPU, so that a seed means the same on every device.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V.cpu() / temperature, dim=-1)
    if top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True)
        sorted_V[sorted_V.cumsum(-1) - sorted_V >= top_p] = 0
        return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
    return int(torch.multinomial(probs_V, 1, generator=generator))


def _padded(values_BHTD: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros before the first position, up to ``width`` positions."""
    return torch.nn.functional.pad(values_BHTD, (0, 0, width - values_BHTD.shape[2], 0))
