"""HTTP to a chat API: one request, one body of bounded size, or :class:`CallError`.

A request has the headers that the ``openai`` package would send, made by its client once for each key. What the package does
per call (an options model, headers anew, two HTTP layers, retries that know nothing of our limits) takes several times the
processor time of the exchange itself, and a judge beside a training loop does not have it: bodies are handed to aiohttp
directly. Only this file knows either package.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import time
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nemo_ampo.chat.completion import CallError, one_line

if TYPE_CHECKING:
    import aiohttp

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
        self._sessions: dict[tuple[str, str | None], aiohttp.ClientSession] = {}

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
        for session in self._sessions.values():
            await session.close()

    def redact(self, text: str) -> str:
        """``text`` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "[API key]")
        return text

    async def _exchange(self, method: str, url: str, key: str, content: bytes | None = None) -> str:
        import aiohttp  # It takes a third of a second, and is only needed to talk.

        session = self._session(key, _proxy_for(url))
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                session.request(method, url, data=content, allow_redirects=False) as response,
            ):
                body = self.redact(await _read(response))
        except TimeoutError:
            failure = CallError("timeout", f"no answer within {self._timeout_s:g} s", cause="timeout", transient=True)
        except (aiohttp.ClientError, OSError, _UnusableBodyError) as error:
            failure = self._no_answer(error)
        else:
            if 200 <= response.status < 300:
                return body
            failure = self._failure(response.status, body, response.headers.get("Retry-After", ""))
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

    def _session(self, key: str, proxy: str | None) -> aiohttp.ClientSession:
        if (key, proxy) not in self._sessions:
            self._sessions[key, proxy] = _open_session(key, proxy)
        return self._sessions[key, proxy]


def _open_session(key: str, proxy: str | None) -> aiohttp.ClientSession:
    """Connections, and the headers of every request."""
    import aiohttp

    return aiohttp.ClientSession(
        # How many connections there may be is the limiter's business.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        headers=_headers(key),
        timeout=aiohttp.ClientTimeout(),  # None: ours is around the whole exchange.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        proxy=proxy,
        # Else the library would also read passwords from .netrc.
        trust_env=False,
    )


def _headers(key: str) -> dict[str, str]:
    import openai

    with openai.OpenAI(api_key=key or "none", base_url="http://every.request.has.its.own.address") as package:
        made = {**package.default_headers, **(package.auth_headers if key else {})}
    said = {name: text for name, text in made.items() if isinstance(text, str) and not name.startswith(_UNSAID)}
    return {**said, "Accept-Encoding": "identity"}  # Answers are short; a few packed bytes may be gigabytes.


class _UnusableBodyError(Exception):
    """The body is not read to its end; the message says what it is."""


async def _read(response: aiohttp.ClientResponse) -> str:
    """The body as text. Always UTF-8, whatever a header claims, as JSON is; what is no UTF-8 becomes a sign for it.

    Raises:
        _UnusableBodyError: it is too long, or packed although that was not asked for.
    """
    packed = response.headers.get("Content-Encoding", "identity")
    if packed.lower() != "identity":
        raise _UnusableBodyError(f"packed ({one_line(packed, 20)}), which was not asked for")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _UnusableBodyError(f"longer than {MAX_BODY_BYTES // 2**20} MiB")
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
