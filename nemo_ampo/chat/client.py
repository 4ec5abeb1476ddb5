"""A chat API as an async client: one question, one answer, with two kinds of patience.

A call that brought no reply at all (timeout, broken connection, 429, 5xx) is repeated after a random, exponentially
growing wait, or at once at another address of the pool: :meth:`ChatClient.complete`. A reply that its reader cannot
read is asked for again at the next temperature of a schedule, the first time with the reader's complaint:
:meth:`ChatClient.ask`. Every other status fails at once. When patience ends, :class:`ChatError`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from nemo_ampo.chat.cache import Cache, ReplyFile
from nemo_ampo.chat.completion import CallError, Completion, read_completion, read_model_ids
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.limiter import Limiter, LocalLimiter
from nemo_ampo.chat.limits import Limits
from nemo_ampo.chat.pool import REFUSALS, Endpoint, Pool
from nemo_ampo.chat.proxies import proxy_for
from nemo_ampo.chat.question import CHARS_PER_TOKEN, Message, Question
from nemo_ampo.chat.stats import ChatStats, StatsRecorder
from nemo_ampo.chat.transport import TRANSIENT_STATUSES, Transport
from nemo_ampo.errors import BudgetError, ChatError, ConfigError, DiskError, UserError
from nemo_ampo.speech import without_control_tokens
from nemo_ampo.text import one_line

_log = logging.getLogger(__name__)

T = TypeVar("T")


_SCHEMA_REFUSED = (400, 422, 501)
_PROBE: list[Message] = [{"role": "user", "content": 'Answer with this JSON object: {"answer": "yes"}'}]
_PROBE_SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
_SHOWN_REPLY_CHARS = 4000


@dataclass(frozen=True)
class Asked(Generic[T]):
    """A readable answer.

    Attributes:
        value: what the reader made of it.
        completion: the reply it was read from.
        tries: replies it took, this one included.
    """

    value: T
    completion: Completion
    tries: int


class ChatClient:
    """Client of one model, at one address or several. One per process.

    Belongs to the event loop that first awaits it; close it there.

    Args:
        config: where and how.
        limiter: shared with the other processes of the job; one of its own otherwise.
        cache: shared likewise; the file of ``config.cache`` or ``config.replay`` otherwise.
        stats: counts; new ones otherwise.
        recording: settings that decide what is asked; a replay with others is refused.

    Raises:
        ConfigError: on construction, if an environment variable is missing, ``ca_file`` or the cache cannot be used, or the
            replay was recorded with other settings.
    """

    def __init__(
        self,
        config: EndpointConfig,
        *,
        limiter: Limiter | None = None,
        cache: Cache | None = None,
        stats: StatsRecorder | None = None,
        recording: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self._pool = Pool(config)
        secrets = [text for endpoint in self._pool.endpoints for text in endpoint.secrets.values()]
        self._transport = Transport(config.timeout_s, secrets, config.ca_file)
        self._limiter: Limiter = limiter or LocalLimiter(Limits.of(config))
        self._cache = cache or open_cache(config, recording or {})
        self._stats = stats or StatsRecorder()
        self._running: dict[str, asyncio.Task[Completion]] = {}
        self._told: set[str] = set()
        self._solved = False
        self._refusal: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.config.model!r}, base_url={self.config.base_url!r})"

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close connections, limiter and cache."""
        for task in self._running.values():
            task.cancel()
        await self._transport.aclose()
        await self._limiter.aclose()
        if self._cache is not None:
            await self._cache.aclose()

    @property
    def stats(self) -> ChatStats:
        """Counts since construction; may be read from any thread."""
        return self._stats.snapshot()

    async def complete(self, question: Question) -> Completion:
        """One reply, whatever it says.

        Raises:
            ChatError: no reply; ``kind`` is ``parse`` (not a chat completion), ``timeout``, ``connection`` or ``status``.
            BudgetError: the job has no call or no money left.
            UserError: a replay holds no outcome of this question.
        """
        with self._noting_refusals():
            return await self._complete(question)

    async def _complete(self, question: Question) -> Completion:
        return await self._patiently(question) if self._cache is None else await self._remembered(question, self._cache)

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ChatError as error:
            if error.permanent:
                self._refusal = str(error)
            raise
        self._solved = True

    def question(
        self,
        messages: Sequence[Message],
        *,
        temperature: float,
        seed: int | None = None,
        max_tokens: int | None = None,
        schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] | None = None,
        attempt: int = 0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Question:
        """What :meth:`complete` and :meth:`check` ask.

        Args:
            messages: the conversation.
            temperature: of the sampling.
            seed: sent if given; endpoints differ in what they make of it.
            max_tokens: limit of the reply; the config's if None.
            schema: JSON schema of the reply, for endpoints that can hold a model to one.
            stop: texts that end the reply.
            attempt: number of this repetition of the same question; a cache keeps them apart.
            extra_body: further fields of the request, over the config's.
        """
        return Question(
            model=self.config.model,
            messages=tuple(messages),
            temperature=temperature,
            max_tokens=max_tokens if max_tokens is not None else self.config.max_tokens,
            seed=seed,
            schema=schema if self.config.structured != "off" else None,
            stop=tuple(stop) if stop else None,
            extra_body={**self.config.extra_body, **(extra_body or {})},
            attempt=attempt,
        )

    async def ask(
        self,
        messages: Sequence[Message],
        parse: Callable[[str], T],
        *,
        temperatures: Sequence[float],
        schema: Mapping[str, Any] | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        parse_errors: tuple[type[Exception], ...] = (ValueError,),
        explain: bool = True,
    ) -> Asked[T]:
        """A reply that ``parse`` can read, asked for up to ``len(temperatures)`` times.

        Args:
            messages: the conversation.
            parse: reads the reply's text or raises one of ``parse_errors``.
            temperatures: of each try.
            schema, max_tokens, stop, extra_body: see :meth:`question`.
            seed: of the first try; each further one adds 1.
            parse_errors: what ``parse`` raises when the reply is at fault.
            explain: let the second try see the first reply and what is wrong with it.

        Raises:
            ChatError: no readable reply; ``parse`` or ``empty`` after the last try, or see :meth:`complete`.
            BudgetError: the job has no call or no money left.
        """
        self._stats.asked()
        try:
            with self._noting_refusals():
                asked = await self._try_each(
                    list(messages), parse, temperatures, parse_errors, explain,
                    seed=seed, schema=schema, max_tokens=max_tokens, stop=stop, extra_body=extra_body,
                )  # fmt: skip
        except ChatError as error:
            self._give_up(error)
            raise
        self._stats.solved()
        return asked

    @property
    def refused(self) -> str | None:
        """Why nothing that was asked so far could be had, where asking again would end the same; None otherwise."""
        return None if self._solved or self._refusal is None else f"{self.config.section}: {self._refusal}"

    async def check(self, questions: Sequence[Question] = ()) -> None:
        """Ask every address whether it is there, lets us in and serves the model; for the start of a run.

        A replay asks nobody.

        Args:
            questions: what the run will ask, so that a parameter which an address refuses is known now; calls that count and
                cost as any other, whose replies are not kept. Without any, an address that lists the model is not asked.

        Raises:
            ConfigError: one line that names the address and what is wrong. An address that knows the model and is only busy
                or broken is no error: patience with that is the run's business.
        """
        if self.config.replay is None:
            await asyncio.gather(*[self._check_endpoint(endpoint, questions) for endpoint in self._pool.endpoints])

    async def reach(self) -> None:
        """Ask every address for its models, which costs nothing: is it there, and does it let us in? A replay asks nobody.

        Raises:
            ConfigError: one line that names the address and what is wrong.
        """

        async def one(endpoint: Endpoint) -> None:
            try:
                await self._listed_models(endpoint)
            except CallError as failure:
                raise ConfigError(self._explain(endpoint, failure, None)) from None

        if self.config.replay is None:
            await asyncio.gather(*[one(endpoint) for endpoint in self._pool.endpoints])

    @property
    def takes_schema(self) -> list[bool | None]:
        """Of every address, whether it takes a JSON schema; None until known. May be set to what another process found."""
        return [endpoint.structured for endpoint in self._pool.endpoints]

    @takes_schema.setter
    def takes_schema(self, found: Sequence[bool | None]) -> None:
        for endpoint, takes in zip(self._pool.endpoints, found, strict=True):
            endpoint.structured = takes

    async def _try_each(
        self,
        messages: list[Message],
        parse: Callable[[str], T],
        temperatures: Sequence[float],
        parse_errors: tuple[type[Exception], ...],
        explain: bool,
        *,
        seed: int | None,
        **how: Any,
    ) -> Asked[T]:
        last_try, complaint = len(temperatures), list[Message]()
        unusable: tuple[type[Exception], ...] = (ChatError, *parse_errors)
        for number, temperature in enumerate(temperatures, start=1):
            tried_seed = None if seed is None else seed + number - 1
            completion = await self._complete(
                self.question(messages + complaint, temperature=temperature, seed=tried_seed, attempt=number - 1, **how)
            )
            try:
                if not completion.text.strip():
                    raise ChatError("empty", "the reply is empty")
                return Asked(parse(completion.text), completion, number)
            except unusable as error:
                ended = f" (finish_reason {one_line(completion.odd_end, 40)})" if completion.odd_end else ""
                failure = ChatError(getattr(error, "kind", "parse"), one_line(str(error)) + ended)
            self._stats.unreadable()
            if completion.cut:  # as the next one would be
                cut = f"{failure}: it was cut at {self._limit(how.get('max_tokens'), how.get('extra_body'))}"
                raise ChatError(failure.kind, cut, permanent=True)
            if number == last_try:
                raise ChatError(failure.kind, f"{failure} (try {number} of {last_try})")
            complaint = _complaint(completion.text, str(failure)) if explain and number == 1 else []
            self._repeat(failure.kind, str(failure))
        raise AssertionError("unreachable: there is at least one temperature")

    async def _remembered(self, question: Question, cache: Cache) -> Completion:
        """The cached reply; or a new one, for which everybody who asks the same in the meantime waits too."""
        key = question.key
        try:
            found = await cache.get(key, failures=self.config.replay is not None)
        except DiskError as error:
            if self.config.replay is not None:
                raise
            self._cache_failed(error)
            found = None
        if found is not None:
            self._stats.hit()
            return found
        if self.config.replay is not None:
            raise UserError(
                f"{self.config.section}.replay: {self.config.replay} holds no reply to a question of this run (try "
                f"{question.attempt + 1}, key {key[:12]}); its data, seeds or settings differ from the recorded run's"
            )
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = asyncio.create_task(self._kept(question, key, cache))
            running.add_done_callback(lambda task: self._forget(key, task))
            return await asyncio.shield(running)
        completion = await asyncio.shield(running)
        self._stats.hit()
        return replace(completion, cached=True)

    async def _kept(self, question: Question, key: str, cache: Cache) -> Completion:
        try:
            completion = await self._patiently(question)
        except ChatError as failure:
            await self._keep(cache, key, failure)
            raise
        return await self._keep(cache, key, completion) or completion

    async def _keep(self, cache: Cache, key: str, outcome: Completion | ChatError) -> Completion | None:
        try:
            return await cache.put(key, outcome)
        except DiskError as error:  # an alarm: what was answered and paid for counts, kept or not
            self._cache_failed(error)
            return None

    def _cache_failed(self, error: DiskError) -> None:
        self._stats.cache_failed()
        if "cache" not in self._told:
            self._told.add("cache")
            _log.warning("%s; the run goes on without it (further failures are only counted)", error)

    def _forget(self, key: str, task: asyncio.Task[Completion]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, also when whoever asked is gone

    async def _patiently(self, question: Question) -> Completion:
        """A reply; repeats the call while it fails in a way that may pass or another address may do better."""
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
            wait=lambda state: self._wait_s(state, avoid),
            retry=retry_if_exception(lambda error: isinstance(error, CallError) and self._may_heal(error, avoid)),
            before_sleep=self._before_sleep,
            reraise=True,
        )
        return await retrying(call)

    async def _anywhere(self, question: Question, avoid: set[Endpoint]) -> Completion:
        """One call at the best address; on failure that address is added to ``avoid``."""
        while (endpoint := self._pool.pick(avoid)) is None:
            await asyncio.sleep(min(self._pool.wait_s(), 1.0))
        endpoint.in_flight += 1
        try:
            completion = await self._call(endpoint, question)
        except CallError as failure:
            avoid.add(endpoint)
            self._pool.failed(endpoint, failure)
            raise
        finally:
            endpoint.in_flight -= 1
        self._pool.succeeded(endpoint)
        return completion

    async def _call(self, endpoint: Endpoint, question: Question) -> Completion:
        """One call, or two where the endpoint is found to refuse the schema."""
        structured = question.schema is not None and endpoint.structured is not False
        try:
            completion = await self._send(endpoint, question, structured)
        except CallError as failure:
            undecided = structured and endpoint.structured is None and self.config.structured == "auto"
            if not undecided or failure.status not in _SCHEMA_REFUSED:
                raise
            self._repeat("structured", str(failure))
            completion = await self._send(endpoint, question, structured=False)
            endpoint.structured = False
            return completion
        if structured:
            endpoint.structured = True
        return completion

    async def _send(self, endpoint: Endpoint, question: Question, structured: bool) -> Completion:
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

    async def _check_endpoint(self, endpoint: Endpoint, questions: Sequence[Question]) -> None:
        must = self.config.structured == "on"
        asked: Question | None = None
        listed = False
        try:
            listed = endpoint.model in await self._listed_models(endpoint)
            if not listed or must:
                # Not every endpoint lists its models, or all of their names. A real call decides.
                questions = questions or [self.question(_PROBE, temperature=0.0, schema=_PROBE_SCHEMA if must else None)]
            for asked in questions:
                completion = await self._first(endpoint, asked)
                if completion.cut and "}" not in completion.text:
                    limit = self._limit(asked.max_tokens, asked.extra_body)
                    raise ConfigError(f"{self._at(endpoint)}: the first reply was cut at {limit}; allow it more")
                required = asked.schema.get("required", []) if asked.schema is not None else []
                if must and not _is_object_with(completion.text, required):
                    raise self._lacks_schema(endpoint, f"it said: {one_line(completion.text, 60)}")
        except BudgetError:
            return  # whether the run needs a further call, and what it keeps without, is for the run to say
        except CallError as failure:
            if not (listed and failure.transient) or failure.kind == "parse":
                raise ConfigError(self._explain(endpoint, failure, asked)) from None
            _log.warning("%s: no first answer: %s", self._at(endpoint), failure)

    async def _first(self, endpoint: Endpoint, question: Question) -> Completion:
        """A reply to a first question; as patient as with any other.

        Finds out, too, whether the endpoint fails because of the schema, whatever it says to it.
        """
        must = self.config.structured == "on"
        for retry in range(1 + self.config.connection_retries):
            try:
                return await self._call(endpoint, question)
            except CallError as error:
                failure = error
            suspect = (
                failure.transient and failure.status not in TRANSIENT_STATUSES
            )  # an address that asks for a pause gets it
            if question.schema is not None and endpoint.structured is None and suspect and not must:
                try:
                    completion = await self._send(endpoint, question, structured=False)
                except CallError:
                    pass
                else:
                    try:  # once more, so that one bad moment does not decide for the whole run
                        return await self._call(endpoint, question)
                    except CallError:
                        self._repeat("structured", str(failure))
                        endpoint.structured = False
                        return completion
            if not failure.transient:
                break
            if retry < self.config.connection_retries:
                self._repeat(failure.cause, str(failure))
                bound_s = min(self.config.backoff_initial_s * 2.0 ** min(retry, 30), self.config.backoff_max_s)
                asked_for_s = min(failure.retry_after_s, self.config.retry_after_max_s)
                await asyncio.sleep(max(random.uniform(0, bound_s), asked_for_s))
        if must and failure.status in _SCHEMA_REFUSED:
            raise self._lacks_schema(endpoint, f"{failure}; {_sent(endpoint, question)}")
        raise failure

    def _lacks_schema(self, endpoint: Endpoint, why: str) -> ConfigError:
        lacks = f"{endpoint.base_url} does not hold {endpoint.model} to a JSON schema"
        return ConfigError(f"{self.config.section}.structured=on: {lacks} ({why}); set it to auto")

    def _limit(self, max_tokens: int | None, extra_body: Mapping[str, Any] | None) -> str:
        """The setting that limits a reply."""
        extra = {**self.config.extra_body, **(extra_body or {})}
        named = next((name for name in ("max_completion_tokens", "max_tokens") if extra.get(name) is not None), None)
        if named is not None:
            return f"{self.config.section}.extra_body.{named}={extra[named]}"
        return f"{self.config.section}.max_tokens={max_tokens if max_tokens is not None else self.config.max_tokens}"

    async def _listed_models(self, endpoint: Endpoint) -> list[str]:
        """Ids under ``/models``; empty if the endpoint does not say."""
        try:
            body = await self._transport.get(endpoint.url("models"), endpoint.key, endpoint.headers)
        except CallError as failure:
            if failure.status is None or failure.status in (401, 403):
                raise
            return []
        return read_model_ids(body)

    def _may_heal(self, failure: CallError, avoid: set[Endpoint]) -> bool:
        return failure.transient or (failure.status in REFUSALS and self._pool.has_other(avoid))

    def _wait_s(self, state: RetryCallState, avoid: set[Endpoint]) -> float:
        if self._pool.has_other(avoid):
            return 0.0
        backoff_s = wait_random_exponential(multiplier=self.config.backoff_initial_s, max=self.config.backoff_max_s)(state)
        return max(backoff_s, min(_failure(state).retry_after_s, self.config.retry_after_max_s))

    def _before_sleep(self, state: RetryCallState) -> None:
        failure = _failure(state)
        self._repeat(failure.cause, str(failure))

    def _repeat(self, cause: str, reason: str) -> None:
        self._stats.repeated(cause)
        _log.info("%s %s: asking again: %s", self.config.section, self.config.model, reason)

    def _give_up(self, failure: ChatError) -> None:
        """Count a question that stays without an answer; the first of each kind is told to whoever watches the run."""
        self._stats.failed(failure.kind)
        if failure.kind not in self._told:
            self._told.add(failure.kind)
            section = self.config.section
            _log.warning("%s: no answer: %s (others of kind %s are only counted)", section, failure, failure.kind)

    def _at(self, endpoint: Endpoint) -> str:
        return f"{self.config.section}.base_url {endpoint.base_url}"

    def _explain(self, endpoint: Endpoint, failure: CallError, asked: Question | None) -> str:
        section = self.config.section
        if failure.status in (401, 403):
            held = " and ".join(endpoint.secrets)
            cure = f"check the key in {held}" if held else f"set {section}.api_key_env"
            if proxy_for(endpoint.base_url) is not None:  # either of the two may be who refuses
                cure += ", or let the address past the proxy (no_proxy)"
        elif failure.status in (402, 429) and failure.permanent:
            cure = "the account behind the key has nothing left: top it up, or give another key or address"
        elif failure.status in (400, 422) and asked is not None:
            cure = f"{_sent(endpoint, asked)}; change these ({section}.extra_body={{FIELD: null}} leaves one out)"
        elif failure.status is not None or failure.kind == "parse":  # somebody is there
            cure = f"check {section}.model ({endpoint.model}) and the address, which often ends in /v1"
        else:
            cure = f"start the {section} or correct the address"
        return f"{self._at(endpoint)}: {failure}; {cure}"


