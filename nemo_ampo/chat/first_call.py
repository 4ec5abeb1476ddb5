"""The first words with an address, at the start of a run: is somebody there, who lets us in and does what will be asked?"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterable, Sequence

from nemo_ampo.chat.calls import SCHEMA_REFUSED, Calls
from nemo_ampo.chat.completion import CallError, Completion
from nemo_ampo.chat.pool import Endpoint
from nemo_ampo.chat.proxies import proxy_for
from nemo_ampo.chat.question import Message, Question
from nemo_ampo.chat.transport import TRANSIENT_STATUSES
from nemo_ampo.errors import BudgetError, ConfigError
from nemo_ampo.text import one_line

_log = logging.getLogger(__name__)

PROBE: list[Message] = [{"role": "user", "content": 'Answer with this JSON object: {"answer": "yes"}'}]
PROBE_SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}


async def check_model(calls: Calls, endpoint: Endpoint, questions: Sequence[Question], probe: Question) -> None:
    """Does an address serve the model, and take what the run will ask?

    Args:
        calls: of the model.
        endpoint: one of its addresses.
        questions: what the run will ask; calls that count and cost as any other, whose replies are not kept.
        probe: asked instead of none, where the address does not list the model or a schema is a must.

    Raises:
        ConfigError: one line that names the address and what is wrong. An address that knows the model and is only busy
            or broken is no error: patience with that is the run's business.
    """
    must = calls.config.structured == "on"
    asked: Question | None = None
    listed = False
    try:
        listed = endpoint.model in await calls.listed_models(endpoint)
        if not listed or must:
            # Not every endpoint lists its models, or all of their names. A real call decides.
            questions = questions or [probe]
        for asked in questions:
            completion = await _first(calls, endpoint, asked)
            if completion.cut and "}" not in completion.text:
                limit = calls.limit_of(asked.max_tokens, asked.extra_body)
                raise ConfigError(f"{_at(calls, endpoint)}: the first reply was cut at {limit}; allow it more")
            required = asked.schema.get("required", []) if asked.schema is not None else []
            if must and not _is_object_with(completion.text, required):
                raise _lacks_schema(calls, endpoint, f"it said: {one_line(completion.text, 60)}")
    except BudgetError:
        return  # whether the run needs a further call, and what it keeps without, is for the run to say
    except CallError as failure:
        if not (listed and failure.transient) or failure.kind == "parse":
            raise ConfigError(_explain(calls, endpoint, failure, asked)) from None
        _log.warning("%s: no first answer: %s", _at(calls, endpoint), failure)


async def reach(calls: Calls, endpoint: Endpoint) -> None:
    """Ask an address for its models, which costs nothing: is it there, and does it let us in?

    Raises:
        ConfigError: one line that names the address and what is wrong.
    """
    try:
        await calls.listed_models(endpoint)
    except CallError as failure:
        raise ConfigError(_explain(calls, endpoint, failure, None)) from None


async def _first(calls: Calls, endpoint: Endpoint, question: Question) -> Completion:
    """A reply to a first question; as patient as with any other.

    Finds out, too, whether the endpoint fails because of the schema, whatever it says to it.
    """
    must = calls.config.structured == "on"
    for retry in range(1 + calls.config.connection_retries):
        try:
            return await calls.once(endpoint, question)
        except CallError as error:
            failure = error
        # An address that asks for a pause gets it.
        suspect = failure.transient and failure.status not in TRANSIENT_STATUSES
        if question.schema is not None and endpoint.structured is None and suspect and not must:
            try:
                completion = await calls.send(endpoint, question, structured=False)
            except CallError:
                pass
            else:
                try:  # once more, so that one bad moment does not decide for the whole run
                    return await calls.once(endpoint, question)
                except CallError:
                    calls.repeating("structured", str(failure))
                    endpoint.structured = False
                    return completion
        if not failure.transient:
            break
        if retry < calls.config.connection_retries:
            calls.repeating(failure.cause, str(failure))
            bound_s = min(calls.config.backoff_initial_s * 2.0 ** min(retry, 30), calls.config.backoff_max_s)
            asked_for_s = min(failure.retry_after_s, calls.config.retry_after_max_s)
            await asyncio.sleep(max(random.uniform(0, bound_s), asked_for_s))
    if must and failure.status in SCHEMA_REFUSED:
        raise _lacks_schema(calls, endpoint, f"{failure}; {_sent(endpoint, question)}")
    raise failure


def _lacks_schema(calls: Calls, endpoint: Endpoint, why: str) -> ConfigError:
    lacks = f"{endpoint.base_url} does not hold {endpoint.model} to a JSON schema"
    return ConfigError(f"{calls.config.section}.structured=on: {lacks} ({why}); set it to auto")


def _at(calls: Calls, endpoint: Endpoint) -> str:
    return f"{calls.config.section}.base_url {endpoint.base_url}"


def _explain(calls: Calls, endpoint: Endpoint, failure: CallError, asked: Question | None) -> str:
    section = calls.config.section
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
    return f"{_at(calls, endpoint)}: {failure}; {cure}"


def _sent(endpoint: Endpoint, question: Question) -> str:
    """What a question was sent with, beside its words."""
    fields = question.payload(endpoint.model, structured=False)
    return "it was sent " + ", ".join(f"{name}={one_line(str(fields[name]), 60)}" for name in fields if name != "messages")


def _is_object_with(text: str, keys: Iterable[str]) -> bool:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and all(key in record for key in keys)
