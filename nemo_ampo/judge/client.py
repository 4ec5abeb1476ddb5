"""The judge as an async client: one question, one verdict, with two kinds of patience.

A reply that cannot be read as a verdict is asked for again, at the temperatures of
``JudgeConfig.temperatures``: the first tries are greedy, later ones sample, since a greedy model repeats its
mistake (reference behaviour: 0, 0, 1, 1, 1). A call that brought no reply at all (timeout, broken connection,
429, 5xx) is repeated at the same temperature after a random, exponentially growing wait. Every other status
fails at once. When patience ends, :class:`JudgeError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from nemo_ampo.errors import ConfigError, JudgeError, UserError
from nemo_ampo.judge.completion import CallError, one_line, read_completion, read_model_ids
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.judge.stats import JudgeStats, StatsRecorder
from nemo_ampo.judge.verdict import parse_verdict
from nemo_ampo.prompts import load_prompt, render_judge_prompt, require_judge_placeholders
from nemo_ampo.types import JudgeRequest, Verdict

if TYPE_CHECKING:
    from openai import APIStatusError

_log = logging.getLogger(__name__)

_NO_KEY = "none"  # The client library insists on a key; endpoints without one ignore it.


class Judge:
    """Client of one endpoint. Belongs to the event loop that first awaits it; close it there.

    Raises:
        ConfigError: on construction, if the prompt or the key's environment variable is missing.
    """

    def __init__(self, config: JudgeConfig) -> None:
        import openai  # Half a second, and only needed to talk.

        self.config = config
        self._template = load_prompt(config.prompt)
        require_judge_placeholders(self._template)
        self._key = _read_key(config.api_key_env)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY, base_url=config.base_url, timeout=config.timeout_s, max_retries=0
        )
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._stats = StatsRecorder()

    def __repr__(self) -> str:
        return f"Judge(model={self.config.model!r}, base_url={self.config.base_url!r})"

    async def __aenter__(self) -> Judge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    @property
    def stats(self) -> JudgeStats:
        """Counts since construction; may be read from any thread."""
        return self._stats.snapshot()

    async def score(self, request: JudgeRequest) -> Verdict:
        """Goal achievement of both speakers.

        Raises:
            JudgeError: if no usable verdict came; ``kind`` is ``parse`` (nothing readable), ``empty`` (nothing
                said), ``timeout``, ``connection`` or ``status``.
        """
        self._stats.asked()
        try:
            verdict = await self._try_temperatures(render_judge_prompt(self._template, request))
        except JudgeError as error:
            self._stats.failed(error.kind)
            raise
        self._stats.scored()
        return verdict

    async def check(self) -> None:
        """Ask the endpoint once whether it is there, lets us in and serves the model; for the start of a run.

        Raises:
            UserError: one line that names ``base_url`` and what is wrong.
        """
        try:
            if self.config.model not in await self._listed_models():
                # Not every endpoint lists its models, or all of their names. A real call decides.
                await self._call("Answer with the word yes.", self.config.temperatures[0])
        except CallError as failure:
            raise UserError(self._explain(failure)) from None

    async def _try_temperatures(self, prompt: str) -> Verdict:
        last_try = len(self.config.temperatures)
        for number, temperature in enumerate(self.config.temperatures, start=1):
            reply = await self._ask(prompt, temperature)
            try:
                return _read_reply(reply)
            except JudgeError as error:
                if number == last_try:
                    raise JudgeError(error.kind, f"{error} (try {number} of {last_try})") from None
                self._repeat(error.kind, str(error))
        raise AssertionError("unreachable: the configuration holds at least one temperature")

    async def _ask(self, prompt: str, temperature: float) -> str:
        """Text of the reply; repeats the call while it fails in a way that may pass."""
        # One controller per question: tenacity's keeps the state of the iteration it is in.
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self.config.connection_retries),
            wait=self._wait_s,
            retry=retry_if_exception(lambda error: isinstance(error, CallError) and error.transient),
            before_sleep=self._before_sleep,
            reraise=True,
        )
        return await retrying(self._call, prompt, temperature)

    async def _call(self, prompt: str, temperature: float) -> str:
        """One HTTP call, once a slot is free. The slot is not held while waiting for a repetition."""
        async with self._slots:
            self._stats.called()
            started = time.monotonic()
            body = await self._body_of(
                lambda: self._client.chat.completions.with_raw_response.create(
                    model=self.config.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=temperature,
                    max_tokens=self.config.max_tokens,
                )
            )
            completion = read_completion(self._redact(body))
            self._stats.answered(time.monotonic() - started, completion.prompt_tokens, completion.completion_tokens)
            return completion.text

    async def _listed_models(self) -> list[str]:
        """Ids under ``/models``; empty if the endpoint does not say."""
        try:
            body = await self._body_of(lambda: self._client.models.with_raw_response.list())
        except CallError as failure:
            if failure.status is None or failure.status in (401, 403):
                raise
            return []
        return read_model_ids(body)

    async def _body_of(self, call: Callable[[], Awaitable[Any]]) -> str:
        """Body of a successful answer, or CallError. Only this place knows the client library's errors."""
        import openai

        try:
            # The library's timeout restarts with every byte received.
            async with asyncio.timeout(self.config.timeout_s):
                response = await call()
                return str(response.text)
        except (TimeoutError, openai.APITimeoutError):
            failure = CallError("timeout", f"no answer within {self.config.timeout_s:g} s", cause="timeout", transient=True)
        except openai.APIStatusError as error:
            failure = self._status_failure(error)
        except openai.OpenAIError as error:
            reason = self._redact(f"{error.__cause__ or error}")
            failure = CallError("connection", f"no connection: {one_line(reason)}", cause="connection", transient=True)
        # Raised outside the handlers, so that the library's error, whose request carries the key, is not its
        # context.
        raise failure

    def _status_failure(self, error: APIStatusError) -> CallError:
        status = error.status_code
        return CallError(
            "status",
            f"status {status}: {one_line(self._redact(error.response.text)) or 'no explanation'}",
            cause="rate_limit" if status == 429 else "server_error",
            transient=status == 429 or status >= 500,
            status=status,
            retry_after_s=_seconds(error.response.headers.get("retry-after", "")),
        )

    def _wait_s(self, state: RetryCallState) -> float:
        backoff_s = wait_random_exponential(multiplier=self.config.backoff_initial_s, max=self.config.backoff_max_s)(state)
        return min(max(backoff_s, _failure(state).retry_after_s), self.config.backoff_max_s)

    def _before_sleep(self, state: RetryCallState) -> None:
        failure = _failure(state)
        self._repeat(failure.cause, str(failure))

    def _repeat(self, cause: str, reason: str) -> None:
        self._stats.repeated(cause)
        _log.info("judge %s: asking again: %s", self.config.model, reason)

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[API key]") if self._key else text

    def _explain(self, failure: CallError) -> str:
        where = f"judge.base_url {self.config.base_url}"
        if failure.status in (401, 403):
            variable = self.config.api_key_env
            cure = f"check the key in {variable}" if variable else "set judge.api_key_env"
        elif failure.status is not None:
            cure = f"check judge.model ({self.config.model}) and the address, which often ends in /v1"
        else:
            cure = "start the judge or correct the address"
        return f"{where}: {failure}; {cure}"


def _read_reply(reply: str) -> Verdict:
    if not reply.strip():
        raise JudgeError("empty", "the judge's reply is empty")
    return parse_verdict(reply)


def _read_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"judge.api_key_env: environment variable {variable} is not set; export it or clear the key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"judge.api_key_env: environment variable {variable} does not hold an API key (odd characters)")
    return key


def _failure(state: RetryCallState) -> CallError:
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, CallError)
    return failure


def _seconds(header: str) -> float:
    """A Retry-After header; its other form, a date, counts as absent."""
    return float(header) if header.isascii() and header.isdigit() else 0.0
