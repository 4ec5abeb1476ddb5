"""The judge: one dialogue, one verdict.

The patience is :class:`~nemo_ampo.chat.client.ChatClient`'s. A reply that cannot be read as a verdict is asked for again, at
the temperatures of ``JudgeConfig.temperatures``: the first tries are greedy, later ones sample, since a greedy model
repeats its mistake (reference behaviour: 0, 0, 1, 1, 1). When patience ends, :class:`JudgeError`.
"""

from __future__ import annotations

import asyncio
import hashlib
from types import TracebackType
from typing import Any

from nemo_ampo.chat.cache import Cache
from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.limiter import Limiter
from nemo_ampo.errors import ChatError, JudgeError
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.judge.verdict import VERDICT_SCHEMA, parse_verdict
from nemo_ampo.prompts import (
    PromptTemplate,
    harmless_request,
    load_prompt,
    render_judge_prompt,
    require_judge_placeholders,
)
from nemo_ampo.types import JudgeRequest, Verdict

QUESTIONS_PER_SLOT = 4
"""Of a batch, so many questions for each call that may be in flight are written and asked at a time. Writing them all in one
go would hold up the calls under way; the surplus keeps the slots busy while some questions wait for their repetition."""

_FIRST_REQUEST = JudgeRequest('Turn 0: Ada said: "Good morning, Ben."', "Ada", "Ben", "greet Ben", "be left in peace")
"""What the judge is asked at the start of a run, to learn whether it answers at all."""


class Judge:
    """Scores dialogues. Belongs to the event loop that first awaits it; close it there.

    Args:
        config: where the judge is and how it is asked.
        limiter, cache: shared with the other processes of the job; of its own otherwise.

    Raises:
        ConfigError: on construction, if the prompt or the key's environment variable is missing, or a cache or replay
            cannot be used.
    """

    def __init__(self, config: JudgeConfig, *, limiter: Limiter | None = None, cache: Cache | None = None) -> None:
        self.config = config
        self._template = load_prompt(config.prompt)
        require_judge_placeholders(self._template)
        self._places = asyncio.Semaphore(QUESTIONS_PER_SLOT * config.max_concurrency)
        self._chat = ChatClient(config, limiter=limiter, cache=cache, recording=recording_of(config, self._template))

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
        await self._chat.aclose()

    @property
    def stats(self) -> JudgeStats:
        """Counts since construction; may be read from any thread."""
        return JudgeStats.of([self._chat.stats])

    async def score(self, request: JudgeRequest) -> Verdict:
        """Goal achievement of both speakers.

        Raises:
            JudgeError: if no usable verdict came; ``kind`` is ``parse`` (nothing readable), ``empty`` (nothing
                said), ``timeout``, ``connection`` or ``status``.
            BudgetError: the job has no call or no money left.
            UserError: a replay holds no outcome of this question.
        """
        async with self._places:
            prompt = render_judge_prompt(self._template, harmless_request(request))
            question: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
            try:
                asked = await self._chat.ask(
                    question,
                    parse_verdict,
                    temperatures=self.config.temperatures,
                    schema=VERDICT_SCHEMA,
                    seed=self.config.seed,
                    parse_errors=(JudgeError,),
                    explain=self.config.explain_parse_error,
                )
            except ChatError as error:
                failure = JudgeError(error.kind, str(error), permanent=error.permanent)
            else:
                return asked.value
        raise failure

    async def check(self, *, first_call: bool = True) -> None:
        """Ask the endpoint whether it is there, lets us in and serves the model, and then for a first verdict at each
        temperature of the schedule, with everything else the run will send too; for the start of a run.

        Args:
            first_call: ask for these verdicts; otherwise only where the model is not listed.

        Raises:
            UserError: one line that names ``base_url`` and what is wrong.
        """
        if not first_call:
            await self._chat.check()
            return
        prompt = render_judge_prompt(self._template, _FIRST_REQUEST)
        await self._chat.check(
            [
                self._chat.question(
                    [{"role": "user", "content": prompt}],
                    temperature=temperature,
                    seed=self.config.seed,
                    schema=VERDICT_SCHEMA,
                )
                for temperature in dict.fromkeys(self.config.temperatures)
            ]
        )

    async def reach(self) -> None:
        """See :meth:`nemo_ampo.chat.client.ChatClient.reach`."""
        await self._chat.reach()

    @property
    def refused(self) -> str | None:
        """See :attr:`nemo_ampo.chat.client.ChatClient.refused`."""
        return self._chat.refused

    @property
    def takes_schema(self) -> list[bool | None]:
        """See :attr:`nemo_ampo.chat.client.ChatClient.takes_schema`."""
        return self._chat.takes_schema

    @takes_schema.setter
    def takes_schema(self, found: list[bool | None]) -> None:
        self._chat.takes_schema = found


def recording_of(config: JudgeConfig, template: PromptTemplate) -> dict[str, Any]:
    """The settings that decide what the judge is asked; a replay needs the same."""
    names = ("model", "max_tokens", "temperatures", "seed", "explain_parse_error", "extra_body")
    settings = {f"judge.{name}": getattr(config, name) for name in names}
    settings["judge.structured"] = "off" if config.structured == "off" else "auto or on"
    settings["judge.prompt"] = hashlib.sha256(template.text.encode("utf-8")).hexdigest()
    return settings


def verdict_protocol(config: JudgeConfig) -> dict[str, Any]:
    """Everything a verdict depends on but the dialogue: what is asked, and which models may answer.

    Raises:
        ConfigError: no such prompt.
    """
    asked = recording_of(config, load_prompt(config.prompt))
    return {name.removeprefix("judge."): value for name, value in asked.items()} | {"models": config.models}
