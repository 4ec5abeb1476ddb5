"""HTTP to a chat API: one request, one body of bounded size, or :class:`CallError`.

The ``openai`` package makes the headers and the HTTP client (over aiohttp) of each key, once. A call goes to that HTTP
client directly: what the package does per call (its options model, headers anew, retries that know nothing of our limits)
takes as much processor time again, and a judge beside a training loop does not have more. Only this file knows the
package and its errors.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nemo_ampo.chat.completion import CallError, one_line

if TYPE_CHECKING:
    import httpx2

MAX_BODY_BYTES = 8 * 2**20
"""A longer answer is not read to its end."""

_KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn, and so vLLM, closes a silent connection: never send into a closing one."""

_UNSAID = ("OpenAI-Organization", "OpenAI-Project", "X-Stainless-")
"""Headers, by their beginning, that the package fills from the environment or about the machine: only what the
configuration says is sent, and every header costs time."""

TRANSIENT_STATUSES = (408, 409, 425, 429)
"""Statuses below 500 after which the same call may succeed."""


class Transport:
    """A pool of connections. Belongs to the event loop that first awaits it; close it there.

    Args:
        timeout_s: from the first byte sent to the last received, seconds.
        secrets: texts that no error message may show.
    """

    def __init__(self, timeout_s: float, secrets: tuple[str, ...]) -> None:
        self._timeout_s = timeout_s
        self._secrets = tuple(secret for secret in secrets if secret)
        self._lines: dict[tuple[str, str | None], _Line] = {}

    async def post(self, url: str, key: str, payload: Mapping[str, Any]) -> str:
        """Body of the answer to a JSON request; see :meth:`get` for errors."""
        body = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return await self._exchange("POST", url, key, body.encode("utf-8", "replace"))

    async def get(self, url: str, key: str) -> str:
        """Body of the answer.

        Raises:
            CallError: of kind ``timeout``, ``connection``, ``status`` or, for a body too long, ``parse``.
        """
        return await self._exchange("GET", url, key)

    async def aclose(self) -> None:
        """Close the connections."""
        for line in self._lines.values():
            await line.client.aclose()

    def redact(self, text: str) -> str:
        """``text`` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "[API key]")
        return text

    async def _exchange(self, method: str, url: str, key: str, content: bytes | None = None) -> str:
        import httpx2  # It takes half a second, and is only needed to talk.

        line = self._line(key, _proxy_for(url))
        # Not the client's own way to make one, which parses the address and merges the headers anew each time.
        request = httpx2.Request(method, _parsed(url), headers=line.headers, content=content)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await line.client.send(request, stream=True)
                body = self.redact(await _read(response))
        except TimeoutError:
            failure = CallError("timeout", f"no answer within {self._timeout_s:g} s", cause="timeout", transient=True)
        except (httpx2.RequestError, _UnusableBodyError) as error:
            failure = self._no_answer(error)
        else:
            if response.is_success:
                return body
            failure = self._failure(response.status_code, body, response.headers.get("Retry-After", ""))
        # Raised outside the handlers, so that the library's error, whose frames carry the key, is not its context.
        raise failure

    def _no_answer(self, reason: BaseException) -> CallError:
        if isinstance(reason, _UnusableBodyError):
            return CallError("parse", f"the answer is {reason}", cause="body", transient=True)
        words = one_line(self.redact(str(reason) or type(reason).__name__))
        return CallError("connection", f"no connection: {words}", cause="connection", transient=True)

    def _failure(self, status: int, body: str, retry_after: str) -> CallError:
        # A spent quota is told with the status of a full queue, but no wait will heal it.
        spent = status == 429 and "insufficient_quota" in body
        return CallError(
            "status",
            f"status {status}: {one_line(body) or 'no explanation'}",
            cause="rate_limit" if status == 429 else "server_error" if status >= 500 else "refused",
            transient=(status in TRANSIENT_STATUSES or status >= 500) and not spent,
            status=status,
            retry_after_s=read_retry_after(retry_after),
        )

    def _line(self, key: str, proxy: str | None) -> _Line:
        if (key, proxy) not in self._lines:
            self._lines[key, proxy] = _open_line(key, proxy)
        return self._lines[key, proxy]


@dataclass(frozen=True)
class _Line:
    """An HTTP client with its connections, and the headers of every request."""

    client: httpx2.AsyncClient
    headers: httpx2.Headers


def _open_line(key: str, proxy: str | None) -> _Line:
    import httpx2
    import openai

    client = openai.DefaultAioHttpClient(
        # How many connections there may be is the limiter's business.
        limits=httpx2.Limits(max_connections=10**5, keepalive_expiry=_KEEP_ALIVE_S),
        timeout=None,
        proxy=proxy,
        # Else the library would also read passwords from .netrc.
        trust_env=False,
        follow_redirects=False,
    )
    nowhere = "http://every.request.has.its.own.address"
    package = openai.AsyncOpenAI(api_key=key or "none", base_url=nowhere, http_client=client)
    made = {**package.default_headers, **(package.auth_headers if key else {})}
    said = {name: text for name, text in made.items() if isinstance(text, str) and not name.startswith(_UNSAID)}
    headers = httpx2.Headers(client.headers)
    headers.update({**said, "Accept-Encoding": "identity"})  # Answers are short; a few packed bytes may be gigabytes.
    return _Line(client, headers)


@functools.cache
def _parsed(url: str) -> httpx2.URL:
    import httpx2

    return httpx2.URL(url)


class _UnusableBodyError(Exception):
    """The body is not read to its end; the message says what it is."""


async def _read(response: httpx2.Response) -> str:
    """The body as text. Always UTF-8, whatever a header claims, as JSON is; what is no UTF-8 becomes a sign for it.

    Raises:
        _UnusableBodyError: it is too long, or packed although that was not asked for.
    """
    body = bytearray()
    try:
        packed = response.headers.get("Content-Encoding", "identity")
        if packed.lower() != "identity":
            raise _UnusableBodyError(f"packed ({one_line(packed, 20)}), which was not asked for")
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise _UnusableBodyError(f"longer than {MAX_BODY_BYTES // 2**20} MiB")
    finally:
        await response.aclose()
    return body.decode("utf-8", "replace")


@functools.cache
def _proxy_for(url: str) -> str | None:
    """The environment's proxy for ``url``. Not left to the library, which then also reads passwords from .netrc."""
    address = urlsplit(url)
    if urllib.request.proxy_bypass(address.hostname or ""):
        return None
    return urllib.request.getproxies().get(address.scheme)


def read_retry_after(header: str) -> float:
    """Seconds to wait by a ``Retry-After`` header, given as seconds or as a date; 0 if there is none."""
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
