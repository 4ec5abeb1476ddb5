"""HTTP to a chat API: one request, one body of bounded size, or :class:`CallError`.

aiohttp instead of an SDK: a call takes about a fifth of its processor time, which a judge beside a training loop
does not have, and the body can be read up to a limit. Only this file knows its errors.
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
        self._session: aiohttp.ClientSession | None = None

    async def post(self, url: str, key: str, payload: Mapping[str, Any]) -> str:
        """Body of the answer to a JSON request; see :meth:`get` for errors."""
        return await self._exchange("POST", url, key, json.dumps(payload).encode("utf-8"))

    async def get(self, url: str, key: str) -> str:
        """Body of the answer.

        Raises:
            CallError: of kind ``timeout``, ``connection``, ``status`` or, for a body too long, ``parse``.
        """
        return await self._exchange("GET", url, key, None)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def redact(self, text: str) -> str:
        """``text`` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "[API key]")
        return text

    async def _exchange(self, method: str, url: str, key: str, data: bytes | None) -> str:
        import aiohttp  # Half a second, and only needed to talk.

        headers = {"Content-Type": "application/json"} if data is not None else {}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            async with asyncio.timeout(self._timeout_s):
                session = self._opened()
                async with session.request(
                    method, url, data=data, headers=headers, proxy=_proxy_for(url), allow_redirects=False
                ) as response:
                    body = await _read(response.content)
                    if response.status < 300 and body is not None:
                        return self.redact(body)
                    failure = self._failure(response.status, body, response.headers.get("Retry-After", ""))
        except TimeoutError:
            failure = CallError("timeout", f"no answer within {self._timeout_s:g} s", cause="timeout", transient=True)
        except (aiohttp.ClientError, OSError) as error:
            reason = one_line(self.redact(str(error) or type(error).__name__))
            failure = CallError("connection", f"no connection: {reason}", cause="connection", transient=True)
        # Raised outside the handlers, so that the library's error, whose frames carry the key, is not its context.
        raise failure

    def _failure(self, status: int, body: str | None, retry_after: str) -> CallError:
        if body is None:
            limit = f"{MAX_BODY_BYTES // 2**20} MiB"
            return CallError("parse", f"the answer is longer than {limit}", cause="body", transient=True)
        # A spent quota is told with the status of a full queue, but no wait will heal it.
        spent = status == 429 and "insufficient_quota" in body
        return CallError(
            "status",
            f"status {status}: {one_line(self.redact(body)) or 'no explanation'}",
            cause="rate_limit" if status == 429 else "server_error" if status >= 500 else "refused",
            transient=(status in TRANSIENT_STATUSES or status >= 500) and not spent,
            status=status,
            retry_after_s=read_retry_after(retry_after),
        )

    def _opened(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                # How many connections there may be is the limiter's business.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session


async def _read(content: aiohttp.StreamReader) -> str | None:
    """The whole body as text, or None if it is too long."""
    chunks, size = [], 0
    async for chunk in content.iter_any():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            return None
        chunks.append(chunk)
    return b"".join(chunks).decode("utf-8", "replace")


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
