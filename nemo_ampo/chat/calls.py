"""Calls of one model, at one address or several, until one brings a reply.

A call that brought no reply at all (timeout, broken connection, 429, 5xx) is repeated after a random, exponentially
growing wait, or at once at another address of the pool. Every other status fails at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from nemo_ampo.chat.completion import CallError, Completion, read_completion, read_model_ids
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.limiter import Limiter
from nemo_ampo.chat.pool import REFUSALS, Endpoint, Pool
from nemo_ampo.chat.question import CHARS_PER_TOKEN, Question
from nemo_ampo.chat.stats import StatsRecorder
from nemo_ampo.chat.transport import Transport

_log = logging.getLogger(__name__)

SCHEMA_REFUSED = (400, 422, 501)
"""Statuses of an endpoint that may know no JSON schemas."""


class Calls:
    """The addresses of a model and the way to them.

    Args:
        config: where and how.
        limiter: asked before every call.
        stats: counts.

    Raises:
        ConfigError: on construction, if an environment variable is missing or ``ca_file`` cannot be used.
    """

    def __init__(self, config: EndpointConfig, limiter: Limiter, stats: StatsRecorder) -> None:
        self.config, self.pool = config, Pool(config)
        secrets = [text for endpoint in self.pool.endpoints for text in endpoint.secrets.values()]
        self._transport = Transport(config.timeout_s, secrets, config.ca_file)
        self._limiter, self._stats = limiter, stats

    async def aclose(self) -> None:
        """Close connections and limiter."""
        await self._transport.aclose()
        await self._limiter.aclose()

    async def reply(self, question: Question) -> Completion:
        """A reply; repeats the call while it fails in a way that may pass or another address may do better.

        Raises:
            CallError: the last one.
            BudgetError: the job has no call or no money left.
        """
        avoid: set[Endpoint] = set()
        known: list[CallError] = []
        try:
            # The first call is made outside: the controller would take a tenth of the time that a good one takes here.
            return await self._anywhere(question, avoid)
        except CallError as failure:
            known.append(failure)

        async def call() -> Completion:
            if known:
                raise known.pop()
            return await self._anywhere(question, avoid)

        # One controller per question: tenacity's keeps the state of the iteration it is in.
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self.config.connection_retries),
            wait=lambda state: self.wait_s(state, avoid),
            retry=retry_if_exception(lambda error: isinstance(error, CallError) and self._may_heal(error, avoid)),
            before_sleep=self._before_sleep,
            reraise=True,
        )
        return await retrying(call)

    async def _anywhere(self, question: Question, avoid: set[Endpoint]) -> Completion:
        """One call at the best address; on failure that address is added to ``avoid``."""
        while (endpoint := self.pool.pick(avoid)) is None:
            await asyncio.sleep(min(self.pool.wait_s(), 1.0))
        endpoint.in_flight += 1
        try:
            completion = await self.once(endpoint, question)
        except CallError as failure:
            avoid.add(endpoint)
            self.pool.failed(endpoint, failure)
            raise
        finally:
            endpoint.in_flight -= 1
        self.pool.succeeded(endpoint)
        return completion

    async def once(self, endpoint: Endpoint, question: Question) -> Completion:
        """One call, or two where the endpoint is found to refuse the schema."""
        structured = question.schema is not None and endpoint.structured is not False
        try:
            completion = await self.send(endpoint, question, structured)
        except CallError as failure:
            undecided = structured and endpoint.structured is None and self.config.structured == "auto"
            if not undecided or failure.status not in SCHEMA_REFUSED:
                raise
            self.repeating("structured", str(failure))
            completion = await self.send(endpoint, question, structured=False)
            endpoint.structured = False
            return completion
        if structured:
            endpoint.structured = True
        return completion

    async def send(self, endpoint: Endpoint, question: Question, structured: bool) -> Completion:
        """One HTTP call, once the limiter lets it go. No lease is held while waiting for a repetition."""
        price = self.config.price.get(endpoint.model)
        most = (question.prompt_tokens, question.max_tokens)
        lease = await self._limiter.acquire(sum(most), price.usd(*most) if price else 0.0)
        tokens, usd = 0, 0.0
        try:
            self._stats.called()
            started = time.monotonic()
            payload = question.payload(endpoint.model, structured)
            body = await self._transport.post(endpoint.url("chat/completions"), endpoint.key, payload, endpoint.headers)
            used = reported = (0, 0)
            try:
                completion = read_completion(body)
                # Once more after decoding: text that came in parts is together only now.
                text, reasoning = self._transport.redact(completion.text), self._transport.redact(completion.reasoning or "")
                completion = replace(completion, text=text, reasoning=reasoning or None)
                used = reported = (completion.prompt_tokens, completion.completion_tokens)
                if used == (0, 0):  # not reported, but not free
                    said = len(completion.text) + len(completion.reasoning or "")
                    used = (question.prompt_tokens, math.ceil(said / CHARS_PER_TOKEN))
            except CallError as failure:
                used = reported = failure.usage
                raise
            finally:
                tokens, usd = sum(used), price.usd(*used) if price else 0.0
                self._stats.answered(time.monotonic() - started, *reported, usd)
            return completion
        finally:
            self._limiter.settle(lease, tokens, usd)

    async def listed_models(self, endpoint: Endpoint) -> list[str]:
        """Ids under ``/models``; empty if the endpoint does not say."""
        try:
            body = await self._transport.get(endpoint.url("models"), endpoint.key, endpoint.headers)
        except CallError as failure:
            if failure.status is None or failure.status in (401, 403):
                raise
            return []
        return read_model_ids(body)

    def limit_of(self, max_tokens: int | None, extra_body: Mapping[str, Any] | None) -> str:
        """The setting that limits a reply."""
        extra = {**self.config.extra_body, **(extra_body or {})}
        named = next((name for name in ("max_completion_tokens", "max_tokens") if extra.get(name) is not None), None)
        if named is not None:
            return f"{self.config.section}.extra_body.{named}={extra[named]}"
        return f"{self.config.section}.max_tokens={max_tokens if max_tokens is not None else self.config.max_tokens}"

    def _may_heal(self, failure: CallError, avoid: set[Endpoint]) -> bool:
        return failure.transient or (failure.status in REFUSALS and self.pool.has_other(avoid))

    def wait_s(self, state: RetryCallState, avoid: set[Endpoint]) -> float:
        """Before the next call, seconds: none where another address is left."""
        if self.pool.has_other(avoid):
            return 0.0
        backoff_s = wait_random_exponential(multiplier=self.config.backoff_initial_s, max=self.config.backoff_max_s)(state)
        return max(backoff_s, min(_failure(state).retry_after_s, self.config.retry_after_max_s))

    def _before_sleep(self, state: RetryCallState) -> None:
        failure = _failure(state)
        self.repeating(failure.cause, str(failure))

    def repeating(self, cause: str, reason: str) -> None:
        """Count, and say, that something is asked again."""
        self._stats.repeated(cause)
        _log.info("%s %s: asking again: %s", self.config.section, self.config.model, reason)


def _failure(state: RetryCallState) -> CallError:
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, CallError)
    return failure