def open_cache(config: EndpointConfig, recording: Mapping[str, Any]) -> ReplyFile | None:
    """The file of ``cache`` or ``replay``, if the config names one.

    Raises:
        ConfigError: it cannot be used, or the replay was recorded with other settings.
    """
    if config.replay is not None:
        replayed = ReplyFile(config.replay, f"{config.section}.replay", replay=True)
        replayed.require(recording)
        return replayed
    if config.cache is not None:
        cache = ReplyFile(config.cache, f"{config.section}.cache")
        cache.record(recording)
        return cache
    return None


def _sent(endpoint: Endpoint, question: Question) -> str:
    """What a question was sent with, beside its words."""
    fields = question.payload(endpoint.model, structured=False)
    return "it was sent " + ", ".join(f"{name}={one_line(str(fields[name]), 60)}" for name in fields if name != "messages")


def _complaint(reply: str, reason: str) -> list[Message]:
    """What the second try adds to the conversation."""
    shown = reply[:_SHOWN_REPLY_CHARS].strip() or "(nothing)"
    request = f"This reply cannot be used: {reason}. Answer the question again, in exactly the form it asks for."
    # A reply may quote whoever it is about, and the reason may quote the reply.
    return [
        {"role": "assistant", "content": without_control_tokens(shown)},
        {"role": "user", "content": without_control_tokens(request)},
    ]


def _is_object_with(text: str, keys: Iterable[str]) -> bool:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and all(key in record for key in keys)


def _failure(state: RetryCallState) -> CallError:
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, CallError)
    return failure
