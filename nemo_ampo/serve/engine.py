"""Continuous batching over a transformers model: requests join between two decoding steps and leave when they are done.

Each request's prompt is read alone, exactly as ``generate`` would, and :mod:`nemo_ampo.serve.rows` computes each of its
tokens as if it were alone, so what is drawn depends on the request and its seed, to the last bit, and not on who shares the
batch. What goes wrong with one request ends that request only. One thread owns the model.

Legend: V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from nemo_ampo.data.chat import check_tokenizer, encode_prompt
from nemo_ampo.errors import EngineError, UserError
from nemo_ampo.model_folder.loading import load_model, load_tokenizer
from nemo_ampo.model_folder.policy_files import stop_token_ids
from nemo_ampo.serve.dial import ModeDial
from nemo_ampo.serve.rows import KeysValues, next_logits
from nemo_ampo.text import one_line

_log = logging.getLogger(__name__)
_STOP_LOOKBACK = 8
"""Tokens decoded beyond a stop text's length in characters, when looking for it."""
_CPU_HEIGHT = 8


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
    known: KeysValues = field(default_factory=list)
    """Keys and values of all but the last token."""


class ServingEngine:
    """A model that many callers ask at once.

    Args:
        folder: Hugging Face checkpoint.
        device: torch device.
        dtype: torch dtype name, or ``auto`` for the stored one.
        max_batch: rows decoded together.
        height: rows of a decoding step, idle ones included, which decides the last bits of what is computed. By default few
            on a CPU, where an idle row costs as much as another, and ``max_batch`` on a GPU, where it costs next to nothing.

    Raises:
        UserError: the folder cannot be loaded or has no usable chat template.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: str = "auto", max_batch: int = 32, height: int | None = None
    ) -> None:
        self.tokenizer = load_tokenizer(folder)
        check_tokenizer(self.tokenizer)
        self._model: Any = load_model(folder, dtype)
        self._model.to(device)
        self.context = int(self._model.config.max_position_embeddings)
        self.tokenizer("")  # the first call sets it up, which no two threads may do at once
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))
        self._stops = frozenset(stop_token_ids(folder, self.tokenizer))
        self._vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        self._max_batch = max_batch
        self._height = height or (min(max_batch, _CPU_HEIGHT) if self._model.device.type == "cpu" else max_batch)
        self._dial: ModeDial | None = None
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="decoder", daemon=True)
        self._thread.start()

    def encode(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Prompt tokens of a conversation, by the checkpoint's own chat template. May be called from any thread.

        Raises:
            UserError: the template refuses the messages, or they are certain not to fit.
        """
        # No token stands for more text than the longest one, and no message for less than one token.
        size = sum(len(message["content"]) for message in messages)
        if size > self.context * self._longest_token or len(messages) > self.context:
            raise UserError(f"context_length_exceeded: {size} characters, the context is {self.context} tokens")
        return tuple(encode_prompt(messages, self.tokenizer))

    def submit(self, request: GenerateRequest) -> Future[Generated]:
        """Queue a request; cancel the future to give it up.

        Raises:
            UserError: it cannot be served: too long, a token the model has not, or a mode bias the tokenizer has no tokens
                for.
        """
        if not request.prompt or len(request.prompt) >= self.context:
            raise UserError(f"context_length_exceeded: {len(request.prompt)} prompt tokens, the context is {self.context}")
        # On a GPU, an index beyond the embeddings ends the process's use of the device: for everybody.
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocabulary:
            raise UserError(f"prompt: a token outside the model's vocabulary of {self._vocabulary}")
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
            with torch.inference_mode():
                for row in joining:
                    self._alone(row, self._join)
                self._rows = [row for row in self._rows if not row.future.done()]
                for begin in range(0, len(self._rows), self._height):
                    self._step(self._rows[begin : begin + self._height])
                self._rows = [row for row in self._rows if not row.future.done()]

    def _free_rows(self) -> int:
        return self._max_batch - len(self._rows)

    def _alone(self, row: _Row, work: Callable[[_Row], None]) -> None:
        """Do something for one row; whatever goes wrong ends that row only."""
        try:
            work(row)
        except Exception as error:  # whatever the model raises belongs to the caller, who is waiting
            self._fail(row, error)

    def _fail(self, row: _Row, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            row.future.set_exception(EngineError(f"generation failed: {one_line(str(error)) or type(error).__name__}"))

    def _join(self, row: _Row) -> None:
        """Read a prompt, draw its first token, and make it a row of the batch unless that was all."""
        if row.future.done():  # cancelled while it waited
            return
        cache = DynamicCache()
        ids_1T = torch.tensor([row.request.prompt], device=self._model.device)
        logits_V = self._model(ids_1T, past_key_values=cache, use_cache=True, num_logits_to_keep=1).logits[0, -1]
        row.known = list(zip(cache.key_cache, cache.value_cache, strict=True))
        self._draw(row, logits_V)
        self._rows.append(row)

    def _step(self, rows: list[_Row]) -> None:
        """One token for each of these rows, together; one by one where that fails, to find the row it fails for."""
        try:
            logits_BV, grown = next_logits(
                self._model, [row.ids[-1] for row in rows], [row.known for row in rows], self._height
            )
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            _log.warning("a step of %d replies failed, each goes on alone: %s", len(rows), one_line(str(error)))
            for row in rows:
                self._step([row])
            return
        for row, logits_V, row.known in zip(rows, logits_BV, grown, strict=True):
            self._alone(row, functools.partial(self._draw, logits_V=logits_V))

    def _draw(self, row: _Row, logits_V: torch.Tensor) -> None:
        """Draw the row's next token, and hand over the reply when it is complete."""
        logits_V = logits_V.to("cpu", torch.float32, copy=True)
        if row.biases and self._mode_dial().chooses_next(row.ids):
            for token, bias in row.biases.items():
                logits_V[token] += bias
        row.ids.append(sample(logits_V, row.request.temperature, row.request.top_p, row.generator))
        reason = self._finish_reason(row)
        if reason is None:
            return
        text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        cut = min((at for at in (text.find(stop) for stop in row.request.stop) if at >= 0), default=len(text))
        with contextlib.suppress(InvalidStateError):  # the caller may give up at any moment
            row.future.set_result(Generated(tuple(row.ids), text[:cut], reason))

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
        logits_V: [V] float32, on the CPU, so that a seed means the same on every device.
        temperature: divides the logits.
        top_p: the smallest set of most likely tokens with at least this probability is drawn from; never less than one.
        generator: on the CPU.

    Raises:
        EngineError: there is no most likely token.
    """
    logits_V = logits_V - logits_V.max()  # so that no division by a small temperature leaves the range of float32
    if not bool(torch.isfinite(logits_V.max())):
        raise EngineError("the model's logits are no finite numbers: its weights are, or their format is too small")
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V / temperature, dim=-1)
    if top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True)
        sorted_V[1:][(sorted_V.cumsum(-1) - sorted_V)[1:] >= top_p] = 0
        return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
    return int(torch.multinomial(probs_V, 1, generator=generator))
