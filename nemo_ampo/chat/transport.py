"""Exchanges with a chat API: one request, one body without secrets, or :class:`CallError`."""

from __future__ import annotations

import asyncio
import email.utils
import json
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import TYPE_CHECKING, Any

import orjson

from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.proxies import passwords, proxy_for, through
from nemo_ampo.chat.secrets import Secrets
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    from nemo_ampo.chat.wire import Wire

TRANSIENT_STATUSES = (408, 409, 425, 429)
"""Statuses below 500 after which the same call may succeed."""


_NONE: Mapping[str, str] = {}

_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?", re.ASCII)


class Transport:
    """A pool of connections. Belongs to the event loop that first awaits it; close it there.

    Args:
        timeout_s: from the first byte sent to the last received, seconds.
        secrets: texts that no error message may show.
        ca_file: PEM file of authorities to believe beside the system's; None for none.
    """

    def __init__(self, timeout_s: float, secrets: Iterable[str] = (), ca_file: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._texts = list(secrets)
        self._secrets = Secrets(self._texts)
        self._ca_file = ca_file
        self._proxies: dict[str, str | None] = {}
        self._wires: dict[tuple[str, frozenset[tuple[str, str]], str | None], Wire] = {}

    async def post(self, url: str, key: str, payload: Mapping[str, Any], headers: Mapping[str, str] = _NONE) -> str:
        """Body of the answer to a JSON request; see :meth:`get`."""
        return await self._exchange("POST", url, key, headers, _as_json(payload))

    async def get(self, url: str, key: str, headers: Mapping[str, str] = _NONE) -> str:
        """Body of the answer to a request with these further headers.

        Raises:
            CallError: of kind ``timeout``, ``connection``, ``status`` or, for a body that is too long or packed, ``parse``.
        """
        return await self._exchange("GET", url, key, headers)

    async def aclose(self) -> None:
        """Close the connections."""
        for wire in self._wires.values():
            await wire.aclose()

    def redact(self, text: str) -> str:
        """``text`` without secrets, see :mod:`nemo_ampo.chat.secrets`."""
        return self._secrets.redact(text)

    async def _exchange(
        self, method: str, url: str, key: str, headers: Mapping[str, str], content: bytes | None = None
    ) -> str:
        from nemo_ampo.chat.wire import NoConnectionError, UnusableBodyError  # Only needed to talk.

        try:
            wire = self._wire(key, headers, self._proxy(url))
            async with asyncio.timeout(self._timeout_s):
                status, answered, text = await wire.send(method, url, content)
            body = self.redact(text)
        except TimeoutError:
            said = f"no answer within {self._timeout_s:g} s{through(url)}"
            failure = CallError("timeout", said, cause="timeout", transient=True)
        except UnusableBodyError as error:
            said = f"the answer is {one_line(self.redact(str(error)), 80)}{through(url)}"
            failure = CallError("parse", said, cause="body", transient=True)
        except NoConnectionError as error:
            said = f"no connection: {one_line(self.redact(str(error)))}{through(url)}"
            failure = CallError("connection", said, cause="connection", transient=True)
        else:
            if 200 <= status < 300:
                return body
            retry_after_s = read_retry_after(answered.get("Retry-After", ""), answered.get("Retry-After-Ms", ""))
            failure = _failure(status, body, retry_after_s, through(url))
        # Raised outside the handlers, so that the package's error, whose frames carry the key, is not its context.
        raise failure

    def _proxy(self, url: str) -> str | None:
        if url not in self._proxies:
            proxy = self._proxies[url] = proxy_for(url)
            if proxy is not None:
                self._texts += passwords(proxy)
                self._secrets = Secrets(self._texts)
        return self._proxies[url]

    def _wire(self, key: str, headers: Mapping[str, str], proxy: str | None) -> Wire:
        from nemo_ampo.chat.wire import Wire

        kind = (key, frozenset(headers.items()), proxy)
        if kind not in self._wires:
            self._wires[kind] = Wire(key, headers, proxy, self._ca_file)
        return self._wires[kind]


def _failure(status: int, body: str, retry_after_s: float, via: str) -> CallError:
    """What an answer without success means."""
    # A spent quota is told with the status of a full queue, but no wait will heal it; and a reply that broke off the schema
    # is told with the status of a bad request, but the next one may hold to it.
    spent = status == 429 and "insufficient_quota" in body
    unlucky = status == 400 and "json_validate_failed" in body
    return CallError(
        "status",
        f"status {status}{via}: {one_line(body) or 'no explanation'}",
        cause="rate_limit" if status == 429 else "server_error" if status >= 500 else "body" if unlucky else "refused",
        transient=(status in TRANSIENT_STATUSES or status >= 500 or unlucky) and not spent,
        status=status,
        retry_after_s=retry_after_s,
    )


def _as_json(payload: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(payload)
    except orjson.JSONEncodeError:  # a lone surrogate, which becomes a question mark, or a number of more than 64 bits
        return json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")


def read_retry_after(header: str, milliseconds: str = "") -> float:
    """Seconds to wait by the headers ``Retry-After``, seconds or a date, and ``Retry-After-Ms``; 0 if they say none."""
    for text, unit_s in ((milliseconds.strip(), 1e-3), (header.strip(), 1.0)):
        if _DECIMAL.fullmatch(text):
            return float(text) * unit_s
    try:
        until = email.utils.parsedate_to_datetime(header)
        if until.tzinfo is None:  # HTTP has no other time zone
            until = until.replace(tzinfo=UTC)
        return max(0.0, until.timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return 0.0
