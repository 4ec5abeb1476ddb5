"""HTTP to a chat API: one request, one body of bounded size, or :class:`CallError`.

A request has the headers that the ``openai`` package would send, made by its client once for each key. What the package does
per call (an options model, headers anew, two HTTP layers, retries that know nothing of our limits) takes several times the
processor time of the exchange itself, and a judge beside a training loop does not have it: bodies are handed to pyreqwest
directly, which talks in a thread of its own, beside Python's. Only this file knows either package.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, timedelta
from typing import TYPE_CHECKING, Any

import orjson

from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.proxies import passwords, proxy_for, through
from nemo_ampo.chat.secrets import Secrets
from nemo_ampo.compat.pyreqwest import import_here, rest_before_exit
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    from pyreqwest.client import Client
    from pyreqwest.exceptions import PyreqwestError
    from pyreqwest.response import Response

MAX_BODY_BYTES = 8 * 2**20
"""A longer answer is not read to its end."""

_KEEP_ALIVE = timedelta(seconds=4)
"""Below the 5 s after which uvicorn, and so vLLM, closes a silent connection: never send into a closing one."""

_UNSAID = ("OpenAI-Organization", "OpenAI-Project", "X-Stainless-")
"""Headers, by their beginning, that the package fills from the environment or about the machine: only what the
configuration says is sent, and every header costs time."""

TRANSIENT_STATUSES = (408, 409, 425, 429)
"""Statuses below 500 after which the same call may succeed."""


_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?", re.ASCII)


class Transport:
    """A pool of connections. Belongs to the event loop that first awaits it; close it there.

    Args:
        timeout_s: from the first byte sent to the last received, seconds.
        secrets: texts that no error message may show.
    """

    def __init__(self, timeout_s: float, secrets: tuple[str, ...]) -> None:
        import_here()
        self._timeout_s = timeout_s
        self._texts = list(secrets)
        self._secrets = Secrets(self._texts)
        self._proxies: dict[str, str | None] = {}
        self._clients: dict[tuple[str, str | None], Client] = {}

    async def post(self, url: str, key: str, payload: Mapping[str, Any]) -> str:
        """Body of the answer to a JSON request; see :meth:`get` for errors."""
        return await self._exchange("POST", url, key, _as_json(payload))

    async def get(self, url: str, key: str) -> str:
        """Body of the answer.

        Raises:
            CallError: of kind ``timeout``, ``connection``, ``status`` or, for a body too long, ``parse``.
        """
        return await self._exchange("GET", url, key)

    async def aclose(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()

    def redact(self, text: str) -> str:
        """``text`` without secrets, see :mod:`nemo_ampo.chat.secrets`."""
        return self._secrets.redact(text)

    async def _exchange(self, method: str, url: str, key: str, content: bytes | None = None) -> str:
        from pyreqwest.exceptions import PyreqwestError  # Only needed to talk.

        proxy = self._proxy(url)
        try:
            request = self._client(key, proxy).request(method, url)
            if content is not None:
                request.body_bytes(content)
            async with request.build_streamed() as response:
                status = response.status
                retry_after = response.get_header("Retry-After"), response.get_header("Retry-After-Ms")
                body = self.redact(await _read(response))
        except TimeoutError:
            said = f"no answer within {self._timeout_s:g} s{through(url)}"
            failure = CallError("timeout", said, cause="timeout", transient=True)
        except _UnusableBodyError as error:
            said = f"the answer is {one_line(self.redact(str(error)), 80)}{through(url)}"
            failure = CallError("parse", said, cause="body", transient=True)
        except (PyreqwestError, ValueError) as error:  # the latter for an address that is none
            said = f"{self._no_connection(error)}{through(url)}"
            failure = CallError("connection", said, cause="connection", transient=True)
        else:
            if 200 <= status < 300:
                return body
            failure = _failure(status, body, read_retry_after(*[header or "" for header in retry_after]), through(url))
        # Raised outside the handlers, so that the library's error, whose frames carry the key, is not its context.
        raise failure

    def _no_connection(self, error: PyreqwestError | ValueError) -> str:
        """The innermost cause, which names what the system said."""
        causes = (getattr(error, "details", None) or {}).get("causes") or [{"message": str(error)}]
        return f"no connection: {one_line(self.redact(causes[-1]['message']))}"

    def _proxy(self, url: str) -> str | None:
        if url not in self._proxies:
            proxy = self._proxies[url] = proxy_for(url)
            if proxy is not None:
                self._texts += passwords(proxy)
                self._secrets = Secrets(self._texts)
        return self._proxies[url]

    def _client(self, key: str, proxy: str | None) -> Client:
        if (key, proxy) not in self._clients:
            self._clients[key, proxy] = _open_client(key, proxy, self._timeout_s)
        return self._clients[key, proxy]


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


def _open_client(key: str, proxy: str | None, timeout_s: float) -> Client:
    """Connections, and the headers of every request. How many connections there may be is the limiter's business."""
    from pyreqwest.client import ClientBuilder
    from pyreqwest.proxy import ProxyBuilder

    rest_before_exit()
    builder = ClientBuilder().default_headers(_headers(key)).timeout(timedelta(seconds=timeout_s))
    builder = builder.pool_idle_timeout(_KEEP_ALIVE).follow_redirects(False)
    builder = builder.gzip(False).brotli(False).zstd(False).deflate(False)
    return (builder.no_proxy() if proxy is None else builder.proxy(ProxyBuilder.all(proxy))).build()


def _headers(key: str) -> dict[str, str]:
    import openai

    # It is never to talk, so it needs no certificates, which would take a tenth of a second to load.
    mute = openai.DefaultHttpxClient(verify=False, trust_env=False)
    with openai.OpenAI(api_key=key or "none", base_url="http://of.each.request", http_client=mute) as package:
        made = {**package.default_headers, **(package.auth_headers if key else {})}
    said = {name: text for name, text in made.items() if isinstance(text, str) and not name.startswith(_UNSAID)}
    return {**said, "Accept-Encoding": "identity"}  # Answers are short; a few packed bytes may be gigabytes.


def _as_json(payload: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(payload)
    except orjson.JSONEncodeError:  # a lone surrogate, which becomes a question mark, or a number of more than 64 bits
        return json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")


class _UnusableBodyError(Exception):
    """The body is not read to its end; the message says what it is."""


async def _read(response: Response) -> str:
    """The body as text. Always UTF-8, whatever a header claims, as JSON is; what is no UTF-8 becomes a sign for it.

    Raises:
        _UnusableBodyError: it is too long, or packed although that was not asked for.
    """
    packed = response.get_header("Content-Encoding") or "identity"
    if packed.lower() != "identity":
        raise _UnusableBodyError(f"packed, which was not asked for ({packed})")
    body = bytearray()
    while chunk := await response.body_reader.read_chunk():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _UnusableBodyError(f"longer than {MAX_BODY_BYTES // 2**20} MiB")
    return body.decode("utf-8", "replace").removeprefix("\ufeff")


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
