"""A chat API as an async client: one question, one answer that its reader can read.

Patience with calls that bring no reply is :mod:`nemo_ampo.chat.calls`'s. A reply that its reader cannot read is asked for
again at the next temperature of a schedule, the first time with the reader's complaint: :meth:`ChatClient.ask`. When
patience ends, :class:`ChatError`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

from nemo_ampo.chat.cache import Cache, ReplyFile
from nemo_ampo.chat.calls import Calls
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.first_call import PROBE, PROBE_SCHEMA, check_model, reach
from nemo_ampo.chat.limiter import Limiter, LocalLimiter
from nemo_ampo.chat.limits import Limits
from nemo_ampo.chat.question import Message, Question
from nemo_ampo.chat.stats import ChatStats, StatsRecorder
from nemo_ampo.errors import ChatError, DiskError, UserError
from nemo_ampo.speech import without_control_tokens
from nemo_ampo.text import one_line

_log = logging.getLogger(__name__)

T = TypeVar("T")


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
        self._stats = stats or StatsRecorder()
        self._calls = Calls(config, limiter or LocalLimiter(Limits.of(config)), self._stats)
        self._cache = cache or open_cache(config, recording or {})
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
        await self._calls.aclose()
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
        return await self._calls.reply(question) if self._cache is None else await self._remembered(question, self._cache)

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
            ConfigError: see :func:`~nemo_ampo.chat.first_call.check_model`.
        """
        schema = PROBE_SCHEMA if self.config.structured == "on" else None
        probe = self.question(PROBE, temperature=0.0, schema=schema)
        if self.config.replay is None:
            endpoints = self._calls.pool.endpoints
            await asyncio.gather(*[check_model(self._calls, endpoint, questions, probe) for endpoint in endpoints])

    async def reach(self) -> None:
        """Ask every address for its models, see :func:`~nemo_ampo.chat.first_call.reach`. A replay asks nobody."""
        if self.config.replay is None:
            await asyncio.gather(*[reach(self._calls, endpoint) for endpoint in self._calls.pool.endpoints])

    @property
    def takes_schema(self) -> list[bool | None]:
        """Of every address, whether it takes a JSON schema; None until known. May be set to what another process found."""
        return [endpoint.structured for endpoint in self._calls.pool.endpoints]

    @takes_schema.setter
    def takes_schema(self, found: Sequence[bool | None]) -> None:
        for endpoint, takes in zip(self._calls.pool.endpoints, found, strict=True):
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
                cut = f"{failure}: it was cut at {self._calls.limit_of(how.get('max_tokens'), how.get('extra_body'))}"
                raise ChatError(failure.kind, cut, permanent=True)
            if number == last_try:
                raise ChatError(failure.kind, f"{failure} (try {number} of {last_try})")
            complaint = _complaint(completion.text, str(failure)) if explain and number == 1 else []
            self._calls.repeating(failure.kind, str(failure))
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
            completion = await self._calls.reply(question)
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

    def _give_up(self, failure: ChatError) -> None:
        """Count a question that stays without an answer; the first of each kind is told to whoever watches the run."""
        self._stats.failed(failure.kind)
        if failure.kind not in self._told:
            self._told.add(failure.kind)
            section = self.config.section
            _log.warning("%s: no answer: %s (others of kind %s are only counted)", section, failure, failure.kind)


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


def _complaint(reply: str, reason: str) -> list[Message]:
    """What the second try adds to the conversation."""
    shown = reply[:_SHOWN_REPLY_CHARS].strip() or "(nothing)"
    request = f"This reply cannot be used: {reason}. Answer the question again, in exactly the form it asks for."
    # A reply may quote whoever it is about, and the reason may quote the reply.
    return [
        {"role": "assistant", "content": without_control_tokens(shown)},
        {"role": "user", "content": without_control_tokens(request)},
    ]
